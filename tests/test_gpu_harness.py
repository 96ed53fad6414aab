"""Benchmarks through Unsloth's CUDA path: the numbers of full logits, and the model left alone."""

import os
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("lm_eval")

# Unsloth's compilation of Gemma 3 takes minutes; the numbers come from the same code without it.
os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402

from lwf_unsloth.harness import evaluate_benchmarks  # noqa: E402
from lwf_unsloth.harness_lm import LoadedLM  # noqa: E402
from lwf_unsloth.hidden import model_logits  # noqa: E402
from lwf_unsloth.scoring import score  # noqa: E402

PAIRS = [(f"The quick brown {'fox ' * (i % 3)}", f"jumps over{' the dog' * i}") for i in range(6)]


@pytest.fixture(scope="module", params=["llama", "gemma", "gemma3"])
def disturbed(request, tmp_path_factory):
    """(model, tokenizer) in 4 bits and half precision, its adapter adding noise."""
    folder = gpu.build(request.param, tmp_path_factory.mktemp("shapes") / request.param)
    dtype = "bfloat16" if request.param == "gemma3" else "float16"
    model, tokenizer = gpu.load(folder, dtype)
    gpu.disturb(model, 0.2)
    return model, tokenizer


def naive(model, tokenizer, context, continuation):
    """Log-likelihood from full logits, one sequence at a time, in training mode's kernels."""
    start = tokenizer(context.rstrip())["input_ids"]
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]], device="cuda")
    with torch.no_grad():
        logits = model_logits(model, ids, torch.ones_like(ids)).double().log_softmax(-1)
    steps = range(len(start), ids.shape[1])
    return sum(float(logits[0, t - 1, ids[0, t]]) for t in steps), len(steps)


def test_log_likelihoods_are_those_of_full_logits(disturbed):
    model, tokenizer = disturbed
    asked = [SimpleNamespace(args=pair, task_name="t") for pair in PAIRS]
    found = LoadedLM(model, tokenizer, batch_size=4).loglikelihood(asked)
    model.for_training(use_gradient_checkpointing=False)
    for (value, _), pair in zip(found, PAIRS, strict=True):
        wanted, tokens = naive(model, tokenizer, *pair)
        assert value / tokens == pytest.approx(wanted / tokens, abs=0.02)


def test_the_nll_of_score_is_that_of_the_harness(disturbed):
    model, tokenizer = disturbed
    rows = [{"text": f"The quick brown fox number {i} sleeps. " * (1 + i % 3)} for i in range(6)]
    ours = score(model, tokenizer, rows, base=None)
    asked = [("", row["text"] + tokenizer.eos_token) for row in rows]
    lm = LoadedLM(model, tokenizer)
    theirs = lm.loglikelihood([SimpleNamespace(args=pair, task_name="t") for pair in asked])
    # The harness leaves the last token out: other shapes, so another rounding in half precision.
    assert -sum(v for v, _ in theirs) / ours.tokens == pytest.approx(ours.nll, abs=5e-3)


def test_base_and_tuned_answer_by_themselves_and_the_model_is_left_as_it_was(disturbed):
    model, tokenizer = disturbed
    before = [(m.training, vars(m).get("_disable_adapters")) for m in model.modules()]
    settings = {"limit": 6, "max_new_tokens": 12}
    both = evaluate_benchmarks(model, tokenizer, "local_instructions", **settings)
    base = evaluate_benchmarks(model, tokenizer, "local_instructions", adapter=False, **settings)
    tuned = evaluate_benchmarks(model, tokenizer, "local_instructions", base=None, **settings)
    for paired, off, on in zip(both, base, tuned, strict=True):
        assert paired.base == off.base and paired.tuned == on.tuned
    assert both.settings["weights"]["base"] == ("off", "base")
    assert [(m.training, vars(m).get("_disable_adapters")) for m in model.modules()] == before
    assert not any("paged_attention" in vars(m) for m in model.modules())


def test_an_adapter_that_adds_nothing_changes_no_answer(tmp_path):
    model, tokenizer = gpu.load(gpu.build("llama", tmp_path / "llama"), "float16")
    for one in evaluate_benchmarks(
        model, tokenizer, "local_instructions", limit=6, max_new_tokens=12
    ):
        assert one.base == one.tuned and one.change.value == 0
