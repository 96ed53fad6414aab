"""One user of a model at a time, and the model handed back as it was found.

Adapter on/off, training mode and the KV cache are global state of a model: two threads that use it
at once (a panel generating while training runs) would silently give each other the wrong model.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from lwf_unsloth.errors import ModelError

_ABSENT = object()

_MODULE_STATE = (
    "training",
    "gradient_checkpointing",
    "generation_config",
    "_flag_for_generation",  # Unsloth's "take the decoding path"
    "_disable_adapters",  # PEFT, each layer
    "_active_adapter",
    "_adapters_disabled",  # PEFT, the model
)
"""Attributes of a module that generation or evaluation changes; absent stays absent."""

_LEFTOVERS = ("paged_attention", "paged_attention_K", "paged_attention_V")
"""KV buffers that Unsloth's decoding leaves on attention modules: memory that training needs."""

_SWITCHES = ("UNSLOTH_RETURN_HIDDEN_STATES", "UNSLOTH_RETURN_LOGITS")
"""Environment switches that Unsloth's for_inference / for_training write."""


class _Use:
    """Who holds a model: a lock of the holding thread and what it does."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.doing = ""


_GUARD = threading.Lock()
_USES: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()


def innermost(model: Any) -> Any:
    """The base model under DDP, torch.compile and PEFT wrappers, which all share its state."""
    for name in ("module", "_orig_mod"):
        inner = vars(model).get("_modules", {}).get(name)
        if inner is not None:
            return innermost(inner)
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


@contextmanager
def model_lock(model: Any, doing: str) -> Iterator[None]:
    """Holds `model` for this thread; nested use in the same thread (a callback) is fine.

    Args:
        model: The model, wrapped or not: all wrappers of one base model share the lock.
        doing: What the caller does with it ("training"), for the message to another thread.

    Raises:
        ModelError: Another thread holds the model.
    """
    with _GUARD:
        use = _USES.setdefault(innermost(model), _Use())
    if not use.lock.acquire(blocking=False):
        raise ModelError(
            f"The model is in use by another thread ({use.doing or 'busy'}), so {doing} is refused "
            "now: adapter, mode and cache belong to the model, and each thread would change the "
            "other's result. Wait until the other has ended, or load a second model."
        )
    outer, use.doing = use.doing, use.doing or doing
    try:
        yield
    finally:
        use.doing = outer
        use.lock.release()


def _configs(model: Any) -> list[Any]:
    """Every distinct config of the modules and their sub-configs (text_config and the like)."""
    found: dict[int, Any] = {}
    waiting = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "__dict__"):
            found[id(config)] = config
            waiting += [sub for name, sub in vars(config).items() if name.endswith("_config")]
    return list(found.values())


def _tokenizers(model: Any, tokenizer: Any) -> list[Any]:
    """The tokenizer given and those that Unsloth hangs on the model to flip their padding side."""
    hung = [vars(module).get("_saved_temp_tokenizer") for module in model.modules()]
    return [one for one in [tokenizer, *hung] if hasattr(one, "padding_side")]


def _put_back(owner: dict[str, Any], values: dict[str, Any]) -> None:
    """Writes `values` into an object's dict; what was absent is removed."""
    for name, value in values.items():
        if value is _ABSENT:
            owner.pop(name, None)
        else:
            owner[name] = value


@contextmanager
def kept_state(model: Any, tokenizer: Any = None) -> Iterator[None]:
    """Restores what generating or evaluating changes, also after an exception.

    Kept: training mode and gradient checkpointing of every module, adapter on/off and active
    adapter of every layer, requires_grad of every parameter, use_cache of every config,
    generation_config, the tokenizers' padding side and Unsloth's environment switches. Buffers left
    by Unsloth's decoding are dropped.

    Args:
        model: A torch module, PEFT or not.
        tokenizer: Tokenizer whose padding side is kept, if any.
    """
    modules = [
        (vars(module), {name: vars(module).get(name, _ABSENT) for name in _MODULE_STATE})
        for module in model.modules()
    ]
    configs = [
        (vars(config), {"use_cache": vars(config).get("use_cache", _ABSENT)})
        for config in _configs(model)
    ]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    sides = [(one, one.padding_side) for one in _tokenizers(model, tokenizer)]
    switches = {name: os.environ.get(name) for name in _SWITCHES}
    try:
        yield
    finally:
        for owner, values in [*modules, *configs]:
            _put_back(owner, values)
        for owner, _ in modules:
            _put_back(owner, dict.fromkeys(_LEFTOVERS, _ABSENT))
        for parameter, wanted in grads:
            vars(parameter).pop("_fast_lora", None)  # Unsloth's decoding copy of a LoRA weight
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        for one, side in sides:
            one.padding_side = side
        for name, switch in switches.items():
            os.environ.pop(name, None) if switch is None else os.environ.update({name: switch})


def why_not_base(model: Any) -> str:
    """Why a PEFT model is not its base with the adapter off ("" where it is), as part of a
    sentence that begins with the adapter.
    """
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        return "is merged into the weights"
    configs = getattr(model, "peft_config", {}).values()
    biases = {getattr(config, "bias", "none") for config in configs} - {"none"}
    return f"trains biases (bias={max(biases)!r})" if biases else ""
