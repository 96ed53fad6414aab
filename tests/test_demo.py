"""The demo: its report holds what it promises, and the real one reaches its marks."""

import io
import json

import pytest
from rich.console import Console

from lwf_unsloth.answer_scores import facts_found
from lwf_unsloth.config import ModelConfig
from lwf_unsloth.generation import DEMO_PROMPTS
from lwf_unsloth.samples import sample_path

REPORT_KEYS = {
    "model", "device", "versions", "settings", "seed", "rows", "steps", "seconds",
    "peak_memory_bytes", "task_loss_first", "task_loss_last", "kl_first", "kl_last",
    "before", "after", "eos_rate", "heldout", "retention",
}  # fmt: skip


def tiny(folder, **changes):
    values = {"dtype": "float32", "r": 4, "max_seq_length": 512, **changes}
    return ModelConfig(str(folder), use_gradient_checkpointing=False, **values)


@pytest.fixture(scope="module")
def ran(tiny_model_dir, tmp_path_factory):
    """A demo of three steps on the tiny model: (report, folder, what was shown)."""
    from lwf_unsloth.demo import run_demo

    folder = tmp_path_factory.mktemp("runs") / "demo"
    shown = Console(file=io.StringIO(), width=120)
    report = run_demo(
        folder, tiny(tiny_model_dir), steps=3, questions=4, max_new_tokens=5, console=shown
    )
    return report, folder, shown.file.getvalue()


def test_the_report_holds_every_promised_key_and_is_the_file(ran):
    report, folder, _ = ran
    assert set(report) >= REPORT_KEYS
    assert json.loads((folder / "report.json").read_text()) == report
    assert set(report["rows"]) >= {"task", "rehearsal", "dropped"}
    assert set(report["eos_rate"]) >= {"before", "after", "prompts"}
    assert set(report["heldout"]) >= {"nll_before", "nll_after", "facts_before", "facts_after"}
    assert set(report["retention"]) >= {"nll_before", "nll_after", "kl", "nll_after_lambda0"}


def test_the_report_counts_what_was_done(ran):
    report, _, _ = ran
    assert (report["steps"], report["seed"], report["eos_rate"]["prompts"]) == (3, 42, 4)
    assert report["rows"]["task"] == len(sample_path("faq_task").read_text().splitlines())
    assert report["rows"]["dropped"] == 0
    assert report["settings"]["max_new_tokens"] == 5
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > 50 * 2**20
    assert report["kl_first"] == 0  # student = teacher before the first step
    assert report["retention"]["kl"] > 0


def test_answers_before_and_after_are_to_the_same_prompts_with_their_stops(ran):
    report, _, _ = ran
    prompts = [[answer["prompt"] for answer in report[side]] for side in ("before", "after")]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 4 + 3
    assert set(prompts[0][4:]) <= set(DEMO_PROMPTS)
    for answer in report["before"] + report["after"]:
        assert answer["stop"] in ("eos", "length")
        assert (answer["stop"] == "length") == (answer["tokens"] == 5)
    for side in ("before", "after"):
        stops = [answer["stop"] for answer in report[side] if answer["kind"] == "heldout"]
        assert report["eos_rate"][side] == stops.count("eos") / 4


def test_everything_it_names_lies_in_its_folder(ran):
    _, folder, shown = ran
    for name in ("report.json", "comparison.html", "comparison.md", "adapter"):
        assert (folder / name).exists()
        assert name in shown.replace("\n", "")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "Could you tell me the address" in (folder / "comparison.md").read_text()


def test_the_stages_the_table_and_the_numbers_are_shown(ran):
    report, _, shown = ran
    for stage in range(1, 7):
        assert f"[{stage}/6]" in shown
    assert f"{report['heldout']['nll_before']:.3f}" in shown
    assert f"{report['retention']['kl']:.4f}" in shown
    assert "cut at the limit" in shown


def test_a_model_that_never_stops_rehearses_passages(ran):
    report, _, _ = ran
    assert report["settings"]["rehearsal"] == "passages"


def test_a_model_that_stops_rehearses_general_instructions(tiny_peft, monkeypatch):
    from lwf_unsloth import demo_data

    model, tokenizer = tiny_peft()
    monkeypatch.setattr(demo_data, "stop_probability", lambda *a: 0.5)
    data = demo_data.demo_data(model, tokenizer)
    assert data.kind == "general instructions"
    seen = {row["instruction"] for row in data.rehearsal}
    assert len(data.retention) == 60
    assert not seen & {row["instruction"] for row in data.retention}
    assert len(data.heldout) >= 50


def test_the_run_without_kl_starts_from_the_same_adapter(ran):
    report, _, _ = ran
    kept = report["retention"]
    # Three tiny steps: near the start either way, and yet another run than ours.
    assert kept["nll_after_lambda0"] == pytest.approx(kept["nll_before"], abs=0.5)
    assert kept["nll_after_lambda0"] != kept["nll_after"]
    assert kept["kl_lambda0"] > 0


def test_ending_the_run_without_kl_keeps_the_report(tiny_model_dir, tmp_path, monkeypatch):
    from lwf_unsloth import demo
    from lwf_unsloth.trainer import LwFTrainer

    train = LwFTrainer.train

    def interrupted(self, *args, **kwargs):
        if self.args.lwf_lambda == 0:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LwFTrainer, "train", interrupted)
    report = demo.run_demo(
        tmp_path,
        tiny(tiny_model_dir),
        steps=1,
        questions=1,
        max_new_tokens=2,
        console=Console(file=io.StringIO()),
    )
    assert report["retention"]["nll_after_lambda0"] is None
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_markup_in_an_answer_is_shown_as_text():
    from lwf_unsloth.answers import Answer
    from lwf_unsloth.demo_view import answer_table

    console = Console(file=io.StringIO(), width=100)
    text = "[bold red]x[/] [link=file:///etc]y[/link]"
    console.print(answer_table([(Answer("[p]", text, "eos", 3), Answer("[p]", "z", "length", 3))]))
    assert "[bold red]x[/]" in console.file.getvalue()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The demo as users run it, on the embedded SmolLM2, less the run at lambda 0."""
    from lwf_unsloth.demo import run_demo

    folder = tmp_path_factory.mktemp("runs") / "demo"
    return run_demo(folder, "smollm2-135m-instruct", lambda0=False), folder


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_real_demo_reaches_its_marks(real):
    report, _ = real
    held, kept = report["heldout"], report["retention"]
    assert report["eos_rate"]["prompts"] >= 50
    assert report["settings"]["max_new_tokens"] == 96
    assert report["eos_rate"]["after"] >= 0.9
    assert held["facts_before"] <= 0.10
    assert held["facts_after"] >= 0.65
    assert held["nll_after"] <= 0.8 * held["nll_before"]
    assert kept["nll_after"] - kept["nll_before"] <= 0.02


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_adapter_answers_the_same_in_plain_transformers_and_peft(real):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from lwf_unsloth.embedded import embedded_model
    from lwf_unsloth.records import prompt_ids

    report, folder = real
    dtype = getattr(torch, report["model"]["dtype"])
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        embedded_model("smollm2-135m-instruct"), dtype=dtype, quantization_config=four_bit
    )
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    for answer in report["after"][:10]:
        ids = torch.tensor([prompt_ids(tokenizer, answer["prompt"])])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=96,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer["text"]


def test_facts_in_the_training_answers_are_the_facts_asked_for():
    """The mark is reachable: the training answer of each fact contains what is looked for."""
    from lwf_unsloth.answers import Answer, Generations
    from lwf_unsloth.decoding import Decoding

    lines = sample_path("faq_heldout").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    answers = tuple(Answer(row["instruction"], row["output"], "eos", 1) for row in rows)
    assert facts_found(Generations(answers, Decoding()), rows) == 1
