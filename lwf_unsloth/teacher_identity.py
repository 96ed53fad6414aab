"""What a teacher's targets depend on, in words and hashes: equal identities, equal targets."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.cache_parts import digest
from lwf_unsloth.hidden import causal_lm
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher
from lwf_unsloth.templates import get_template

SAMPLE = 64
"""Values looked at in each weight tensor, evenly spread: a training moves every tensor it
touches."""

_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "unsloth_version"}
"""Entries of a model's configuration that change without the model."""


def teacher_identity(
    teacher: OwnTeacher | ModelTeacher, tokenizer: Any, products: str
) -> dict[str, str]:
    """What decides the targets of a row, apart from the row.

    Args:
        teacher: The live teacher, in the state that is to be described.
        tokenizer: The one that encoded the rows, with its template.
        products: Dtype of the products ("float16" under autocast to it).

    Returns:
        Name of the part -> short description; hashes are cut to 16 digits.
    """
    model, own = teacher.model, isinstance(teacher, OwnTeacher)
    snapshot = teacher.snapshot if isinstance(teacher, OwnTeacher) else None
    template = get_template(tokenizer)
    return {
        "model": _model_name(model),
        "weights": digest(_config(causal_lm(model)), _weight_sample(model, own))[:16],
        "adapter": "off" if own else "as loaded",
        **({} if snapshot is None else {"adapter": _adapter(model, snapshot)}),
        "tokenizer": _tokenizer(tokenizer),
        "template": f"{template.name} {digest(_json(template.to_dict()))[:16]}",
        "dtype": f"{str(getattr(model, 'dtype', '')).removeprefix('torch.')}, products {products}",
    }


def _model_name(model: nn.Module) -> str:
    """What `load_model` knows of the base, or the configuration's class."""
    loaded = getattr(model, "lwf_loaded", None)
    if loaded is None:
        return type(causal_lm(model).config).__name__
    known = loaded.identity
    mark = known.source or known.fingerprint or known.revision
    bits = f"{loaded.bits} bits {loaded.quantization}".strip()
    return f"{known.name} {mark[:16]}, {bits}, {loaded.compute_dtype}"


def _config(model: Any) -> str:
    values = model.config.to_dict()
    return _json({name: value for name, value in values.items() if name not in _VOLATILE})


def _weight_sample(model: nn.Module, own: bool) -> bytes:
    """Names, shapes and samples of the frozen weights, without the own model's adapter."""
    names, samples = [], []
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta or (own and (parameter.requires_grad or "lora_" in name)):
            continue
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE])
        names.append(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}")
    by_dtype: dict[Any, list[Tensor]] = {}
    for sample in samples:  # one transfer for each kind and device, not one for each tensor
        by_dtype.setdefault((sample.dtype, sample.device), []).append(sample)
    return "\n".join(names).encode() + b"".join(map(_raw, map(torch.cat, by_dtype.values())))


def _adapter(model: nn.Module, snapshot: dict[str, Tensor]) -> str:
    """Hash of every value of the trained tensors, and of how the adapter applies them."""
    configs = getattr(model, "peft_config", {})
    text = _json({name: config.to_dict() for name, config in configs.items()})
    parts = [text, *(part for n in sorted(snapshot) for part in (n, _raw(snapshot[n])))]
    return digest(*parts)[:16]


def _tokenizer(tokenizer: Any) -> str:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    text = _json([vocabulary, inner.special_tokens_map])
    return f"{len(vocabulary)} tokens {digest(text)[:16]}"


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _json(values: Any) -> str:
    """Plain values as sorted JSON; of other objects only the type, which does not change."""
    return json.dumps(values, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else type(value).__name__
