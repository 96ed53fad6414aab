"""Steps whose gradient is not finite: skipped and told; a run of nothing else ends."""

import pytest
import torch

from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.teacher import trained_tensors


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
    assert all(p.isfinite().all() for p in trained_tensors(trainer.model).values())
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 8
    assert losses[7] < losses[0] and "Step 2 has a gradient that is not finite" in caplog.text


@pytest.mark.slow
def test_on_the_device_a_bad_step_is_passed_over_as_on_the_cpu_bit_for_bit(make_trainer):
    found = []
    for late in (False, True):  # True is a GPU's way: the fused optimizer is told by a tensor
        trainer = spoiled(make_trainer(), {2, 4})
        trainer.guard.late = late
        trainer.train()
        assert trainer.guard.skipped == 2 and not hasattr(trainer.optimizer, "found_inf")
        found.append(trained_tensors(trainer.model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("late", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_of_nan_alone_ends_with_its_rows_named_and_the_adapter_kept(
    make_trainer, tmp_path, tiny_model_dir, late
):
    from lwf_unsloth.model import load_adapter

    task = [
        {"instruction": f"Task {i}: <b>bold\x1b[31m</b>", "output": "Yes. " * 30} for i in range(12)
    ]
    trainer = spoiled(
        make_trainer(task=task, num_train_epochs=9, lwf_max_bad_steps=3), range(5, 99)
    )
    trainer.guard.late = late
    seen = {}

    def note(args, state, control, **kwargs):
        if state.global_step == 4:
            kept = trained_tensors(trainer.model)
            seen.update({name: value.clone() for name, value in kept.items()})

    trainer.guard.on_step_end = note
    with pytest.raises(ModelError, match="in 3 steps in a row, up to step 7") as told:
        trainer.train()
    text = str(told.value)
    named = [i for i in range(12) if f"task row {i} 'Task {i}: <b>bold\\x1b[31m</b>" in text]
    assert len(named) == 3 and "rehearsal row " in text and "\x1b" not in text
    assert "lwf_max_bad_steps" in text and "last_good" in text
    model, _ = load_adapter(tmp_path / "run" / "last_good", base=str(tiny_model_dir))
    saved = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for name, value in seen.items():
        assert torch.equal(value, saved[name]), name


def test_only_the_rows_of_the_forward_that_went_wrong_are_named(make_trainer, caplog):
    trainer = make_trainer(
        per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1
    )
    spoiled(trainer, {2}).train()
    (line,) = [r.getMessage() for r in caplog.records if "not finite: it is" in r.getMessage()]
    assert line.count("task row ") + line.count("rehearsal row ") == 1


def test_a_count_of_no_steps_is_refused(tmp_path):
    from lwf_unsloth.config import LwFConfig

    with pytest.raises(ConfigError, match="lwf_max_bad_steps"):
        LwFConfig(str(tmp_path), lwf_max_bad_steps=0)
