"""Unsloth first: the one place that imports it before trl, transformers and peft, with every
environment switch.

Each switch says why it is set. None overrides what the user set in the environment.
"""

import importlib.metadata
import logging
import os
import sys
from functools import cache

logger = logging.getLogger(__name__)

PACKAGES = (
    "lwf_unsloth",
    "torch",
    "unsloth",
    "unsloth_zoo",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
)

SWITCHES = {
    # Unsloth asks the hub for a statistics file at load; TRL and the hub client send usage data.
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts even the loading of a local file
    # A fork after the tokenizer ran would otherwise warn, or hang.
    "TOKENIZERS_PARALLELISM": "false",
}

BAD_PAIRS = {
    # torch 2.11 with Unsloth's whole-block compile fails in backward (InductorError).
    "2.11": {"UNSLOTH_BLOCK_COMPILE": "0"},
}


def set_switches(torch_version: str) -> dict[str, str]:
    """Sets the environment switches that are not set yet.

    Args:
        torch_version: Installed torch, to know the pairs that fail together.

    Returns:
        The switches this call has set.
    """
    wanted = dict(SWITCHES)
    for prefix, switches in BAD_PAIRS.items():
        if torch_version.startswith(prefix + "."):
            wanted.update(switches)
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    return new


@cache
def prepare() -> None:
    """Imports Unsloth, once, before the libraries that it patches.

    Raises:
        ImportError: Unsloth or one of its needs is not installed; the message names the command.
    """
    set_switches(importlib.metadata.version("torch"))
    early = [name for name in ("trl", "transformers", "peft") if name in sys.modules]
    if early and "unsloth" not in sys.modules:
        logger.warning(
            "%s was imported before lwf_unsloth: Unsloth patches it late, some fast paths may be "
            "off. "
            "Import lwf_unsloth first.",
            ", ".join(early),
        )
    # Without the package `kernels`, which would look at the hub, bitsandbytes says so at every
    # start.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Unsloth could not be imported ({error}). Run `bash colab_setup.sh` in the project's "
            f"folder."
        ) from error


def on_cuda() -> bool:
    """Whether Unsloth's CUDA path is in use (else its CPU backend)."""
    import torch

    return torch.cuda.is_available() and os.environ.get("UNSLOTH_FORCE_CPU", "0") != "1"


def device_name() -> str:
    """Name of the device that trains, as people know it ("Tesla T4", "CPU, 2 threads")."""
    import torch

    if on_cuda():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def native_bf16() -> bool:
    """Whether the device computes bf16 in hardware.

    A T4 (capability 7.5) does not, though recent torch answers True there through emulation.
    """
    import torch

    if on_cuda():
        return torch.cuda.get_device_capability()[0] >= 8
    prepare()
    from unsloth import is_bfloat16_supported

    return bool(is_bfloat16_supported())


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result, "-" where one is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found
