"""Merge an adapter into its base: a plain 16-bit model folder that needs neither PEFT nor
Unsloth.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

from lwf_unsloth.adapters import active_adapter, adapter_record
from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import prepare
from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.model_card import adapter_card
from lwf_unsloth.replaced_folders import RECORD, new_folder

logger = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16")


@checked()
def merge_model(
    model: Any, tokenizer: Any, folder: str | Path, *, dtype: str | None = None
) -> Path:
    """Writes base plus adapter as one 16-bit model that plain transformers loads.

    Each layer's weights are dequantised, the adapter's update is added in fp32 and the sum rounded
    once. PEFT's own merge would round the sum to 4 bits again, and Unsloth's takes the 16-bit base
    from the hub, on which the adapter was not trained. So only 16-bit rounding is lost: measured on
    SmolLM2 (20 prompts, 883 tokens) 99.7 % of the greedy choices stay, where adding the adapter to
    the 16-bit base keeps 69 %. The adapter remains the original.
    The model in memory is left as it is.

    Args:
        model: A PEFT model, 4-bit or not.
        tokenizer: Its tokenizer.
        folder: Where to; appears whole or not at all.
        dtype: "bfloat16" or "float16"; None takes the model's own, bf16 where that is fp32.

    Returns:
        The folder.

    Raises:
        ModelError: No single active adapter, one that is not plain LoRA, or a folder in use.
        ConfigError: Another dtype.
    """
    prepare()
    import torch

    if dtype not in (None, *_DTYPES):
        raise ConfigError(
            f"dtype is {dtype!r}, but must be one of {_DTYPES}: merging is to 16 bits."
        )
    name = active_adapter(model)
    base = model.get_base_model()
    own = str(base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    dtype = dtype or (own if own in _DTYPES else "bfloat16")
    weights = _merged_weights(model, name, getattr(torch, dtype))
    record = {**adapter_record(model, tokenizer), "merged": True, "dtype": dtype}
    with new_folder(Path(folder)) as new:
        _plain_model(base, weights, getattr(torch, dtype)).save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(adapter_card(record, {}, "merged"), encoding="utf-8")
    return Path(folder)


def _merged_weights(model: Any, name: str, dtype: Any) -> dict[str, Any]:
    """Every weight of the base under its own name, on the CPU in `dtype`, LoRA added where it
    is.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    merged: dict[str, Any] = {}
    for key, module in model.named_modules():
        if not isinstance(module, LoraLayer) or name not in module.lora_A:
            continue
        if module.use_dora.get(name) or module.lora_bias.get(name):
            raise ModelError(
                f"{key} holds DoRA or a LoRA bias, which is no plain sum of weights. Merge it with "
                "PEFT."
            )
        with torch.no_grad():
            update = module.get_delta_weight(name).float()
            weight = _dequantized(module.get_base_layer()) + update
        merged[f"{key.removeprefix(prefix)}.weight"] = weight.to("cpu", dtype)
    for key, module in model.named_modules():
        if isinstance(module, LoraLayer) or ".lora_" in key:
            continue
        short = key.removeprefix(prefix).removesuffix(".base_layer")
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{short}.{leaf}"
            if tensor is None or full in merged or leaf in module._non_persistent_buffers_set:
                continue
            if leaf == "weight" and type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
                tensor = _dequantized(module)
            kept = tensor.detach().to("cpu")
            merged[full] = kept.to(dtype) if kept.is_floating_point() else kept
    return merged


def _dequantized(layer: Any) -> Any:
    """A linear layer's weight in fp32, dequantised where it is quantised."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float()


def _plain_model(base: Any, weights: dict[str, Any], dtype: Any) -> Any:
    """The base's own class, unquantised and without patches, holding the given weights."""
    import torch

    config = copy.deepcopy(base.config)
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config.dtype = dtype
    config.use_cache = True
    with torch.device("meta"):
        plain = type(base)(config)
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    tied = set(getattr(plain, "_tied_weights_keys", None) or [])
    lost = [key for key in missing if key not in tied]
    unexpected = [key for key in unexpected if key.endswith((".weight", ".bias"))]  # no buffers
    if lost or unexpected:
        raise ModelError(
            f"The merged weights don't fit {type(base).__name__}: missing {lost[:3]}, unexpected "
            f"{unexpected[:3]}. Save the adapter instead (save_adapter); it is the original."
        )
    plain.tie_weights()
    if base.generation_config is not None:
        plain.generation_config = copy.deepcopy(base.generation_config)
    return plain
