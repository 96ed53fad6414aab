"""The prompt template: one object renders prompts for training, generation and evaluation alike.

It travels on the tokenizer (``tokenizer.init_kwargs``), so that saving the tokenizer beside an
adapter saves the template it was trained with, and loading it back brings the same template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import DataError

_PLACEHOLDER = re.compile(r"\{(instruction|input)\}")
_TEMPLATE_KEY = "lwf_template"


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with and without an input; each ends where the response begins.

    ``{instruction}`` and ``{input}`` mark the data. Any other brace, in the template or in the
    data, is plain text.

    Raises:
        DataError: a placeholder is missing, or ``{output}`` is in it.
    """

    name: str
    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        for field, needed in (
            ("with_input", ("{instruction}", "{input}")),
            ("without_input", ("{instruction}",)),
        ):
            text = getattr(self, field)
            if not isinstance(text, str) or any(mark not in text for mark in needed):
                raise DataError(
                    f"Template {self.name!r}: {field} is {text!r}; it needs "
                    f"{' and '.join(needed)}. "
                    "Without them a prompt would not hold the row's data. Write the "
                    "placeholders with "
                    "single braces."
                )
            if "{output}" in text:
                raise DataError(
                    f"Template {self.name!r}: {field} has {{output}}; a template ends where the "
                    "response begins, the response and EOS are added after it. Cut it at {output}."
                )
        if "{input}" in self.without_input:
            raise DataError(
                f"Template {self.name!r}: without_input has {{input}}, which stays empty there. "
                "Leave "
                "it out: this half serves the rows that have no input."
            )

    def pieces(self, instruction: str, input: str = "") -> list[tuple[str, bool]]:
        """The prompt as (text, is_data) pieces; the template's own text is told from the row's."""
        template = self.with_input if input and input.strip() else self.without_input
        data = {"instruction": instruction, "input": input}
        parts = _PLACEHOLDER.split(template)  # literal, name, literal, name, ... literal
        return [
            (data[part], True) if place % 2 else (part, False) for place, part in enumerate(parts)
        ]

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt as text; a blank input takes the half without input."""
        return "".join(text for text, _ in self.pieces(instruction, input))

    def to_dict(self) -> dict[str, str]:
        """A plain dict for a tokenizer's or adapter's configuration file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """The template of `to_dict`.

        Raises:
            DataError: another shape than `to_dict` writes.
        """
        keys = {"name", "with_input", "without_input"}
        if not isinstance(values, Mapping) or set(values) != keys:
            found = (
                sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            )
            raise DataError(
                f"A saved template has {found}; needed are {sorted(keys)}. The configuration "
                "file was "
                "changed by hand or written by another version: set the template again with "
                "set_template."
            )
        return cls(**{key: values[key] for key in keys})


ALPACA = PromptTemplate(
    name="alpaca",
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    without_input=(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
)
"""The two standard prompts of Stanford Alpaca (Taori et al., 2023), with a newline before the
response.
"""

PLAIN = PromptTemplate(
    name="plain", with_input="{instruction}\n\n{input}\n\n", without_input="{instruction}\n\n"
)
"""No markers: the instruction, a blank line, the response."""


def text_tokenizer(tokenizer: Any) -> Any:
    """The text tokenizer inside a multimodal processor, or the tokenizer itself."""
    inner = getattr(tokenizer, "tokenizer", None)
    return inner if inner is not None and hasattr(inner, "init_kwargs") else tokenizer


@checked("template")
def set_template(tokenizer: Any, template: PromptTemplate) -> None:
    """Put the template on the tokenizer; it is written by ``tokenizer.save_pretrained``."""
    if not isinstance(template, PromptTemplate):
        raise DataError(
            f"set_template got a {type(template).__name__}; it needs a PromptTemplate, so that the "
            "halves with and without input are both known. Use PromptTemplate(name, with_input, "
            "without_input)."
        )
    text_tokenizer(tokenizer).init_kwargs[_TEMPLATE_KEY] = template.to_dict()


def get_template(tokenizer: Any) -> PromptTemplate:
    """The template on the tokenizer; ALPACA where none was set."""
    values = getattr(text_tokenizer(tokenizer), "init_kwargs", {}).get(_TEMPLATE_KEY)
    return ALPACA if values is None else PromptTemplate.from_dict(values)
