"""Folders of adapters and merged models: written beside their place, put there by a rename."""

import contextlib
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lwf_unsloth.errors import ModelError
from lwf_unsloth.whole_files import alone_in, sync, sync_folder

logger = logging.getLogger(__name__)

RECORD = "lwf.json"
SCRATCH = "[a-z0-9_]{8}"
"""What mkdtemp adds to a name."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the target's place by a rename when the block ends well.

    Raises:
        ModelError: The target holds files that the new one would not replace, or the disk is full
            or may not be written.
    """
    from safetensors import SafetensorError

    with alone_in(target.parent):
        recover(target)
        if target.exists():
            _check_replaceable(target)
    scratch = target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        new = scratch / "new"
        new.mkdir()
        yield new
        for path in new.iterdir():
            with contextlib.suppress(OSError):  # some mounted folders know no modes
                path.chmod(0o644)  # safetensors writes 0600
            sync(path)
        with alone_in(target.parent):
            _exchange(new, target, scratch / "old")
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{str(target)!r} could not be written ({error}). What was there before is as it was. "
            "Free space on that disk, make the folder writable, or name another one."
        ) from error
    finally:
        if scratch != target:
            shutil.rmtree(scratch, ignore_errors=True)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Moves the target away and the new folder into its place, or leaves the target there."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def recover(target: Path) -> None:
    """Puts in place what a save has left whole beside it when it was killed between two renames.

    Folders that a killed save left otherwise are removed when nothing has been written to them for
    an hour; those of others, whatever their names, are left alone. The caller holds the folder that
    the target is in.
    """
    name = re.compile(re.escape(f".{target.name}-") + SCRATCH)
    found = target.parent.iterdir() if target.parent.is_dir() else ()
    for left in sorted(path for path in found if name.fullmatch(path.name)):
        try:
            names = {path.name for path in left.iterdir()}
        except OSError:  # another save's, which has ended meanwhile and taken it away
            continue
        if left.is_symlink() or not names <= {"new", "old"}:
            continue
        if not target.exists() and (left / "old").is_dir():  # "new" was synced before
            whole = left / ("new" if (left / "new").is_dir() else "old")
            whole.rename(target)
            logger.warning("A save of %s was cut off; what it had written is put in place.", target)
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - newest > 3600:
                shutil.rmtree(left, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Refuses a target that is no folder, or that holds anything but an adapter or a merged
    model.
    """
    names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    if not names or RECORD in names:
        return
    raise ModelError(
        f"{str(target)!r} exists and was not written by save_adapter or merge_model (it holds "
        f"{', '.join(sorted(names)[:5])}): it would be replaced. Name another folder."
    )
