"""Answers scored: facts found, whatever their case; nothing compared with another question."""

import pytest

from lwf_unsloth.answer_scores import (
    answer_values,
    distinct_n,
    exact_match,
    facts_found,
    plain_answer,
    usual_metric,
)
from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.errors import DataError


def answered(*pairs):
    answers = tuple(Answer(prompt, text, "eos", 3) for prompt, text in pairs)
    return Generations(answers, Decoding())


ROWS = [
    {"instruction": "Where?", "answer_contains": "Brindle Street"},
    {"instruction": "Who?", "answer_contains": "Odessa Plum"},
    {"instruction": "When?", "answer_contains": "1898"},
]


def test_a_fact_is_found_whatever_its_case_and_line_breaks():
    answers = answered(
        ("Where?", "At BRINDLE\nstreet 14."), ("Who?", "Plum"), ("When?", "In 1898.")
    )
    assert facts_found(answers, ROWS) == pytest.approx(2 / 3)


def test_answers_to_other_questions_are_not_compared():
    with pytest.raises(DataError, match="belong together"):
        facts_found(answered(("Who?", "x"), ("Where?", "y"), ("When?", "z")), ROWS)
    with pytest.raises(DataError, match="belong together"):
        facts_found(answered(("Where?", "x")), ROWS)


def test_a_row_without_its_fact_is_named():
    rows = [{**ROWS[0]}, {"instruction": "Who?", "answer_contains": " "}]
    with pytest.raises(DataError, match=r"\[2\]"):
        facts_found(answered(("Where?", "x"), ("Who?", "y")), rows)


@pytest.mark.parametrize(
    ("answer", "output", "same"),
    [
        ("SELECT  name\nFROM t", "select name from t", True),
        ("```sql\nselect name from t\n```", "select name from t", True),
        ("Yes.", "yes", True),
        ("はい。", "はい", True),
        ("ＡＢＣ", "abc", True),
        ("Yes, indeed.", "Yes.", False),
        ("", "Yes.", False),
        ("1.5", "15", False),
    ],
)
def test_an_exact_match_looks_past_case_spaces_and_fences_and_no_further(answer, output, same):
    assert exact_match(answer, {"output": output}) == same


def test_a_text_in_the_midst_keeps_its_marks():
    assert plain_answer('{"a": "b."}') == '{"a": "b."}'


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["a b c d"], 1.0),
        (["a b a b a b"], 2 / 5),
        (["Tokyo Tokyo Tokyo"], 1 / 2),
        (["東京東京東京"], 2 / 5),
        (["a b c", "a b c"], 2 / 4),
        (["a"], 1.0),
        ([""], 1.0),
    ],
)
def test_repeated_word_pairs_count_once(texts, value):
    assert distinct_n(texts) == pytest.approx(value)


def test_every_answer_gets_its_values():
    answers = Generations(
        (Answer("Where?", "x y x y x y", "length", 6), Answer("Who?", "Odessa", "eos", 1)),
        Decoding(),
    )
    rows = [{"instruction": "Where?"}, {"instruction": "Who?"}]
    found = answer_values(answers, rows, lambda answer, row: len(answer) < 8)
    assert (found.right, found.ended) == ((0.0, 1.0), (0.0, 1.0))
    assert found.distinct == pytest.approx((2 / 5, 1.0))
    assert answer_values(answers, rows, None).right == ()


def test_the_rows_say_what_a_right_answer_is():
    assert usual_metric(ROWS)[0] == "facts found"
    assert usual_metric([*ROWS, {"instruction": "x", "output": "y"}])[0] == "exact match"


@pytest.mark.parametrize("value", [float("nan"), None, "good"])
def test_a_metric_that_gives_no_number_is_told_with_its_row(value):
    with pytest.raises(DataError, match="row 1"):
        answer_values(answered(("Where?", "x")), ROWS[:1], lambda answer, row: value)
