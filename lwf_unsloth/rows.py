"""Raw rows checked field by field: each is kept as text, or dropped under a named reason."""

from __future__ import annotations

import math
import numbers
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from lwf_unsloth.errors import DataError
from lwf_unsloth.formats import NumberText, RawRow, RawTable, RepeatedKeys
from lwf_unsloth.load_report import SourceReport, number_list

_CHAT_COLUMNS = (
    {"conversations"},
    {"conversation"},
    {"messages"},
    {"from", "value"},
    {"role", "content"},
)
RIGHT = "answer_contains"
"""Optional column of held-out rows: what makes an answer right; `evaluate` looks for it."""
_KINDS = {
    "str": "text",
    "dict": "an object",
    "list": "a list",
    "NoneType": "null",
    "bool": "a truth value",
}


@dataclass
class Row:
    """One kept row. origin: the place of its table among all tables; number: its number there."""

    origin: int
    number: int
    fields: dict[str, Any] = field(default_factory=dict)


class _NotText(Exception):
    """A value that is no text and no number; its argument says what it is."""


def check_rows(
    table: RawTable, origin: int, mapping: Mapping[str, str], required: Collection[str]
) -> tuple[list[Row], SourceReport]:
    """The usable rows of a table and the report of the others.

    Args:
        table: rows as they were read.
        origin: the table's place among all tables.
        mapping: our field -> the table's column.
        required: the fields that a row must have text in; the others may be empty.

    Raises:
        DataError: no rows, no such columns, chat data, or no usable row.
    """
    report = SourceReport(table.name, table.format, rows_read=len(table.rows))
    if not table.rows:
        header = f" (columns: {', '.join(table.columns)})" if table.columns else ""
        raise DataError(f"{table.name} has no rows{header}. At least one is needed.")
    columns = _columns(table, mapping)
    _check_columns(table, columns, mapping, required)
    used = {*mapping.values(), RIGHT} if "output" in mapping else set(mapping.values())
    report.unused = [column for column in columns if column not in used]
    kept = []
    for raw in table.rows:
        fields, reason = _fields(raw, mapping, required, report)
        if reason:
            report.drop(reason, raw.number)
        else:
            kept.append(Row(origin, raw.number, fields))
    if not kept:
        reasons = "; ".join(f"{why}: {number_list(rows)}" for why, rows in report.dropped.items())
        raise DataError(
            f"{table.name}: none of {len(table.rows)} rows can be used. {reasons}. Repair the "
            "rows, or "
            "name the right columns with columns=."
        )
    return kept, report


def _columns(table: RawTable, mapping: Mapping[str, str]) -> list[str]:
    """The header, or every key that some row has; plain text rows have the mapped column."""
    if table.columns is not None:
        return table.columns
    found: dict[str, None] = {}
    for raw in table.rows:
        if isinstance(raw.value, Mapping):
            found.update(dict.fromkeys(map(str, raw.value)))
        elif isinstance(raw.value, str) and "text" in mapping:
            found[mapping["text"]] = None
    return list(found)


def _check_columns(
    table: RawTable, columns: list[str], mapping: Mapping[str, str], required: Collection[str]
) -> None:
    missing = [mapping[name] for name in required if mapping[name] not in columns]
    missing += [
        column for name, column in mapping.items() if name != column and column not in columns
    ]
    if not missing:
        return
    _refuse_chat(table, columns)
    found = ", ".join(map(repr, columns[:20])) or _kind(table.rows[0].value)
    number = table.rows[0].number
    raise DataError(
        f"{table.name}: the columns {' and '.join(map(repr, dict.fromkeys(missing)))} are missing. "
        f"Found (from row {number} on): {found}. Needed: {', '.join(mapping.values())}"
        f"{' (input may be absent)' if 'input' in mapping else ''}.{_hint(columns, mapping)}"
    )


def _hint(columns: list[str], mapping: Mapping[str, str]) -> str:
    """What to do about the wrong columns, as far as they tell."""
    glued = [c for c in columns if all(name in c for name in mapping if name != "input")]
    if "instruction" in mapping and glued:
        return f" The header is glued into one name, {glued[0]!r}: write the columns apart."
    if "instruction" in mapping and columns == ["text"]:
        return " These are plain passages: use load_text."
    if "text" in mapping and {"instruction", "output"} <= set(columns):
        return " These are Alpaca rows: use load_alpaca."
    if "text" in mapping:
        return " Name the column of the passages with column=."
    return " Name them with columns={'instruction': ..., 'output': ...}."


def _refuse_chat(table: RawTable, columns: list[str]) -> None:
    """Chat data has its own shape; guessing at it would train on str(list)."""
    names = set(columns)
    for raw in table.rows[:1]:
        turns = raw.value if isinstance(raw.value, list) else []
        names.update(str(key) for turn in turns if isinstance(turn, Mapping) for key in turn)
    if any(chat <= names for chat in _CHAT_COLUMNS):
        raise DataError(
            f"{table.name} looks like ShareGPT or chat data (keys: "
            f"{', '.join(sorted(names)[:12])}). "
            "load_alpaca reads rows of instruction, input and output and does not guess at turns. "
            "Write each question and answer as {'instruction': question, 'output': answer}."
        )


def _fields(
    raw: RawRow, mapping: Mapping[str, str], required: Collection[str], report: SourceReport
) -> tuple[dict[str, Any], str]:
    """The row's fields as text, and why it is dropped ("" where it is kept)."""
    value = raw.value
    if raw.fault:
        return {}, raw.fault
    if isinstance(value, str) and "text" in mapping:
        value = {mapping["text"]: value}
    if not isinstance(value, Mapping):
        return {}, f"the row is {_kind(value)}, not an object"
    if isinstance(value, RepeatedKeys):
        return {}, f"the key {value.key!r} stands twice"
    fields: dict[str, Any] = {}
    converted = False
    for name, column in mapping.items():
        try:
            text, was_number = as_text(value.get(column))
        except _NotText as error:
            return {}, f"{column!r} is {error}, not text"
        except UnicodeEncodeError:
            return {}, f"{column!r} has half a surrogate pair, which is no valid text"
        if _is_blank(text) and name in required:
            return (
                {},
                f"{column!r} is empty or null" if column in value else f"{column!r} is missing",
            )
        fields[name] = "" if _is_blank(text) else text
        converted = converted or was_number
    if value.get("whole") is False:  # written by the model and cut: it must get no EOS
        fields["whole"] = False
    if RIGHT in value and "output" in mapping:
        try:
            fields[RIGHT] = as_text(value[RIGHT])[0].strip()
        except (_NotText, UnicodeEncodeError):
            return {}, f"{RIGHT!r} is {_kind(value[RIGHT])}, not text"
    if converted:
        report.converted.append(raw.number)
    return fields, ""


def _is_blank(text: str) -> bool:
    """Whether there is nothing to read: white space, zero-width and direction marks alone."""
    return all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def as_text(value: object) -> tuple[str, bool]:
    r"""A field's text, and whether it was a number or truth value.

    None, NaN and infinity are missing (""), numbers keep their spelling, line ends become ``\n``.
    """
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return "", False
    if isinstance(value, NumberText):
        return str(value), True
    if isinstance(value, str):
        value.encode("utf-8")
        return value.replace("\r\n", "\n").replace("\r", "\n"), False
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return ("true" if value else "false"), True
    if isinstance(value, (numbers.Real, Decimal)):
        if isinstance(value, numbers.Integral):
            return _digits(int(value)), True
        finite = math.isfinite(value)
        return (str(value), True) if finite else ("", False)
    raise _NotText(_kind(value))


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # Python refuses to write more than 4300 digits
        raise _NotText("a number of more than 4300 digits") from None


def _kind(value: object) -> str:
    if isinstance(value, NumberText):
        return "a number"
    name = type(value).__name__
    return _KINDS.get(name, "a number" if isinstance(value, numbers.Number) else f"of type {name}")


def normalised(text: str) -> str:
    """The text with compatible letters, case and white space made alike, to find repeats."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_text_row(row: Mapping[str, Any]) -> bool:
    """Whether the row is a plain passage (``text``) and not an instruction with a response."""
    return row.get("text") is not None and row.get("instruction") is None


def as_rows(rows: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a Dataset or list, one by one.

    Raises:
        DataError: the rows are no rows, such as both halves of a load at once.
    """
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        hint = (
            f" Take one half: [{next(iter(rows), 'train')!r}]." if isinstance(rows, Mapping) else ""
        )
        raise DataError(
            f"The {what} are a {type(rows).__name__}; a Dataset or a list of dicts is needed.{hint}"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"Row {number} of the {what} is {_kind(row)}; each row must be a dict with "
                "instruction and output, or with text. Load it with load_alpaca or load_text."
            )
        yield row


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What two rows share if they say the same: the whole text, normalised."""
    names = ("text",) if is_text_row(row) else ("instruction", "input", "output")
    return tuple(normalised(str(row.get(name) or "")) for name in names)


def prompt_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The same for what is asked: `row_key` without the output."""
    return row_key(row) if is_text_row(row) else row_key(row)[:2]
