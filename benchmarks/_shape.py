"""A model in Gemma-2B's shape with random weights, in a folder, and loaded as a user loads one."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lwf_unsloth.backend import on_cuda

GEMMA_2B = {
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
LENGTH = 8192
"""Gemma-2B's positions."""
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def make_folder(folder: Path | None, tiny: bool) -> Path:
    """The model's folder: the one given, filled where it is empty, or one under the temporary
    folder that later runs on this machine find again.
    """
    name = "lwf-gemma-tiny" if tiny else "lwf-gemma-2b-shape"
    folder = folder or Path(tempfile.gettempdir()) / name
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, TINY if tiny else GEMMA_2B)
    return folder


def _write(folder: Path, shape: dict[str, int]) -> None:
    """Weights of deviation 0.02 in fp16 (fp32 on a CPU), a small tokenizer, and the config last."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GemmaConfig

    _tokenizer().save_pretrained(folder)
    config = GemmaConfig(
        **shape, max_position_embeddings=LENGTH, pad_token_id=0, eos_token_id=1, bos_token_id=2
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    device, dtype = ("cuda", torch.float16) if on_cuda() else ("cpu", torch.float32)
    draw = torch.Generator(device).manual_seed(0)
    weights = {}
    for key, value in empty.state_dict().items():
        if key == "lm_head.weight":  # tied
            continue
        made = torch.zeros(value.shape, device=device)  # norms: Gemma adds 1
        if value.dim() > 1:
            made.normal_(0.0, 0.02, generator=draw)
        weights[key] = made.to(dtype).cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(empty).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def _tokenizer() -> Any:
    """Bytes as tokens: the benchmarks draw their token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def _config(folder: Path, tiny: bool) -> Any:
    from lwf_unsloth.config import ModelConfig

    dtype = "float16" if on_cuda() else "float32"
    return ModelConfig(str(folder), max_seq_length=128 if tiny else LENGTH, dtype=dtype, r=8)


def load_student(folder: Path, tiny: bool) -> tuple[nn.Module, Any]:
    """(model, tokenizer): 4 bits, LoRA r 8 on 7 modules, checkpointing "unsloth"."""
    from lwf_unsloth.model import load_model

    return load_model(_config(folder, tiny))


def load_second(folder: Path, tiny: bool) -> nn.Module:
    """The base alone, in 4 bits."""
    from lwf_unsloth.model import load_base

    model, _, _ = load_base(_config(folder, tiny))
    return model
