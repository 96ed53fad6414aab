"""The sizes of a model that decide its memory, from a configuration or from the loaded model."""

from dataclasses import dataclass
from typing import Any

from lwf_unsloth.errors import ModelError

BLOCK, OUTER_BLOCK = 64, 256
"""Weights, and scales, that share a scale in bitsandbytes' double quantisation."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with LoRA."""

    layers: int
    hidden: int
    mlp: int
    """Width of the MLP."""
    queries: int
    """Heads x their width."""
    keys: int
    """Key heads x their width."""
    vocabulary: int
    weight_bytes: int
    """All frozen weights."""
    trained: int
    """Values that are trained."""
    trained_bytes: int
    itemsize: int = 2
    """Bytes of a value in the products' dtype."""
    unpacked_bytes: int = 0
    """The largest 4-bit weight as the products take it."""
    checkpointing: str = "unsloth"
    """"unsloth" (inputs of layers on the CPU), "inputs" (they stay) or "everything" (off)."""
    fused: bool = True
    """Unsloth's CUDA kernels; False on a CPU."""
    full_logits: bool = False
    """The head is trained, or of an unknown kind."""
    positions: int = 2**17
    """Longest row the model was made for."""
    dense: bool = True
    """False with experts, whose widths here are a guess."""

    @classmethod
    def of_config(
        cls,
        config: Any,
        *,
        bits: int = 4,
        itemsize: int = 2,
        r: int = 8,
        target_modules: tuple[str, ...] | None = None,
        checkpointing: str = "unsloth",
        fused: bool = True,
    ) -> "ModelShape":
        """Counts from a transformers configuration: nothing has to be loaded.

        A 4-bit weight takes half a byte, a byte of scale for 64 of them and 4 bytes of scale for
        64 x 256. Embedding and head stay in the products' dtype. Norms and biases are left out.

        Args:
            config: Of a dense decoder (Llama, Gemma, Qwen, Mistral and the like).
            bits: 4, 8, 16 or 32 of the linear layers.
            itemsize: Bytes of a value in the products' dtype.
            r: LoRA rank, kept in fp32.
            target_modules: Names with LoRA; None for all seven.
            checkpointing: See the field.
            fused: See the field.
        """
        sizes = _sizes(config)
        hidden, mlp = sizes["hidden"], sizes["mlp"]
        linear = {
            "q_proj": (hidden, sizes["queries"]),
            "k_proj": (hidden, sizes["keys"]),
            "v_proj": (hidden, sizes["keys"]),
            "o_proj": (sizes["queries"], hidden),
            "gate_proj": (hidden, mlp),
            "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden),
        }
        weights = sizes["layers"] * sum(width * out for width, out in linear.values())
        packed = 0.5 + 1 / BLOCK + 4 / (BLOCK * OUTER_BLOCK) if bits == 4 else bits / 8
        tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
        embeddings = tables * sizes["vocabulary"] * hidden * itemsize
        chosen = linear if target_modules is None else {n: linear[n] for n in target_modules}
        trained = sizes["layers"] * r * sum(width + out for width, out in chosen.values())
        return cls(
            sizes["layers"],
            hidden,
            mlp,
            sizes["queries"],
            sizes["keys"],
            sizes["vocabulary"],
            weight_bytes=round(weights * packed) + embeddings,
            trained=trained,
            trained_bytes=4 * trained,
            itemsize=itemsize,
            unpacked_bytes=hidden * mlp * itemsize if bits == 4 else 0,
            checkpointing=checkpointing,
            fused=fused,
            positions=_positions(config),
            dense=not any(getattr(config, name, None) for name in EXPERTS),
        )

    @classmethod
    def of_model(cls, model: Any) -> "ModelShape":
        """Reads sizes off a loaded model; weights are counted, not computed."""
        import torch

        from lwf_unsloth.backend import on_cuda
        from lwf_unsloth.hidden import causal_lm, output_head

        base = causal_lm(model)
        config = base.config.get_text_config()
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        packed = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
        frozen = sum(_bytes(p) for p in parameters if not p.requires_grad)
        dtype = getattr(model, "dtype", torch.float32)
        itemsize = dtype.itemsize if dtype.is_floating_point else 2
        largest = max((m.in_features * m.out_features for m in packed), default=0)
        sizes = _sizes(config)
        return cls(
            sizes["layers"],
            sizes["hidden"],
            sizes["mlp"],
            sizes["queries"],
            sizes["keys"],
            sizes["vocabulary"],
            weight_bytes=frozen + sum(_scale_bytes(m.weight) for m in packed),
            trained=sum(p.numel() for p in trained),
            trained_bytes=sum(_bytes(p) for p in trained),
            itemsize=itemsize,
            unpacked_bytes=largest * itemsize,
            checkpointing=_checkpointing(model),
            fused=on_cuda(),
            full_logits=output_head(model) is None,
            positions=_positions(config),
            dense=not any(getattr(config, name, None) for name in EXPERTS),
        )


def _sizes(config: Any) -> dict[str, int]:
    """Widths by the names that decoders' configurations use.

    Raises:
        ModelError: One is not there.
    """
    try:
        heads, hidden = config.num_attention_heads, config.hidden_size
        width = getattr(config, "head_dim", None) or hidden // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        mlp = getattr(config, "intermediate_size", None) or 4 * hidden
        return {
            "layers": int(config.num_hidden_layers),
            "hidden": int(hidden),
            "mlp": int(max(mlp) if isinstance(mlp, (list, tuple)) else mlp),
            "queries": int(heads * width),
            "keys": int(keys * width),
            "vocabulary": int(config.vocab_size),
        }
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"The sizes of a {type(config).__name__} are not known here ({error}), so its memory "
            "can't be estimated: try a short run, and watch the memory."
        ) from error


def _positions(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**17)


def _checkpointing(model: Any) -> str:
    """What a loaded model does with its layers' activations in training.

    As it was loaded: the modules' own state is off after answers, or in a new trainer.
    """
    from lwf_unsloth.backend import on_cuda

    way = getattr(model, "_unsloth_gradient_checkpointing", None)
    if way is None:
        way = getattr(model, "is_gradient_checkpointing", False)
    if not way:
        return "everything"
    return "unsloth" if way == "unsloth" and on_cuda() else "inputs"


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _scale_bytes(weight: Any) -> int:
    """The scales of a 4-bit weight, which are no parameters."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return 0
    inner = getattr(state, "state2", None)
    tensors = [state.absmax, state.code, *([] if inner is None else [inner.absmax, inner.code])]
    return sum(_bytes(tensor) for tensor in tensors if tensor is not None)
