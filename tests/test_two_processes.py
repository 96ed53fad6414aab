"""Two processes or two sessions in one folder: each continues, waits or is told; nothing is mixed.

Threads stand for processes where what keeps them apart (locks of open files, renames) does not tell
one from the other.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.kept_folders import held, locked, making

ROOT = Path(__file__).resolve().parent.parent
LORA = {"peft_type": "LORA", "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"}


def at_once(*tasks):
    """Runs them from the same moment on; their results, or the first error."""
    both = threading.Barrier(len(tasks))

    def begin(task):
        both.wait(timeout=30)
        return task()

    with ThreadPoolExecutor(len(tasks)) as threads:
        return [one.result() for one in [threads.submit(begin, task) for task in tasks]]


# ------------------------------------------------------------------ adapters and written rows


def save_small(folder, rank):
    """An adapter's folder whose files tell which save they are of."""
    from lwf_unsloth.replaced_folders import RECORD, new_folder

    with new_folder(folder) as new:
        config = {**LORA, "r": rank, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
        (new / "adapter_config.json").write_text(json.dumps(config))
        (new / "adapter_model.safetensors").write_bytes(b"x" * rank)
        (new / RECORD).write_text(json.dumps({"base": {"name": "b", "kind": "hub"}, "r": rank}))


def test_adapters_that_are_saved_and_read_at_once_in_one_folder_are_each_whole(tmp_path):
    from lwf_unsloth.adapters import read_adapter

    place = tmp_path / "adapter"
    save_small(place, 1)

    def save(first):
        for rank in range(first, first + 10):
            save_small(place, rank)

    def read():
        for _ in range(50):
            found = read_adapter(place)
            assert found.lora["r"] == found.record["r"] == found.stamp[0]

    at_once(lambda: save(1), lambda: save(101), read)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_save_looks_at_what_is_there_while_no_other_moves_it(tmp_path, monkeypatch):
    import fcntl

    from lwf_unsloth import replaced_folders

    looked = []

    def look(target):
        handle = os.open(target.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        looked.append(target)

    save_small(tmp_path / "adapter", 1)
    monkeypatch.setattr(replaced_folders, "_check_replaceable", look)
    save_small(tmp_path / "adapter", 2)
    assert looked == [tmp_path / "adapter"]


def test_a_save_that_ends_while_another_begins_is_no_error_for_that(tmp_path, monkeypatch):
    """It takes its folder of scratch away, which the other has just found."""
    from lwf_unsloth import replaced_folders

    (tmp_path / ".adapter-abcdefgh" / "new").mkdir(parents=True)
    listed = Path.iterdir

    def ended(folder):
        if folder != tmp_path:
            shutil.rmtree(folder)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", ended)
    replaced_folders.recover(tmp_path / "adapter")
    assert list(listed(tmp_path)) == []


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_told(tiny_peft, tmp_path):
    from lwf_unsloth.adapters import fill_adapter, read_adapter, save_adapter

    model, tokenizer = tiny_peft()
    save_adapter(model, tokenizer, tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter")
    fill_adapter(model, found, trainable=True)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match="replaced while it was being loaded"):
        fill_adapter(model, found, trainable=True)


def test_rows_that_are_written_and_read_at_once_in_one_file_are_those_of_one_writer(tmp_path):
    from lwf_unsloth.written_file import load_written, save_written
    from lwf_unsloth.written_rows import WrittenReport, WrittenRows

    path = tmp_path / "rows.jsonl"

    def write(name):
        for _ in range(10):
            rows = [{"instruction": name, "output": "x" * 5000, "whole": True}]
            save_written(WrittenRows(rows, WrittenReport("answers", 1), {"by": name}), path)

    def read():
        for _ in range(80):
            found = load_written(path)
            assert found[0]["instruction"] == found.origin["by"]

    write("first")
    at_once(lambda: write("first"), lambda: write("second"), read)
    names = {"rows.jsonl", "rows.jsonl.old", "rows.jsonl.origin.json"}
    assert {one.name for one in tmp_path.iterdir()} <= names


# ------------------------------------------------------------------ runs


def take(folder):
    """A process that holds a run's folder until its standard input ends."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom lwf_unsloth.kept_folders import held\n"
        "with held(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **ends)
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture()
def impatient(monkeypatch):
    monkeypatch.setattr("lwf_unsloth.kept_folders.PATIENCE", 0.1)


def test_a_second_training_in_the_same_folder_is_refused_and_goes_on_when_the_first_has_died(
    make_trainer, tmp_path, impatient
):
    """Else a checkpoint would be files of the one and files of the other, listed as whole."""
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(**run)
    other = take(tmp_path / "run")
    try:
        for resume in (None, True):
            with pytest.raises(ConfigError, match=rf"another run .process {other.pid} on"):
                trainer.train(resume_from_checkpoint=resume)
        assert not list((tmp_path / "run").glob("checkpoint-*"))
    finally:
        other.kill()
        other.wait()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer.guard, "on_save", lambda *a, **k: 1 / 0)
        trainer.train()
    with held(tmp_path / "run"):  # what ends by an error has let go of it
        pass
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told_and_trained_on(tmp_path, monkeypatch, caplog, number):
    import fcntl

    def flock(*given):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "run"):
        pass
    assert "no locks" in caplog.text
    with held(tmp_path / "run"):  # nothing of the first is in the way
        pass


def test_a_disk_that_has_no_room_for_the_holders_name_ends_no_run(tmp_path, monkeypatch):
    from lwf_unsloth.kept_folders import RUN_LOCK

    write = Path.write_text

    def full(path, *given, **more):
        if path.name == RUN_LOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *given, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with held(tmp_path / "run"):
        assert (tmp_path / "run" / RUN_LOCK).read_text() == ""


def test_rows_are_not_written_over_in_the_folder_of_a_run_that_trains(
    tiny_peft, settings, tmp_path, impatient
):
    from lwf_unsloth.train_data import written_rehearsal

    given = (*tiny_peft(), settings(save_strategy="steps"), [{}] * 4)
    with held(tmp_path / "run"), pytest.raises(ConfigError, match="in use by another run"):
        written_rehearsal("self", *given)
    assert not (tmp_path / "run" / "rehearsal.jsonl").exists()


@pytest.mark.slow
def test_two_runs_cannot_keep_their_best_adapters_in_one_folder(
    make_trainer, tmp_path, alpaca_rows, impatient
):
    from lwf_unsloth.best_adapter import BestAdapter

    trainer, rows = make_trainer(max_steps=1), alpaca_rows(2)
    best = {"task": rows, "general": alpaca_rows(2, "keep"), "folder": tmp_path / "best"}
    trainer.add_callback(BestAdapter(trainer.model, trainer.processing_class, **best))
    with held(tmp_path / "best"), pytest.raises(ConfigError, match="best' is in use"):
        trainer.train()
    assert not (tmp_path / "best" / "history.jsonl").exists()
    trainer.train()
    assert len((tmp_path / "best" / "history.jsonl").read_text().splitlines()) == 1


# ------------------------------------------------------------------ the cache of models and sets


def test_the_process_that_waits_goes_on_when_the_one_that_makes_a_folder_is_killed(tmp_path):
    """And takes away what the killed one has left half made, which could be gigabytes."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from lwf_unsloth.errors import ModelError\n"
        "from lwf_unsloth.kept_folders import locked, making\n"
        "target = Path(sys.argv[1])\n"
        "with locked(target, 1, 'making', 'it takes a second', ModelError):\n"
        "    with making(target) as scratch:\n"
        "        (scratch / 'half').write_text('x')\n"
        "        print('half', flush=True)\n"
        "        time.sleep(60)\n"
    )
    target = tmp_path / "model"
    command = [sys.executable, "-c", code, str(target)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert first.stdout.readline() == b"half\n"
    threading.Timer(0.3, first.kill).start()
    (tmp_path / "fetch-other-12345678").mkdir()  # another model's, made under another lock
    with locked(target, 1, "making", "it takes a second", ModelError), making(target) as scratch:
        assert first.wait() and list(scratch.iterdir()) == []
        assert len(list(tmp_path.glob("fetch-model-*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model.lock", "fetch-other-12345678"}


# ------------------------------------------------------------------ the panel


def test_panels_of_two_sessions_take_runs_and_uploads_of_their_own(tmp_path):
    from lwf_unsloth.panel_session import keep_upload, new_run

    runs = at_once(*[lambda: [new_run(tmp_path / "runs") for _ in range(20)]] * 3)
    assert len({path for made in runs for path in made}) == 60

    kept = at_once(*[lambda n=n: keep_upload("rows.jsonl", b"%d" % n, tmp_path) for n in range(4)])
    assert [path.read_bytes() for path in kept] == [b"0", b"1", b"2", b"3"]
    assert keep_upload("rows.jsonl", b"2", tmp_path) == kept[2], "the same file again"


@pytest.mark.slow
def test_a_panel_neither_saves_into_nor_resumes_the_run_of_another_session(tiny_peft, tmp_path):
    lwf = pytest.importorskip("lwf_unsloth")
    panel = lwf.panel(*tiny_peft(), output_dir=tmp_path / "runs")
    theirs = tmp_path / "runs" / "run-1"
    (theirs / "checkpoint-2").mkdir(parents=True)
    save_small(theirs / "adapter", 3)
    panel._free()
    assert panel.parts.resume.disabled
    panel.parts.save.click()
    assert panel.wait(60)
    assert (theirs / "adapter" / "adapter_model.safetensors").read_bytes() == b"xxx"
    assert (tmp_path / "runs" / "run-2" / "adapter" / "adapter_config.json").is_file()
