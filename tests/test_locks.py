"""The lock on a model, and the state that is put back."""

import copy
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lwf_unsloth.errors import ModelError
from lwf_unsloth.locks import innermost, kept_state, model_lock


def in_thread(call):
    """Runs `call` in another thread and returns the error it raised, if any."""
    caught = []

    def run():
        try:
            call()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def take(model):
    with model_lock(model, "generating"):
        pass


def test_the_lock_refuses_another_thread_and_says_who_holds_the_model():
    model = nn.Linear(2, 2)
    with model_lock(model, "training"):
        error = in_thread(lambda: take(model))
        assert isinstance(error, ModelError)
        assert "training" in str(error) and "generating" in str(error)
        assert in_thread(lambda: take(nn.Linear(2, 2))) is None, "another model is free"
    assert in_thread(lambda: take(model)) is None


def test_the_lock_nests_in_one_thread_and_is_free_after_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError), model_lock(model, "training"):
        with model_lock(model, "sampling"):
            pass
        error = in_thread(lambda: take(model))
        assert "(training)" in str(error), "still held by the outer use"
        raise KeyError
    assert in_thread(lambda: take(model)) is None


def test_wrappers_of_one_model_share_its_lock():
    model = nn.Linear(2, 2)
    wrapped = nn.DataParallel(model)
    assert innermost(wrapped) is model
    with model_lock(wrapped, "training"):
        assert isinstance(in_thread(lambda: take(model)), ModelError)


def test_a_model_that_was_locked_can_be_copied_and_saved(tmp_path):
    model = nn.Linear(2, 2)
    with model_lock(model, "training"):
        copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")


def test_everything_that_inference_switches_is_put_back_even_after_an_error(monkeypatch):
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "1")
    monkeypatch.delenv("UNSLOTH_RETURN_LOGITS", raising=False)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    inner = SimpleNamespace(use_cache=False)
    model.config = SimpleNamespace(use_cache=False, text_config=inner)
    model._saved_temp_tokenizer = SimpleNamespace(padding_side="right")
    tokenizer = SimpleNamespace(padding_side="right")
    model[1].gradient_checkpointing = "unsloth"
    model[1][0].eval()
    model[1][0].weight.requires_grad_(False)
    with pytest.raises(KeyError), kept_state(model, tokenizer):
        model.eval()
        model[0]._flag_for_generation = True
        model[0].paged_attention = torch.zeros(2)
        model[1].gradient_checkpointing = False
        model.config.use_cache = inner.use_cache = True
        tokenizer.padding_side = model._saved_temp_tokenizer.padding_side = "left"
        model.requires_grad_(True)
        model[0].weight.requires_grad_(False)
        os.environ.update(UNSLOTH_RETURN_HIDDEN_STATES="0", UNSLOTH_RETURN_LOGITS="0")
        raise KeyError
    modes = [model.training, model[0].training, model[1].training, model[1][0].training]
    assert modes == [True, True, True, False]
    assert model[1].gradient_checkpointing == "unsloth"
    assert not hasattr(model[0], "_flag_for_generation")
    assert not hasattr(model[0], "paged_attention")
    assert (model.config.use_cache, inner.use_cache) == (False, False)
    assert {tokenizer.padding_side, model._saved_temp_tokenizer.padding_side} == {"right"}
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "1"
    assert "UNSLOTH_RETURN_LOGITS" not in os.environ
