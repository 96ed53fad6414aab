"""An adapter's folder: safetensors, tokenizer, prompt template, model card, and which base it
needs.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import versions
from lwf_unsloth.bases import BaseIdentity, identify
from lwf_unsloth.config import ModelConfig
from lwf_unsloth.embedded import EMBEDDED, embedded_name
from lwf_unsloth.errors import ModelError
from lwf_unsloth.loaded import LoadedModel
from lwf_unsloth.model_card import adapter_card
from lwf_unsloth.replaced_folders import RECORD, new_folder, recover
from lwf_unsloth.templates import get_template
from lwf_unsloth.whole_files import alone_in

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
_NOT_FROM_A_FILE = ("trust_remote_code", "device_map", "token", "model_name", "revision")
"""Settings that a folder from elsewhere must not decide, or that belong to another machine."""
_LORA = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")
_LORA_EXTRAS = (
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
)


@checked()
def save_adapter(
    model: Any, tokenizer: Any, folder: str | Path, *, card: dict[str, Any] | None = None
) -> Path:
    """Saves the active adapter alone, with all that is needed to use it again.

    The folder appears whole or not at all; an adapter already there is replaced. Where several
    processes train together, one of them calls it.

    Args:
        model: A PEFT model, usually from `load_model`.
        tokenizer: Its tokenizer; the prompt template travels on it.
        folder: Where to; holds safetensors, tokenizer, `lwf.json` and README.md afterwards.
        card: What the model card tells besides (settings, row counts, results), nested at will;
            machine paths and tokens are left out of it.

    Returns:
        The folder.

    Raises:
        ModelError: The model has no adapter or several active ones, or the folder holds other
            files.
    """
    name = active_adapter(model)
    record = adapter_record(model, tokenizer)
    with new_folder(Path(folder)) as new:
        # False: else PEFT asks the hub whether the base's vocabulary has another size.
        model.save_pretrained(new, selected_adapters=[name], save_embedding_layers=False)
        if (new / name).is_dir():
            for path in (new / name).iterdir():
                path.replace(new / path.name)
            (new / name).rmdir()
        _name_base(new / "adapter_config.json", BaseIdentity.from_dict(record["base"]))
        tokenizer.save_pretrained(new)
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(adapter_card(record, card or {}), encoding="utf-8")
    return Path(folder)


def adapter_record(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What `lwf.json` says of a model with its adapter: base, settings, template, versions."""
    loaded = getattr(model, "lwf_loaded", None)
    return {
        "format": 1,
        "base": (loaded.identity if loaded else _unknown_base(model)).to_dict(),
        "loaded": loaded.to_dict() if loaded else {},
        "template": get_template(tokenizer).to_dict(),
        "eos_token": tokenizer.eos_token,
        "versions": versions(),
    }


def active_adapter(model: Any) -> str:
    """Name of the one active adapter.

    Raises:
        ModelError: There is none, or there are several.
    """
    names = list(getattr(model, "active_adapters", [])) if hasattr(model, "peft_config") else []
    if len(names) != 1:
        raise ModelError(
            f"The model ({type(model).__name__}) has {len(names)} active adapters {names}, but "
            "exactly one can be saved or merged. Take a model from load_model, or activate one "
            "with model.set_adapter(name)."
        )
    return str(names[0])


@dataclass(frozen=True)
class AdapterFolder:
    """What lies in an adapter's folder."""

    folder: Path
    lora: dict[str, Any]
    """Arguments of `get_peft_model`."""
    base: BaseIdentity
    record: dict[str, Any]
    """`lwf.json`; empty for an adapter that another tool saved."""
    stamp: tuple[int, int]
    """Size and time of change of the weights when the rest was read."""

    def base_config(self, base: ModelConfig | str | None) -> ModelConfig:
        """What to load as base: the recorded settings, under the name given or recorded.

        Raises:
            ModelError: No base was given and none is recorded that could be found.
        """
        if isinstance(base, ModelConfig):
            return base
        if base is None and self.base.kind == "folder" and not Path(self.base.name).is_dir():
            raise ModelError(
                f"The adapter in {str(self.folder)!r} was trained on {self.base}, a folder whose "
                "place is not recorded. Say where it is: load_adapter(..., base=folder)."
            )
        settings = (self.record.get("loaded") or {}).get("settings") or {}
        known = {
            key: value
            for key, value in settings.items()
            if key in ModelConfig.__dataclass_fields__
            and key not in _NOT_FROM_A_FILE
            and key not in _LORA
        }
        revision = self.base.revision if base is None and self.base.kind == "hub" else ""
        return ModelConfig(base or self.base.name, revision=revision or None, **known)

    def compare(self, loaded: LoadedModel, *, check: bool = True) -> LoadedModel:
        """Compares the base that was loaded with the one the adapter was trained on.

        Returns:
            `loaded`, with what differs added to its differences.

        Raises:
            ModelError: `check`, and they are different weights, or their names differ and nothing
                tells that the weights don't.
        """
        same = self.base.same_weights(loaded.identity)
        if same is None:
            same = _short(self.base.name) == _short(loaded.base)
        notes = list(loaded.differences)
        if not same:
            text = f"the adapter was trained on {self.base}, the base given is {loaded.identity}"
            if check:
                raise ModelError(
                    f"In {str(self.folder)!r} {text}: on other weights it loads without an error "
                    "and answers wrongly. Give its own base (base=...), or check_base=False where "
                    "you know that they match."
                )
            notes.append(text)
        bits = (self.record.get("loaded") or {}).get("bits", loaded.bits)
        if bits != loaded.bits:
            notes.append(
                f"the adapter was trained on {bits}-bit weights and answers a little differently "
                f"on {loaded.bits}-bit ones"
            )
        return replace(loaded, differences=tuple(notes))


def read_adapter(folder: Path) -> AdapterFolder:
    """Reads what an adapter's folder says, without its weights.

    Raises:
        ModelError: No adapter there, pickled weights only, or another kind than LoRA.
    """
    with alone_in(folder.parent):  # a save may be about to replace it
        recover(folder)
        return _read_adapter(folder)


def _read_adapter(folder: Path) -> AdapterFolder:
    config = _read_json(folder / "adapter_config.json")
    if not config:
        raise ModelError(
            f"{str(folder)!r} has no readable adapter_config.json, so it holds no adapter. Give "
            "the folder that save_adapter wrote."
        )
    if not (folder / WEIGHTS).is_file():
        pickled = [path.name for path in folder.glob("adapter_model.*")]
        raise ModelError(
            f"{str(folder)!r} has no {WEIGHTS}" + (f", only {pickled}" if pickled else "") + ". "
            "Pickled weights can run any code when they are loaded, so they are refused. Save the "
            "adapter as safetensors where you trust it."
        )
    extras = {key: config[key] for key in _LORA_EXTRAS if config.get(key)}
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise ModelError(
            f"The adapter in {str(folder)!r} is {config.get('peft_type')} with use_dora="
            f"{config.get('use_dora')} and modules_to_save={config.get('modules_to_save')}; plain "
            "LoRA is what is built here. Load it with PEFT itself."
        )
    record = _read_json(folder / RECORD)
    return AdapterFolder(
        folder=folder,
        lora={**{key: config[key] for key in _LORA}, **extras},
        base=_recorded_base(record, str(config.get("base_model_name_or_path") or "unknown")),
        record=record,
        stamp=_stamp(folder / WEIGHTS),
    )


def _stamp(path: Path) -> tuple[int, int]:
    """What tells a file from the one that replaced it, or from none."""
    try:
        state = path.stat()
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


def _recorded_base(record: dict[str, Any], named: str) -> BaseIdentity:
    """The base from `lwf.json`, or from the name that PEFT alone has saved, which may be a path."""
    if record.get("base"):
        return BaseIdentity.from_dict(record["base"])
    embedded = embedded_name(Path(named).name) or (named if named in EMBEDDED else None)
    if embedded:
        return BaseIdentity(embedded, "embedded", source=EMBEDDED[embedded].sha256)
    path = Path(named)
    if not path.is_dir():
        return BaseIdentity(named, "folder" if path.is_absolute() else "hub")
    # The whole path stays the name: it is where this machine finds the base.
    return replace(identify(path, named, "folder"), name=named)


def fill_adapter(model: Any, saved: AdapterFolder, *, trainable: bool) -> None:
    """Puts the saved weights into the LoRA layers that the model already has.

    Args:
        model: A PEFT model with an adapter of the same settings.
        saved: The adapter.
        trainable: Whether its weights may train on.

    Raises:
        ModelError: A weight is missing, too much, or has another shape, or the adapter was replaced
            since its settings were read.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = active_adapter(model)
    try:
        tensors = load_file(saved.folder / WEIGHTS)
        replaced = _stamp(saved.folder / WEIGHTS) != saved.stamp
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{WEIGHTS} in {str(saved.folder)!r} can't be read ({error}): the file is not whole. "
            "Save or copy it again."
        ) from error
    if replaced:
        raise ModelError(
            f"The adapter in {str(saved.folder)!r} was replaced while it was being loaded, by a "
            "run that still saves there: its settings would be those of another one. Load it again."
        )
    have = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wrong = [f"missing {key}" for key in have if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in have]
    wrong += [
        f"{key} has shape {list(tensors[key].shape)} instead of {list(have[key].shape)}"
        for key in have
        if key in tensors and tensors[key].shape != have[key].shape
    ]
    if wrong:
        raise ModelError(
            f"The weights in {str(saved.folder)!r} don't fit the model: {'; '.join(wrong[:3])}"
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + ". Parts of the adapter would stay at their initial values. Give the base it was "
            "trained on."
        )
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    if not trainable:
        model.peft_config[name].inference_mode = True
        model.requires_grad_(False)
        model.eval()


def _name_base(path: Path, identity: BaseIdentity) -> None:
    """Writes the base's name into PEFT's config in the place of this machine's path."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = identity.name
    config["revision"] = identity.revision or None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _unknown_base(model: Any) -> BaseIdentity:
    """The base's name for a model that `load_model` did not load."""
    name = str(getattr(model.get_base_model().config, "_name_or_path", "") or "unknown")
    local = Path(name).exists() or Path(name).is_absolute()
    return BaseIdentity(Path(name).name if local else name, "folder" if local else "hub")


def _short(name: str) -> str:
    """A name without owner, path and Unsloth's 4-bit ending, in lower case."""
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
