"""Answers, scores, saving and merging through Unsloth's CUDA path, on a model that has learned."""

import json
import math

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from lwf_unsloth import generation  # noqa: E402
from lwf_unsloth.generation import generate  # noqa: E402
from lwf_unsloth.hidden import model_logits  # noqa: E402
from lwf_unsloth.scoring import score  # noqa: E402

QUESTIONS = [row["instruction"] for row in gpu.numbered(12) if not row["input"]] + ["Sleep?"]
LONG = {"instruction": "Describe the river bank.", "input": "The quick brown fox jumps. " * 6}


def taught(folder, tmp, dtype, **changes):
    """(model, tokenizer, trainer) after 60 steps on 12 rows: it knows some of them by heart."""
    model, tokenizer = gpu.load(folder, dtype, r=16, lora_alpha=32, **changes)
    trainer = gpu.make_trainer(
        model, tokenizer, tmp, per_device_train_batch_size=8, max_steps=60, learning_rate=2e-2
    )
    trainer.train()
    return model, tokenizer, trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpu.build("llama", tmp_path_factory.mktemp("shapes") / "llama")


@pytest.fixture(scope="module")
def half(folder, tmp_path_factory):
    """In 4 bits and fp16."""
    return taught(folder, tmp_path_factory.mktemp("half"), "float16")


def state(model, tokenizer):
    """What generating and scoring must leave as it was."""
    return (
        tokenizer.padding_side,
        model.config.use_cache,
        [m.training for m in model.modules()],
        [vars(m).get("gradient_checkpointing") for m in model.modules()],
        [vars(m).get("_disable_adapters") for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [n for n, m in model.named_modules() if "paged_attention" in vars(m)],
    )


def test_in_fp16_every_token_of_a_left_padded_batch_is_the_likeliest_after_its_own_prefix(
    half, monkeypatch
):
    """Half precision rounds a batch otherwise than a row alone, so near ties may fall either way;
    each token must be as good as tied with the best by a forward without padding and cache.
    """
    model, tokenizer, _ = half
    prompts = [*QUESTIONS, LONG, "Write code to calculate prime numbers."]
    seen = []

    def recorded(*args):
        new = run_batch(*args)
        seen.extend(zip(args[2], new, strict=True))
        return new

    run_batch = generation._run_batch
    monkeypatch.setattr(generation, "_run_batch", recorded)
    generate(model, tokenizer, prompts, max_new_tokens=32, batch_size=16)
    assert len(seen) == len(prompts) and len({len(prompt) for prompt, _ in seen}) > 2
    for prompt, new in seen:
        end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
        ids = torch.tensor([prompt + new[:end]], device="cuda")
        with torch.no_grad():
            logits = model_logits(model, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        spread = logits.amax(1) - logits.amin(1)
        assert ((logits.amax(1) - taken) / spread).max() <= 0.02


@pytest.fixture()
def no_tf32():
    """Products of fp32 with all their bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_in_fp32_a_left_padded_batch_is_the_same_to_the_last_token(folder, no_tf32):
    model, tokenizer = gpu.load(folder, "float32", load_in_4bit=False)
    gpu.disturb(model, 0.2)
    prompts = [*QUESTIONS, LONG]
    together = generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=16)
    alone = generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=1)
    assert [a.text for a in together] == [a.text for a in alone]


def test_generating_and_scoring_leave_the_model_as_it_was(half):
    model, tokenizer, _ = half
    for mode in (model.for_training, model.for_inference):
        mode()
        before = state(model, tokenizer)
        generate(model, tokenizer, QUESTIONS[:2], max_new_tokens=8)
        generate(model, tokenizer, QUESTIONS[:2], max_new_tokens=8, adapter=False, temperature=1.0)
        score(model, tokenizer, gpu.numbered(3))
        assert state(model, tokenizer) == before


def test_adapter_false_answers_as_the_base(half, folder):
    model, tokenizer, _ = half
    base, _ = gpu.load(folder, "float16")
    off = generate(model, tokenizer, QUESTIONS, max_new_tokens=12, adapter=False, batch_size=16)
    fresh = generate(base, tokenizer, QUESTIONS, max_new_tokens=12, batch_size=16)
    on = generate(model, tokenizer, QUESTIONS, max_new_tokens=12, batch_size=16)
    assert [a.text for a in off] == [a.text for a in fresh]
    assert [a.text for a in on] != [a.text for a in off]


def test_a_saved_adapter_gives_the_same_greedy_answers(half, folder, tmp_path):
    from lwf_unsloth.model import load_adapter, save_adapter

    model, tokenizer, _ = half
    before = generate(model, tokenizer, QUESTIONS, max_new_tokens=32, batch_size=16)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    again, own = load_adapter(tmp_path / "adapter", base=str(folder))
    assert again.lwf_loaded.bits == 4
    after = generate(again, own, QUESTIONS, max_new_tokens=32, batch_size=16)
    assert [a.text for a in after] == [a.text for a in before]
    assert after.weights == before.weights != "base"
    assert str(folder.parent) not in (tmp_path / "adapter/adapter_config.json").read_text()


def test_a_merged_16_bit_model_is_close_in_plain_transformers(half, tmp_path):
    from transformers import AutoModelForCausalLM

    from lwf_unsloth.model import merge_model

    model, tokenizer, _ = half
    merge_model(model, tokenizer, tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float16).cuda()
    ids, mask = gpu.tokens(tokenizer, [f"say what number {i} is." for i in (1, 7, 10)])
    real = mask.bool()
    model.for_inference()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
        ours = model_logits(model, ids, mask)[real].float().log_softmax(-1)
        with model.disable_adapter():
            base = model_logits(model, ids, mask)[real].float().log_softmax(-1)
    with torch.no_grad():
        theirs = merged(input_ids=ids, attention_mask=mask).logits[real].float().log_softmax(-1)
    apart = (ours.exp() * (ours - theirs)).sum(-1).mean()
    effect = (ours.exp() * (ours - base)).sum(-1).mean()
    assert apart < 0.01 * effect, "16-bit rounding beside what the adapter does"


class Answering(TrainerCallback):
    """Generates and scores in the middle of training."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            generate(self.model, self.tokenizer, QUESTIONS[:3], max_new_tokens=8, temperature=1.0)
            generate(self.model, self.tokenizer, QUESTIONS[:3], max_new_tokens=8, adapter=False)
            score(self.model, self.tokenizer, gpu.numbered(3))


def test_training_with_answers_in_between_equals_training_without(folder, tmp_path):
    runs = []
    for answering in (False, True):
        model, tokenizer = gpu.load(folder, "float16")
        if answering:
            generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=8)
        callbacks = [Answering(model, tokenizer)] if answering else []
        trainer = gpu.make_trainer(
            model, tokenizer, tmp_path, callbacks=callbacks, num_train_epochs=2
        )
        trainer.train()
        runs.append(gpu.logged(trainer))
    assert len(runs[0]) == 8 and runs[1] == pytest.approx(runs[0], rel=2e-3)


def direct(model, tokenizer, rows):
    """(CE of answers, KL to the base of answers, of all tokens) a token, from full fp32 logits."""
    from lwf_unsloth.alpaca import encode_rows

    encoded = encode_rows(tokenizer, rows, max_length=256)[0]
    sums = torch.zeros(3, 2, dtype=torch.float64)
    model.for_training()
    for row in encoded:
        ids = torch.tensor([row["input_ids"]]).cuda()
        labels = torch.tensor(row["labels"][1:]).cuda()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
            tuned = model_logits(model, ids, torch.ones_like(ids))[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                base = model_logits(model, ids, torch.ones_like(ids))[0, :-1].double()
        base, scored = base.log_softmax(-1), labels >= 0
        kl = (base.exp() * (base - tuned)).sum(-1)
        ce = -tuned[scored].gather(1, labels[scored, None])[:, 0]
        for i, part in enumerate((ce, kl[scored], kl)):
            sums[i] += torch.tensor([float(part.sum()), len(part)])
    return (sums[:, 0] / sums[:, 1]).tolist()


def test_evaluate_and_score_give_the_numbers_of_a_direct_computation(half):
    model, tokenizer, trainer = half
    rows = gpu.numbered(9, "held")
    ce, kl_answers, kl_all = direct(model, tokenizer, rows)
    found = trainer.evaluate(rows)
    assert found["eval_task_loss"] == pytest.approx(ce, rel=0.01)
    assert found["eval_kl"] == pytest.approx(kl_all, rel=0.02)
    scored = score(model, tokenizer, rows, max_length=256, batch_size=4)
    assert scored.nll == pytest.approx(ce, rel=0.01)
    assert scored.kl == pytest.approx(kl_answers, rel=0.02)
    assert math.isfinite(scored.base_nll) and scored.rise == scored.nll - scored.base_nll


def test_sampling_with_a_seed_is_repeatable_and_uses_no_global_random_state(half):
    model, tokenizer, _ = half
    settings = {"max_new_tokens": 16, "temperature": 1.0, "seed": 5, "batch_size": 16}
    random = torch.cuda.get_rng_state()
    one = generate(model, tokenizer, QUESTIONS, **settings)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    torch.cuda.manual_seed(99)
    two = generate(model, tokenizer, QUESTIONS, **settings)
    assert [a.text for a in one] == [a.text for a in two]
