# ruff: noqa: F811
"""Proposed tests (to be put into test_trainer.py, test_guard.py, test_train_data.py)."""

import pytest
import torch
from datasets import Dataset
from test_trainer import disturb, make_trainer, settings, trained  # noqa: F401

from lwf_unsloth.errors import ConfigError, DataError, ModelError


def texts(trainer):
    return [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]


def test_a_list_of_rows_keeps_columns_that_its_first_row_lacks(make_trainer):
    rows = [{"instruction": "first", "output": "yes"}]
    rows += [{"instruction": f"b {i}", "input": "THE CONTEXT", "output": "yes"} for i in range(3)]
    trainer = make_trainer(task=rows, rehearsal=0)
    assert ["THE CONTEXT" in text for text in texts(trainer)] == [False, True, True, True]


def test_a_list_may_mix_passages_and_alpaca_rows(make_trainer):
    rows = [{"text": "a passage"}, {"instruction": "ask", "output": "yes"}]
    assert len(texts(make_trainer(task=rows, rehearsal=0))) == 2


BAD = {
    "numbers": [1, 2],
    "texts": ["a"],
    "an int among texts": [{"instruction": "a", "output": "x"}, {"instruction": "b", "output": 4}],
}


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD)
def test_rows_of_another_type_are_errors_of_ours(make_trainer, rows):
    with pytest.raises(DataError, match="[Rr]ow [12]"):
        make_trainer(task=rows, rehearsal=0)


def test_rows_that_mix_rehearsal_marked_are_refused_as_task_rows(make_trainer, alpaca_rows):
    from lwf_unsloth.rehearsal import mix_rehearsal

    with pytest.raises(DataError, match="3 rows of train_dataset are marked is_rehearsal"):
        make_trainer(task=mix_rehearsal(alpaca_rows(9), alpaca_rows(4, "keep"), 0.25), rehearsal=0)


def test_a_ratio_that_gives_no_rehearsal_row_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"0.1 beside 4 task rows.*0.2 or more"):
        make_trainer(task=4, rehearsal_ratio=0.1)
    assert make_trainer(task=4, rehearsal_ratio=0.2).rows.n_rehearsal == 6


def test_encoded_rows_are_cut_dropped_and_checked_like_others(make_trainer, caplog):
    long = {"input_ids": [1] + [5] * 299, "labels": [-100] + [5] * 299}
    late = {"input_ids": [1] + [5] * 299, "labels": [-100] * 299 + [5]}
    trainer = make_trainer(task=[long, late], rehearsal=0, max_length=64)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [64]
    assert "2 of 2 encoded rows are cut at max_length=64, 1 without a label" in caplog.text
    with pytest.raises(DataError, match="No row of train_dataset has a label"):
        make_trainer(task=[late], rehearsal=0, max_length=64)
    with pytest.raises(DataError, match="Row 1 of train_dataset has 3 input_ids and 2 labels"):
        make_trainer(task=[{"input_ids": [1, 5, 6], "labels": [-100, 5]}], rehearsal=0)


def test_predict_and_a_cut_off_evaluation_leave_nothing_in_the_next_one(
    make_trainer, alpaca_rows, monkeypatch
):
    held = Dataset.from_list(alpaca_rows(7, "held out"))
    trainer = make_trainer(eval_dataset=held, per_device_eval_batch_size=2)
    disturb(trainer.model)
    first = trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    compute, calls = trainer.compute_loss, []

    def cut_off(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(trainer.train_dataset)
    monkeypatch.undo()
    second = trainer.evaluate()
    assert second["eval_task_loss"] == first["eval_task_loss"]
    assert second["eval_kl"] == first["eval_kl"]


def spoiled(trainer, steps):
    """The trainer, the loss of these micro-batches NaN."""
    compute, calls = trainer.compute_loss, []

    def loss(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs) * (float("nan") if len(calls) in steps else 1.0)

    trainer.compute_loss = loss
    return trainer


def test_a_step_that_is_nan_is_skipped_and_told_and_spoils_nothing(make_trainer, caplog):
    trainer = spoiled(make_trainer(num_train_epochs=2), {2})
    trainer.train()
    assert all(p.isfinite().all() for p in trained(trainer.model).values())
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 8
    assert losses[7] < losses[0] and "Step 2 has a gradient that is not finite" in caplog.text


def test_a_run_of_nan_alone_ends_with_the_adapter_as_it_was(make_trainer):
    trainer = spoiled(make_trainer(num_train_epochs=10), range(3, 100))
    with pytest.raises(ModelError, match="20 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 21
    assert all(p.isfinite().all() for p in trained(trainer.model).values())


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_named_checkpoint_without_its_state_is_told(make_trainer, tmp_path, caplog, name):
    make_trainer(save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-4"
    (folder / name).unlink()
    make_trainer(num_train_epochs=2).train(resume_from_checkpoint=str(folder))
    assert "checkpoint-4 lacks" in caplog.text
    assert "will not be the uninterrupted one" in caplog.text


@pytest.mark.parametrize(
    "name", ["data_collator", "formatting_func", "compute_loss_func", "peft_config"]
)
def test_what_would_have_no_effect_is_refused(tiny_peft, settings, alpaca_rows, name):
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    with pytest.raises(ConfigError, match=f"{name} was given"):
        LwFTrainer(
            model,
            args=settings(),
            processing_class=tokenizer,
            train_dataset=alpaca_rows(4),
            **{name: torch.nn.Identity()},
        )
