"""Switches inside a model that a pass without training sets for a moment: adapters, dropout,
checkpointing.

Such a pass comes with every batch, so the walk over the model's modules that finds the switches is
kept. For Gemma-2B with LoRA it takes 5 ms or more, PEFT's own `disable_adapter` 70 ms, and the GPU
may wait meanwhile.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

DROPOUT_FIELDS = ("attention_dropout", "attn_dropout", "hidden_dropout", "resid_dropout", "dropout")
ADAPTER_SWITCH = "_disable_adapters"
"""The flag on each of PEFT's layers that its `disable_adapter` sets and every kernel reads."""

Change = tuple[nn.Module, str, Any]
"""Module, attribute, value."""


@dataclass(eq=False)
class Parts:
    """The modules that have a switch, found by one walk."""

    dropouts: list[nn.Module] = field(default_factory=list)
    """Dropout, and embeddings, which may add noise."""
    dropout_fields: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Modules with a dropout probability in an attribute."""
    adapters: list[nn.Module] = field(default_factory=list)
    """PEFT's layers."""
    checkpointed: list[nn.Module] = field(default_factory=list)
    """Modules that may checkpoint."""
    members: set[int] = field(default_factory=set)
    """id of every module walked over."""
    stale: bool = False
    """A member was given a new child since."""


_walks: WeakSet[Parts] = WeakSet()


def _note_child(module: nn.Module, *_: Any) -> None:
    for parts in list(_walks):
        parts.stale = parts.stale or id(module) in parts.members


register_module_module_registration_hook(_note_child)


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model; walks it anew only after a module in it was given a new child."""
    known = vars(model).get("_lwf_parts")
    if isinstance(known, Parts) and not known.stale and id(model) in known.members:
        return known  # a copy of the model is not among them
    parts = Parts()
    for module in model.modules():
        parts.members.add(id(module))
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.Embedding)):
            parts.dropouts.append(module)
        if _has(module, ADAPTER_SWITCH):
            parts.adapters.append(module)
        if _has(module, "gradient_checkpointing"):
            parts.checkpointed.append(module)
        parts.dropout_fields += [(module, name) for name in DROPOUT_FIELDS if name in vars(module)]
    vars(model)["_lwf_parts"] = parts
    _walks.add(parts)
    return parts


def _has(module: nn.Module, name: str) -> bool:
    """Whether the attribute is the module's own: wrappers pass on that of what they wrap."""
    return name in vars(module) or hasattr(type(module), name)


@contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    """Sets attributes for the block and puts back what was there, also after an exception."""
    before = [(module, name, vars(module).get(name, _NOTHING)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            vars(module)[name] = value
        yield
    finally:
        for module, name, value in before:
            if value is _NOTHING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


_NOTHING = object()


def adapters_off(model: nn.Module) -> AbstractContextManager[None] | None:
    """Turns every adapter layer off for the block; None where the model has no such layers.

    Unlike PEFT's `disable_adapter`, what is trainable stays as it is.
    """
    adapters = parts_of(model).adapters
    return changed([(module, ADAPTER_SWITCH, True) for module in adapters]) if adapters else None


def uncheckpointed(model: nn.Module) -> AbstractContextManager[None]:
    """Turns gradient checkpointing off for a block without gradients.

    There it would only copy activations away, and Unsloth would count the pass as a training step's
    when it decides which layers to offload.
    """
    found = [module for module in parts_of(model).checkpointed if module.gradient_checkpointing]
    return changed([(module, "gradient_checkpointing", False) for module in found])


def dropout_off(model: nn.Module) -> AbstractContextManager[None]:
    """Turns dropout (and noise on embeddings) off for the block, and leaves training mode on.

    Eval mode would take other attention and cache paths on CUDA, so the KL would not start at 0.
    """
    parts = parts_of(model)
    changes: list[Change] = [(module, "training", False) for module in parts.dropouts]
    for module, name in parts.dropout_fields:
        value = vars(module)[name]
        if isinstance(value, float) and value > 0:
            changes.append((module, name, 0.0))
    return changed(changes)
