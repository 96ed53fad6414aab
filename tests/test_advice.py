"""advise(): what it says rests on a figure, it says nothing where all is well, and what it changes
is a copy."""

import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lwf_unsloth.advice import advise
from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.comparison import compare
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.facts import TrainingFacts
from lwf_unsloth.generation import DEMO_PROMPTS
from lwf_unsloth.loss_curve import falling, overfitted, rising

FALLING = tuple(3.0 - 0.05 * i for i in range(40))
FLAT = tuple(1.0 + 0.01 * (i % 2) for i in range(40))
SETTINGS = {
    "learning_rate": 2e-4,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "max_length": 512,
    "lwf_lambda": 2.0,
    "rehearsal_ratio": 0.1,
}


def answers(*texts, prompt="Tell me about the sea.", **settings):
    made = tuple(Answer(prompt, text, stop, 9) for text, stop in texts)
    return Generations(made, Decoding(**settings))


FINE = ("The sea is deep and salt.", "eos")
CUT = ("The sea is deep and covers most of the", "length")
LOOP = ("The sea is deep and salt. " * 6, "length")


def known(**values):
    whole = {"answer_tokens": (40,) * 100, "ended": 100, "settings": SETTINGS}
    return TrainingFacts(**{**whole, **values})


def test_nothing_is_said_where_all_is_well():
    facts = known(task_loss=FLAT, kl=0.01, rise=0.001, rehearsal_rows=20, looked_at=100)
    for one in (None, facts, replace(facts, task_loss=FALLING)):
        advice = advise(answers(FINE, FINE), one)
        assert not advice and str(advice) == "Nothing to change."
        assert advice.changes == {} and "Nothing to change" in advice._repr_html_()


def test_too_few_new_tokens_are_seen_from_the_lengths_of_the_training_answers():
    lengths = tuple(range(1, 201))  # 99 % end within 198
    (hint,) = advise(answers(CUT, FINE, max_new_tokens=64), known(answer_tokens=lengths, ended=200))
    assert hint.changes == {"max_new_tokens": 224}
    assert "1 of 2 answers" in hint.sentence and "64" in hint.sentence and "198" in hint.sentence


def test_no_longer_answers_are_advised_where_the_limit_is_above_what_was_trained():
    assert not advise(answers(CUT, FINE, max_new_tokens=64), known())


def test_without_facts_a_cut_answer_gets_twice_the_tokens():
    assert advise(answers(CUT, max_new_tokens=64)).changes == {"max_new_tokens": 128}


def test_rows_without_an_end_are_named_with_the_length_that_keeps_it():
    facts = known(ended=60, cut=40, longest_row=700)
    (hint,) = advise(answers(LOOP, repetition_penalty=1.3, no_repeat_ngram_size=6), facts)
    assert hint.topic == "eos" and hint.changes == {"max_length": 704}
    assert "60%" in hint.sentence and "40 rows" in hint.sentence and "700" in hint.sentence
    (hint,) = advise(answers(CUT), known(ended=0))
    assert hint.changes == {} and "append the EOS id" in hint.sentence


def test_repetition_gets_a_penalty_then_an_ngram_limit_then_a_stronger_penalty():
    steps = []
    made = answers(LOOP, FINE)
    while advice := advise(made):
        (hint,) = advice
        assert "6 times" in hint.sentence and "1 of 2 answers" in hint.sentence
        steps.append(hint.changes)
        made = replace(made, settings=advice.apply(made.settings))
    assert steps == [
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 6},
        {"repetition_penalty": 1.2},
        {"repetition_penalty": 1.3},
    ]


def test_a_loss_that_still_falls_asks_for_more_only_where_answers_have_faults():
    missing = answers(("It is deep.", "eos"), prompt="Describe the sea with a table.")
    topics = {h.topic: h for h in advise(missing, known(task_loss=FALLING, looked_at=0))}
    assert topics["loss"].changes == {"num_train_epochs": 2.0}
    assert "(1.62 to 1.22 nats a token in the last fifth)" in topics["loss"].sentence
    steps = known(task_loss=FALLING, settings={**SETTINGS, "max_steps": 60})
    assert {"max_steps": 120} in [hint.changes for hint in advise(missing, steps)]
    assert "loss" not in {h.topic for h in advise(missing, known(task_loss=FLAT))}


def test_a_rising_loss_halves_the_rate_and_a_nan_is_one():
    up = tuple(1.0 + 0.02 * i for i in range(40))
    for curve in (up, (*FLAT, math.nan)):
        (hint,) = advise(answers(FINE), known(task_loss=curve))
        assert hint.changes == {"learning_rate": 1e-4} and "0.0002" in hint.sentence


def test_a_held_out_loss_past_its_best_takes_epochs_back():
    evals = ((1.0, 1.20), (2.0, 1.10), (3.0, 1.30))
    facts = known(eval_loss=evals, settings={**SETTINGS, "num_train_epochs": 3.0})
    (hint,) = advise(answers(FINE), facts)
    assert hint.changes == {"num_train_epochs": 2.0} and "1.10" in hint.sentence
    within = known(eval_loss=((0.5, 1.0), (1.0, 1.2)))
    assert advise(answers(FINE), within).changes == {"learning_rate": 1e-4}


def test_the_noise_of_a_curve_is_no_trend():
    noisy = tuple(2.0 + (0.8 if i * 7919 % 13 < 6 else -0.8) for i in range(50))
    assert falling(noisy) is None and rising(noisy) is None
    assert falling(FALLING) and not rising(FALLING)
    assert falling(FALLING[:9]) is None, "too few values say nothing"
    assert overfitted([(1.0, 1.0), (2.0, 1.01)]) is None


def test_a_missing_form_gets_a_template_and_the_number_of_rows_that_lack():
    made = answers(("It is deep.", "eos"), ("It is salt.", "eos"), prompt=DEMO_PROMPTS[4])
    facts = known(shapes={"table": 1, "code": 30}, looked_at=100)
    form, rows = advise(made, facts)
    assert form.form == "table" and 'form="table"' in form.sentence
    assert "1 of 100" in rows.sentence
    more = int(re.search(r"about (\d+) rows", rows.sentence)[1])
    assert (1 + more) / (100 + more) == pytest.approx(0.05, abs=0.01)
    enough = replace(facts, shapes={"table": 9})
    assert [hint.topic for hint in advise(made, enough)] == ["form"]
    prompts = advise(made).with_forms([*DEMO_PROMPTS, {"instruction": DEMO_PROMPTS[4]}])
    row = {"instruction": DEMO_PROMPTS[4], "form": "table"}
    assert prompts == [*DEMO_PROMPTS[:4], row, row]


@pytest.mark.parametrize(
    ("settings", "rows", "changes"),
    [
        ({}, 20, {"lwf_lambda": 4.0}),
        ({"lwf_lambda": 0.5}, 20, {"lwf_lambda": 2.0}),
        ({"lwf_lambda": 4.0}, 20, {"lwf_lambda": 5.0}),
        ({"lwf_lambda": 5.0}, 20, {"rehearsal_ratio": 0.2}),
        ({"lwf_lambda": 5.0, "rehearsal_ratio": 0.2}, 20, {"learning_rate": 1e-4}),
        ({"lwf_lambda": 0.0}, 0, {"rehearsal_ratio": 0.1, "lwf_lambda": 2.0}),
        ({"rehearsal_ratio": 0.3}, 0, {"rehearsal_ratio": 0.3, "lwf_lambda": 4.0}),
        ({"lwf_lambda_schedule": "linear:0->2"}, 20, {"rehearsal_ratio": 0.2}),
        ({"lwf_lambda_schedule": "warmup:0.1"}, 20, {"lwf_lambda": 4.0}),
        ({"lwf_kl_budget": 0.02}, 20, {"rehearsal_ratio": 0.2}),
    ],
)
def test_what_was_forgotten_asks_for_rehearsal_then_lambda_then_a_lower_rate(
    settings, rows, changes
):
    facts = known(rise=0.31, rehearsal_rows=rows, settings={**SETTINGS, **settings})
    (hint,) = advise(answers(FINE), facts)
    assert hint.changes == changes and "0.31" in hint.sentence
    assert ("rehearsal_dataset" in hint.sentence) == (rows == 0)
    with_kl = replace(facts, rise=None, kl=0.071)
    assert "0.071" in advise(answers(FINE), with_kl)[0].sentence
    assert not advise(answers(FINE), replace(facts, rise=0.04, kl=0.03))


def test_a_kl_on_task_rows_or_of_another_kind_is_no_sign_of_forgetting(tiny_tokenizer):
    rows = [{"instruction": "a", "output": "Short."}]
    logs = [{"task_loss": 1.0, "kl": 0.4, "kl_task": 0.4}] * 20
    assert TrainingFacts.of_rows(tiny_tokenizer, rows, log_history=logs).kl is None
    for change in ({"lwf_kl": "reverse"}, {"lwf_temperature": 2.0}):
        facts = known(kl=0.09, rehearsal_rows=20, settings={**SETTINGS, **change})
        assert not advise(answers(FINE), facts)
    assert advise(answers(FINE), known(kl=0.09, rehearsal_rows=20))


@pytest.mark.parametrize("schedule", ["linear:1->2", "constant"])
def test_no_change_of_lambda_that_its_schedule_refuses(schedule, tmp_path):
    from lwf_unsloth.config import LwFConfig

    config = LwFConfig(str(tmp_path), lwf_lambda_schedule=schedule)
    settings = {**SETTINGS, "lwf_lambda_schedule": schedule}
    advice = advise(answers(FINE), known(rise=0.3, rehearsal_rows=20, settings=settings))
    assert advice and advice.apply(config) is not config


def test_apply_changes_a_copy_of_the_settings_it_is_given(tmp_path):
    from lwf_unsloth.config import LwFConfig

    facts = known(rise=0.3, rehearsal_rows=20)
    advice = advise(answers(LOOP, FINE), facts)
    config = LwFConfig(str(tmp_path), lwf_lambda=2.0)
    kept = copy.deepcopy(config.to_dict())
    changed = advice.apply(config)
    assert type(changed) is LwFConfig and changed.lwf_lambda == 4.0
    assert config.to_dict() == kept
    decoding = Decoding(max_new_tokens=64)
    assert advice.apply(decoding) == Decoding(max_new_tokens=64, repetition_penalty=1.1)
    assert advice.apply({"batch_size": 4}) == {"batch_size": 4, "repetition_penalty": 1.1}
    with pytest.raises(ConfigError, match="dict of generate's keywords"):
        advice.apply(3)


def test_every_sentence_holds_a_figure_and_what_to_do():
    made = answers(CUT, LOOP, ("No.", "eos"), prompt="Describe the sea with a table.")
    facts = known(
        ended=50,
        cut=50,
        task_loss=FALLING,
        kl=0.09,
        rise=0.2,
        looked_at=100,
        rehearsal_rows=0,
        answer_tokens=(300,) * 100,
    )
    advice = advise(made, facts)
    assert {h.topic for h in advice} == {
        "eos",
        "max_new_tokens",
        "repetition",
        "loss",
        "form",
        "rows",
        "retention",
    }
    for hint in advice:
        assert re.search(r"\d", hint.sentence)
        assert re.search(r"\b(set|Set|add|give)\b", hint.sentence)
        assert (
            hint.sentence.endswith(".") and hint.sentence[0].isupper() or hint.sentence[0].isdigit()
        )
        for name, value in hint.changes.items():
            assert f"{name}={value:g}" in hint.sentence or f"set {value:g}" in hint.sentence
    nasty = answers(("<b>x</b> is a large tag. " * 6, "eos"))
    assert "<b>" not in advise(nasty)._repr_html_()


def test_other_types_are_refused():
    with pytest.raises(ConfigError, match="got a str"):
        advise("text")
    with pytest.raises(ConfigError, match="got a dict"):
        advise(answers(FINE), {})
    with pytest.raises(DataError, match="no rows"):
        TrainingFacts.of_rows(None, [])


def test_a_comparison_gives_the_advice_of_its_second_side():
    before, after = answers(CUT, max_new_tokens=64), answers(LOOP, max_new_tokens=64)
    advice = compare(before, replace(after, weights="a" * 16, adapter="on")).advice()
    assert advice.changes == {"repetition_penalty": 1.1}


LONG = "The river bank is near the lazy dog and the quick brown fox jumps over it again. " * 4


def test_facts_of_rows_count_lengths_ends_cuts_and_forms(tiny_tokenizer):
    rows = [
        {"instruction": "a", "output": "Short."},
        {"instruction": "b", "output": "| a | b |\n|---|---|\n| 1 | 2 |"},
        {"instruction": "c", "output": LONG},
        {"instruction": "d", "output": "```python\nprint(1)\n```"},
    ]
    config = SimpleNamespace(max_length=120, learning_rate=1e-3, lwf_lambda=2.0)
    logs = [{"task_loss": 3.0 - i / 10, "kl_rehearsal": i / 100, "kl": 9.0} for i in range(20)]
    logs.append({"eval_task_loss": 1.5, "epoch": 1.0})
    retention = SimpleNamespace(rise=0.2)
    facts = TrainingFacts.of_rows(
        tiny_tokenizer, rows, config, log_history=logs, retention=retention
    )
    assert (len(facts.answer_tokens), facts.ended, facts.cut) == (4, 3, 1)
    assert facts.longest_row > 120 and facts.ended_share == 0.75
    assert facts.quantile(1.0) == max(facts.answer_tokens) and facts.quantile(0.01) < 10
    assert (facts.shapes["table"], facts.shapes["code"], facts.looked_at) == (1, 1, 4)
    assert len(facts.task_loss) == 20 and facts.eval_loss == ((1.0, 1.5),)
    assert facts.kl == pytest.approx(0.145), "the last ten values, of rehearsal rows"
    assert facts.rise == 0.2 and facts.settings["learning_rate"] == 1e-3


def test_facts_of_a_trainer_are_those_of_its_rows_and_logs(tiny_peft, alpaca_rows, tmp_path):
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    args = LwFConfig(
        str(tmp_path),
        max_steps=1,
        max_length=128,
        save_strategy="no",
        disable_tqdm=True,
        rehearsal_ratio=0.25,
    )
    rows = [*alpaca_rows(5), {"instruction": "long", "input": "", "output": LONG}]
    trainer = LwFTrainer(
        model,
        args=args,
        processing_class=tokenizer,
        train_dataset=rows,
        rehearsal_dataset=alpaca_rows(4, "general"),
    )
    before = TrainingFacts.of(trainer)
    assert (len(before.answer_tokens), before.ended, before.cut) == (6, 5, 1)
    assert before.longest_row is None and before.rehearsal_rows == 4 and before.task_loss == ()
    wanted = TrainingFacts.of_rows(tokenizer, rows[:5], args)
    assert before.answer_tokens[:5] == wanted.answer_tokens
    assert before.shapes == wanted.shapes and before.settings["max_length"] == 128
    trainer.train()
    after = TrainingFacts.of(trainer)
    assert len(after.task_loss) == 1 and after.kl is not None


def test_following_the_advice_ends_the_loops_of_a_model_that_loops(tiny_model_dir, tiny_tokenizer):
    from transformers import LlamaForCausalLM

    from lwf_unsloth.generation import generate

    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    for layer in model.model.layers:  # the next token then hangs on the last alone: a loop
        layer.self_attn.o_proj.weight.data.zero_()
    prompts = [f"Say what number {i} is." for i in range(6)]
    made = generate(model, tiny_tokenizer, prompts, max_new_tokens=160)
    settings = made.settings
    assert "repetition_penalty" in advise(made).changes, "the trial needs a model that loops"
    for _ in range(4):
        changes = {k: v for k, v in advise(made).changes.items() if k != "max_new_tokens"}
        if not changes:
            break
        settings = replace(settings, **changes)
        made = generate(model, tiny_tokenizer, prompts, **settings.to_dict())
    assert not [h for h in advise(made) if h.topic == "repetition"]


@pytest.mark.slow
def test_on_the_embedded_model_following_the_advice_leaves_half_of_the_faults_at_most():
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.generation import generate
    from lwf_unsloth.model import load_model

    config = ModelConfig("smollm2-135m-instruct", dtype="float32", max_seq_length=512)
    model, tokenizer = load_model(config)
    more = ["List five fruits as bullet points.", "Describe the sea.", "How do bees make honey?"]
    prompts = [*DEMO_PROMPTS, *more]
    settings = {"max_new_tokens": 96, "batch_size": 8, "adapter": False}
    made = generate(model, tokenizer, prompts, **settings)
    advice, before = advise(made), compare(made, made).diagnoses[0]
    assert sum(before.counts.values()) >= 8, "the trial needs a model with faults"
    changed = {**advice.apply(settings), "max_new_tokens": 96}
    after = generate(model, tokenizer, advice.with_forms(prompts), **changed)
    found = compare(after, after).diagnoses[0]
    assert sum(found.counts.values()) <= sum(before.counts.values()) / 2
    assert found.counts["repetition"] < before.counts["repetition"], (before, found)
