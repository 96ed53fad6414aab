"""Shared fixtures: a hand-made two-layer model with its own tokenizer, loaded through the real
FastLanguageModel."""

import logging
import os
import shutil

import hypothesis
import pytest

# The same drawn cases in every run, and no complaint that drawing them took long on a busy machine.
# `--hypothesis-profile=default` looks for others, and so does tests/campaigns/fuzz.py.
hypothesis.settings.load_profile("ci")

# The GPU tests read CUDA when they are imported: without a card they are not there, not skipped.
collect_ignore_glob = [] if shutil.which("nvidia-smi") else ["test_gpu_*.py"]

# One thread a process: tiny tensors gain nothing from more, and parallel test processes would
# fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = 1800
"""Seconds of a test that trains, browses or starts processes, before it counts as hanging. The
longest takes two minutes where nothing else runs; what runs beside it may make it ten times as
long."""


def pytest_collection_modifyitems(items):
    """The real demo takes longer than all others together: it goes first, they go beside it."""
    items.sort(key=lambda item: "test_the_real_demo" not in item.nodeid)
    for item in items:
        long = any(map(item.get_closest_marker, ("slow", "notebook", "browser")))
        if long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONGEST))


SENTENCES = [
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context.",
    "Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
    "The quick brown fox jumps over the lazy dog near the river bank at 12:45 on 3 May 1987.",
    "Sleep is important because the body repairs itself and the brain sorts what it has learned.",
    "def prime(n): return all(n % k for k in range(2, n))",
]


def build_tokenizer(bos: bool = True):
    """A byte-level BPE of about 400 tokens with <s>, </s> and <pad>; `bos` adds <s> by a
    post-processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )


@pytest.fixture(autouse=True)
def one_log_level_for_every_test():
    """The command line sets the level of the package's log for its process: here it lasts one
    test, so that no test's log depends on what ran before it."""
    log = logging.getLogger("lwf_unsloth")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tiny tokenizer, shared: tests that change it build their own with `build_tokenizer`."""
    from lwf_unsloth.backend import prepare

    prepare()
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer):
    """Folder of a random two-layer Llama (hidden 64, safetensors) with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture()
def tiny_peft(tiny_model_dir):
    """Factory: `tiny_peft(**ModelConfig changes)` -> (model, tokenizer), 4-bit, float32, LoRA r
    4."""

    def load(**changes):
        from lwf_unsloth.config import ModelConfig
        from lwf_unsloth.model import load_model

        values = {"dtype": "float32", "r": 4, "lora_alpha": 8, "max_seq_length": 512}
        return load_model(ModelConfig(str(tiny_model_dir), **{**values, **changes}))

    return load


@pytest.fixture()
def alpaca_rows():
    """Builder of distinct Alpaca rows: `alpaca_rows(n)`."""

    def rows(n: int, tag: str = "task") -> list[dict[str, str]]:
        return [
            {
                "instruction": f"{tag}: say what number {i} is.",
                "input": "" if i % 3 else f"number {i}",
                "output": f"Number {i} is the {'even' if i % 2 == 0 else 'odd'} one. "
                * (1 + i % 3),
            }
            for i in range(n)
        ]

    return rows


@pytest.fixture()
def settings(tmp_path):
    """Factory of small LwFConfigs: float32, 4 rows a step, one epoch."""

    def make(**changes):
        from lwf_unsloth.config import LwFConfig

        values = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_length": 256,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "rehearsal_ratio": 0.25,
        }
        return LwFConfig(str(tmp_path / "run"), **{**values, **changes})

    return make


@pytest.fixture()
def make_trainer(tiny_peft, settings, alpaca_rows):
    """Factory: a trainer on 12 task rows and 6 rehearsal rows unless told otherwise."""

    def make(
        model=None, tokenizer=None, task=12, rehearsal=6, teacher=None, eval_dataset=None, **changes
    ):
        from datasets import Dataset

        from lwf_unsloth.trainer import LwFTrainer

        if model is None:
            model, tokenizer = tiny_peft()
        return LwFTrainer(
            model,
            args=settings(**changes),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(alpaca_rows(task)) if isinstance(task, int) else task,
            rehearsal_dataset=Dataset.from_list(alpaca_rows(rehearsal, "keep"))
            if rehearsal
            else None,
            eval_dataset=eval_dataset,
            teacher=teacher,
        )

    return make


def change_adapter(model, seed=1):
    """An adapter that has learned something: LoRA's second factor away from 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)


@pytest.fixture(scope="module")
def gpu_folders(tmp_path_factory):
    """Folders of a Llama and of a Gemma shape, and of the Gemma pre-quantised to 4 bits."""
    import gpu_shapes as gpu

    root = tmp_path_factory.mktemp("shapes")
    made = {kind: gpu.build(kind, root / kind) for kind in ("llama", "gemma")}
    return {**made, "prequantised": gpu.quantise(made["gemma"], root / "gemma-4bit")}


@pytest.fixture()
def llama(gpu_folders):
    """Factory: (model, tokenizer) of the Llama shape in 4 bits, on the GPU."""
    import gpu_shapes as gpu

    return lambda dtype="float16", **changes: gpu.load(gpu_folders["llama"], dtype, **changes)


@pytest.fixture()
def short_run(tiny_peft, alpaca_rows, tmp_path):
    """Factory: a trainer on the tiny model, 2 rows a forward, half of them rehearsal."""

    def make(run="run", model=None, task=6, **changes):
        from lwf_unsloth.config import LwFConfig
        from lwf_unsloth.trainer import LwFTrainer

        values = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_length": 96,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "rehearsal_ratio": 0.5,
        }
        model, tokenizer = model or tiny_peft()
        return LwFTrainer(
            model,
            args=LwFConfig(str(tmp_path / run), **{**values, **changes}),
            processing_class=tokenizer,
            train_dataset=alpaca_rows(task),
            rehearsal_dataset=alpaca_rows(6, "keep"),
        )

    return make


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on this machine alone, for the browser tests of a file."""
    from browser_lab import Lab, chromium

    chromium()  # skips before a server is started
    server = Lab(tmp_path_factory.mktemp("lab"))
    try:
        server.start()
        yield server
    finally:
        server.stop()
