"""What is in memory after loading: read off the modules, compared with what was asked for, said."""

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lwf_unsloth.backend import device_name, on_cuda
from lwf_unsloth.bases import BaseIdentity, identify
from lwf_unsloth.config import ModelConfig
from lwf_unsloth.errors import ModelError
from lwf_unsloth.model_files import ModelFiles, cached

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """What is in memory, read off the modules; `str()` is the sentence said to the user."""

    asked: str
    """The name that was asked for."""
    identity: BaseIdentity
    bits: int
    """Bits a weight of the linear layers: 4, 8, 16 or 32."""
    quantization: str
    """"nf4, double quantisation", or empty where not quantised."""
    quantized_layers: int
    linear_layers: int
    """Linear layers under the output head, quantised or not."""
    dtype: str
    """Dtype of the weights that are not quantised."""
    compute_dtype: str
    """Dtype of the products with quantised weights."""
    device: str
    parameters: int
    """Weights of the base model (4-bit ones counted as weights, not as bytes)."""
    trainable: int = 0
    lora: dict[str, Any] = field(default_factory=dict)
    """r, lora_alpha, lora_dropout, bias and target_modules as they are on the model."""
    differences: tuple[str, ...] = ()
    """What differs from what was asked for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The `ModelConfig`, without its token."""

    @property
    def base(self) -> str:
        """The base model's name: hub id, embedded name or folder name."""
        return self.identity.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports and model cards."""
        values = asdict(self)
        values["identity"] = self.identity.to_dict()
        settings = {**self.settings, "model_name": self.base}
        return {**values, "base": self.base, "asked": self.base, "settings": settings}

    def __str__(self) -> str:
        if self.bits < 16:
            weights = (
                f"{self.bits}-bit weights ({self.quantization}) in {self.quantized_layers} of "
                f"{self.linear_layers} linear layers, the rest in {self.dtype}, products in "
                f"{self.compute_dtype}"
            )
        else:
            weights = f"{self.bits}-bit weights ({self.dtype})"
        text = f"{self.base}: {weights}, on {self.device}"
        if self.lora:
            text += (
                f"; LoRA r {self.lora['r']}, alpha {self.lora['lora_alpha']}, trains "
                f"{self.trainable:,} of {self.parameters + self.trainable:,} weights"
            )
        return ". ".join([text, *self.differences]) + "."


def note_adapter(model: Any, loaded: LoadedModel) -> LoadedModel:
    """Reads the adapter off a PEFT model, notes on the model what is there, and says it.

    Args:
        model: A PEFT model.
        loaded: What `inspect_model` found.

    Returns:
        The completed `LoadedModel`, also set as `model.lwf_loaded`.

    Raises:
        ModelError: Nothing in the model would train, though the adapter is not in inference mode.
    """
    adapter = model.peft_config[model.active_adapter]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable and not adapter.inference_mode:
        raise ModelError(
            "No weight of the model would train: LoRA reached none of its modules, or they are "
            "frozen. Training would end without having learned anything. Check target_modules."
        )
    lora = {
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "bias": adapter.bias,
        "target_modules": sorted(adapter.target_modules)
        if not isinstance(adapter.target_modules, str)
        else adapter.target_modules,
    }
    loaded = replace(loaded, trainable=trainable, lora=lora)
    model.lwf_loaded = loaded
    logger.log(logging.WARNING if loaded.differences else logging.INFO, "%s", loaded)
    return loaded


def check_targets(model: Any, wanted: Any) -> None:
    """Checks that every target module is a linear module of the model.

    Raises:
        ModelError: One is not; the message lists those there are.
    """
    if isinstance(wanted, str):  # a pattern, as PEFT may have saved one: it was matched in training
        return
    from torch.nn import Linear

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, Linear) or type(module).__name__ == "Conv1D"
    }
    head = {"lm_head", "embed_tokens"} & set(wanted)
    if head:
        raise ModelError(
            f"target_modules names {sorted(head)}: Unsloth would train it whole, not by LoRA, and "
            "the model with its adapter off would no longer be the teacher. Leave it out."
        )
    missing = [name for name in wanted if name.rsplit(".", 1)[-1] not in linear]
    if missing:
        there = sorted(linear - {"lm_head"})
        raise ModelError(
            f"target_modules names {missing}, but {type(model).__name__} has no such linear "
            f"modules: LoRA would leave them out. The ones there: {', '.join(there)}. Set "
            "ModelConfig(target_modules=[...])."
        )


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Checks that every token has an embedding row.

    Raises:
        ModelError: The tokenizer knows more tokens than the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = len(getattr(tokenizer, "tokenizer", tokenizer))
    if tokens > rows:
        raise ModelError(
            f"The tokenizer of {name!r} has {tokens} tokens, but the model only {rows} embedding "
            "rows: a token without a row crashes in training, and a grown embedding would have to "
            "be saved with every adapter. Use the tokenizer the model came with."
        )


def inspect_model(
    model: Any, config: ModelConfig, files: ModelFiles, identity: BaseIdentity | None
) -> LoadedModel:
    """Reads what was loaded off the modules, and how it differs from what was asked for.

    Args:
        model: What `from_pretrained` returned.
        config: What was asked for.
        files: Where it was loaded from.
        identity: What `identify_files` found; None asks the hub's cache.

    Returns:
        What is there.
    """
    head = model.get_output_embeddings()
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "in_features") and hasattr(module, "weight") and module is not head
    ]
    quantized = [
        layer for layer in layers if type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    ]
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    bits, kind, compute = (32 if dtype == "float32" else 16), "", dtype
    if quantized:
        bits, kind, compute = _quantization(quantized[0], dtype)
    packed = {id(layer.weight) for layer in quantized}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    weights += sum(layer.in_features * layer.out_features for layer in quantized)
    loaded = LoadedModel(
        asked=config.model_name,
        identity=identity or _identify_from_hub(model, config),
        bits=bits,
        quantization=kind,
        quantized_layers=len(quantized),
        linear_layers=len(layers),
        dtype=dtype,
        compute_dtype=compute,
        device=device_name(),
        parameters=weights,
        settings=config.to_dict(),
    )
    return replace(loaded, differences=tuple(_differences(loaded, config, files)))


def _quantization(layer: Any, dtype: str) -> tuple[int, str, str]:
    """Bits, kind and compute dtype of one quantised layer."""
    if type(layer).__name__ == "Linear8bitLt":
        return 8, "int8", dtype
    state = layer.weight.quant_state
    kind = layer.weight.quant_type + (", double quantisation" if state.nested else "")
    return 4, kind, str(layer.compute_dtype or dtype).removeprefix("torch.")


def identify_files(files: ModelFiles, config: ModelConfig) -> BaseIdentity | None:
    """Identity of a base whose files lie here; None where the hub will choose them.

    Raises:
        ModelError: A file is not whole safetensors.
    """
    if files.folder is None:
        return None
    if files.kind != "hub":
        return identify(files.folder, config.model_name, files.kind)
    return identify(files.folder, config.model_name, "hub", files.folder.name)


def _identify_from_hub(model: Any, config: ModelConfig) -> BaseIdentity:
    """Names what the hub gave: Unsloth may have taken another repository than was asked for."""
    commit = str(getattr(model.config, "_commit_hash", None) or config.revision or "")
    name = str(getattr(model.config, "_name_or_path", "") or config.model_name)
    return identify(cached(name, commit or None), name, "hub", commit)


def _differences(loaded: LoadedModel, config: ModelConfig, files: ModelFiles) -> list[str]:
    """What is not as it was asked for, one clause each."""
    found = []
    if files.kind == "hub" and loaded.base != config.model_name:
        found.append(f"{config.model_name!r} was asked for; Unsloth took {loaded.base!r}")
    if config.load_in_4bit and loaded.bits != 4:
        found.append(f"4 bits were asked for, but the weights have {loaded.bits}")
    if not config.load_in_4bit and loaded.bits < 16:
        found.append(
            f"load_in_4bit=False was asked for, but the files hold {loaded.bits}-bit weights"
        )
    if config.dtype not in (None, loaded.dtype):
        found.append(f"dtype {config.dtype} was asked for, but this device got {loaded.dtype}")
    if files.prequantized and loaded.bits == 4:
        kind = config.bnb_4bit_quant_type
        kind += ", double quantisation" if config.bnb_4bit_use_double_quant else ""
        if kind != loaded.quantization:
            found.append(f"{kind} was asked for, but the files were quantised already")
    if not on_cuda() and config.device_map not in (None, "auto", "cpu"):
        found.append(f"device_map {config.device_map!r} has no effect without a GPU")
    return found
