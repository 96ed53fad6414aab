"""Final hidden states and the output head of a causal LM, so that no loss needs rows x vocabulary.

Unsloth's CUDA models return the hidden states in `.logits` while UNSLOTH_RETURN_HIDDEN_STATES is
set, which is read at every forward. Elsewhere the causal LM's forward is replaced, for that one
call, by its decoder's: so the call still goes through every wrapper around it (PEFT, DDP).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.backend import on_cuda
from lwf_unsloth.losses import Head
from lwf_unsloth.switches import uncheckpointed

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


@dataclass
class Carried:
    """Hidden states on their way through the wrappers around a model.

    Mixed precision's wrapper would turn a tensor, or one in a tuple or mapping, into fp32, at twice
    the memory and for nothing, since the head's products are half precision; DDP looks inside
    dataclasses for the tensors it must wait for.
    """

    states: Tensor
    """(B, T, H)"""


def model_hidden(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Final hidden states, after the last norm, in the dtype they are computed in.

    Args:
        model: A causal LM; DDP and PEFT wrappers are called through.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 on tokens, 0 on padding; None where all padding is on the right,
            which causal attention never looks at (Unsloth's kernels read a mask back to see that,
            and the CPU waits).

    Returns:
        (B, T, H) hidden states; the head times them is the model's logits.
    """
    base = causal_lm(model)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if on_cuda() and not getattr(base, "_lwf_decoder_forward", False):
        own = base.forward
        with environment(UNSLOTH_RETURN_HIDDEN_STATES="1"):
            hidden = _carried(model, base, batch, lambda *a, **k: own(*a, **k).logits)
        if hidden.shape[-1] == base.config.get_text_config().hidden_size:
            return hidden
        base._lwf_decoder_forward = True
    decoder = base.base_model

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        return decoder(*args, **given).last_hidden_state

    return _carried(model, base, batch, forward)


def model_logits(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
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


def _carried(model: Any, base: Any, batch: dict[str, Any], forward: Any) -> Tensor:
    """What `forward` gives in place of the base's forward, called through every wrapper."""
    own = vars(base).get("forward")
    base.forward = lambda *args, **kwargs: Carried(forward(*args, **kwargs))
    try:
        states: Tensor = model(**batch).states
        return states
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
    with torch.no_grad(), uncheckpointed(model):
        hidden = model_hidden(model, input_ids, None).to(head.weight.dtype)
        ours = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
        if head.softcap:
            ours = head.softcap * torch.tanh(ours / head.softcap)
        theirs = model_logits(model, input_ids, None).float()
    if theirs.shape != ours.shape:
        return False
    # On CUDA mixed precision may act inside the forward of a model that is fp32 outside.
    coarse = on_cuda() or head.weight.dtype != torch.float32 or hidden.dtype != torch.float32
    return bool(
        (ours - theirs).abs().max() <= (0.02 if coarse else 1e-3) * theirs.abs().max().clamp(min=1)
    )
