"""Answers scored: facts found, whatever their case; nothing compared with another question."""

import pytest

from lwf_unsloth.answer_scores import facts_found
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
