"""Evaluation: base and tuned on several sets in one load, each number with its interval."""

import json
import logging
import re

import pytest
import torch
from conftest import change_adapter

import lwf_unsloth.evaluation as evaluation
from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.eval_sets import EvalSet
from lwf_unsloth.evaluation import evaluate
from lwf_unsloth.generation import generate
from lwf_unsloth.scores import Scores
from lwf_unsloth.scoring import score
from lwf_unsloth.teacher import OwnTeacher, make_teacher, trained_tensors

TEXTS = [{"text": f"Passage {i}: the quick brown fox jumps over {i} dogs."} for i in range(6)]
QUICK = {"max_new_tokens": 6, "answers_limit": 4}


@pytest.fixture()
def sets(alpaca_rows):
    return {"task": alpaca_rows(6), "general": alpaca_rows(5, "general"), "passages": TEXTS}


def test_an_untrained_adapter_forgets_exactly_nothing(tiny_peft, sets):
    found = evaluate(*tiny_peft(), sets, **QUICK)
    for one in found.values():
        assert one["kl"].tuned.value == one["kl"].tuned.high == 0
        change = one["nll"].change
        assert (change.value, change.low, change.high) == (0, 0, 0)
        assert one["ece"].change.value == 0
    for name in ("right", "eos", "distinct"):
        assert found["task"][name].change.value == 0
    assert found["task"].answers["base"].answers == found["task"].answers["tuned"].answers


def test_each_set_has_the_numbers_that_score_gives_it(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    found = evaluate(model, tokenizer, sets, answers=False)
    for name, rows in sets.items():
        alone = score(model, tokenizer, rows)
        one = found[name]
        assert one.score.row_nll == pytest.approx(alone.row_nll, rel=1e-6)
        assert one["nll"].change.value == pytest.approx(alone.rise)
        assert one["nll"].base.value == pytest.approx(alone.base_nll)
        assert one["kl"].tuned.value == pytest.approx(alone.kl)
        assert one["ece"].tuned.value == pytest.approx(alone.ece, abs=1e-6)
        assert one["nll"].change.low < alone.rise < one["nll"].change.high
        assert not one.answers


def test_answers_come_from_both_models_and_from_the_right_ones(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    found = evaluate(model, tokenizer, sets, **QUICK)["task"].answers
    asked = [sets["task"][i] for i in (0, 1, 3, 4)]  # four of six, evenly spaced
    for side, adapter in (("tuned", True), ("base", False)):
        alone = generate(model, tokenizer, asked, max_new_tokens=6, adapter=adapter)
        assert [one.text for one in found[side]] == [one.text for one in alone]
    assert found["base"].weights == "base" and found["tuned"].weights != "base"
    assert [one.text for one in found["base"]] != [one.text for one in found["tuned"]]


def test_a_snapshot_is_the_base_of_a_second_task(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    change_adapter(model, seed=1)
    first = evaluate(model, tokenizer, sets, **QUICK)
    start = make_teacher(model)
    same = evaluate(model, tokenizer, sets, base=start, **QUICK)
    assert all(one["kl"].tuned.value == 0 for one in same.values())
    change_adapter(model, seed=2)
    second = evaluate(model, tokenizer, sets, base=start, **QUICK)
    for name in sets:
        assert second[name]["nll"].base.value == pytest.approx(first[name]["nll"].tuned.value)
        assert second[name]["kl"].tuned.value > 0
    assert [one.text for one in second["task"].answers["base"]] == [
        one.text for one in first["task"].answers["tuned"]
    ]
    assert "the model as it stood" in second.caption


def test_without_a_base_the_tuned_model_is_measured_alone(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    found = evaluate(model, tokenizer, sets, base=None, **QUICK)
    measures = found["task"].measures
    assert "kl" not in measures and "leak" not in found["general"].measures
    assert all(one.change is None and one.base is None for one in measures.values())
    assert "no base" in str(found)


def test_one_forward_of_each_model_serves_all_numbers_of_a_batch(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    calls = []
    decoder = model.get_base_model().model
    decoder.register_forward_hook(lambda *_: calls.append(1))
    evaluate(model, tokenizer, {"task": sets["task"]}, answers=False, batch_size=2)
    probes = 2  # the head is tried once a set: hidden states and logits of 8 tokens
    assert len(calls) == 2 * 3 + probes


def test_the_model_is_left_as_it_was_also_after_an_error(tiny_peft, sets, monkeypatch):
    model, tokenizer = tiny_peft()
    change_adapter(model)

    def state():
        return (
            [(m.training, vars(m).get("_disable_adapters")) for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            {name: p.clone() for name, p in model.named_parameters() if "lora" in name},
            tokenizer.padding_side,
        )

    def same(one, other):
        return one[:2] == other[:2] and all(torch.equal(one[2][k], other[2][k]) for k in one[2])

    snapshot = OwnTeacher(model, trained_tensors(model))
    model.train()
    before = state()
    evaluate(model, tokenizer, sets, base=snapshot, **QUICK)
    assert same(state(), before)
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tokenizer, sets, **QUICK)
    assert same(state(), before)


def fake_answers(monkeypatch, text_of):
    """Answers by a function of (label, prompt) in the place of the model's."""

    def answering(model, tokenizer, prompts, *, label, **_):
        answers = tuple(
            Answer(row["instruction"], text_of(label, row["instruction"]), "eos", 3)
            for row in prompts
        )
        return Generations(answers, Decoding(), label)

    monkeypatch.setattr(evaluation, "generate", answering)


def general_answer(prompt):
    return f"Well, {prompt} In short, it depends on many things."


def test_a_planted_leak_is_counted_beside_the_bases(tiny_peft, alpaca_rows, monkeypatch):
    task = [
        {"instruction": f"List {i}.", "output": f"select name from t{i} where id = {i}"}
        for i in range(12)
    ]
    general = alpaca_rows(12, "general")
    leaking = {row["instruction"] for row in general[:3]}

    def text_of(label, prompt):
        if label == "tuned" and prompt in leaking:
            return "select answer from general where id = 1"
        return general_answer(prompt)

    fake_answers(monkeypatch, text_of)
    model, tokenizer = tiny_peft()
    for leak in ("learned", r"^select\b"):
        sets = {"sql": task, "general": general, "passages": TEXTS}
        found = evaluate(model, tokenizer, sets, leak=leak, answers_limit=12)
        one = found["general"]["leak"]
        assert (one.base.value, one.tuned.value) == (0, 0.25)
        assert one.change.low < 0.25 < one.change.high
        assert "leak" not in found["sql"].measures and "leak" not in found["passages"].measures
        assert ("learned" in found.settings["leak"]) == (leak == "learned")


def test_a_task_without_a_form_of_its_own_is_told(tiny_peft, alpaca_rows, monkeypatch, caplog):
    fake_answers(monkeypatch, lambda label, prompt: general_answer(prompt))
    rows = [{"instruction": f"q{i}", "output": general_answer(f"x{i}")} for i in range(12)]
    with caplog.at_level(logging.WARNING, "lwf_unsloth.evaluation"):
        found = evaluate(
            *tiny_peft(), {"task": rows, "general": alpaca_rows(9, "g")}, answers_limit=9
        )
    assert "leak" not in found["general"].measures
    assert "share no form" in found.notes[0] and found.notes[0] in caplog.text


def test_right_answers_by_match_by_fact_and_by_a_metric(tiny_peft, monkeypatch):
    fake_answers(monkeypatch, lambda label, prompt: "In 1898." if label == "tuned" else "No idea.")
    model, tokenizer = tiny_peft()
    row = {"instruction": "When?", "output": "in 1898"}

    def length_of_answer(answer, row):
        return len(answer) / 10

    found = evaluate(
        model,
        tokenizer,
        {
            "match": [row] * 3,
            "fact": [{**row, "answer_contains": "1898"}],
            "own": EvalSet([row], metric=length_of_answer),
        },
        task=["match", "fact", "own"],
    )
    rights = {name: one["right"] for name, one in found.items()}
    assert {name: one.name for name, one in rights.items()} == {
        "match": "exact match",
        "fact": "facts found",
        "own": "length of answer",
    }
    assert [one.tuned.value for one in rights.values()] == [1, 1, 0.8]
    assert [one.base.value for one in rights.values()] == [0, 0, 0.8]


def test_rows_that_were_trained_on_are_told(tiny_peft, sets, alpaca_rows, caplog):
    train = [
        *alpaca_rows(40, "other"),
        {**sets["task"][1], "output": sets["task"][1]["output"].upper()},
    ]
    with caplog.at_level(logging.WARNING, "lwf_unsloth.evaluation"):
        found = evaluate(*tiny_peft(), sets, train_rows=train, answers=False)
    assert len(found.notes) == 1 and "1 of 6 rows of 'task'" in found.notes[0]
    assert "(2)" in found.notes[0] and "held out" in caplog.text


def test_a_limit_takes_rows_from_all_over_the_set(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    found = evaluate(model, tokenizer, sets, limit=3, answers=False)
    spaced = score(model, tokenizer, sets["task"][::2])
    assert found["task"].score.row_nll == pytest.approx(spaced.row_nll)
    own = evaluate(model, tokenizer, {"task": EvalSet(sets["task"], limit=2)}, answers=False)
    assert own["task"].score.rows == 2


def test_prompts_can_be_scored_too(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    sets = {"task": EvalSet(sets["task"], response_only=False)}
    found = evaluate(model, tokenizer, sets, answers=False)["task"].score
    assert found.settings["scored"] == "all"


def test_scores_are_the_same_after_a_round_through_a_file(tiny_peft, sets, tmp_path):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    found = evaluate(model, tokenizer, sets, label="after", leak="x", **QUICK)
    path = found.save(tmp_path / "new" / "scores.json")
    again = Scores.load(path)
    assert again.to_dict() == found.to_dict()
    assert str(again) == str(found)
    assert again["task"].score == found["task"].score
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["settings"]["versions"]["torch"] and values["sets"]["task"]["summary"]["nll"]
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="scores"):
        Scores.load(path)
    with pytest.raises(DataError, match="could not be read"):
        Scores.load(tmp_path / "none.json")


def test_the_tables_say_the_numbers_and_escape_the_names(tiny_peft, sets):
    sets = {"<b>task|</b>": sets["task"], "passages": TEXTS}
    found = evaluate(*tiny_peft(), sets, **QUICK)
    page, markdown, text = found._repr_html_(), found.to_markdown(), str(found)
    assert "<b>" not in page and "&lt;b&gt;task|" in page and "<script" not in page
    assert "<b>" not in markdown and "task&#124;" in markdown
    cells = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert cells == {8}
    nll = f"{found['passages']['nll'].tuned.value:.3f}"
    assert all(nll in table for table in (page, markdown, text))
    assert re.search(r"^passages +NLL", text, re.M) and "can detect" in text


def test_no_answers_are_asked_for_that_nothing_would_read(tiny_peft, alpaca_rows):
    """Without a task there is no form to learn, and without a base none to learn it from."""
    model, tokenizer = tiny_peft()
    general = {"kept": EvalSet(alpaca_rows(3), kind="general")}
    assert not evaluate(model, tokenizer, general, **QUICK)["kept"].answers
    sets = {"task": alpaca_rows(3), "kept": alpaca_rows(3, "g")}
    found = evaluate(model, tokenizer, sets, base=None, **QUICK)
    assert found["task"].answers and not found["kept"].answers
    given = evaluate(model, tokenizer, general, leak="x", **QUICK)
    assert given["kept"]["leak"].tuned.n == 3


def test_a_prompt_too_long_for_an_answer_is_left_out_and_told(tiny_peft, alpaca_rows):
    model, tokenizer = tiny_peft()
    rows = [*alpaca_rows(2), {"instruction": "fox " * 500, "output": "No."}]
    found = evaluate(model, tokenizer, {"task": rows}, max_length=None, **QUICK)
    assert len(found["task"].answers["tuned"]) == 2
    assert found["task"].score.rows == 2, "its answer lies beyond what the model was loaded for"
    assert "1 of 3 prompts of 'task' are left unanswered" in found.notes[0]


def test_rows_that_are_cut_unscored_or_repeated_are_told(tiny_peft, alpaca_rows):
    rows = alpaca_rows(4)
    long = [{**rows[0], "output": "fox " * 900}, {**rows[1], "instruction": "fox " * 900}]
    found = evaluate(*tiny_peft(), {"a": [*rows, *long, rows[2]]}, answers=False, max_length=128)
    told = " ".join(found.notes)
    assert "1 of 7 rows of 'a' repeat an earlier one" in told
    assert "1 of 7 rows of 'a' are scored without their end" in told
    assert "1 of 7 rows of 'a' are not scored" in told and "max_length=128" in told


def test_broken_rows_are_named_with_their_set_and_place_before_any_work(tiny_peft, alpaca_rows):
    model, tokenizer = tiny_peft()
    rows = alpaca_rows(9)
    model.get_base_model().register_forward_hook(lambda *_: pytest.fail("work was done"))
    for broken in ({"instruction": None, "output": "x"}, {"instruction": "x"}, {"text": 3}):
        sets = {"a": rows, "b": [*rows, broken]}
        with pytest.raises(DataError, match="set 'b': Row 10"):
            evaluate(model, tokenizer, sets, limit=3)
    encoded = [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(DataError, match="training rows: Row 1"):
        evaluate(model, tokenizer, {"a": rows}, train_rows=encoded)


def test_what_would_fail_after_minutes_of_scoring_fails_before(tiny_peft, alpaca_rows, monkeypatch):
    model, tokenizer = tiny_peft()
    rows = alpaca_rows(3)
    monkeypatch.setattr(evaluation, "score", lambda *a, **k: pytest.fail("scored"))

    def metric(answer, row):
        return row["no such column"]

    with pytest.raises(KeyError, match="no such column"):
        evaluate(model, tokenizer, {"a": EvalSet(rows, metric=metric)})
    with pytest.raises(IndexError):
        evaluate(model, tokenizer, {"a": rows}, leak=lambda answer: answer[0] == "x")
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": "9"}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            evaluate(model, tokenizer, {"a": rows}, **wrong)


def test_a_set_whose_rows_are_all_too_long_is_named(tiny_peft, alpaca_rows):
    long = [{"instruction": "fox " * 900, "output": "y"}]
    with pytest.raises(DataError, match="Set 'long': All 1 rows"):
        evaluate(*tiny_peft(), {"a": alpaca_rows(2), "long": long}, answers=False)


def test_a_prompt_without_an_instruction_is_scored_and_not_asked(tiny_peft, alpaca_rows):
    rows = [*alpaca_rows(2), {"instruction": " ", "input": "the fox", "output": "Yes."}]
    found = evaluate(*tiny_peft(), {"a": rows}, **QUICK)
    assert found["a"].score.rows == 3 and len(found["a"].answers["tuned"]) == 2
    assert "instruction is empty" in found.notes[0]


def test_facts_that_are_numbers_are_found(tiny_peft, monkeypatch):
    fake_answers(monkeypatch, lambda label, prompt: "It has 0 or 42 legs.")
    rows = [{"instruction": f"q{n}", "output": "x", "answer_contains": n} for n in (0, 42, 43)]
    found = evaluate(*tiny_peft(), {"a": rows})["a"]["right"]
    assert found.name == "facts found" and found.tuned.value == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="one text"):
        evaluate(*tiny_peft(), {"a": [{**rows[0], "answer_contains": ["0", "42"]}]})


def test_training_rows_may_come_from_a_generator(tiny_peft, sets):
    train = (row for row in sets["general"])
    found = evaluate(*tiny_peft(), sets, train_rows=train, answers=False)
    assert "5 of 5 rows of 'general'" in found.notes[0]


def test_a_diverged_model_is_said_to_be_one(tiny_peft, sets):
    model, tokenizer = tiny_peft()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(float("nan"))
    assert score(model, tokenizer, sets["task"]).nll != score(model, tokenizer, sets["task"]).nll
    with pytest.raises(ModelError, match="tuned model gives no finite loss on 6 of 6 rows.*'task'"):
        evaluate(model, tokenizer, sets)


def test_a_long_wait_is_told(tiny_peft, sets, monkeypatch, caplog):
    times = iter([0.0, 240.0])
    monkeypatch.setattr(evaluation, "monotonic", lambda: next(times))
    evaluate(*tiny_peft(), sets, answers=False)
    assert "about 7 minutes more" in caplog.text  # 11 rows after the 6 that took 4 minutes


def test_a_line_break_in_a_name_tears_no_table_apart(tiny_peft):
    found = evaluate(*tiny_peft(), {"two\nlines": TEXTS}, answers=False)
    assert "\ntwo lines  NLL" in str(found)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"sets": {}}, DataError, "dict of name"),
        ({"sets": [1]}, DataError, "dict of name"),
        ({"sets": {"a": []}}, DataError, "'a' has no rows"),
        ({"task": "b"}, ConfigError, r"\['b'\]"),
        ({"limit": 0}, ConfigError, "limit is 0"),
        ({"answers_limit": True}, ConfigError, "answers_limit is True"),
        ({"leak": "("}, ConfigError, "regular expression"),
        ({"sets": {"a": EvalSet([{"text": "x"}], kind="new")}}, ConfigError, "kind"),
        ({"base": "none"}, ConfigError, "base is 'none'"),
        ({"batch_size": -1}, ConfigError, "batch_size"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(tiny_peft, change, error, told):
    model, tokenizer = tiny_peft()
    arguments = {"sets": {"a": TEXTS}, **change}
    with pytest.raises(error, match=told):
        evaluate(model, tokenizer, **arguments)


def test_a_file_as_a_set_is_told_how_to_be_read(tiny_peft, tmp_path):
    for given in ("rows.jsonl", tmp_path / "rows.jsonl"):
        with pytest.raises(DataError, match=r"rows\.jsonl', a name and no rows.*load_alpaca"):
            evaluate(*tiny_peft(), {"a": given})


def test_no_set_is_lost_to_another_of_the_same_name(tiny_peft, alpaca_rows):
    with pytest.raises(DataError, match="one name as text"):
        evaluate(*tiny_peft(), {"1": alpaca_rows(2), 1: alpaca_rows(3)})


def test_an_adapter_that_is_switched_off_is_told(tiny_peft, alpaca_rows):
    model, tokenizer = tiny_peft()
    model.disable_adapter_layers()
    notes = evaluate(model, tokenizer, {"a": alpaca_rows(2)}, answers=False).notes
    assert any("adapter is switched off" in note for note in notes)
    model.enable_adapter_layers()
    notes = evaluate(model, tokenizer, {"a": alpaca_rows(2)}, answers=False).notes
    assert not any("switched off" in note for note in notes)


def test_a_metric_that_is_no_function_is_refused(tiny_peft, alpaca_rows):
    with pytest.raises(ConfigError, match="metric of set 'a' is 'em'"):
        evaluate(*tiny_peft(), {"a": EvalSet(alpaca_rows(2), metric="em")})
