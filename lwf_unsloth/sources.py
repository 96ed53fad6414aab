"""Where rows come from: a file, a folder, the hub, a Dataset, a list of dicts or an upload's bytes.

Nothing of a folder or data set is ever executed; loading scripts are left alone.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lwf_unsloth.backend import set_switches
from lwf_unsloth.errors import DataError
from lwf_unsloth.formats import MOST_BYTES, RawRow, RawTable, read_bytes, too_large

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_NOT_DATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BATCH = 1000
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Wanted:
    """What to take from a source.

    columns: the columns looked for.
    text_column: the column of plain passages, or None for Alpaca rows.
    split: which split of a hub data set, DatasetDict or AlpacaData.
    token: hub token for private data.
    """

    columns: Collection[str]
    text_column: str | None = None
    split: str = "train"
    token: str | None = None


def split_sources(source: object) -> list[object]:
    """The sources that a list stands for; a list of rows is one source."""
    if not isinstance(source, (list, tuple)):
        return [source]
    if not source:
        raise DataError(
            "The list is empty: it has no rows and no sources. At least one row is needed."
        )
    if any(_is_source(item) for item in source):
        return list(source)
    lists = all(isinstance(item, (list, tuple)) for item in source)
    if lists and all(isinstance(row, Mapping) for item in source for row in item):
        return list(source)
    return [source]


def _is_source(item: object) -> bool:
    if isinstance(item, (str, bytes, os.PathLike)) or _is_dataset(item) or _is_frame(item):
        return True
    return isinstance(item, Mapping) and _has_splits(item)


def read_source(source: Any, wanted: Wanted) -> list[RawTable]:
    """The tables of one source: one, or one for each file of a folder.

    Raises:
        DataError: it does not exist, cannot be reached or is no kind of source.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_named(source, wanted)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return [_parse_bytes(bytes(source), "uploaded file", wanted)]
    if isinstance(source, Mapping) and _has_splits(source):
        return [_from_splits(source, wanted)]
    if _is_dataset(source):
        return [_from_dataset(source, "Dataset", wanted)]
    if _is_frame(source):
        rows = _numbered(source.to_dict("records"))
        return [RawTable("DataFrame", "dataframe", rows, [str(name) for name in source.columns])]
    if isinstance(source, (list, tuple)):
        return [RawTable("list of rows", "list", _numbered(source))]
    hint = "Wrap one row in a list: [row]. " if isinstance(source, Mapping) else ""
    raise DataError(
        f"Got a {type(source).__name__} as source; needed is a hub id, a path to JSON, JSONL, "
        "CSV or "
        "parquet (or a folder of them), a datasets.Dataset, a list of dicts, or a list of "
        f"these. {hint}"
        "Turn a streaming data set into rows first: list(stream.take(1000))."
    )


def _numbered(rows: Any) -> list[RawRow]:
    return [RawRow(number, row) for number, row in enumerate(rows, start=1)]


def _is_dataset(value: object) -> bool:
    return (
        hasattr(value, "select_columns")
        and hasattr(value, "column_names")
        and hasattr(value, "num_rows")
    )


def _is_frame(value: object) -> bool:
    return type(value).__name__ == "DataFrame" and hasattr(value, "to_dict")


def _has_splits(source: Mapping[Any, Any]) -> bool:
    return bool(source) and all(_is_dataset(part) for part in source.values())


def _from_splits(source: Mapping[str, Any], wanted: Wanted) -> RawTable:
    if wanted.split not in source:
        raise DataError(
            f"The data set has the splits {sorted(map(str, source))}, not {wanted.split!r}. Name "
            "one of "
            "them with split=."
        )
    return _from_dataset(source[wanted.split], f"split {wanted.split!r}", wanted)


def _from_dataset(dataset: Any, name: str, wanted: Wanted) -> RawTable:
    """Rows of a datasets.Dataset; only the columns looked for are decoded."""
    columns = [str(column) for column in dataset.column_names]
    used = [column for column in columns if column in wanted.columns]
    part = dataset.with_format(None).select_columns(used)
    rows: list[RawRow] = []
    for start in range(0, len(dataset), _BATCH):
        batch = part[start : start + _BATCH]
        size = min(_BATCH, len(dataset) - start)
        rows += [
            RawRow(start + place + 1, {column: batch[column][place] for column in used})
            for place in range(size)
        ]
    return RawTable(name, "dataset", rows, columns)


# files ------------------------------------------------------------------------------------------


def _parse_bytes(data: bytes, name: str, wanted: Wanted) -> RawTable:
    return read_bytes(data, name, expected=wanted.columns, text_column=wanted.text_column)


def _read_named(source: str | os.PathLike[str], wanted: Wanted) -> list[RawTable]:
    """A path where one exists, else a hub id."""
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{str(source)[:200]!r} is no usable path: {error}.") from None
    if is_folder:
        return _read_folder(path, wanted)
    if exists:
        return [_read_file(path, path.name, wanted)]
    text = os.fspath(source)
    is_path = text.lower().endswith(_SUFFIXES) or text.startswith((".", "~", "/"))
    if is_path or not isinstance(source, str) or not _HUB_ID.fullmatch(text):
        raise DataError(_not_found(path))
    return [_from_hub(text, wanted)]


def _not_found(path: Path) -> str:
    folder = path.parent
    try:
        near = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)[:8]
    except OSError:
        near = []
    there = f" In {folder} there is: {', '.join(near)}." if near else ""
    shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
    return (
        f"There is no file {shown!r}, and it is no hub id (owner/name) either.{there} Check the "
        "path; "
        "rows given as text go in a list of dicts."
    )


def _read_file(path: Path, name: str, wanted: Wanted) -> RawTable:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise too_large(name, "has more than")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    return _parse_bytes(data, name, wanted)


def _read_folder(path: Path, wanted: Wanted) -> list[RawTable]:
    """Every data file of a folder in the order of names, or a data set written by save_to_disk."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_from_disk(path, wanted)]
    try:
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"The folder {path} cannot be read: {error.strerror or error}.") from None
    suffixes = _SUFFIXES if wanted.text_column is not None else _SUFFIXES[:-1]
    data = [p for p in files if p.suffix.lower() in suffixes and p.name not in _NOT_DATA]
    if not data:
        found = ", ".join(p.name for p in files[:8]) or "nothing"
        raise DataError(
            f"The folder {path} holds no data file ({', '.join(suffixes)}); found: {found}. Name "
            "the "
            "file itself, whatever its ending, or put the data in the folder."
        )
    return [_read_file(file, f"{path.name}/{file.name}", wanted) for file in data]


def _from_disk(path: Path, wanted: Wanted) -> RawTable:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise DataError(
            f"The saved data set {path} cannot be read: {_first_line(error)}. Save it again with "
            "save_to_disk."
        ) from error
    if isinstance(loaded, Mapping):
        return _from_splits(loaded, wanted)
    return _from_dataset(loaded, path.name, wanted)


# the hub ----------------------------------------------------------------------------------------


def _from_hub(name: str, wanted: Wanted) -> RawTable:
    """A data set of the hub through datasets.load_dataset; its loading script, if any, is not
    run.
    """
    set_switches("")  # no usage data from the hub's client
    import datasets

    reachable = _hub_reachable()
    try:
        with _offline(not reachable):
            loaded: Any = datasets.load_dataset(name, split=wanted.split, token=wanted.token)
    except Exception as error:  # the hub's clients raise dozens of kinds
        where = (
            f"There is no local file or folder of that name in {Path.cwd().name!r}, "
            + ("and the hub said: " if reachable else "the hub is not in reach, ")
            + ("" if reachable else "and it is not in the local cache: ")
        )
        raise DataError(
            f"The data set {name!r} cannot be loaded (split {wanted.split!r}). {where}"
            f"{_first_line(error)}. Check the id and split; give token= for private data; without "
            "network use a local file."
        ) from error
    return _from_dataset(loaded, name, wanted)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def _hub_reachable() -> bool:
    """Whether a connection to the hub opens; without this an offline machine waits for minutes."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    address = urlsplit(datasets.config.HF_ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def _offline(switch: bool) -> Iterator[None]:
    """Let the hub's clients look at their cache only, where `switch` is set."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if switch:
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
