"""Named forms of an answer: words added to the instruction, and a start that the answer must have.

A prompt row with `form="table"` asks for a table, and its answer begins with the bar of one: a
model that knows tables but does not think of them is thereby put on the way. Whether the form then
came is said by `diagnose`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.asked import wishes
from lwf_unsloth.errors import DataError
from lwf_unsloth.prose import CJK

_LANGUAGES = {
    "c++": "cpp",
    "c#": "csharp",
    "golang": "go",
    **{
        name: name
        for name in "python javascript typescript java rust ruby php sql bash html".split()
    },
}


@dataclass(frozen=True)
class Form:
    """A form that an answer shall have."""

    name: str
    """What it is called, e.g. "table"; shown in messages."""
    suffix: str = ""
    """Added to an instruction that does not ask for the form already; empty adds nothing."""
    suffix_ja: str = ""
    """The same for a Japanese instruction; empty takes `suffix`."""
    prefix: str = ""
    """What the answer must begin with, part of its text; `{language}` is the programming language
    that the instruction names (else python). Without a space at its end: most tokens hold the space
    before a word, so a model cannot go on well after one."""

    def __post_init__(self) -> None:
        """Checks that the form does something, and that the model can go on after the prefix.

        Raises:
            DataError: Neither suffix nor prefix, no name, or a prefix that ends with a space.
        """
        for field in ("name", "suffix", "suffix_ja", "prefix"):
            if not isinstance(getattr(self, field), str):
                raise DataError(
                    f"Form {self.name!r}: {field} is {getattr(self, field)!r}, but must be text."
                )
        if not self.name.strip() or not (self.suffix or self.suffix_ja or self.prefix):
            raise DataError(
                f"Form {self.name!r} needs a name and a suffix or a prefix: without them a prompt "
                "with it is the prompt without it."
            )
        if self.prefix.endswith((" ", "\t")) or (self.prefix and not self.prefix.strip()):
            raise DataError(
                f"Form {self.name!r}: the prefix {self.prefix!r} ends with a space. The space "
                "belongs to the next word's token, so the model would go on badly: leave it out."
            )

    def instruction(self, asked: str) -> str:
        """The instruction with the words of the form, once."""
        japanese = bool(re.search(f"[{CJK}]", asked))
        added = self.suffix_ja if japanese and self.suffix_ja else self.suffix
        done = any(wish.form == self.name for wish in wishes(asked))
        if not added or done or asked.rstrip().endswith(added):
            return asked
        return asked.rstrip() + ("" if japanese and added == self.suffix_ja else " ") + added

    def start(self, asked: str) -> str:
        """The prefix for an instruction."""
        return self.prefix.replace("{language}", _language(asked))


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("list", "Answer as a numbered list.", "番号付きリストで答えてください。", "1."),
        Form("table", "Answer with a table.", "表で答えてください。", "|"),
        Form(
            "code",
            "Answer with code in a fenced block.",
            "コードで答えてください。",
            "```{language}\n",
        ),
        Form("json", "Answer with valid JSON only.", "JSON形式だけで答えてください。", "{"),
        Form("paragraph", "Answer in one paragraph.", "一段落で答えてください。"),
    )
}
"""The forms that a prompt row can name."""


def shaped(prompt: Any) -> tuple[Any, str]:
    """A prompt with the words of its form, and what its answer must begin with.

    Args:
        prompt: A text, or a row of `instruction`, optionally `input`, and optionally `form`: a name
            of FORMS or a Form of your own.

    Returns:
        The prompt without `form` (as it was where it has none), and the prefix, "" for none.

    Raises:
        DataError: Another form, or a row with one but without an instruction.
    """
    form = prompt.get("form") if isinstance(prompt, Mapping) else None
    if form is None or form == "":
        return prompt, ""
    found = FORMS.get(form) if isinstance(form, str) else form
    if not isinstance(found, Form):
        raise DataError(
            f"form is {form!r:.80}, but must be one of {', '.join(FORMS)}, or a Form of your own: "
            'Form("haiku", suffix="Answer as a haiku."). Without a form leave it out.'
        )
    instruction = prompt.get("instruction")
    if not isinstance(instruction, str):
        return prompt, ""  # read_prompts says what is wrong with it
    row = {name: value for name, value in prompt.items() if name != "form"}
    return {**row, "instruction": found.instruction(instruction)}, found.start(instruction)


def _language(asked: str) -> str:
    """The programming language that an instruction names, as fences write it; else python."""
    for name, tag in _LANGUAGES.items():
        if re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z+#])", asked, re.I):
            return tag
    return "python"
