"""Memory that runs out: the message says in which part, what was foretold, and what to lower."""

import pytest
import torch

from lwf_unsloth.out_of_memory import is_out_of_memory
from lwf_unsloth.preflight import DoesNotFit

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
PLACES = {
    "teacher": ("the teacher's forward", "lwf_cache="),
    "forward": ("the forward", "per_device_train_batch_size=2 and gradient_accumulation_steps=2"),
    "optimizer": ("the optimizer's state", 'optim="adamw_8bit"'),
    "backward": ("the backward", "max_length"),
}


def fails(error):
    def fail(*args, **kwargs):
        raise type(error)(*error.args)  # a new one: an old one carries its old traceback

    return fail


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("teacher", GPU),
        ("forward", MemoryError()),
        pytest.param("optimizer", CPU, marks=pytest.mark.slow),
        pytest.param("backward", GPU, marks=pytest.mark.slow),
    ],
)
def test_memory_that_runs_out_names_the_part_the_number_and_what_to_lower(
    make_trainer, monkeypatch, place, error
):
    trainer = make_trainer()
    if place == "teacher":
        from lwf_unsloth import teacher

        monkeypatch.setattr(teacher, "model_hidden", fails(error))
    elif place == "forward":
        monkeypatch.setattr(trainer.model.get_base_model().model, "forward", fails(error))
    elif place == "optimizer":
        from torch.optim import AdamW

        monkeypatch.setattr(AdamW, "_init_group", fails(error))
    else:
        monkeypatch.setattr(torch.autograd, "backward", fails(error))
    with pytest.raises(DoesNotFit) as told:
        trainer.train()
    text, (part, advice) = str(told.value), PLACES[place]
    assert f"Memory ran out in step 1, in {part}" in text and "on a batch of 4 x " in text
    assert "Foretold were" in text and "were free before the run" in text
    assert advice in text and isinstance(told.value.__cause__, type(error))
    assert "gradient_accumulation_steps=2" in text


def test_an_evaluation_names_its_own_batch_size(make_trainer, alpaca_rows, monkeypatch):
    trainer = make_trainer(eval_dataset=alpaca_rows(4), eval_strategy="steps", eval_steps=1)
    monkeypatch.setattr(trainer, "prediction_step", fails(GPU))
    with pytest.raises(
        DoesNotFit, match="during an evaluation .*per_device_eval_batch_size, now 8"
    ):
        trainer.train()


def test_other_errors_stay_what_they_are(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "compute_loss", fails(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.train()
    assert not is_out_of_memory(ValueError("out of memory"))
