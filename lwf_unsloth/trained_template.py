"""The template that a loaded adapter has learned to answer in: another one is refused when it is
used, since the answers would be those to prompts that it never saw.
"""

import logging
from collections.abc import Mapping
from typing import Any

from lwf_unsloth.errors import DataError, ModelError
from lwf_unsloth.hidden import unwrap
from lwf_unsloth.switches import ADAPTER_SWITCH
from lwf_unsloth.templates import PromptTemplate, get_template

logger = logging.getLogger(__name__)

NOTE = "lwf_template"
"""Attribute of the model: the `PromptTemplate` its adapter was trained in; None takes any."""


def note_template(model: Any, record: Mapping[str, Any]) -> None:
    """Notes on a model what the record in its adapter's folder says.

    Args:
        model: A PEFT model.
        record: `lwf.json`; empty for an adapter that another tool saved.
    """
    try:
        template = PromptTemplate.from_dict(record["template"])
    except (DataError, KeyError):
        return
    setattr(unwrap(model), NOTE, template)


def check_template(model: Any, tokenizer: Any) -> None:
    """Refuses a tokenizer whose template is not the one that the model's adapter was trained in.

    Raises:
        ModelError: Another one, and the adapter is on.
    """
    trained, now = getattr(unwrap(model), NOTE, None), get_template(tokenizer)
    if trained is None or _same(trained, now) or not _is_on(model):
        return
    raise ModelError(
        f"The adapter was trained in the template {trained.name!r} ({_words(trained)}), and the "
        f"tokenizer has {now.name!r} ({_words(now)}): it would be asked in a form that it never "
        "saw. Take the tokenizer that load_adapter gave, or set_template(tokenizer, "
        f"model.{NOTE}). To see what it does in another one, set model.{NOTE} = None."
    )


def train_in(model: Any, tokenizer: Any) -> None:
    """Says it when an adapter is trained on in another template; from now on that one counts."""
    trained, now = getattr(unwrap(model), NOTE, None), get_template(tokenizer)
    if trained is None or _same(trained, now):
        return
    logger.warning(
        "The adapter was trained in the template %r, and this training takes %r (%s): what it has "
        "learned is served in the new one from now on.",
        *(trained.name, now.name, _words(now)),
    )
    setattr(unwrap(model), NOTE, now)


def _same(one: PromptTemplate, other: PromptTemplate) -> bool:
    """Whether two templates give the same prompts, whatever they are called."""
    return (one.with_input, one.without_input) == (other.with_input, other.without_input)


def _words(template: PromptTemplate) -> str:
    text = template.without_input
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}")


def _is_on(model: Any) -> bool:
    """Whether an adapter acts."""
    switches = [vars(m)[ADAPTER_SWITCH] for m in model.modules() if ADAPTER_SWITCH in vars(m)]
    return not (switches and all(switches))
