"""What a teacher's targets depend on, in words and hashes: equal identities, equal targets."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.cache_parts import digest
from lwf_unsloth.hidden import causal_lm
from lwf_unsloth.switches import ADAPTER_SWITCH
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
    model, template = teacher.model, get_template(tokenizer)
    return {
        "model": _model_name(model),
        "weights": digest(_config(causal_lm(model)), _weight_sample(teacher))[:16],
        "adapter": _adapter(teacher),
        "tokenizer": tokenizer_identity(tokenizer),
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


def _weight_sample(teacher: OwnTeacher | ModelTeacher) -> bytes:
    """Names, shapes and samples of the weights, without those that the adapter's part stands for.

    A snapshot holds what is trained; adapter tensors that are frozen act beside it.
    """
    snapshot = _snapshot(teacher)
    off = isinstance(teacher, OwnTeacher) and not snapshot
    names, samples = [], []
    for name, parameter in sorted(teacher.model.named_parameters()):
        if parameter.is_meta or name in snapshot or (off and "lora_" in name):
            continue
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE])
        names.append(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}")
    by_dtype: dict[Any, list[Tensor]] = {}
    for sample in samples:  # one transfer for each kind and device, not one for each tensor
        by_dtype.setdefault((sample.dtype, sample.device), []).append(sample)
    return "\n".join(names).encode() + b"".join(map(_raw, map(torch.cat, by_dtype.values())))


def _adapter(teacher: OwnTeacher | ModelTeacher) -> str:
    """What acts beside the weights: a hash of every value of a snapshot and how it is applied.

    "off" or "none" where nothing does. Scales are read off the layers: an adapter can be turned
    down after it was loaded.
    """
    snapshot = _snapshot(teacher)
    if isinstance(teacher, OwnTeacher) and not snapshot:
        return "off"
    layers = {
        name: [module.active_adapters, vars(module)[ADAPTER_SWITCH], module.scaling]
        for name, module in teacher.model.named_modules()
        if ADAPTER_SWITCH in vars(module) and hasattr(module, "scaling")
    }
    if not layers and not snapshot:
        return "none"
    configs = getattr(teacher.model, "peft_config", {})
    text = _json([{name: config.to_dict() for name, config in configs.items()}, layers])
    parts = [text, *(part for n in sorted(snapshot) for part in (n, _raw(snapshot[n])))]
    return digest(*parts)[:16]


def _snapshot(teacher: OwnTeacher | ModelTeacher) -> dict[str, Tensor]:
    """The snapshot's tensors, none where the adapter is off or the teacher a second model."""
    return (teacher.snapshot or {}) if isinstance(teacher, OwnTeacher) else {}


def tokenizer_identity(tokenizer: Any) -> str:
    """Size of the vocabulary, and a hash of all its tokens and of the special ones."""
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
