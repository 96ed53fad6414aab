"""Rows of tensors on disk: safetensors parts, and a manifest with the hash of each.

Parts and manifest are written to another name, flushed and renamed, so a crash leaves whole files
alone. What was cut off, changed on disk or made for something else is refused by name; its rows
count as not there. Each rank writes files of its own and reads those of all ranks.
"""

import contextlib
import hashlib
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.whole_files import write_whole

logger = logging.getLogger(__name__)

FORMAT = 1
PART_ROWS = 64
"""Rows a part holds at most."""
PART_BYTES = 32 * 2**20
"""A part is closed when it holds as much."""
IN_FLIGHT = 3
"""Parts that may wait for the disk; more, and adding waits too."""
REFRESH_SECONDS = 5.0
"""How often other ranks' manifests are looked at while rows are missing."""

PART_NAME = re.compile(r"part-[0-9a-f]{12}-r\d+-(\d{6})\.safetensors")

Row = dict[str, Tensor]
"""Tensors of a row, by name."""


@dataclass
class Part:
    """One file of rows."""

    path: Path
    bytes: int
    sha256: str
    trusted: bool = False
    """Written by this process, or its hash compared."""
    reader: Any = None
    """Memory-mapped; its tensors are read when they are used."""

    def row(self, key: str, names: Iterable[str]) -> Row:
        """One row's tensors, on the file's own pages."""
        if self.reader is None:
            self.reader = _opened(self.path)
        return {name: self.reader.get_tensor(f"{key}.{name}") for name in names}


class PartStore:
    """A dict from keys to rows on disk, that only grows."""

    def __init__(
        self, folder: Path, identity: dict[str, str], names: tuple[str, ...], rank: int = 0
    ) -> None:
        """Opens a folder, made if need be; reads headers, not rows.

        Args:
            folder: Where the files are.
            identity: What the rows were made from and how, in words; files of another one are
                stale.
            names: The tensors of each row.
            rank: This process among those that write here.

        Raises:
            ConfigError: The folder can't be made or written.
        """
        self.folder, self.identity, self.names = folder, identity, names
        self.mark = mark_of(identity)
        self.manifest = folder / f"manifest-{self.mark}-r{rank}.json"
        self._prefix = f"part-{self.mark}-r{rank}-"
        self._index: dict[str, Part] = {}  # key -> where it is
        self._known: set[str] = set()  # names of the parts that were taken in
        self._seen: dict[Path, int] = {}  # manifest -> its time of change
        self._looked = 0.0
        self._entries: dict[str, dict[str, Any]] = {}  # own parts, as the manifest lists them
        self._guard = threading.Lock()  # of _entries
        self._pending: dict[str, Row] = {}  # not yet in a whole part
        self._buffer: list[str] = []  # keys of the next part
        self._writing: deque[tuple[Future[Part], list[str]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / f"lock-{self.mark}-r{rank}")
        except OSError as error:
            raise ConfigError(
                f"The teacher cache can't be written to {folder} ({error}). Set lwf_cache_dir to a "
                'folder that you may write to, or lwf_cache="off".'
            ) from error
        self.writes = self._lock is not None
        self._open()

    # ------------------------------------------------------------------ reading

    def get(self, key: str) -> Row | None:
        """A row, or None where it is not there, or was found damaged or removed just now."""
        from safetensors import SafetensorError

        row = self._pending.get(key)
        if row is not None:
            return row
        if key not in self._index:
            self._refresh()
        part = self._index.get(key)
        if part is None or not self._trust(part):
            return None
        try:
            return part.row(key, self.names)
        except (OSError, SafetensorError) as error:  # another process has removed it
            self._drop(part, str(error))
            return None

    def __contains__(self, key: str) -> bool:
        """Whether the row is known; `get` may still find it damaged."""
        return key in self._pending or key in self._index

    def __len__(self) -> int:
        """Rows known."""
        return len(self._index.keys() | self._pending.keys())

    def _open(self) -> None:
        """Reads every manifest; clears what a crash of this rank has left."""
        for path in sorted(self.folder.glob("manifest-*.json")):
            self._read_manifest(path)
        if not self.writes:
            return
        left = [*self.folder.glob(f"{self._prefix}*"), *self.folder.glob(f"{self.manifest.name}.*")]
        for path in left:
            if (
                path.name not in self._known
            ):  # cut off before the rename or before the manifest, or bad
                _remove(path)
        numbers = [int(found[1]) for name in self._known if (found := PART_NAME.fullmatch(name))]
        self._number = max(numbers, default=-1) + 1

    def _read_manifest(self, path: Path) -> None:
        """Takes a manifest's parts in, or says why not."""
        try:
            self._seen[path] = path.stat().st_mtime_ns
            listed = json.loads(path.read_text(encoding="utf-8"))
            parts = {
                name: (int(e["bytes"]), str(e["sha256"])) for name, e in listed["parts"].items()
            }
            identity = dict(listed["identity"])
            if listed["format"] != FORMAT or not all(map(PART_NAME.fullmatch, parts)):
                raise ValueError("another format")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _refuse(path.name, f"unreadable: {error}")
            return
        if identity != self.identity:
            self._tell_stale(identity, list(parts))
            return
        for name, (size, sha256) in parts.items():
            part = Part(self.folder / name, size, sha256)
            if name not in self._known:
                self._admit(part, own=path == self.manifest)

    def _admit(self, part: Part, own: bool) -> None:
        """Adds a part's rows to the index if its size and header are right."""
        from safetensors import SafetensorError

        try:
            size = part.path.stat().st_size
            if size != part.bytes:
                _refuse(part.path.name, f"{size} of {part.bytes} bytes")
                return
            keys = {name.split(".")[0] for name in _opened(part.path).keys()}  # noqa: SIM118
        except FileNotFoundError:
            _refuse(part.path.name, "missing")
            return
        except (OSError, SafetensorError) as error:
            _refuse(part.path.name, str(error))
            return
        self._known.add(part.path.name)
        self._index.update(dict.fromkeys(keys, part))
        if own:
            self._entries[part.path.name] = {"bytes": part.bytes, "sha256": part.sha256}

    def _tell_stale(self, theirs: dict[str, Any], parts: list[str]) -> None:
        if not parts:
            return
        names = sorted(theirs.keys() | self.identity.keys())
        other = [n for n in names if theirs.get(n) != self.identity.get(n)]
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        logger.warning(
            "The teacher cache in %s holds stale parts, made with %s: %s%s. They are not used, and "
            "kept in case you go back; delete them to have their space.",
            self.folder,
            "; ".join(f"another {n} ({theirs.get(n)}, now {self.identity.get(n)})" for n in other),
            ", ".join(parts[:3]),
            more,
        )

    def look(self) -> None:
        """Looks at once whether other ranks have written since."""
        self._looked = -REFRESH_SECONDS
        self._refresh()

    def _refresh(self) -> None:
        """Looks, not too often, whether other ranks have written since."""
        if time.monotonic() - self._looked < REFRESH_SECONDS:
            return
        self._looked = time.monotonic()
        for path in self.folder.glob(f"manifest-{self.mark}-r*.json"):
            with contextlib.suppress(OSError):
                if path != self.manifest and path.stat().st_mtime_ns != self._seen.get(path):
                    self._read_manifest(path)

    def _trust(self, part: Part) -> bool:
        """Compares a part's hash when it is first used; a damaged one is dropped."""
        if part.trusted:
            return True
        try:
            with part.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            part.trusted = found == part.sha256
        except OSError:
            part.trusted = False
        if part.trusted:
            return True
        self._drop(part, "its content has changed")
        return False

    def _drop(self, part: Part, why: str) -> None:
        """Forgets a part that cannot be used, and says so."""
        _refuse(part.path.name, why)
        self._index = {key: other for key, other in self._index.items() if other is not part}
        with self._guard:
            if self._entries.pop(part.path.name, None) is not None and self.writes:
                _remove(part.path)

    # ------------------------------------------------------------------ writing

    def add(self, key: str, row: Row) -> None:
        """`add_all` of one row."""
        self.add_all({key: row})

    def add_all(self, rows: dict[str, Row]) -> None:
        """Keeps rows: in memory at once, on disk when their part is full. Known rows stay.

        Rows that were computed together share a part, so that a crash loses all of them or none:
        computed again they have the same shape, and with it the same rounding.
        """
        self._settle(IN_FLIGHT)
        new = {key: row for key, row in rows.items() if key not in self}
        if not self.writes or not new:
            return
        self._pending.update(new)
        self._buffer.extend(new)
        size = sum(_bytes(self._pending[k]) for k in self._buffer)
        if len(self._buffer) >= PART_ROWS or size >= PART_BYTES:
            self._submit()

    def flush(self) -> None:
        """Writes what is in memory and waits for the disk."""
        self._submit()
        self._settle(0)

    def close(self) -> None:
        """Writes the rest, lets go of the folder."""
        self.flush()
        self._pool.shutdown()
        if self._lock is not None:
            self._lock.release()
        self.writes = False

    def _submit(self) -> None:
        keys, self._buffer = self._buffer, []
        if keys and self.writes:
            rows = {f"{k}.{name}": t for k in keys for name, t in self._pending[k].items()}
            path = self.folder / f"{self._prefix}{self._number:06d}.safetensors"
            self._number += 1
            self._writing.append((self._pool.submit(self._write, path, rows), keys))

    def _settle(self, allowed: int) -> None:
        """Moves the rows of written parts to the index; waits while more than `allowed` wait."""
        while self._writing and (len(self._writing) > allowed or self._writing[0][0].done()):
            future, keys = self._writing.popleft()
            try:
                self._index.update(dict.fromkeys(keys, future.result()))
            except OSError as error:
                if self.writes:
                    logger.warning(
                        "The teacher cache in %s grows no further, and rows that are not in it are "
                        "computed: %s. Free space there, or set lwf_cache_dir to another folder.",
                        *(self.folder, error),
                    )
                self.writes = False
            for key in keys:
                self._pending.pop(key, None)

    def _write(self, path: Path, rows: dict[str, Tensor]) -> Part:
        """In the writer's thread: the part, then the manifest that lists it."""
        from safetensors.torch import save

        data = save(rows, metadata={"identity": self.mark})
        part = Part(path, len(data), hashlib.sha256(data).hexdigest(), trusted=True)
        write_whole(path, data)
        with self._guard:
            self._entries[path.name] = {"bytes": part.bytes, "sha256": part.sha256}
            listed = {"format": FORMAT, "identity": self.identity, "parts": self._entries}
            text = json.dumps(listed, indent=1) + "\n"
        write_whole(self.manifest, text.encode())
        return part


def mark_of(identity: dict[str, str]) -> str:
    """The 12 hex digits that stand in the names of an identity's files."""
    return digest(json.dumps(identity, sort_keys=True))[:12]


def digest(*parts: str | bytes) -> str:
    """SHA-256, 64 hex digits, over the parts in order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
    return whole.hexdigest()


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _bytes(row: Row) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _refuse(name: str, why: str) -> None:
    logger.warning(
        "%s of the teacher cache is damaged (%s): its rows are computed again.", name, why
    )


def _lock(path: Path) -> Any:
    """The writer's lock, None where another process has it; the system frees it at its end."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process writes %s: this one only reads the cache.", path.parent)
        return None
    return lock
