"""Files that are there whole or as they were: written beside their place, synced, moved there."""

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lwf_unsloth.errors import DiskError

_ERRNO = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EEXIST EISDIR ENAMETOOLONG".split()
UNWRITABLE = {getattr(errno, name) for name in _ERRNO if hasattr(errno, name)}
"""What the system says of a disk or folder that cannot be written."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder that the block writes to; what hinders that is told with the folder's name.

    Raises:
        DiskError: The disk is full, or the folder may not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if isinstance(error, DiskError) or error.errno not in UNWRITABLE:
            raise
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: Exception) -> DiskError:
    """The error of `writing`."""
    told = DiskError(
        f"{str(folder)!r} could not be written ({error}). Whole files that were there stay. Free "
        "space on that disk, make the folder writable, or name another one."
    )
    told.errno = getattr(error, "errno", None)
    return told


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that at any moment the old one or the whole new one is there."""
    new = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            new.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk says no name
        raise
    sync_folder(path.parent)


def write_whole_text(path: Path, text: str) -> None:
    r"""`write_whole` of UTF-8 text.

    A lone surrogate has no UTF-8; it becomes ``\uXXXX``, which in JSON reads back the same.
    """
    write_whole(path, text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder while files in it are moved or read that belong together; others that hold it
    wait, processes and threads alike.

    Nothing is left in the folder, and the system lets go of it when a process dies. Where a system
    or a disk has no such locks, and where there is no folder yet, nothing is held. Not to nest.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = None
    try:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has it open too
            os.close(handle)


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk (folders can't be opened on Windows, and need not be)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """`sync` of a folder, as far as its disk can: mounted cloud folders sync none."""
    with contextlib.suppress(OSError):
        sync(path)
