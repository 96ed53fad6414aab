"""Whether a setting has the type and the range of its field, before any library reads it.

Dataclasses take any value. A learning rate that is the text "2e-4", a flag that is the text "no"
(which counts as yes), a length that is a list: each would fail far from its cause, or worse, train.
"""

import collections.abc
import enum
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from lwf_unsloth.errors import ConfigError

SEED_MOST = 2**32 - 1  # the largest that numpy takes

COUNTS = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length "
    "save_total_limit eval_accumulation_steps dataset_num_proc pad_to_multiple_of lwf_cache_k "
    "self_rehearsal_rows torch_empty_cache_steps dataloader_prefetch_factor max_seq_length r "
    "lora_alpha ddp_timeout lwf_max_bad_steps"
).split()
NOT_NEGATIVE = (
    "learning_rate warmup_steps weight_decay max_grad_norm eval_delay dataloader_num_workers "
    "neftune_noise_alpha"
).split()
POSITIVE = "num_train_epochs logging_steps save_steps eval_steps adam_epsilon".split()
SHARES = "adam_beta1 adam_beta2".split()
SEEDS = "seed data_seed random_state".split()
PATHS = "output_dir lwf_cache_dir resume_from_checkpoint model_name".split()


def check_fields(config: Any) -> None:
    """Checks every field of a dataclass of settings against its annotation and its range.

    Args:
        config: `LwFConfig`, `ModelConfig`, or a class below one.

    Raises:
        ConfigError: Names the first field that is wrong, its value, and what it takes.
    """
    hints = _hints(config.__class__)
    for field in fields(config):
        if not field.init:
            continue
        name, value = field.name, getattr(config, field.name)
        if name == "report_to":
            _check_report_to(value)
            continue
        if not type_fits(value, hints[name]):
            shown = "not shown" if "token" in name else short(value)
            raise ConfigError(
                f"{name} is {shown} ({type(value).__name__}), but it takes "
                f"{type_words(hints[name])}.{type_hint(value, hints[name])}"
            )
        if value is not None:
            _check_range(name, value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check_report_to(value: Any) -> None:
    """One service or several, by name."""
    if value is None or isinstance(value, str):
        return
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return
    raise ConfigError(
        f"report_to is {short(value)}, but it takes the name of a service, a list of names, or "
        '"none".'
    )


def type_fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; annotations that are not known take anything."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(type_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value is part or value == part for part in parts)
    if hint in (None, type(None)):
        return value is None
    if origin in (list, tuple) or hint in (list, tuple):
        given = isinstance(value, (list, tuple))
        return given and all(type_fits(item, parts[0]) for item in value if parts)
    if origin is dict or hint is dict:
        return isinstance(value, dict) or is_dataclass(value)  # what TRL makes of a dict
    if origin is collections.abc.Sequence:
        listed = isinstance(value, (list, tuple, collections.abc.Sequence))
        plain = listed and not isinstance(value, (str, bytes))
        return plain and all(type_fits(item, parts[0]) for item in value if parts)
    if origin is type or not isinstance(origin or hint, type):
        return True
    return _is_a(value, origin or hint)


def _is_a(value: Any, kind: type) -> bool:
    """The plain types: a bool is no number, a whole number is a float, a path is a text."""
    flag = isinstance(value, bool)
    if kind is bool:
        return flag
    if kind is int:
        return isinstance(value, numbers.Integral) and not flag
    if kind is float:
        return isinstance(value, numbers.Real) and not flag and _is_finite(value)
    if kind is str:
        return isinstance(value, (str, os.PathLike, enum.Enum))
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that only type checkers look at
        return True


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False


def type_words(hint: Any) -> str:
    """An annotation in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        said = [type_words(part) for part in parts if part is not type(None)]
        said += ["None"] * (type(None) in parts)
        return " or ".join(dict.fromkeys(said))
    if origin in (list, tuple) or hint in (list, tuple):
        return _list_words(parts)
    if origin is typing.Literal:
        return " or ".join(map(repr, parts))
    if origin is collections.abc.Sequence:
        return _list_words(parts)
    plain = {
        bool: "True or False",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        dict: "a dict",
        collections.abc.Mapping: "a dict",
        collections.abc.Iterable: "a list",
        collections.abc.Callable: "a function",
    }
    kind = origin or hint
    return plain.get(kind, getattr(kind, "__name__", str(kind)))


def _list_words(parts: tuple[Any, ...]) -> str:
    """A list, and of what where that is one plain type."""
    named = {int: " of whole numbers", float: " of finite numbers", str: " of texts"}
    return "a list" + (named.get(parts[0], "") if parts else "")


def type_hint(value: Any, hint: Any) -> str:
    """What is meant most likely, where a text stands for a number or a flag."""
    if not isinstance(value, str):
        return ""
    kinds = {hint, *typing.get_args(hint)}
    if bool in kinds:
        return " Any text would count as True: write it without quotes."
    if kinds & {int, float}:
        return " Write the number without quotes."
    return ""


def _check_range(name: str, value: Any) -> None:
    """The range of a field whose type is right."""
    whole = isinstance(value, numbers.Integral)
    rules: tuple[tuple[list[str], Callable[[Any], bool], str], ...] = (
        (COUNTS, lambda v: v >= 1, "1 or more"),
        (NOT_NEGATIVE, lambda v: v >= 0, "0 or more"),
        (POSITIVE, lambda v: v > 0, "more than 0"),
        (SHARES, lambda v: 0 <= v < 1, "at least 0 and under 1"),
        (SEEDS, lambda v: 0 <= v <= SEED_MOST, f"0 to {SEED_MOST}"),
        (["max_steps"], lambda v: v == -1 or v >= 1, "1 or more, or -1 for num_train_epochs"),
    )
    for names, holds, said in rules:
        if name in names and not holds(value):
            raise ConfigError(f"{name} is {short(value)}, but it must be {said}.")
    if whole and name not in SEEDS and abs(int(value)) > 2**62:
        raise ConfigError(f"{name} is {short(value)}: no machine counts so far.")
    if name in PATHS and "\0" in os.fspath(value):
        raise ConfigError(f"{name} is {short(value)}: no path holds a null character.")


def short(value: Any) -> str:
    """A value as code, not longer than a line."""
    said = repr(value)
    return said if len(said) <= 80 else said[:77] + "..."
