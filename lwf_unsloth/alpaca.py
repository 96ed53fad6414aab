"""Load Alpaca rows and plain passages from any source, checked, counted and split before any
mixing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.load_report import LoadReport, SourceReport
from lwf_unsloth.records import (
    ALPACA,
    PLAIN,
    EncodedRow,
    EncodeReport,
    PromptTemplate,
    check_tokenizer,
    encode_row,
    encode_rows,
    get_template,
    prompt_ids,
    set_template,
)
from lwf_unsloth.rows import RIGHT, Row, check_rows, row_key
from lwf_unsloth.selection import NOT_CHOSEN, Plan, choose_rows, grouped, is_count, split_rows
from lwf_unsloth.sources import Wanted, read_source, split_sources

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

__all__ = [
    "ALPACA",
    "PLAIN",
    "AlpacaData",
    "EncodeReport",
    "EncodedRow",
    "LoadReport",
    "PromptTemplate",
    "SourceReport",
    "check_tokenizer",
    "encode_row",
    "encode_rows",
    "get_template",
    "load_alpaca",
    "load_text",
    "prompt_ids",
    "set_template",
    "template_jsonl",
]

_FIELDS = ("instruction", "input", "output")


class AlpacaData(dict[str, "Dataset"]):
    """``{"train": Dataset, "test": Dataset}`` with the report of how they came to be."""

    def __init__(self, train: Dataset, test: Dataset, report: LoadReport) -> None:
        super().__init__(train=train, test=test)
        self.report = report

    def __repr__(self) -> str:
        return f"AlpacaData({str(self.report)})"


@checked()
def load_alpaca(
    source: Any,
    *,
    shares: Sequence[float] | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    test_size: float | int | None = 0.1,
    seed: int = 42,
    split: str = "train",
    token: str | None = None,
) -> AlpacaData:
    r"""Rows of instruction, input and output, and `answer_contains` where a row has it.

    Every row is kept or dropped under a named reason (``.report``). Numbers become text, null, NaN
    and blank outputs are dropped, line ends become ``\n``; repeats are counted and kept, on one
    side of the split. No prompt (case and spaces aside) is both in train and test.

    Args:
        source: hub id, path to JSON, JSONL, CSV or parquet (told by content), folder of these,
            datasets.Dataset or DatasetDict, DataFrame, list of dicts, bytes, or a list of sources.
        shares: with a list of sources, each one's share of the rows, summing to 1; the largest
            such set without repeats is taken.
        columns: our field -> the source's column, e.g. ``{"instruction": "question"}``.
        limit: at most so many rows, drawn with the seed.
        test_size: share (below 1) or number of rows held out; 0 or None for none.
        seed: of the split, the limit and the mix of sources.
        split: which split of a hub data set, DatasetDict or AlpacaData.
        token: hub token for private data.

    Raises:
        DataError: a source that cannot be read or used.
        ConfigError: a setting out of range.
    """
    mapping = _mapping(columns)
    wanted = Wanted(tuple(mapping.values()), split=split, token=token)
    plan = Plan(shares, limit, test_size, seed)
    return _load(source, wanted, mapping, ("instruction", "output"), plan)


@checked()
def load_text(
    source: Any,
    *,
    column: str = "text",
    shares: Sequence[float] | None = None,
    limit: int | None = None,
    test_size: float | int | None = 0.1,
    seed: int = 42,
    max_chars: int | None = None,
    split: str = "train",
    token: str | None = None,
) -> AlpacaData:
    """Plain passages as rows of ``text``.

    Sources and arguments are those of `load_alpaca`; a plain text file is read as paragraphs
    parted by blank lines (or as lines, where all are long), a JSON list may hold strings. A passage
    longer than the window is cut when it is encoded, and counted there: give max_chars to use all
    of long articles.

    Args:
        source: as in `load_alpaca`; also a text file.
        column: the column of the passages.
        shares: as in `load_alpaca`.
        limit: at most so many passages, drawn with the seed.
        test_size: share (below 1) or number of passages held out; 0 or None for none.
        seed: of the split, the limit and the mix of sources.
        max_chars: passages longer than this become several rows, split after a line, sentence or
            word and kept on one side; they have ``whole=False`` and get no EOS. The report counts
            passages, ``report.cut`` has those that were split.
        split: which split of a hub data set, DatasetDict or AlpacaData.
        token: hub token for private data.
    """
    if not isinstance(column, str) or not column:
        raise ConfigError(f"column is {column!r}; it must be the name of the column of passages.")
    if max_chars is not None and not is_count(max_chars):
        raise ConfigError(
            f"max_chars is {max_chars!r}; it must be a whole number of 1 or more, or None."
        )
    wanted = Wanted((column,), text_column=column, split=split, token=token)
    plan = Plan(shares, limit, test_size, seed, max_chars)
    return _load(source, wanted, {"text": column}, ("text",), plan)


def template_jsonl() -> str:
    """A JSONL file to start from: three rows with every field, ready for `load_alpaca`."""
    rows = (
        (
            "Explain in one sentence what this project is for.",
            "",
            "Write the answer here, as you want it.",
        ),
        ("Sum up the text.", "Put the text that the answer needs here.", "The summary goes here."),
        ("List three colours.", "", "1. red\n2. green\n3. blue"),
    )
    lines = [json.dumps(dict(zip(_FIELDS, row, strict=True)), ensure_ascii=False) for row in rows]
    return "\n".join(lines) + "\n"


def _mapping(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Our field -> their column, with the fields not named under their own name."""
    mapping = {name: name for name in _FIELDS}
    if columns is None:
        return mapping
    wrong = not isinstance(columns, Mapping) or set(columns) - set(_FIELDS)
    if wrong or not all(isinstance(column, str) and column for column in columns.values()):
        raise ConfigError(
            f"columns is {columns!r}; it maps our fields ({', '.join(_FIELDS)}) to the source's "
            "columns, e.g. {'instruction': 'question', 'output': 'answer'}."
        )
    mapping.update(columns)
    if len(set(mapping.values())) < len(mapping):
        raise ConfigError(f"columns maps two fields to one column: {mapping}. Name three columns.")
    return mapping


def _load(
    source: Any, wanted: Wanted, mapping: Mapping[str, str], required: tuple[str, ...], plan: Plan
) -> AlpacaData:
    """Read, check, choose, split and report."""
    sources = split_sources(source)
    if plan.shares is not None and len(plan.shares) != len(sources):
        raise ConfigError(
            f"There are {len(plan.shares)} shares for {len(sources)} sources; give one for each."
        )
    report = LoadReport()
    groups: list[list[Row]] = []
    for item in sources:
        group: list[Row] = []
        for table in read_source(item, wanted):
            table.name = _unused_name(table.name, report)
            rows, part = check_rows(table, len(report.sources), mapping, required)
            report.sources.append(part)
            group += rows
        groups.append(group)
    chosen = choose_rows(groups, plan, report)
    train, test = split_rows(chosen, plan, report)
    if len(report.sources) > 1:
        plan.random("train order").shuffle(train)
        plan.random("test order").shuffle(test)
    if plan.max_chars is not None:
        chosen = train + test
        report.cut = [row.number for row in chosen if len(row.fields["text"]) > plan.max_chars]
    _finish(train, test, plan, report)
    marked = any("whole" in row.fields for row in train + test)
    names = (*mapping, "whole") if plan.max_chars is not None or marked else tuple(mapping)
    if any(row.fields.get(RIGHT) for row in train + test):
        names = (*names, RIGHT)
    halves = [_dataset(_pieces(half, plan.max_chars), names) for half in (train, test)]
    return AlpacaData(halves[0], halves[1], report)


def _unused_name(name: str, report: LoadReport) -> str:
    taken = {source.name for source in report.sources}
    new, count = name, 1
    while new in taken:
        count += 1
        new = f"{name} ({count})"
    return new


def _finish(train: list[Row], test: list[Row], plan: Plan, report: LoadReport) -> None:
    """Count what was kept, and tell."""
    kept = train + test
    report.train, report.test = len(train), len(test)
    report.duplicates = len(kept) - len(grouped(kept, row_key))
    for row in kept:
        report.sources[row.origin].kept += 1
    if plan.test_size and not test:
        report.notes.append("too few rows to hold any out: the test half is empty")
    odd = any(why != NOT_CHOSEN for part in report.sources for why in part.dropped)
    logger.log(logging.WARNING if odd else logging.INFO, "%s", report)


def _pieces(rows: list[Row], max_chars: int | None) -> list[dict[str, Any]]:
    """The fields of the rows; a passage longer than max_chars as several, none of them whole."""
    if max_chars is None:
        return [row.fields for row in rows]
    pieces: list[dict[str, Any]] = []
    for row in rows:
        rest = row.fields["text"]
        whole = len(rest) <= max_chars and row.fields.get("whole", True)
        while len(rest) > max_chars:
            cut = _cut_place(rest, max_chars)
            pieces.append({"text": rest[:cut].rstrip(), "whole": False})
            rest = rest[cut:].lstrip()
        if rest:
            pieces.append({"text": rest, "whole": whole})
    return [piece for piece in pieces if piece["text"]]


def _cut_place(text: str, length: int) -> int:
    """Where to cut within `length` characters: after a line, a sentence or a word."""
    head = text[: length + 1]
    for mark in ("\n", ". ", "\u3002", " "):
        place = head.rfind(mark, length // 2)
        if place >= 0:
            return min(length, place + len(mark))
    return length


def _dataset(rows: list[dict[str, Any]], names: Sequence[str]) -> Dataset:
    """The rows as a Dataset with fixed types, also where there is no row."""
    from datasets import Dataset, Features, Value

    types = {name: Value("bool" if name == "whole" else "string") for name in names}
    missing = {"whole": True, RIGHT: ""}
    columns = {name: [row.get(name, missing.get(name)) for row in rows] for name in names}
    return Dataset.from_dict(columns, features=Features(types))
