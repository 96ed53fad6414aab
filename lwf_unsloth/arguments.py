"""Whether a public function was called with what its annotations say, before it does any work."""

import builtins
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, ParamSpec, TypeVar

from lwf_unsloth.errors import ConfigError, DataError, LwfError, ModelError
from lwf_unsloth.field_types import short, type_fits, type_hint, type_words

P = ParamSpec("P")
R = TypeVar("R")

OF_DATA = {"source", "rows", "sets", "prompts", "rehearsal", "train_rows"}

PARTS = {
    "model": (("named_modules",), "the model that load_model gives"),
    "tokenizer": (("eos_token_id", "tokenizer"), "the tokenizer that load_model gives"),
}
"""Argument -> attributes of which one tells the thing from a name or a number (a processor holds
its tokenizer), and what it is."""


def checked(*left_out: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function refuse arguments of another type than its annotations name.

    Args:
        *left_out: Arguments that the function checks itself, in words of its own.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            _check(function, signature, left_out, args, kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


def _check(
    function: Callable[..., Any],
    signature: inspect.Signature,
    left_out: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Checks the arguments that were given.

    Raises:
        LwfError: `ModelError`, `DataError` or `ConfigError` by what the argument is.
    """
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise ConfigError(f"{function.__name__}: {error}. It takes {known}.") from None
    hints = _hints(function)
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if name in left_out or kind in (kind.VAR_KEYWORD, kind.VAR_POSITIONAL):
            continue
        if name in PARTS:
            attributes, needed = PARTS[name]
            if not any(hasattr(value, attribute) for attribute in attributes):
                raise _error(name)(
                    f"{function.__name__}: {name} is {short(value)} ({type(value).__name__}), but "
                    f"it must be {needed}."
                )
        elif not type_fits(value, hints.get(name, Any)):
            hint = hints[name]
            shown = "not shown" if name == "token" else short(value)
            raise _error(name)(
                f"{function.__name__}: {name} is {shown} ({type(value).__name__}), but it takes "
                f"{type_words(hint)}.{type_hint(value, hint)}"
            )
        elif isinstance(value, (str, PurePath)) and "\0" in str(value) and _is_path(hints[name]):
            raise _error(name)(
                f"{function.__name__}: {name} is {short(value)}: no path holds a null character."
            )


def _is_path(hint: Any) -> bool:
    parts = {hint, *typing.get_args(hint)}
    return any(isinstance(part, type) and issubclass(part, PurePath) for part in parts)


def _error(name: str) -> type[LwfError]:
    return ModelError if name in PARTS else DataError if name in OF_DATA else ConfigError


class _Names(dict[str, Any]):
    """A module's names for its annotations; one that only type checkers import takes anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Argument -> its annotation."""
    names = _Names(inspect.unwrap(function).__globals__)
    return typing.get_type_hints(function, globalns={}, localns=names)
