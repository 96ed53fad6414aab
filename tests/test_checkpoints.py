"""Which checkpoint a resume takes, and that its teacher is that of the interrupted run."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from lwf_unsloth.checkpoints import is_complete, latest_checkpoint, load_teacher, save_teacher
from lwf_unsloth.errors import TeacherError
from lwf_unsloth.teacher import OwnTeacher


def checkpoint(folder, teacher="adapter_off"):
    """A whole checkpoint folder, as a run leaves it."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(300)}, folder / name)
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    (folder / "lwf_teacher.json").write_text(json.dumps({"kind": teacher}))
    if teacher == "snapshot":
        save_file({"a": torch.ones(3)}, folder / "lwf_teacher.safetensors")
    return folder


def teacher(kind):
    """A teacher of which no model is needed."""
    if kind == "model":
        return SimpleNamespace(kind="model")
    own = OwnTeacher.__new__(OwnTeacher)
    own.snapshot = {"a": torch.zeros(3)} if kind == "snapshot" else None
    return own


FILES = (
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "adapter_model.safetensors",
    "lwf_teacher.json",
    "lwf_teacher.safetensors",
)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_any_file_cut_off_is_passed_over(tmp_path, caplog, name):
    checkpoint(tmp_path / "checkpoint-2", "snapshot")
    newest = checkpoint(tmp_path / "checkpoint-10", "snapshot")
    assert latest_checkpoint(tmp_path) == newest
    path = newest / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"
    assert "checkpoint-10 is not complete" in caplog.text


def test_a_snapshot_whose_tensors_are_gone_is_not_complete(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-1", "snapshot")
    assert is_complete(folder)
    (folder / "lwf_teacher.safetensors").unlink()
    assert not is_complete(folder)


@pytest.mark.parametrize(
    ("then", "now"), [("model", "adapter_off"), ("model", "snapshot"), ("snapshot", "model")]
)
def test_a_resume_with_another_kind_of_teacher_is_refused(tmp_path, then, now):
    folder = checkpoint(tmp_path / "checkpoint-1", then)
    with pytest.raises(TeacherError, match="checkpoint-1 comes from a run with .*same `teacher`"):
        load_teacher(teacher(now), folder)


@pytest.mark.parametrize("then", ["adapter_off", "snapshot"])
@pytest.mark.parametrize("now", ["adapter_off", "snapshot"])
def test_the_models_own_teacher_is_that_of_the_checkpoint(tmp_path, then, now):
    folder = checkpoint(tmp_path / "checkpoint-1", then)
    found = teacher(now)
    load_teacher(found, folder)
    assert found.kind == then
    assert then == "adapter_off" or torch.equal(found.snapshot["a"], torch.ones(3))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    start = teacher("snapshot")
    start.snapshot["a"] += 5
    save_teacher(start, tmp_path)
    found = teacher("adapter_off")
    load_teacher(found, tmp_path)
    assert torch.equal(found.snapshot["a"], start.snapshot["a"])


def test_a_checkpoint_of_a_run_without_teacher_leaves_the_teacher_alone(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-1")
    (folder / "lwf_teacher.json").unlink()
    found = teacher("snapshot")
    load_teacher(found, folder)
    load_teacher(None, folder)
    assert found.kind == "snapshot" and is_complete(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_named_checkpoint_without_its_state_is_told(make_trainer, tmp_path, caplog, name):
    make_trainer(save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-4"
    (folder / name).unlink()
    make_trainer(num_train_epochs=2).train(resume_from_checkpoint=str(folder))
    assert "checkpoint-4 lacks" in caplog.text
    assert "will not be the uninterrupted one" in caplog.text
