"""Rows as the model sees them: token ids and labels with explicit BOS and EOS.

`prompt_ids` is the one function that turns an instruction into ids, for training, generation and
evaluation. Prompt and response are encoded apart and joined as ids, so the ids of the prompt are a
prefix of the ids of the whole row whatever the response starts with. Control tokens come from here
and from the template only: a row that contains the text of one (``</s>``, ``<|im_end|>``) has it
encoded as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lwf_unsloth.codec import IGNORED, Codec, check_tokenizer
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.load_report import number_list
from lwf_unsloth.rows import as_rows, is_text_row
from lwf_unsloth.templates import (
    ALPACA,
    PLAIN,
    PromptTemplate,
    get_template,
    set_template,
    text_tokenizer,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "ALPACA",
    "IGNORED",
    "PLAIN",
    "EncodeReport",
    "EncodedRow",
    "PromptTemplate",
    "check_tokenizer",
    "encode_row",
    "encode_rows",
    "get_template",
    "is_text_row",
    "prompt_ids",
    "prompts_ids",
    "row_kind",
    "set_template",
]

_BATCH_ROWS = 1000  # rows given to the tokenizer at once


class EncodedRow(NamedTuple):
    """One row as ids.

    input_ids: BOS (where the model has one), prompt, response, EOS (where the row is whole).
    labels: the same length, -100 where nothing is learned; the first is always -100, for nothing
        predicts it, so that the count of labels is the count of supervised tokens after the shift.
    cut: the row was longer than max_length, or had been cut before; it has no EOS.
    supervised: labels that are not -100.
    prompt_length: ids before the response, 1 or 0 (the BOS) for a text row.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool
    supervised: int
    prompt_length: int


@dataclass
class EncodeReport:
    """What became of the rows. Row numbers count from 1; rows == kept + len(dropped)."""

    rows: int = 0
    kept: int = 0
    cut: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    supervised_tokens: int = 0
    longest: int = 0
    max_length: int | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows encoded, {self.kept} kept, {self.supervised_tokens} supervised "
            "tokens, "
            f"longest {self.longest} tokens"
        ]
        if self.cut:
            lines.append(
                f"  cut at max_length={self.max_length} (their end and EOS are lost): "
                f"{number_list(self.cut)}"
            )
        if self.dropped:
            lines.append(
                f"  dropped, no supervised token at max_length={self.max_length}: "
                f"{number_list(self.dropped)}"
            )
        return "\n".join(lines)


def prompt_ids(
    tokenizer: Any, instruction: str, input: str = "", template: PromptTemplate | None = None
) -> list[int]:
    """The ids of a prompt, with BOS exactly once where the model has one.

    Args:
        tokenizer: a transformers tokenizer, or a processor that holds one.
        instruction: the instruction; any text, braces and control-token text included.
        input: further context; blank or None means none.
        template: another template than the tokenizer's own (`get_template`).
    """
    return prompts_ids(tokenizer, [(instruction, input or "")], template)[0]


def prompts_ids(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], template: PromptTemplate | None = None
) -> list[list[int]]:
    """`prompt_ids` of many (instruction, input): the tokenizer is looked at once."""
    codec = Codec(text_tokenizer(tokenizer))
    return codec.prompts(pairs, template or get_template(tokenizer))


def encode_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    *,
    max_length: int | None,
    train_on: str = "response",
    template: PromptTemplate | None = None,
) -> EncodedRow:
    """One Alpaca row (instruction, input, output) or text row (text) as ids and labels.

    A text row is learned whole, whatever ``train_on`` says. A response that already ends in the
    EOS text gets one EOS, not two; so does a text row that starts with the BOS text get one BOS.

    Args:
        tokenizer: a transformers tokenizer with an EOS token.
        row: one row; ``whole=False`` says that its text or response had been cut already: no EOS.
        max_length: longest row in tokens; a longer one loses its end (and EOS). None: no limit.
        train_on: "response", or "all" for prompt and response.
        template: another template than the tokenizer's own.

    Raises:
        ConfigError: train_on or max_length out of range.
        DataError: a row that is neither kind, or a tokenizer without EOS.
    """
    encoder = _Encoder(tokenizer, max_length, train_on, template)
    return encoder.encode([row], first=1)[0]


def encode_rows(
    tokenizer: Any,
    rows: Dataset | Iterable[Mapping[str, Any]],
    *,
    max_length: int | None,
    train_on: str = "response",
    template: PromptTemplate | None = None,
    is_rehearsal: bool = False,
) -> tuple[Dataset, EncodeReport]:
    """All rows as a dataset of input_ids, labels, prompt_length and is_rehearsal, in their order.

    Nothing is cached on disk. Rows without a supervised token are dropped, counted and named in the
    report. The arguments are those of `encode_row`.

    Raises:
        DataError: no row is left; the message names max_length.
    """
    encoder = _Encoder(tokenizer, max_length, train_on, template)
    report = EncodeReport(max_length=max_length)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "prompt_length": []}
    for batch in _batches(as_rows(rows, "rows to encode")):
        for row in encoder.encode(batch, first=report.rows + 1):
            report.rows += 1
            if row.supervised == 0:
                report.dropped.append(report.rows)
                continue
            report.kept += 1
            if row.cut:
                report.cut.append(report.rows)
            report.supervised_tokens += row.supervised
            report.longest = max(report.longest, len(row.input_ids))
            columns["input_ids"].append(row.input_ids)
            columns["labels"].append(row.labels)
            columns["prompt_length"].append(row.prompt_length)
    _refuse_empty(report)
    return _as_dataset(columns, is_rehearsal), report


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    """The rows in lists of at most _BATCH_ROWS."""
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _as_dataset(columns: dict[str, list[Any]], is_rehearsal: bool) -> Dataset:
    """The encoded columns with fixed types, so that sets with and without rows can be joined."""
    from datasets import Dataset, Features, Sequence, Value

    features = Features(
        {
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "prompt_length": Value("int32"),
            "is_rehearsal": Value("bool"),
        }
    )
    roles = {"is_rehearsal": [is_rehearsal] * len(columns["input_ids"])}
    return Dataset.from_dict(columns | roles, features=features)


def _refuse_empty(report: EncodeReport) -> None:
    if report.rows == 0:
        raise DataError("There are no rows to encode; at least one is needed. Look at the source.")
    if report.kept == 0:
        raise DataError(
            f"All {report.rows} rows have no supervised token at max_length={report.max_length} "
            f"(rows {number_list(report.dropped)}): prompts alone fill the window, or the "
            "responses "
            "hold no text, so nothing could be learned. Raise max_length or shorten the prompts."
        )


class _Encoder:
    """The settings of one encoding run, checked once."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None,
        train_on: str,
        template: PromptTemplate | None,
    ) -> None:
        if train_on not in ("response", "all"):
            raise ConfigError(
                f"train_on is {train_on!r}; it must be 'response' (labels on the response only) or "
                "'all' (prompt too)."
            )
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
        ):
            raise ConfigError(
                f"max_length is {max_length!r}; it must be a whole number of tokens of 1 or "
                "more, or "
                "None for no limit."
            )
        self.codec = Codec(text_tokenizer(tokenizer), needs_eos=True)
        self.template = template or get_template(tokenizer)
        self.max_length = max_length
        self.train_on = train_on

    def encode(self, rows: list[Mapping[str, Any]], first: int) -> list[EncodedRow]:
        """The rows in their order; `first` is the number of the first in messages."""
        heads: list[list[int]] = [[] for _ in rows]
        kinds = [row_kind(row, number) for number, row in enumerate(rows, start=first)]
        alpaca = [place for place, kind in enumerate(kinds) if kind == "alpaca"]
        texts = [place for place, kind in enumerate(kinds) if kind == "text"]
        pairs = [(rows[place]["instruction"], rows[place].get("input") or "") for place in alpaca]
        for place, ids in zip(alpaca, self.codec.prompts(pairs, self.template), strict=True):
            heads[place] = ids
        bodies: list[list[int]] = [[] for _ in rows]
        answers = self.codec.responses([rows[place]["output"] for place in alpaca])
        for place, ids in zip(alpaca, answers, strict=True):
            bodies[place] = ids
        passages = self.codec.passages([rows[place]["text"] for place in texts])
        for place, ids in zip(texts, passages, strict=True):
            heads[place], bodies[place] = self.codec.bos, ids
        return [
            self._finish(heads[place], bodies[place], rows[place], kinds[place])
            for place in range(len(rows))
        ]

    def _finish(
        self, head: list[int], body: list[int], row: Mapping[str, Any], kind: str
    ) -> EncodedRow:
        """Join, end, cut and label one row."""
        whole = row.get("whole") is not False
        input_ids = head + body + (self.codec.eos if whole else [])
        limit = len(input_ids) if self.max_length is None else self.max_length
        cut = not whole or len(input_ids) > limit
        input_ids = input_ids[:limit]
        start = len(head) if kind == "alpaca" and self.train_on == "response" else 0
        start = max(1, start) if body else len(input_ids)  # a bare EOS is no response
        labels = [IGNORED] * min(start, len(input_ids)) + input_ids[start:]
        supervised = sum(label != IGNORED for label in labels)
        return EncodedRow(input_ids, labels, cut, supervised, min(len(head), len(input_ids)))


def row_kind(row: Mapping[str, Any], number: int) -> str:
    """Which kind a row is, "alpaca" or "text"; every field that will be used is text.

    Raises:
        DataError: the row is neither.
    """
    if is_text_row(row):
        kind, needed = "text", ["text"]
    else:
        kind, needed = "alpaca", ["instruction", "output"]
    optional = row.get("input") if kind == "alpaca" else None
    wrong = [name for name in needed if not isinstance(row.get(name), str)]
    if optional is not None and not isinstance(optional, str):
        wrong.append("input")
    if wrong:
        found = {str(name): type(value).__name__ for name, value in row.items()}
        raise DataError(
            f"Row {number} has {found}; {' and '.join(wrong)} must be text. An Alpaca row has "
            "instruction and output (input optional), a plain passage has text. Load the file with "
            "load_alpaca or load_text, which check and convert."
        )
    return kind
