"""Folders made once for a machine: listed and hashed in a manifest, made behind a file lock, put in
place by one rename. And folders that one run at a time writes to.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import ConfigError, LwfError
from lwf_unsloth.gguf_files import sha256
from lwf_unsloth.whole_files import sync, sync_folder, writing

logger = logging.getLogger(__name__)

RUN_LOCK = ".lwf_run.lock"
PATIENCE = 10.0
"""Seconds that a held folder is waited for: what a killed run had forked (a data loader's workers)
holds it until it sees that the run is gone."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a disk says that has no file locks, as mounted network folders may."""


def write_manifest(path: Path, about: dict[str, Any]) -> None:
    """Writes `about` and the folder's files with size and hash, then flushes all of it to disk."""
    files = sorted(one for one in path.parent.iterdir() if one.is_file())
    listed = {one.name: {"bytes": one.stat().st_size, "sha256": sha256(one)} for one in files}
    text = json.dumps({**about, "files": listed}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    for one in [*files, path]:
        with contextlib.suppress(OSError):  # some mounted folders know no modes
            one.chmod(0o644)  # safetensors writes 0600, which a shared cache can't serve
        sync(one)
    sync_folder(path.parent)


def is_whole(manifest: Path, needed: Iterable[str] = ()) -> bool:
    """Whether the folder holds what its manifest lists; a file is hashed once per process.

    Args:
        manifest: The manifest, in the folder.
        needed: Names that it must list.
    """
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, wanted in files.items():
            path = manifest.parent / name
            state = path.stat()
            if state.st_size != wanted["bytes"]:
                return False
            if _sha256_once(path, state.st_size, state.st_mtime_ns) != wanted["sha256"]:
                return False
        return set(needed) <= set(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@functools.cache
def _sha256_once(path: Path, size: int, changed: int) -> str:
    """`sha256`, remembered for as long as the file's size and time of change stay the same."""
    return sha256(path)


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """A folder beside the target to make it in; what a killed making has left there goes.

    The caller holds the target's lock.
    """
    prefix = f"fetch-{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
        yield Path(scratch)


def put_in_place(new: Path, target: Path, scratch: Path) -> None:
    """Renames a finished folder to its place; a damaged one that stands there goes to `scratch`."""
    if target.exists():
        logger.warning("%s was damaged and is replaced.", target)
        target.rename(scratch / "damaged")
    new.rename(target)
    sync_folder(target.parent)


@contextmanager
def locked(
    target: Path, minutes: int, doing: str, usual: str, error: type[LwfError]
) -> Iterator[None]:
    """Holds a folder's file lock; the system frees it when a process dies.

    Args:
        target: The folder; its parent is made.
        minutes: How long another process is waited for.
        doing: What that process does ("converting").
        usual: How long that usually takes, as a sentence's part.
        error: What is raised when the time is over.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process is %s %s; waiting for it.", doing, target.name)
        try:
            lock.acquire(timeout=60 * minutes)
        except Timeout as late:
            raise error(
                f"Another process has held {lock.lock_file} for {minutes} minutes; {usual}. End "
                "that process, then try again."
            ) from late
    try:
        yield
    finally:
        lock.release()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run's folder, which is made, against other runs for as long as the block takes.

    Raises:
        ConfigError: Another run holds it: two would write into each other's checkpoints.
        DiskError: The folder may not be written.
    """
    from filelock import FileLock, Timeout

    path = folder / RUN_LOCK
    try:  # a lock by the file's mere presence would outlive a runtime that was cut off
        lock = FileLock(path, fallback_to_soft=False)
    except TypeError:  # filelock before 4 has no such lock to fall back to
        lock = FileLock(path)
    try:
        with writing(folder):
            lock.acquire(timeout=PATIENCE)
    except Timeout as late:
        raise ConfigError(
            f"{str(folder)!r} is in use by another run ({_holder(path) or 'of unknown process'}): "
            "the files of both would be mixed. Wait until it has ended, or end it; then a resume "
            "can go on there. Or take another folder (output_dir) for this run."
        ) from late
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        logger.warning("The disk of %s has no locks: keep other runs out of it yourself.", folder)
        yield
        return
    try:
        if _holder(path) is not None:
            own = f"process {os.getpid()} on {socket.gethostname()}"
            with contextlib.suppress(OSError):  # a full disk is told by what writes a run's files
                path.write_text(f"{own}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str | None:
    """Who wrote into a lock's file, "" where none has; None where its text is not ours to write."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if not text or text.startswith("process ") else None
