"""Final hidden states and the output head of a causal LM, so that no loss needs rows x vocabulary.

Unsloth's CUDA models return the hidden states in `.logits` while UNSLOTH_RETURN_HIDDEN_STATES is
set, which is read at every forward. Elsewhere the causal LM's forward is replaced, for that one
call, by its decoder's: so the call still goes through every wrapper around it (PEFT, DDP).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.backend import on_cuda
from lwf_unsloth.losses import Head

logger = logging.getLogger(__name__)


def unwrap(model: Any) -> Any:
    """The model under DDP's or compile's wrapper, PEFT kept."""
    while True:
        children = vars(model).get("_modules", {})
        inner = children.get("module") or children.get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def causal_lm(model: Any) -> Any:
    """The transformers causal LM under every wrapper."""
    model = unwrap(model)
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def output_head(model: Any) -> Head | None:
    """The frozen output head, or None where the loss must go through full logits.

    Args:
        model: A causal LM, wrapped or not.

    Returns:
        `Head` with weight (V, H), or None if the head is trained, adapted, quantised, sharded or
        absent.
    """
    base = causal_lm(model)
    layer = base.get_output_embeddings()
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return None
    if not layer.weight.is_floating_point() or any(p.requires_grad for p in layer.parameters()):
        return None
    config = base.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    return Head(layer.weight, layer.bias, float(softcap), logit_scale(config))


def logit_scale(config: Any) -> float:
    """Factor on the logits before softcapping: Cohere multiplies, Granite and MiniCPM3 divide."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if not divisor else 1.0 / float(divisor)


def model_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final hidden states, after the last norm.

    Args:
        model: A causal LM; DDP and PEFT wrappers are called through.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 on tokens, 0 on padding.

    Returns:
        (B, T, H) hidden states; the head times them is the model's logits.
    """
    base = causal_lm(model)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if on_cuda() and not getattr(base, "_lwf_decoder_forward", False):
        with environment(UNSLOTH_RETURN_HIDDEN_STATES="1"):
            hidden = model(**batch).logits
        if hidden.shape[-1] == base.config.get_text_config().hidden_size:
            return hidden
        base._lwf_decoder_forward = True
    with _decoder_forward(base):
        return model(**batch).last_hidden_state


def model_logits(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Full logits (B, T, V), for heads that `output_head` cannot give."""
    with environment(UNSLOTH_RETURN_LOGITS="1"):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@contextmanager
def environment(**switches: str) -> Iterator[None]:
    """Sets environment variables for the block and puts back what was there."""
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _decoder_forward(base: Any) -> Iterator[None]:
    """Lets `base(...)` return its decoder's output for the block."""
    decoder = base.base_model
    own = vars(base).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return decoder(*args, **{k: v for k, v in kwargs.items() if v is not None})

    base.forward = forward
    try:
        yield
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own


def head_matches(model: Any, head: Head, input_ids: Tensor) -> bool:
    """Whether head times hidden states equals the model's own logits on a short input.

    Guards against architectures with a transformation that `output_head` does not know.

    Args:
        model: The causal LM.
        head: What `output_head` gave.
        input_ids: (1, T) a few real tokens.

    Returns:
        True if the largest difference is within the rounding of the head's dtype.
    """
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        hidden = model_hidden(model, input_ids, mask).to(head.weight.dtype)
        ours = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
        if head.softcap:
            ours = head.softcap * torch.tanh(ours / head.softcap)
        theirs = model_logits(model, input_ids, mask).float()
    if theirs.shape != ours.shape:
        return False
    coarse = head.weight.dtype != torch.float32 or hidden.dtype != torch.float32
    return bool(
        (ours - theirs).abs().max() <= (0.02 if coarse else 1e-3) * theirs.abs().max().clamp(min=1)
    )
