"""The file of rows that a model wrote: plain JSONL, and beside it what wrote them."""

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import DataError
from lwf_unsloth.whole_files import alone_in, sync_folder, write_whole, writing
from lwf_unsloth.written_rows import SURPLUS, WrittenReport, WrittenRows

logger = logging.getLogger(__name__)

_FORMAT = 1


def origin_path(path: Path) -> Path:
    """Where it is kept what wrote the rows: beside them, so that they stay plain JSONL."""
    return path.with_name(f"{path.name}.origin.json")


def save_written(rows: WrittenRows, path: str | Path) -> Path:
    """Writes rows as JSONL and their origin beside them, each file whole or not at all.

    Args:
        rows: The rows.
        path: The JSONL's place; its folder is made. A file that is there is kept as `.old`.

    Returns:
        The path.

    Raises:
        DiskError: The disk is full, or the folder may not be written; the old file stays.
    """
    path = Path(path)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    rows.sha256 = hashlib.sha256(data).hexdigest()
    head = {
        "format": _FORMAT,
        "sha256": rows.sha256,
        "origin": rows.origin,
        "report": asdict(rows.report),
    }
    origin = json.dumps(head, ensure_ascii=False, indent=1).encode()
    with writing(path.parent):
        _exchange(path, data, origin)
    return path


def _exchange(path: Path, data: bytes, origin: bytes) -> None:
    """Writes both files beside their places; they are moved there when both are whole."""
    contents = {path: data, origin_path(path): origin}
    own = f"{os.getpid()}-{threading.get_ident()}.new"  # another process may write the same rows
    beside = {target: target.with_name(f"{target.name}.{own}") for target in contents}
    try:
        for target, content in contents.items():
            write_whole(beside[target], content)
        with alone_in(path.parent):
            if path.is_file() and path.read_bytes() != data:
                path.replace(path.with_name(f"{path.name}.old"))
            for target, new in beside.items():
                new.replace(target)
        sync_folder(path.parent)
    finally:
        for new in beside.values():
            with contextlib.suppress(OSError):
                new.unlink()


def load_written(path: str | Path, origin: Mapping[str, Any] | None = None) -> WrittenRows:
    """Reads rows that `save_written` wrote.

    Args:
        path: The JSONL.
        origin: What must have written them; None takes any.

    Returns:
        The rows with their report.

    Raises:
        DataError: No such file, a file that was changed or whose origin is unknown, or another
            origin; names what differs.
    """
    path = Path(path)
    try:
        with alone_in(path.parent):  # both of one writing
            head = json.loads(origin_path(path).read_text(encoding="utf-8"))
            data = path.read_bytes()
        found, report = dict(head["origin"]), WrittenReport(**head["report"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no whole file of self-written rows with its {origin_path(path).name} "
            f"({type(error).__name__}: {error}), so what wrote it is not known. {_what_to_do(path)}"
        ) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != head.get("sha256"):
        raise DataError(
            f"{path} was changed after it was written, so its rows are not those that the model "
            f"wrote. {_what_to_do(path)}"
        )
    differ = differences(found, origin) if origin is not None else []
    if differ:
        raise DataError(
            f"{path} was written by something else ({'; '.join(differ)}): as rehearsal for this "
            f"model it would keep what another one knew. {_what_to_do(path)}"
        )
    rows = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
    report.reused = True
    read = WrittenRows(rows, report, found)
    read.sha256 = sha256
    return read


def written_before(
    path: str | Path, origin: Mapping[str, Any], rows: int, *, rewrite: bool
) -> WrittenRows | None:
    """The first `rows` rows of a file of the same origin.

    Args:
        path: The JSONL.
        origin: What must have written them.
        rows: Rows wanted. A file with fewer serves only if so many had been tried for in vain.
        rewrite: Say why it does not serve and give None, instead of an error.

    Returns:
        The rows; None where they are to be written anew.

    Raises:
        DataError: The file does not serve.
    """
    try:
        found = load_written(path, origin)
        if len(found) < rows and found.report.asked < rows:
            raise DataError(
                f"{path} holds {len(found)} self-written rows, but {rows} are wanted. Let it be "
                "written anew (rewrite=True, or remove it), or ask for fewer."
            )
    except DataError as error:
        if not rewrite:
            raise
        logger.warning("Rehearsal rows are written anew. %s", error)
        return None
    kept = WrittenRows(found[:rows], found.report, found.origin)
    kept.sha256 = found.sha256
    kept.report.kept, kept.report.ended = len(kept), sum(row["whole"] for row in kept)
    if len(found) > len(kept):
        left = kept.report.dropped.get(SURPLUS, 0) + len(found) - len(kept)
        kept.report.dropped[SURPLUS] = left
    logger.info("%s: %s", path, kept.report)
    return kept


def _what_to_do(path: Path) -> str:
    return (
        "Let it be written anew (rewrite=True, or remove it), or, to take these rows as they are, "
        f"pass them yourself: load_alpaca or load_text({path.name!r})."
    )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two origins, in words."""
    names = dict.fromkeys([*wanted, *saved])
    return [
        f"{name}: {saved.get(name)!r} there, {wanted.get(name)!r} now"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
