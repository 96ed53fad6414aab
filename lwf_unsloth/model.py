"""Load a model with LoRA through Unsloth's FastLanguageModel, and an adapter back onto its base."""

import logging
from pathlib import Path
from typing import Any

from lwf_unsloth.adapters import AdapterFolder, fill_adapter, read_adapter, save_adapter
from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import native_bf16, on_cuda, prepare
from lwf_unsloth.config import ModelConfig
from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.loaded import (
    LoadedModel,
    check_targets,
    check_vocabulary,
    identify_files,
    inspect_model,
    note_adapter,
)
from lwf_unsloth.merging import merge_model
from lwf_unsloth.model_files import ModelFiles, cached, find_model, hub_in_reach
from lwf_unsloth.ranks import check_launch, own_device_map
from lwf_unsloth.records import check_tokenizer
from lwf_unsloth.trained_template import note_template

__all__ = [
    "LoadedModel",
    "default_model",
    "load_adapter",
    "load_base",
    "load_model",
    "merge_model",
    "save_adapter",
]

logger = logging.getLogger(__name__)

_DEFAULT_HUB_MODEL = "unsloth/gemma-2b-bnb-4bit"
_DEFAULT_EMBEDDED = "smollm2-135m-instruct"


def default_model() -> ModelConfig:
    """`unsloth/gemma-2b-bnb-4bit` on a GPU that can get it, else the embedded SmolLM2."""
    if on_cuda() and (cached(_DEFAULT_HUB_MODEL) or hub_in_reach()):
        return ModelConfig(_DEFAULT_HUB_MODEL)
    return ModelConfig(_DEFAULT_EMBEDDED)


@checked()
def load_model(
    config: ModelConfig | str | Path, *, adapter: str | Path | None = None
) -> tuple[Any, Any]:
    """Loads a base model in 4 bits and puts LoRA on it.

    Args:
        config: What to load, or just its name: a hub id, a local folder (pre-quantised or not) or
            an embedded name.
        adapter: Folder of a saved adapter to train on, instead of a new one; see `load_adapter`.

    Returns:
        (model, tokenizer): a PEFT model whose `lwf_loaded` is a `LoadedModel`, and its tokenizer.

    Raises:
        ModelError: The model is not there or can't be loaded, has only pickled weights, has none of
            the target modules, or nothing would train.
        ConfigError: A quantisation setting that the CPU backend would ignore.
    """
    if adapter is not None:
        return load_adapter(adapter, base=config, trainable=True)
    config = config if isinstance(config, ModelConfig) else ModelConfig(str(config))
    model, tokenizer, loaded = load_base(config)
    check_targets(model, config.target_modules)
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        target_modules=list(config.target_modules),
        use_gradient_checkpointing=config.use_gradient_checkpointing,
        random_state=config.random_state,
    )
    note_adapter(model, loaded)
    return model, tokenizer


@checked()
def load_adapter(
    folder: str | Path,
    *,
    base: ModelConfig | str | Path | None = None,
    trainable: bool = False,
    check_base: bool = True,
) -> tuple[Any, Any]:
    """Loads a saved adapter onto its base model, with the tokenizer and template it was saved with.

    An adapter belongs to the base it was trained on, in the same precision: on 4-bit weights it
    answers a little differently than on 16-bit ones, and on other weights it answers wrongly. So
    the base is loaded as it was in training, unless `base` says otherwise, and compared.

    Args:
        folder: What `save_adapter`, or PEFT's own save_pretrained, wrote.
        base: Its base model; None takes the recorded one (not possible for a local folder, whose
            path is not recorded). A name keeps the recorded settings, a `ModelConfig` replaces them
            (its LoRA fields are not used).
        trainable: Whether the adapter is to be trained on.
        check_base: False loads it onto a base that is known to differ.

    Returns:
        (model, tokenizer), as `load_model`; `model.lwf_template` is the template that it was
        trained in, and a tokenizer with another one is refused where it answers or is measured.

    Raises:
        ModelError: No adapter in safetensors there, a base that differs from the recorded one (both
            are named), or weights that don't fit the model.
    """
    saved = read_adapter(Path(folder))
    config = saved.base_config(str(base) if isinstance(base, Path) else base)
    model, tokenizer, loaded = load_base(config)
    loaded = saved.compare(loaded, check=check_base)
    check_targets(model, saved.lora["target_modules"])
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        use_gradient_checkpointing=config.use_gradient_checkpointing,
        random_state=config.random_state,
        **saved.lora,
    )
    fill_adapter(model, saved, trainable=trainable)
    tokenizer = _saved_tokenizer(model, tokenizer, saved)
    note_adapter(model, loaded)
    note_template(model, saved.record)
    return model, tokenizer


def load_base(config: ModelConfig) -> tuple[Any, Any, LoadedModel]:
    """Loads the base model alone, through `FastLanguageModel.from_pretrained`.

    Args:
        config: What to load; its LoRA fields are not used.

    Returns:
        (model, tokenizer, what was loaded).

    Raises:
        ModelError: As `load_model`.
        ConfigError: As `load_model`.
    """
    check_launch()
    prepare()
    files = find_model(config)
    arguments = _arguments(config, files)
    identity = identify_files(
        files, config
    )  # looks at every file's header: a cut-off one ends here
    from unsloth import FastLanguageModel

    try:
        model, tokenizer = FastLanguageModel.from_pretrained(files.source, **arguments)
    except Exception as error:  # whatever the libraries raise, the user is told what to do
        raise _not_loaded(config, error) from error
    check_tokenizer(tokenizer)
    check_vocabulary(model, tokenizer, config.model_name)
    return model, tokenizer, inspect_model(model, config, files, identity)


def _saved_tokenizer(model: Any, tokenizer: Any, saved: AdapterFolder) -> Any:
    """The tokenizer in the adapter's folder, or the base's where there is none."""
    if not (saved.folder / "tokenizer_config.json").is_file():
        return tokenizer
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(
        saved.folder,
        padding_side="right",
        model_max_length=getattr(tokenizer, "model_max_length", None),
        trust_remote_code=False,  # left out, it would ask whether to run what the folder brings
    )
    check_tokenizer(own)
    check_vocabulary(model, own, str(saved.folder))
    for module in model.modules():  # Unsloth flips the padding side of the one it keeps there
        if "_saved_temp_tokenizer" in vars(module):
            module._saved_temp_tokenizer = own
    return own


def _not_loaded(config: ModelConfig, error: Exception) -> ModelError:
    """What to say when `from_pretrained` failed."""
    reason = next((line for line in str(error).splitlines() if line.strip()), repr(error)).strip()
    advice = "Check the name, that its files are whole, and for a gated or private model the token."
    if "out of memory" in reason.lower():
        advice = "Free memory (another process or notebook may hold it), or take a smaller model."
    return ModelError(
        f"{config.model_name!r} could not be loaded ({type(error).__name__}: {reason}). {advice}"
    )


def _dtype(config: ModelConfig) -> Any:
    """The torch dtype to ask Unsloth for; None leaves it bf16, where the device has it.

    A card before Ampere gets fp16 also where torch claims that bf16 works: there it is emulated.
    """
    import torch

    if on_cuda() and not native_bf16():
        return torch.float32 if config.dtype == "float32" else torch.float16
    return None if config.dtype is None else getattr(torch, config.dtype)


def _own_quantization(config: ModelConfig) -> dict[str, Any]:
    """The quantisation settings that differ from the ones Unsloth takes by itself."""
    usual = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": config.dtype,
    }
    return {
        name: getattr(config, name)
        for name, value in usual.items()
        if getattr(config, name) not in (value, None)
    }


def _arguments(config: ModelConfig, files: ModelFiles) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`.

    Raises:
        ConfigError: Quantisation settings that the CPU backend would ignore.
    """
    arguments: dict[str, Any] = {
        "max_seq_length": config.max_seq_length,
        "dtype": _dtype(config),
        "load_in_4bit": config.load_in_4bit or files.prequantized,
        "token": config.token,
        "trust_remote_code": config.trust_remote_code,
        "use_gradient_checkpointing": config.use_gradient_checkpointing,
        "random_state": config.random_state,
        "use_safetensors": True,
    }
    if config.revision is not None and files.kind == "hub":
        arguments["revision"] = config.revision
    device_map = own_device_map(config.device_map)
    if device_map is not None:
        arguments["device_map"] = device_map
    changed = _own_quantization(config)
    if not config.load_in_4bit or files.prequantized or not changed:
        return arguments
    if not on_cuda():
        raise ConfigError(
            f"{changed} was asked for, but Unsloth's CPU backend always takes nf4 with double "
            "quantisation and computes in dtype: the setting would be ignored. Leave it at its "
            "default here, or load a folder that was quantised that way."
        )
    from transformers import BitsAndBytesConfig
    from unsloth_zoo.peft_utils import SKIP_QUANTIZATION_MODULES

    compute = (
        config.bnb_4bit_compute_dtype
        or config.dtype
        or ("bfloat16" if native_bf16() else "float16")
    )
    arguments["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(SKIP_QUANTIZATION_MODULES),
    )
    return arguments
