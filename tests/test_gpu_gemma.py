"""Gemma on CUDA: the widths of Gemma-2B, and gemma-3-270m through Unsloth's generic path."""

import math
import os

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # conversion and compilation
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

# Unsloth's compilation of Gemma 3 takes minutes here for steps of a second; what is tested, the
# generic path's hidden states, adapter and answers, goes through the same code without it.
os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402
from conftest import SENTENCES, build_tokenizer  # noqa: E402
from datasets import Dataset  # noqa: E402

from lwf_unsloth.generation import generate  # noqa: E402
from lwf_unsloth.hidden import head_matches, model_hidden, model_logits, output_head  # noqa: E402
from lwf_unsloth.scoring import score  # noqa: E402

GIB = 2**30


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """(folder, whether it is the real gemma-3-270m)."""
    return gpu.gemma_3_270m(tmp_path_factory.mktemp("gemma3") / "gemma-3-270m")


def test_gemma_3_hidden_states_times_the_head_are_its_logits_and_the_kl_starts_at_0(
    gemma3, tmp_path
):
    """Up to rounding, as bf16 allows."""
    model, tokenizer = gpu.load(gemma3[0], "bfloat16")
    assert model.lwf_loaded.bits == 4
    head = output_head(model)
    ids, mask = gpu.tokens(tokenizer, SENTENCES[:3])
    model.for_training()
    assert head is not None and head_matches(model, head, ids[:1])
    with torch.no_grad():
        hidden = model_hidden(model, ids, mask)
        logits = model_logits(model, ids, mask)
    real = mask.bool()
    ours = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight)
    assert (ours - logits)[real].abs().max() <= 0.02 * logits[real].abs().max()

    trainer = gpu.make_trainer(
        model, tokenizer, tmp_path, rehearsal=0, lwf_rows="all", learning_rate=1e-3
    )
    assert trainer.objective.head is not None, "no rows x vocabulary"
    first = trainer.teacher.hidden(ids, mask)[real].float()
    trainer.train()
    kl, losses = gpu.logged(trainer, "kl"), gpu.logged(trainer)
    assert 0 <= kl[0] < 1e-3 and min(kl[1:]) > 10 * kl[0]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    assert {p.dtype for p in gpu.trained(model).values()} == {torch.float32}
    model.for_inference()
    last = trainer.teacher.hidden(ids, mask)[real].float()
    assert (last - first).abs().max() <= 0.02 * first.abs().max(), "the base, after training too"


def test_gemma_3_with_rehearsal_answers_and_is_scored(gemma3, tmp_path):
    folder, real = gemma3
    model, tokenizer = gpu.load(folder, "bfloat16")
    before = generate(model, tokenizer, ["Say what number 3 is."], max_new_tokens=8)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, learning_rate=1e-3)
    trainer.train()
    assert all(map(math.isfinite, gpu.logged(trainer, "kl_rehearsal")))
    after = generate(model, tokenizer, ["Say what number 3 is."], max_new_tokens=8, adapter=False)
    assert after[0].text == before[0].text, "with the adapter off it is the base"
    scored = score(model, tokenizer, gpu.numbered(4, "held"))
    assert scored.kl > 0 and scored.nll < scored.base_nll
    if real:
        assert scored.base_nll < 6, "the real weights know English"


def test_gemma_3_learns_in_plain_sft_too(gemma3, tmp_path):
    model, tokenizer = gpu.load(gemma3[0], "bfloat16")
    trainer = gpu.make_trainer(
        model, tokenizer, tmp_path, rehearsal=0, lwf_lambda=0.0, learning_rate=1e-3
    )
    trainer.train()
    losses = gpu.logged(trainer)
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two layers of Gemma-2B: hidden 2048, heads of 256, one KV head, vocabulary 256,000."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GemmaConfig

    folder = tmp_path_factory.mktemp("gemma2b") / "gemma-2b-2-layers-bnb-4bit"
    sizes = {
        "vocab_size": 256000,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GemmaConfig(**sizes), dtype=torch.float16)
    plain = folder.parent / "fp16"
    model.save_pretrained(plain)
    del model
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    packed = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float16, device_map={"": 0}
    )
    packed.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_gemma_2b_widths_take_fp16_steps_without_holding_the_logits(wide, tmp_path):
    model, tokenizer = gpu.load(wide, "float16")
    assert model.lwf_loaded.bits == 4
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 256000, (24, 512), generator=draw).tolist()
    task = [{"input_ids": ids, "labels": [-100] * 256 + ids[256:]} for ids in rows]
    trainer = gpu.make_trainer(
        model,
        tokenizer,
        tmp_path,
        task=Dataset.from_list(task),
        rehearsal=0,
        lwf_rows="all",
        max_length=512,
        learning_rate=2e-4,
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.train()
    kl, losses = gpu.logged(trainer, "kl"), gpu.logged(trainer)
    assert kl[0] == 0.0 and len(kl) == 6
    assert all(map(math.isfinite, losses + kl))
    assert all(torch.isfinite(value).all() for value in gpu.trained(model).values())
    logits = 4 * 511 * 256000 * 2  # bytes of one side's, in fp16
    assert torch.cuda.max_memory_allocated() - before < 2 * logits, "both sides' would be more"


def test_gemma_2b_widths_have_no_nan_in_fp16_at_any_temperature_and_length(wide, tmp_path):
    """Temperature 0.5 sharpens the differences between logits and 4 scales the KL by 16."""
    model, tokenizer = gpu.load(wide, "float16", max_seq_length=2048)
    draw = torch.Generator().manual_seed(1)
    for temperature in (0.5, 1.0, 2.0, 4.0):
        for length, batch in ((33, 4), (512, 4), (2048, 2)):
            rows = torch.randint(3, 256000, (2 * batch, length), generator=draw).tolist()
            trainer = gpu.make_trainer(
                model,
                tokenizer,
                tmp_path / f"{temperature}-{length}",
                task=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows]),
                rehearsal=0,
                lwf_rows="all",
                lwf_temperature=temperature,
                max_length=length,
                per_device_train_batch_size=batch,
                learning_rate=1e-3,
                logging_steps=1,
                max_steps=3,
            )
            trainer.train()
            values = gpu.logged(trainer, "kl") + gpu.logged(trainer)
            assert len(values) == 6 and all(map(math.isfinite, values)), (temperature, length)
    assert all(torch.isfinite(value).all() for value in gpu.trained(model).values())
