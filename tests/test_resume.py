"""A resumed run is the interrupted one, or it is refused; checkpoints are whole or told."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lwf_unsloth import checkpoints, kept_folders
from lwf_unsloth.checkpoints import is_complete, latest_checkpoint
from lwf_unsloth.errors import ConfigError, ModelError

STEPS = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture()
def interrupted(make_trainer, tmp_path):
    """A run of 4 steps with checkpoints at 2 and 4, the later one taken away."""
    make_trainer(**STEPS).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return tmp_path / "run"


@pytest.mark.slow
def test_every_log_line_of_a_resumed_run_is_that_of_the_uninterrupted_one(make_trainer, tmp_path):
    run = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 3, "max_steps": 6}
    whole = make_trainer(**run)
    whole.train()
    again = make_trainer(**run)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    lines = [
        [
            {k: v for k, v in line.items() if not k.startswith("train_") or k == "train_loss"}
            for line in log
        ]
        for log in (whole.state.log_history, again.state.log_history)
    ]
    assert len(lines[0]) == 3 and lines[0] == lines[1]
    assert {"kl_rehearsal", "task_loss", "loss"} <= lines[0][1].keys()


CHANGES = {
    "max_length": ({"max_length": 110}, "max_length .256 there, 110 now.*rows are cut"),
    "data": ({"task": 11}, "task rows .12 rows .* there, 11 rows"),
    "rehearsal": ({"rehearsal": 5}, "rehearsal rows .6 rows .* there, 5 rows"),
    "seed": ({"seed": 7}, "seed .42 there, 7 now"),
    "where": ({"lwf_rows": "all"}, "lwf_rows .rehearsal there, all now"),
    "batch": ({"per_device_train_batch_size": 2}, "rows a step .4 there, 2 now"),
}


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(
    make_trainer, tiny_peft, interrupted
):
    from lwf_unsloth.templates import PLAIN, set_template

    model, tokenizer = tiny_peft(r=2)
    for changes, said in CHANGES.values():
        with pytest.raises(ConfigError, match=f"checkpoint-2 .* another run.*{said}.*output_dir"):
            make_trainer(model, tokenizer, **STEPS, **changes).train(resume_from_checkpoint=True)
    set_template(tokenizer, PLAIN)
    with pytest.raises(ConfigError) as told:
        make_trainer(model, tokenizer, **STEPS).train(resume_from_checkpoint=True)
    text = str(told.value)
    assert "template (alpaca " in text and "plain " in text and "lora (" in text
    assert "'r': 4" in text and "'r': 2" in text and "load_model(config, adapter=" in text


@pytest.mark.slow
def test_a_setting_that_may_change_is_told_and_the_same_step_in_smaller_parts_is_the_same_run(
    make_trainer, interrupted, caplog
):
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    again = make_trainer(**STEPS, **smaller, lwf_lambda=4.0, learning_rate=1e-3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert "lwf_lambda 2.0 -> 4.0, learning_rate 0.01 -> 0.001" in caplog.text
    record = json.loads((interrupted / "checkpoint-4" / "lwf_run.json").read_text())
    assert record["changes"] == [
        {"at": "checkpoint-2", "lwf_lambda": [2.0, 4.0], "learning_rate": [0.01, 0.001]}
    ]


def test_a_run_that_has_ended_says_that_nothing_is_left_to_train(make_trainer, tmp_path, caplog):
    run = {**STEPS, "max_steps": 2}
    first = make_trainer(**run)
    first.args.output_dir = str(tmp_path / "My Drive" / "run 1")
    first.train()
    caplog.clear()
    again = make_trainer(**run)
    again.args.output_dir = first.args.output_dir
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-2 is the end of its run (step 2): nothing was left" in caplog.text


@pytest.mark.slow
def test_the_best_checkpoint_stays_and_is_loaded_and_nan_is_never_the_best(
    make_trainer, alpaca_rows, tmp_path, monkeypatch
):
    run = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "task_loss"}
    more = {"load_best_model_at_end": True, "greater_is_better": False, "save_total_limit": 1}
    trainer = make_trainer(**STEPS, **run, **more, max_steps=8, eval_dataset=alpaca_rows(4))
    losses, kept, measure = [float("nan"), 1.0, 0.5, 0.9], [], trainer.evaluate

    def forced(*args, **kwargs):
        found = {**measure(*args, **kwargs), "eval_task_loss": losses[len(kept)]}
        kept.append({n: p.clone() for n, p in trainer.model.named_parameters() if "lora" in n})
        return found

    monkeypatch.setattr(trainer, "evaluate", forced)
    trainer.train()
    assert trainer.state.best_metric == 0.5
    left = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-6"], "the best one; the run is over"
    for name, value in trainer.model.named_parameters():
        assert "lora" not in name or torch.equal(value, kept[2][name]), name


def full(path=None):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_folder_and_leaves_the_earlier_checkpoint(
    make_trainer, monkeypatch, tmp_path
):
    trainer, sync = make_trainer(**STEPS, save_total_limit=1), kept_folders.sync

    def late(path):
        return full() if "checkpoint-4" in str(path) else sync(path)

    monkeypatch.setattr(kept_folders, "sync", late)
    with pytest.raises(ModelError) as told:
        trainer.train()
    text = str(told.value)
    assert "checkpoint-4 could not be written to" in text and str(tmp_path / "run") in text
    assert "No space left" in text and "checkpoint-2 is whole and stays" in text
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_complete(tmp_path / "run" / "checkpoint-2")


@pytest.mark.slow
def test_older_checkpoints_go_only_when_the_new_one_is_whole(make_trainer, monkeypatch, tmp_path):
    write, seen = checkpoints.write_manifest, []

    def noted(path, about):
        whole = [p.name for p in path.parent.parent.glob("checkpoint-*") if is_complete(p)]
        seen.append(sorted(whole))
        write(path, about)

    monkeypatch.setattr(checkpoints, "write_manifest", noted)
    half = tmp_path / "run" / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "lwf_run.json").write_text("{}")
    make_trainer(**STEPS, save_total_limit=1, num_train_epochs=2).train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"], ["checkpoint-6"]]
    left = [p.name for p in (tmp_path / "run").glob("checkpoint-*")]
    assert left == ["checkpoint-8"], "a half-written one does not take a whole one's place"


def test_a_checkpoint_with_any_byte_changed_is_passed_over(make_trainer, tmp_path):
    make_trainer(**STEPS).train()
    kept_folders._sha256_once.cache_clear()
    newest = tmp_path / "run" / "checkpoint-4"
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        kept_folders._sha256_once.cache_clear()
        assert latest_checkpoint(tmp_path / "run", quiet=True).name == "checkpoint-2", path.name
        path.write_bytes(data)
    kept_folders._sha256_once.cache_clear()
    assert latest_checkpoint(tmp_path / "run") == newest
    (newest / "lwf_whole.json").unlink()
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-2", "it is written last"


def test_a_full_disk_says_which_file(tmp_path, monkeypatch):
    from lwf_unsloth.whole_files import write_whole

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*rows.jsonl"):
        write_whole(tmp_path / "rows.jsonl", b"x")
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_with_a_cache_and_several_rows_a_batch_ends_bit_for_bit(
    make_trainer, tmp_path
):
    from lwf_unsloth.teacher import trained_tensors

    run = {**STEPS, "max_steps": 12, "lwf_cache": "hidden", "rehearsal_ratio": 0.5}
    folder, kept = tmp_path / "run", tmp_path / "kept"

    def keep(args, state, control, **kwargs):  # what the disk holds when it is killed there
        if state.global_step == 2:
            shutil.copytree(folder, kept)

    whole = make_trainer(task=12, rehearsal=12, **run)
    whole.guard.on_save = keep
    whole.train()
    wanted = {name: value.clone() for name, value in trained_tensors(whole.model).items()}
    shutil.rmtree(folder)
    kept.rename(folder)
    again = make_trainer(task=12, rehearsal=12, **run)
    again.train(resume_from_checkpoint=True)
    for name, value in trained_tensors(again.model).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.slow
def test_processes_killed_at_random_moments_end_as_if_nothing_had_been(tmp_path):
    from campaigns.kill import campaign

    found = campaign(tmp_path, kills=3, seed=1, shares=("saving", "conversion", "sweep"))
    assert found["kills"] == found["survived"] == 3 and found["equal_bit_for_bit"], found
