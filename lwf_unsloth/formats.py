"""Bytes to rows: JSON, JSONL, CSV, TSV, parquet and plain text, told apart by content, not by name.

Nothing is guessed in silence: bytes that are not UTF-8 (or UTF-16/32 with a byte order mark) are
    an error that names the byte, a row that cannot be read keeps its number and the reason.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.errors import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PACKED = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip archive (or an Excel workbook)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"ARROW1": "an Arrow file",
}
_CSV_NULLS = frozenset(("", "nan", "NaN", "NAN", "null", "NULL", "None", "<NA>"))
_DELIMITERS = ",\t;|"
MOST_BYTES = 2 << 30
"""Bytes of the largest file, and of what a packed one may unpack to."""
_ROW_BYTES = 64
"""What a row takes at least, whatever it holds."""
_LONG_LINE = 200  # characters; no one wraps text so late


class NumberText(str):
    """A number of a JSON file as it is written there: 3.50 stays 3.50, and no digit is lost."""


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which a key stands twice, so that one of its values would be lost."""

    key: str = ""


@dataclass(frozen=True)
class RawRow:
    """One row as it was read.

    number: counted from 1; in JSONL the line.
    value: a mapping where all is well, or whatever stood there.
    fault: why it could not be read, or "".
    """

    number: int
    value: object
    fault: str = ""


@dataclass
class RawTable:
    """The rows of one file or data set. columns: what its header has, or None (look at the
    rows).
    """

    name: str
    format: str
    rows: list[RawRow]
    columns: list[str] | None = None


def read_bytes(
    data: bytes, name: str, *, expected: Collection[str], text_column: str | None = None
) -> RawTable:
    """The rows of a file's content.

    Args:
        data: the whole content.
        name: the name for messages; its ending decides only between CSV and plain text.
        expected: the columns looked for; they help to find the delimiter of a CSV file.
        text_column: set where plain passages are wanted; then what is no table is plain text, and
            its paragraphs (parted by blank lines) are the rows.

    Raises:
        DataError: empty, packed, not text, or damaged as a whole.
    """
    if data[:4] == b"PAR1":
        return _read_parquet(data, name, expected)
    text = _decode(data, name)
    start = text.lstrip()[:1]
    if not start:
        raise DataError(f"{name} is empty ({len(data)} bytes). It needs at least one row.")
    if text_column is not None and not _is_table(text, name, start, text_column):
        return _read_paragraphs(text, name)
    if start in "[{":
        return _read_json(text, name)
    return _read_csv(text, name, expected)


def _decode(data: bytes, name: str) -> str:
    for magic, what in _PACKED.items():
        if data.startswith(magic):
            raise DataError(
                f"{name} is {what}; unpacked JSON, JSONL, CSV, parquet or text is needed."
            )
    encoding = next((codec for mark, codec in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(
            f"{name} is not {encoding.upper()}: byte 0x{byte:02x} at offset {error.start} (line "
            f"{data.count(10, 0, error.start) + 1}). Decoding it by guess could train on wrong "
            "letters. "
            "Save the file as UTF-8; if it came from Windows it may be cp1252: "
            "text = open(path, encoding='cp1252').read()."
        ) from None
    head = text[:400]
    if head.count("\0") * 4 > len(head):
        raise DataError(
            f"{name} is full of zero bytes: UTF-16 without a byte order mark, or no text at all. "
            "Save "
            "it as UTF-8."
        )
    return text.removeprefix("\ufeff")


def _is_table(text: str, name: str, start: str, column: str) -> bool:
    """Whether a file for plain passages is JSON, JSONL or CSV (else it is plain text)."""
    suffix = name.lower().rpartition(".")[2]
    if start in "[{":
        if suffix in ("json", "jsonl"):
            return True
        first = next(line for line in text.split("\n") if line.strip())
        return _parse(first) is not None or _parse(text) is not None
    return suffix in ("csv", "tsv") or column in _header(text, (column,))[0]


# JSON -------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    repeated = RepeatedKeys(result)
    names = [key for key, _ in pairs]
    repeated.key = next(key for key in names if names.count(key) > 1)
    return repeated


def _no_constant(_: str) -> None:
    """NaN and Infinity are no JSON and no text: missing."""


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_float=NumberText,
    parse_int=NumberText,
    parse_constant=_no_constant,
    strict=False,
)


def _parse(text: str) -> list[Any] | dict[str, Any] | None:
    """The object or list that the text is, or None."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (list, dict)) else None


def _read_json(text: str, name: str) -> RawTable:
    """A JSON array, one JSON object, or objects after one another (JSONL, also pretty-printed)."""
    try:
        values = list(_values(text))
    except (ValueError, RecursionError) as error:
        return RawTable(name, "jsonl", _lines(text, name, error))
    if len(values) == 1 and isinstance(values[0][1], list):
        rows = [RawRow(number, value) for number, value in enumerate(values[0][1], start=1)]
        return RawTable(name, "json", rows)
    return RawTable(name, "jsonl", [RawRow(line, value) for line, value in values])


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Each value of the text with the line that it starts in."""
    place, line = 0, 1
    space = re.compile(r"[ \t\r\n]*")
    while True:
        begin = space.match(text, place).end()  # type: ignore[union-attr]
        if begin == len(text):
            return
        line += text.count("\n", place, begin)
        value, place = _DECODER.raw_decode(text, begin)
        yield line, value
        line += text.count("\n", begin, place)


def _lines(text: str, name: str, error: Exception) -> list[RawRow]:
    """The rows of a JSONL text of which some line is damaged; that line keeps its number."""
    rows, good = [], 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parse(line)
        good += isinstance(value, dict)
        rows.append(
            RawRow(number, value, "" if value is not None else "the line is no JSON object")
        )
    if good:
        return rows
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    else:
        reason = str(error)
    raise DataError(
        f"{name} starts like JSON and cannot be read: {reason}. It must be one JSON array of "
        "objects, or "
        "one JSON object a line. Repair the place named, or write the file again with json.dump."
    )


# CSV --------------------------------------------------------------------------------------------


def _header(text: str, expected: Collection[str]) -> tuple[list[str], str]:
    """The first row's cells and the delimiter: the one that finds the most expected columns."""
    line = text.lstrip().split("\n", 1)[0].rstrip("\r")
    best: tuple[list[str], str] = ([line.strip()], ",")
    score = (-1, 0)
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        cells = [cell.strip() for cell in cells]
        found = (len(set(cells) & set(expected)), len(cells))
        if found > score:
            best, score = (cells, delimiter), found
    return best


def _read_csv(text: str, name: str, expected: Collection[str]) -> RawTable:
    """A table with a header. Blank lines are no rows; a row with too many or few cells is at
    fault.
    """
    _, delimiter = _header(text, expected)
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [cells for cells in reader if cells]
    except csv.Error as error:
        raise DataError(
            f"{name} is no valid CSV: {error}, in line {reader.line_num} (a quote that is not "
            'closed, or not doubled as ""). The rows after it would be lost. Repair the line, or '
            "save as JSONL."
        ) from None
    finally:
        csv.field_size_limit(limit)
    columns = [cell.strip() for cell in lines[0]]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"{name} has the column {twice[0]!r} twice. Rename one in its header.")
    rows = []
    for number, cells in enumerate(lines[1:], start=1):
        values = [None if cell.strip() in _CSV_NULLS else cell for cell in cells]
        fault = ""
        if len(cells) != len(columns):
            fault = f"the row has {len(cells)} cells, the header {len(columns)}"
        rows.append(RawRow(number, dict(zip(columns, values, strict=False)), fault))
    return RawTable(name, "csv", rows, columns)


# parquet and plain text -------------------------------------------------------------------------


def _read_parquet(data: bytes, name: str, expected: Collection[str]) -> RawTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = list(file.schema_arrow.names)
        wanted = [column for column in columns if column in expected]
        twice = [column for column in wanted if columns.count(column) > 1]
        if twice:
            raise DataError(f"{name} has the column {twice[0]!r} twice. Rename one and save again.")
        _check_unpacked(data, name, wanted)
        values: list[dict[str, Any]] = []
        for batch in file.iter_batches(columns=wanted):
            values += batch.to_pylist()
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} starts like parquet and cannot be read: {reason}. It may be cut off; copy or "
            "download it again."
        ) from None
    rows = [RawRow(number, value) for number, value in enumerate(values, start=1)]
    return RawTable(name, "parquet", rows, columns)


def _check_unpacked(data: bytes, name: str, columns: list[str]) -> None:
    """Refuses a parquet file that a few bytes unpack to more than memory holds: repeated values are
    counted, not made. What the file's own header says of its size need not be true.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = 0
    schema = pq.read_schema(pa.BufferReader(data))
    plain = [one for one in columns if not pa.types.is_nested(schema.field(one).type)]
    rows = 4096 if plain == columns else 64  # what is nested is made to be counted
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=plain)
    for batch in file.iter_batches(batch_size=rows, columns=columns):
        size += _ROW_BYTES * batch.num_rows + sum(map(_unpacked, batch.columns))
        if size > MOST_BYTES:
            raise too_large(name, "unpacks to more than")


def _unpacked(column: Any) -> int:
    """Bytes of a column's values, each repeated one counted anew."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = column.dictionary if isinstance(column, pa.DictionaryArray) else None
    if (
        kept is None
        or not len(kept)
        or not (pa.types.is_string(kept.type) or pa.types.is_large_string(kept.type))
    ):
        return int(column.nbytes)
    lengths = pc.binary_length(kept).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)


def too_large(name: str, what: str) -> DataError:
    """What to say of a file that is over the limit."""
    return DataError(
        f"{name} {what} {MOST_BYTES / 2**30:g} GiB: it would fill the memory of a small machine. "
        "Take a part of it, in several files, or rows of a datasets.Dataset."
    )


def _read_paragraphs(text: str, name: str) -> RawTable:
    """Passages parted by blank lines, numbered from 1.

    Where no line is blank and most are long, the file has a passage a line; short lines are
    wrapped text.
    """
    plain = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    parts = re.split(r"\n[ \t]*(?:\n[ \t]*)+", plain)
    lines = plain.split("\n")
    if len(parts) == 1 and sum(len(line) >= _LONG_LINE for line in lines) * 2 > len(lines):
        parts = lines
    passages = [part.strip("\n") for part in parts if part.strip()]
    rows = [RawRow(number, passage) for number, passage in enumerate(passages, start=1)]
    return RawTable(name, "text", rows)
