"""Where a model comes from: an embedded name, a folder or the hub; checked before anything heavy is
loaded.
"""

import json
import logging
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lwf_unsloth.config import ModelConfig
from lwf_unsloth.embedded import EMBEDDED, embedded_model
from lwf_unsloth.errors import ModelError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PREQUANTIZED_ENDINGS = ("-bnb-4bit", "-unsloth-bnb-4bit")
"""How Unsloth names the 4-bit copies that it takes instead of the repository asked for."""


@dataclass(frozen=True)
class ModelFiles:
    """What `from_pretrained` gets, and what is known of it beforehand."""

    source: str
    """Hub id or path."""
    kind: str
    """"hub", "folder" or "embedded"."""
    folder: Path | None = None
    """Where the files lie; None where the hub will be asked."""

    @property
    def prequantized(self) -> bool:
        """Whether the files are known to hold bitsandbytes 4-bit weights already."""
        return self.folder is not None and _is_prequantized(self.folder)


def find_model(config: ModelConfig) -> ModelFiles:
    """Finds a model and checks its files, as far as they are here.

    Args:
        config: Its `model_name`, `revision` and `load_in_4bit` are used.

    Returns:
        Where to load it from.

    Raises:
        ModelError: No such model, no safetensors, an adapter instead of a model, or the hub is
            needed and out of reach.
    """
    name = config.model_name.strip()
    if name in EMBEDDED:
        folder = embedded_model(name)
        return ModelFiles(str(folder), "embedded", folder)
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return ModelFiles(str(path.resolve()), "folder", path.resolve())
    if path.is_file() or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is no folder, no embedded model and no hub id. Give a folder with "
            "config.json and safetensors, a hub id such as unsloth/gemma-2b-bnb-4bit, or one of "
            f"{_embedded(name)}."
        )
    return _on_hub(name, config)


def _on_hub(name: str, config: ModelConfig) -> ModelFiles:
    """A hub id: asked for on the hub, or, where that is out of reach, taken from the hub's local
    cache.
    """
    if hub_in_reach():
        return ModelFiles(name, "hub")
    endings = ("", *_PREQUANTIZED_ENDINGS) if config.load_in_4bit else ("",)
    for ending in endings:
        folder = cached(name + ending, config.revision)
        if folder is not None:
            logger.warning("The hub is out of reach; %r is taken from its cache.", name + ending)
            return ModelFiles(str(folder), "hub", folder)
    raise ModelError(
        f"{name!r} is not on this machine and the hub is out of reach, so there is nothing to "
        "load. Connect, give a local folder, or take a model that needs no hub: "
        f"{_embedded(name)}. Where there is no network at all, HF_HUB_OFFLINE=1 saves the waiting."
    )


def _embedded(name: str) -> str:
    """The embedded names, the most similar one first."""
    near = get_close_matches(name, EMBEDDED, n=1, cutoff=0.4)
    return ", ".join(sorted(EMBEDDED, key=lambda known: known not in near))


def check_folder(folder: Path) -> None:
    """Checks that a folder holds a model in safetensors.

    Raises:
        ModelError: It does not; says what is there instead. Pickled weights are refused: loading
            them can run any code.
    """
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        raise ModelError(
            f"{str(folder)!r} holds an adapter, not a model: it needs its base below it. "
            "Use load_adapter(folder)."
        )
    if "config.json" not in names:
        raise ModelError(
            f"{str(folder)!r} has no config.json, so it is no model folder; it holds "
            f"{', '.join(sorted(names)[:8]) or 'nothing'}. Give the folder that save_pretrained "
            "wrote."
        )
    if any(name.endswith(".safetensors") for name in names):
        missing = sorted(_shards(folder) - names)
        if missing:
            raise ModelError(
                f"{str(folder)!r} lacks {', '.join(missing[:4])}, which its index lists: the copy "
                "is not whole. Copy or download it again."
            )
        return
    pickled = sorted(name for name in names if name.endswith(_PICKLES))
    found = f", only {', '.join(pickled[:4])}" if pickled else ""
    raise ModelError(
        f"{str(folder)!r} has no *.safetensors{found}. Pickled weights can run any code when they "
        "are loaded, so they are refused. Convert them where you trust them: save_pretrained "
        "writes safetensors."
    )


def _shards(folder: Path) -> set[str]:
    """The files that a sharded model's index lists."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{str(index)!r} can't be read ({error!r}), so it is unknown which files belong to the "
            "model. Copy or download it again."
        ) from error


def _is_prequantized(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool((config.get("quantization_config") or {}).get("load_in_4bit"))
    except (OSError, ValueError, AttributeError):
        return False


def cached(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub model in the hub's local cache, None where it is not there or not
    whole.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        check_folder(folder)
    except (OSError, ValueError):  # ModelError is a ValueError
        return None
    return folder


def hub_in_reach(seconds: float = 5.0) -> bool:
    """Whether the hub answers within a few seconds; False without a try where HF_HUB_OFFLINE is
    set.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # any transport's own error says the same: not in reach
        return False
    return True
