"""Which base model an adapter belongs to: a name, and a fingerprint of the weights' files.

An adapter on another base loads without an error and answers wrongly. A path can't tell (folders
are moved, and a machine's path does not belong in a shared adapter), so the weights themselves are
looked at.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.embedded import embedded_identity
from lwf_unsloth.errors import ModelError

_SAMPLE = 4096
"""Bytes read at the start and at the end of every tensor."""


@dataclass(frozen=True)
class BaseIdentity:
    """What a base model is called and what its weights are."""

    name: str
    """Hub id, embedded name, or the last part of a folder's path; never a machine's path."""
    kind: str
    """"hub", "folder" or "embedded"."""
    fingerprint: str = ""
    """Hash over name, shape, dtype and samples of every tensor; empty where the files are
    unknown."""
    source: str = ""
    """Hash of the file that an embedded model was converted from."""
    revision: str = ""
    """Commit on the hub, where known."""

    def to_dict(self) -> dict[str, str]:
        """The known parts, for JSON."""
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BaseIdentity":
        """The identity that `to_dict` wrote; unknown keys of later versions are left out."""
        known = {key: str(values[key]) for key in cls.__dataclass_fields__ if key in values}
        return cls(**{"name": "unknown", "kind": "folder", **known})

    def same_weights(self, other: "BaseIdentity") -> bool | None:
        """Whether both are the same weights; None where neither hash is known on both sides."""
        if self.source and other.source:
            return self.source == other.source
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return None

    def __str__(self) -> str:
        mark = self.fingerprint[:12] or self.revision[:12]
        return f"{self.name!r} ({self.kind}{', weights ' + mark if mark else ''})"


def identify(folder: Path | None, name: str, kind: str, revision: str = "") -> BaseIdentity:
    """Names a base model and takes the fingerprint of its files.

    Args:
        folder: Where its safetensors lie, None where that is not known.
        name: What to call it; of a folder only the last part is kept.
        kind: "hub", "folder" or "embedded".
        revision: Commit on the hub.

    Returns:
        Its identity.
    """
    if kind == "folder":
        name = Path(name).resolve().name
    if folder is None:
        return BaseIdentity(name, kind, revision=revision)
    embedded = embedded_identity(folder) or {}
    return BaseIdentity(
        name=embedded.get("name", name),
        kind="embedded" if embedded else kind,
        fingerprint=fingerprint(folder),
        source=embedded.get("gguf_sha256", ""),
        revision=revision,
    )


def fingerprint(folder: Path) -> str:
    """Hash over every tensor's name, dtype, shape, first and last bytes, however it is sharded.

    Reads 8 KiB a tensor instead of gigabytes: enough to tell any two trainings apart, since they
    move every tensor they touch.

    Args:
        folder: A folder with safetensors files.

    Returns:
        64 hex digits.

    Raises:
        ModelError: A file that is not whole safetensors.
    """
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(_tensor_digests(path))
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + b"\0" + tensors[name])
    return whole.hexdigest()


def _tensor_digests(path: Path) -> dict[str, bytes]:
    """Tensor name -> hash of its dtype, shape and samples, read off a safetensors file."""
    found = {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                if end > size:
                    raise ValueError(f"{name} ends behind the file's end")
                digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
                for place in (start, max(start, end - _SAMPLE)):
                    file.seek(place)
                    digest.update(file.read(min(_SAMPLE, end - place)))
                found[name] = digest.digest()
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path.name} is not a whole safetensors file ({error}); its weights can't be trusted. "
            "Download or save it again."
        ) from error
    return found
