"""The GPU's main job where time runs out: what was measured stays, and what hangs is told."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import main_job_gpu as job  # noqa: E402


@pytest.fixture()
def options(tmp_path):
    return Namespace(
        run=["gpu_tests"], out=tmp_path, smoke=True, seed=0, rows=Path("rows.json"),
        lambda0_to=None, tests=None, limit_seconds=0.2,
    )  # fmt: skip


def rows(folder):
    found = json.loads((folder / "main_job_gpu.json").read_text(encoding="utf-8"))
    return found["rows"], found["meta"]["settings"]


def test_half_a_row_stays_until_the_whole_one_takes_its_place(options, tmp_path):
    job.keep({"run": "other", "steps": 1}, options)
    job.keep({"run": "alpaca", "error": "ended before lambda 0"}, options)
    assert rows(tmp_path)[0][1]["error"] == "ended before lambda 0"
    job.keep({"run": "alpaca", "steps": 2}, options)
    found, settings = rows(tmp_path)
    assert found == [{"run": "other", "steps": 1}, {"run": "alpaca", "steps": 2}]
    assert "rows" not in settings["alpaca"], "where a file lies is told to no one"
    options.lambda0_to = tmp_path / "row.json"
    job.keep({"run": "alpaca", "steps": 3}, options)
    assert rows(tmp_path)[0][1]["steps"] == 2, "the process beside it writes no row"


class Run:
    """A process of pytest: one that ends by itself, hangs until it is interrupted, or until it is
    killed."""

    def __init__(self, name):
        self.hangs, self.deaf, self.code = "hangs" in name, "deaf" in name, 5

    def wait(self, timeout=None):
        if self.hangs:
            assert timeout is not None, "it would be waited for without an end"
            raise subprocess.TimeoutExpired("pytest", timeout)
        return self.code

    def send_signal(self, number):
        self.hangs, self.code = self.deaf, 2

    def kill(self):
        self.hangs, self.code = False, -9


def test_tests_that_outlast_the_limit_are_interrupted_and_told_by_name(
    options, tmp_path, monkeypatch
):
    (tmp_path / "tests").mkdir()
    for name in ("ends", "hangs", "hangs_deaf"):
        (tmp_path / "tests" / f"test_gpu_{name}.py").touch()

    def start(path, scratch):
        (scratch / path.stem).write_text(f"log of {path.stem}")
        return Run(path.stem), scratch / path.stem

    monkeypatch.setattr(job, "ROOT", tmp_path)
    monkeypatch.setattr(job, "_start", start)
    row = job.gpu_tests(options)
    assert row["error"] == "crashed or interrupted: test_gpu_hangs, test_gpu_hangs_deaf"
    assert row["failed"] == 2
    assert "log of test_gpu_hangs_deaf" in (tmp_path / "gpu_tests.log").read_text()
    options.tests, options.limit_seconds = ["ends"], None
    assert job.gpu_tests(options)["error"] == "no test ran", "a file that skips itself is no crash"
