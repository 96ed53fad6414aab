"""What this machine has, what is known to fail on it, as a report to paste into an issue.

Nothing but the standard library is needed to import this file: it must speak where the rest can't.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lwf_unsloth import backend

SWITCHES = re.compile(
    r"(UNSLOTH|LWF|HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|TORCH|PYTORCH|TRITON|CUDA|NVIDIA_VISIBLE"
    r"|NCCL|BNB|BITSANDBYTES|ACCELERATE|TRL|PEFT|WANDB|OMP|MKL|XDG_CACHE)(_|$)"
)
"""Environment variables that change what the libraries do."""
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|AUTH")
"""Their values are never shown."""
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@")
"""A user and password inside an address."""
LOW_DISK = 2 * 2**30
"""Free bytes under which models can't be fetched or converted."""
RANGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
"""Packages whose version is held against what Unsloth says it works with."""


@dataclass
class Findings:
    """What was found; `str()` is the report."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """Name and value."""
    notes: list[str] = field(default_factory=list)
    """Good to know, harmless as it is."""
    problems: list[str] = field(default_factory=list)
    """What will fail, and what to do."""

    def __str__(self) -> str:
        text = [f"{name:14} {value}" for name, value in self.lines]
        text += [f"Note: {note}" for note in self.notes]
        text += [f"Problem: {problem}" for problem in self.problems] or ["No problem found."]
        return "\n".join(text)


def doctor(*, hub: bool = True) -> str:
    """The report: versions, device, memory, switches, disk, hub, and known problems.

    Args:
        hub: Whether to try the hub (a few seconds where it is out of reach).

    Returns:
        Lines of text without secrets; fit to be pasted into an issue.
    """
    return str(examine(hub=hub))


def examine(*, hub: bool = True) -> Findings:
    """Looks at everything; see `doctor`."""
    own = switches()  # before the libraries add theirs
    found = Findings([("Python", f"{platform.python_version()}, {platform.platform()}")])
    versions = backend.versions()
    found.lines += versions.items()
    missing = [name for name in backend.PACKAGES[1:] if versions[name] == "-"]  # 0 is this package
    if missing:
        found.problems.append(
            f"Not installed: {', '.join(missing)}. Nothing trains without them. Run "
            "`bash colab_setup.sh` in the project's folder."
        )
    _look_at_versions(found, versions)
    if versions["torch"] != "-":
        _look_at_device(found, complete=not missing)
    _look_at_disk(found)
    if hub and not missing:
        _look_at_hub(found)
    found.lines += own.items()
    return found


def _look_at_versions(found: Findings, versions: dict[str, str]) -> None:
    """Known bad pairs, packages that should not be there, and versions Unsloth does not take."""
    for prefix, needed in backend.BAD_PAIRS.items():
        if versions["torch"].startswith(f"{prefix}."):
            unlike = {n: v for n, v in needed.items() if os.environ.get(n, v) != v}
            text = f"torch {prefix} fails with Unsloth in backward, unless {_pairs(needed)}"
            if unlike:
                change = _pairs({name: os.environ[name] for name in unlike})
                found.problems.append(f"{text}; here {change}: unset it.")
            else:
                found.notes.append(f"{text}; that is set for you.")
    if _version("kernels") is not None:
        found.problems.append(
            "The package `kernels` is installed: with it bitsandbytes asks the hub for code at "
            "every start, and waits where there is no network. `pip uninstall kernels`."
        )
    found.problems += out_of_range()


def out_of_range() -> list[str]:
    """Installed versions outside of what Unsloth's own metadata allow, one sentence each."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = {}
    for owner in ("unsloth", "unsloth_zoo"):
        for line in _requirements(owner):
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            marker = wanted.marker
            if wanted.name not in RANGES or (marker and not marker.evaluate({"extra": ""})):
                continue
            version = _version(wanted.name)
            if version and not wanted.specifier.contains(version, prereleases=True):
                found[wanted.name] = (
                    f"{wanted.name} {version} is outside of what {owner} "
                    f"{_version(owner)} works with ({wanted.specifier}): its patches may fail. "
                    f"`pip install '{wanted.name}{wanted.specifier}'`."
                )
    return list(found.values())


def _look_at_device(found: Findings, complete: bool) -> None:
    """The card or the CPU, its memory, and whether bf16 is computed in hardware."""
    import torch

    if not backend.on_cuda():
        found.lines.append(("device", f"{backend.device_name()}, {platform.machine()}"))
        _look_at_memory(found)
        if complete:
            native = backend.native_bf16()
            found.lines.append(("bf16", "native" if native else "no (fp32 is taken)"))
        return
    found.lines.append(("CUDA", f"{torch.version.cuda}, driver {_driver()}"))
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        name = "device" if number == 0 else f"device {number}"
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found.lines.append((name, f"{card.name}, capability {card.major}.{card.minor}, {memory}"))
    native = backend.native_bf16()
    said = "native" if native else "emulated only, and slow (fp16 is taken)"
    found.lines.append(("bf16", said))


def _look_at_memory(found: Findings) -> None:
    """RAM, where psutil is there to ask."""
    try:
        import psutil
    except ImportError:
        return
    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    found.lines.append(("memory", text))


def _look_at_disk(found: Findings) -> None:
    """Room where models are kept."""
    for name, folder in cache_folders().items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        found.lines.append((name, f"{_without_home(str(folder))}, {free / 2**30:.1f} GiB free"))
        if free < LOW_DISK:
            found.problems.append(
                f"Only {free / 2**30:.1f} GiB are free in {there}, where {name} lies: models need "
                "more. Free some, or set HF_HOME and LWF_UNSLOTH_CACHE to another disk."
            )


def cache_folders() -> dict[str, Path]:
    """Where the hub's models and the converted ones are kept."""
    from lwf_unsloth.embedded import cache_dir

    home = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    hub = Path(home) if home else Path(cache) / "huggingface"
    return {"hub cache": hub.expanduser().absolute(), "model cache": cache_dir().absolute()}


def _look_at_hub(found: Findings) -> None:
    from lwf_unsloth.model_files import hub_in_reach

    reached = hub_in_reach(3.0)
    found.lines.append(("hub", "in reach" if reached else "not in reach"))
    if not reached:
        found.notes.append(
            "The hub is not in reach (or HF_HUB_OFFLINE is set): models that are cached here, "
            "folders and the embedded models still load."
        )


def switches() -> dict[str, str]:
    """Environment variables that matter; of secrets only that they are set."""
    shown = {}
    for name, value in sorted(os.environ.items()):
        if SWITCHES.match(name):
            value = _without_home(CREDENTIALS.sub("...@", value))
            shown[name] = "set" if SECRET.search(name) else value
    return shown


def _without_home(text: str) -> str:
    """Paths as they may be published: without the user's name."""
    return text.replace(str(Path.home()), "~")


def _requirements(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """The NVIDIA driver's version, "?" where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "?"
    return done.stdout.split("\n")[0].strip() or "?"


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


if __name__ == "__main__":
    sys.stdout.write(doctor() + "\n")
