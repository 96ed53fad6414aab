"""Steps whose gradient is not finite: skipped and told; a run of nothing else ends."""

import pytest

from lwf_unsloth.errors import ModelError
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


def test_a_run_of_nan_alone_ends_with_the_adapter_as_it_was(make_trainer):
    trainer = spoiled(make_trainer(num_train_epochs=10), range(3, 100))
    with pytest.raises(ModelError, match="20 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 21
    assert all(p.isfinite().all() for p in trained_tensors(trainer.model).values())
