"""Full disks and read-only folders, real ones: every writer says which folder, and what was stays.

    python -m tests.campaigns.disk [--out tests/campaigns/results/disk.json]

Each writer writes once on a small disk of its own (a tmpfs: needs root). Then the disk is filled
but for some KiB, or mounted read-only, and it writes again. Right is: an error of ours that names
the folder (the teacher's cache: a warning, and the run goes on), and every file of the first time
as it was, or the whole new one in its place.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

RESULT = Path(__file__).resolve().parent / "results" / "disk.json"
SIZE = 24
"""MiB of the small disk."""
FREE = {"full": 0, "nearly full": 8, "read-only": None}
"""Condition -> KiB that are left; None: mounted read-only."""


@contextlib.contextmanager
def small_disk(folder):
    """A disk of its own at a folder.

    Raises:
        RuntimeError: Mounting is not permitted here.
    """
    folder.mkdir(parents=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(folder)]
    done = subprocess.run(options, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"No disk of its own: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def spoil(disk, free):
    """Fills a disk but for `free` KiB, or mounts it read-only."""
    if free is None:
        gc.collect()  # a file that is open for writing keeps a disk writable
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    size = ballast.stat().st_size
    with ballast.open("r+b") as file:
        file.truncate(max(0, size - free * 1024))


def snapshot(disk):
    """Relative path -> hash of every file but the ballast and the locks."""
    return {
        str(path.relative_to(disk)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(disk.rglob("*"))
        if path.is_file() and path.name != "ballast" and path.suffix != ".lock"
    }


# ---------------------------------------------------------------------------- the writers


class Writers:
    """Everything that writes, each as a function of a disk and of the time (first, second)."""

    def __init__(self, home):
        """Takes a folder on a good disk, for the model."""
        self.home = home
        self._peft = None

    def _model(self):
        from lwf_unsloth.config import ModelConfig
        from lwf_unsloth.model import load_model
        from tests.campaigns.work import model_dir

        if self._peft is None:
            config = ModelConfig(str(model_dir(self.home)), dtype="float32", r=4, lora_alpha=8)
            self._peft = load_model(config)
        return self._peft

    def _trained(self, run, steps, **changes):
        from tests.campaigns.work import trainer_of

        trainer = trainer_of(_Placed(self.home, run=run), max_steps=steps, **changes)
        trainer.train(resume_from_checkpoint=True)

    def checkpoint(self, disk, time):
        self._trained(disk / "run", 2 * time, lwf_cache="off")

    def first_checkpoint(self, disk, time):
        if time == 2:
            self._trained(disk / "run", 2, lwf_cache="off")

    def cache(self, disk, time):
        run = self.home / f"run-{disk.name}"
        self._trained(run, 6 * time, save_strategy="no", lwf_cache_dir=str(disk))

    def adapter(self, disk, time):
        from lwf_unsloth.adapters import save_adapter

        save_adapter(*self._model(), disk / "adapter", card={"time": time})

    def merged(self, disk, time):
        from lwf_unsloth.merging import merge_model

        merge_model(*self._model(), disk / "merged", dtype=("bfloat16", "float16")[time - 1])

    def written_rows(self, disk, time):
        from lwf_unsloth.written_file import save_written
        from lwf_unsloth.written_rows import WrittenReport, WrittenRows

        rows = [{"text": f"{time} {n} " + "word " * 60, "whole": True} for n in range(40 * time)]
        save_written(
            WrittenRows(rows, WrittenReport("passages", 1, 1, 1), {"a": time}), disk / "rows.jsonl"
        )

    def figures(self, disk, time):
        from lwf_unsloth.result_table import save_json

        save_json(disk / f"deep-{time}" / "scores.json", {"what": "it", "n": list(range(5000))})

    def chart(self, disk, time):
        from matplotlib.figure import Figure

        from lwf_unsloth.plots import Chart

        figure = Figure()
        figure.subplots().plot(range(500 * time))
        Chart(figure).save(disk / "charts" / "loss.png")

    def comparison(self, disk, time):
        from lwf_unsloth.comparison import Comparison

        with mock.patch.multiple(
            Comparison, to_dict=lambda self: {}, to_html=lambda self: "x" * 9000 * time,
            to_markdown=lambda self: "x" * 9000 * time,
        ):  # fmt: skip
            Comparison.__new__(Comparison).save(disk / "compared")

    def sweep(self, disk, time):
        from lwf_unsloth.sweep import run_sweep
        from lwf_unsloth.sweep_file import read_sweep_file
        from tests.test_sweep import GRID, STAND_IN

        (self.home / "stand_in.py").write_text(STAND_IN)
        (self.home / "grid.yaml").write_text(GRID)
        plan = read_sweep_file(self.home / "grid.yaml")
        command = (sys.executable, str(self.home / "stand_in.py"))
        place = disk / ("sweep" if time == 1 else "another")
        run_sweep(plan, workers=1, output=place, command=command)

    def upload(self, disk, time):
        from lwf_unsloth.panel_session import keep_upload

        keep_upload("rows.jsonl", b"x" * 50_000 * time, disk / "uploads")

    def conversion(self, disk, time):
        from lwf_unsloth import embedded
        from tests.campaigns.work import convert

        place = disk / "first" if time == 1 else disk
        place.mkdir(exist_ok=True)
        told = self.home / f"told-{disk.name}"
        told.mkdir(exist_ok=True)
        with (
            mock.patch.dict(os.environ),
            mock.patch.dict(embedded.EMBEDDED),
            mock.patch.multiple(
                embedded, fetch_gguf=embedded.fetch_gguf, _convert=embedded._convert
            ),
        ):
            convert(_Placed(told, cache=place))


class _Placed:
    """A folder with one of its folders elsewhere."""

    def __init__(self, folder, **elsewhere):
        self.folder, self.elsewhere = folder, elsewhere

    def __truediv__(self, name):
        return self.elsewhere.get(name, self.folder / name)


NAMES = [name for name in vars(Writers) if not name.startswith("_")]


# ---------------------------------------------------------------------------- the trial


class Heard(logging.Handler):
    """Keeps what the library warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


def trial(writers, name, condition, disk):
    """One writer on one spoiled disk; what came of it."""
    from lwf_unsloth.errors import LwfError

    heard, error = Heard(), None
    logging.getLogger("lwf_unsloth").addHandler(heard)
    try:
        with small_disk(disk):
            getattr(writers, name)(disk, 1)
            before = snapshot(disk)
            spoil(disk, FREE[condition])
            heard.text = ""
            try:
                getattr(writers, name)(disk, 2)
            except Exception as raised:
                error = raised
            after = snapshot(disk)
    finally:
        logging.getLogger("lwf_unsloth").removeHandler(heard)
    said = heard.text if error is None else str(error)
    return {
        "writer": name,
        "condition": condition,
        "error": type(error).__name__ if error else "",
        "ours": isinstance(error, LwfError) if error else bool(heard.text),
        "names_the_folder": str(disk) in said,
        "earlier_files": len(before),
        "lost_or_changed": [one for one, digest in before.items() if after.get(one) != digest],
        "left_over": [one for one in after if one not in before],
        "said": said.replace(str(disk), "DISK").strip()[:400],
    }


def campaign(root, names=None, conditions=tuple(FREE)):
    """Every writer in every condition."""
    writers = Writers(root / "home")
    writers.home.mkdir()
    return [
        trial(writers, name, condition, root / f"disk-{name}-{condition.replace(' ', '-')}")
        for name in names or NAMES
        for condition in conditions
    ]


def wrong(row):
    """Whether a trial came out wrong. A full disk that has room enough is no error."""
    if row["lost_or_changed"] and row["error"]:
        return True
    if not row["error"] and row["writer"] != "cache":
        return row["condition"] != "nearly full"
    return not (row["ours"] and row["names_the_folder"])


def main():
    """All trials; prints and writes the figures."""
    from tests.campaigns.kill import about

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="*")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    meta = about(0, "python -m tests.campaigns.disk")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lwf-disk-") as root:
        rows = campaign(Path(root), asked.only)
    bad = [f"{row['writer']}, {row['condition']}" for row in rows if wrong(row)]
    summary = {"trials": len(rows), "wrong": bad, "seconds": round(time.monotonic() - begun)}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"meta": meta, **summary, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1), json.dumps(summary, indent=1), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
