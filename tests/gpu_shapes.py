"""Small models in the shapes that Unsloth's CUDA kernels take, and steps of the trainer on them."""

import importlib.metadata

import torch
from conftest import build_tokenizer
from datasets import Dataset

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def build(kind: str, folder, **changes):
    """A folder of a random model: "llama", "gemma" (one KV head, as Gemma-2B) or "gemma3"."""
    import transformers

    tokenizer = build_tokenizer()
    values = {**COMMON, "vocab_size": len(tokenizer), **changes}
    if kind == "llama":
        config = transformers.LlamaConfig(**values, tie_word_embeddings=False)
    elif kind == "gemma":
        config = transformers.GemmaConfig(**values)
    else:
        values = {"sliding_window": 64, "query_pre_attn_scalar": 64, **values}
        if "layer_types" not in values:
            values["layer_types"] = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantise(source, folder, dtype=torch.float16):
    """Saves a folder's model pre-quantised to 4 bits, as the hub's -bnb-4bit repositories are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=dtype, device_map={"": 0}
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def load(folder, dtype="float16", **changes):
    """(model, tokenizer) through the real load_model: 4-bit, LoRA r 8."""
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_model

    values = {"max_seq_length": 512, "r": 8, "lora_alpha": 16, **changes}
    return load_model(ModelConfig(str(folder), dtype=dtype, **values))


def numbered(n: int, tag: str = "task", first: int = 0) -> list[dict[str, str]]:
    """Distinct Alpaca rows."""
    return [
        {
            "instruction": f"{tag}: say what number {i} is.",
            "input": "" if i % 3 else f"number {i}",
            "output": f"Number {i} is the {'even' if i % 2 == 0 else 'odd'} one. " * (1 + i % 3),
        }
        for i in range(first, first + n)
    ]


def make_trainer(model, tokenizer, folder, *, task=12, rehearsal=6, teacher=None, **changes):
    """A trainer on `task` rows and `rehearsal` Alpaca rows; keyword arguments of LwFConfig."""
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.trainer import LwFTrainer

    kwargs = {name: changes.pop(name) for name in ("eval_dataset", "callbacks") if name in changes}
    values = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_length": 256,
        "disable_tqdm": True,
        "save_strategy": "no",
        "rehearsal_ratio": 0.25,
        **changes,
    }
    keep = Dataset.from_list(numbered(rehearsal, "keep")) if rehearsal else None
    return LwFTrainer(
        model,
        args=LwFConfig(str(folder), **values),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(numbered(task)) if isinstance(task, int) else task,
        rehearsal_dataset=keep,
        teacher=teacher,
        **kwargs,
    )


def trained(model) -> dict[str, torch.Tensor]:
    """Copies of the weights that are trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def disturb(model, scale=0.05) -> None:
    """Gives LoRA a random state, as if it had been trained."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * scale)


def logged(trainer, name: str = "loss") -> list[float]:
    """One value of every log line of the training."""
    return [line[name] for line in trainer.state.log_history if "loss" in line and name in line]


def mixed_rows(trainer, count=8):
    """The first rows in the order of training, rehearsal rows among them."""
    order = list(trainer._get_train_sampler())
    return [trainer.train_dataset[i] for i in order[:count]]


def gradients(trainer, rows, micro, scale=1024.0):
    """Gradients and loss of one accumulated step over `rows`, `micro` at a time, as in training.

    The loss scale is fixed, so that in fp16 no run is compared at another scale than the other.
    """
    if not hasattr(trainer, "_test_prepared"):
        trainer._test_prepared = trainer.accelerator.prepare_model(trainer.model)
    model = trainer._test_prepared
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    else:
        scale = 1.0
    trainer.model.for_training(trainer.model._unsloth_gradient_checkpointing)
    model.zero_grad()
    batches = [
        {k: v.cuda() if hasattr(v, "cuda") else v for k, v in trainer.data_collator(part).items()}
        for part in (rows[i : i + micro] for i in range(0, len(rows), micro))
    ]
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cuda"))
    total = sum(float(trainer.training_step(model, batch, items)) for batch in samples)
    found = {n: p.grad.float() / scale for n, p in model.named_parameters() if p.grad is not None}
    return found, total


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative difference (L2, all tensors together)."""
    assert one.keys() == other.keys() and one
    apart = sum((one[name] - other[name]).square().sum() for name in one)
    size = sum(value.square().sum() for value in other.values())
    return float((apart / size).sqrt())


def tokens(tokenizer, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask (B, T) on the GPU."""
    rows = [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        for text in texts
    ]
    longest = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids).cuda(), torch.tensor(mask).cuda()


def gemma_3_270m(scratch):
    """(folder, is it the real one): the embedded model where its packages or its conversion are on
    this machine (nothing is fetched), else its shape with random weights and a small vocabulary.
    """
    from lwf_unsloth.embedded import CONVERTER, EMBEDDED, cache_dir, embedded_model

    spec = EMBEDDED["gemma-3-270m"]
    made = cache_dir() / f"{spec.name}-{spec.sha256[:12]}-c{CONVERTER}"
    if made.is_dir() or all(map(_installed, spec.parts + spec.documents)):
        return embedded_model(spec.name), True
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]
    shape = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "head_dim": 256,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "layer_types": kinds,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    }
    return build("gemma3", scratch, **shape), False


def _installed(part) -> bool:
    try:
        package = importlib.metadata.distribution(part.package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return package.locate_file(part.member).is_file()
