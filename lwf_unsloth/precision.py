"""A trainer's mixed precision, taken off the model that it was put on."""

from typing import Any


def autocast_off(trainer: Any) -> None:
    """Takes the trainer's autocast off its model, as the answers of the saved adapter, loaded anew,
    have none; the next trainer puts its own on.

    accelerate's own way (`unwrap_model`) leaves the mark by which it knows a model that is wrapped
    already, so the next trainer on it would train without mixed precision, and without a word.

    Args:
        trainer: A trainer that has trained, or failed to.
    """
    model = trainer.model
    own = vars(model)
    own.pop("_is_accelerate_prepared", None)
    before = own.pop("_original_forward", None)
    if before is None:
        return
    own.pop("forward", None)
    if model.forward != before:  # it had one of its own
        model.forward = before
