"""Full disks and folders that may not be written: the folder is named and what was there stays."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from lwf_unsloth.errors import DiskError, LwfError
from lwf_unsloth.whole_files import UNWRITABLE, writing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@contextmanager
def no_file_longer_than(size):
    """The system refuses longer files (EFBIG), as a full disk refuses more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def written_rows(folder, count):
    from lwf_unsloth.written_file import save_written
    from lwf_unsloth.written_rows import WrittenReport, WrittenRows

    rows = [{"text": f"word {n} of {count}. " * 20, "whole": True} for n in range(count)]
    save_written(WrittenRows(rows, WrittenReport("passages", 1), {"a": 1}), folder / "rows.jsonl")


def figures(folder, count):
    from lwf_unsloth.result_table import save_json

    save_json(folder / "scores.json", {"what": "it", "n": list(range(200 * count))})


def chart(folder, count):
    from matplotlib.figure import Figure

    from lwf_unsloth.plots import Chart

    figure = Figure()
    figure.subplots().plot(range(count))
    Chart(figure).save(folder / "loss.png")


def upload(folder, count):
    from lwf_unsloth.panel_session import keep_upload

    keep_upload("rows.jsonl", b"x" * 1000 * count, folder)


WRITERS = [written_rows, figures, chart, upload]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("write", WRITERS)
def test_a_write_that_does_not_fit_names_its_folder_and_leaves_what_was_there(write, tmp_path):
    place = tmp_path / "results"
    write(place, 2)
    before = files(place)
    with no_file_longer_than(1000), pytest.raises(DiskError) as told:
        write(place, 90)
    assert files(place) == before
    text = str(told.value)
    assert str(place) in text and "Free space" in text and "File too large" in text
    assert told.value.errno == errno.EFBIG and isinstance(told.value, (LwfError, OSError))
    write(place, 90)
    assert len(files(place)) >= len(before) and files(place) != before


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_cannot_be_made_is_named(write, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DiskError, match=r"taken.results' could not be written .*another one"):
        write(tmp_path / "taken" / "results", 1)


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as told, writing(tmp_path):
        (tmp_path / "none").read_text()
    assert not isinstance(told.value, LwfError) and errno.ENOENT not in UNWRITABLE


def test_rows_that_are_written_again_keep_the_old_ones_beside_them_and_nothing_else(tmp_path):
    written_rows(tmp_path, 2)
    first = (tmp_path / "rows.jsonl").read_bytes()
    written_rows(tmp_path, 3)
    names = ["rows.jsonl", "rows.jsonl.old", "rows.jsonl.origin.json"]
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "rows.jsonl.old").read_bytes() == first


def test_a_run_whose_folder_may_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.trainer_inputs import _check_output

    (tmp_path / "taken").write_text("a file")
    config = LwFConfig(str(tmp_path / "taken" / "run"), bf16=False)
    with pytest.raises(DiskError, match=r"taken.run' could not be written"):
        _check_output(config)
    config = LwFConfig(str(tmp_path / "run"), bf16=False, save_strategy="steps")
    _check_output(config)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on a disk that is read-only
    with pytest.raises(DiskError, match=r"run' could not be written .*Permission denied"):
        _check_output(config)
    config.save_strategy = "no"
    _check_output(config)


def test_a_sweep_whose_database_finds_no_room_names_the_folder(tmp_path):
    from lwf_unsloth import sweep_storage

    said = "(sqlite3.OperationalError) database or disk is full\n[SQL: CREATE TABLE studies"
    with (
        pytest.raises(DiskError, match="disk is full.. Whole files") as told,
        sweep_storage.told(tmp_path),
    ):
        raise RuntimeError(said)
    assert str(tmp_path) in str(told.value) and "SQL:" not in str(told.value)
    with pytest.raises(RuntimeError, match="something else"), sweep_storage.told(tmp_path):
        raise RuntimeError("something else")


def mountable():
    """Whether disks of their own can be mounted here."""
    if os.name != "posix" or os.geteuid():
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_real_disks_that_are_full_or_read_only_are_told_by_every_small_writer(tmp_path):
    from tests.campaigns import disk

    names = ["written_rows", "figures", "chart", "upload", "conversion"]
    if not mountable():
        pytest.skip("mounting a disk needs root; the tests above limit the files' size instead")
    rows = disk.campaign(tmp_path, names)
    assert len(rows) == 15 and [row for row in rows if disk.wrong(row)] == []
