"""What written answers are worth: right, ended, free of repetition; one value an answer."""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.answers import Generations
from lwf_unsloth.errors import DataError
from lwf_unsloth.rows import RIGHT, as_text, normalised

Metric = Callable[[str, Mapping[str, Any]], float]
"""A user's own measure: (answer, row) -> a number, usually 0 to 1; higher is better."""

_FENCE = re.compile(r"\s*```[\w+-]*\n(.*?)\n?```\s*", re.S)
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
"""A word; in scripts without spaces a character."""
_ENDS = " \t\n.。!！\"'`「」“”"


@dataclass(frozen=True)
class AnswerValues:
    """One value for each answer, in the order of the prompts."""

    right: tuple[float, ...]
    """By the set's metric; empty where nothing says what is right."""
    ended: tuple[float, ...]
    """1 where the model ended the answer by itself, 0 where it was cut."""
    distinct: tuple[float, ...]
    """Share of an answer's word pairs that are not repeats; 1 for answers under three words."""


def answer_values(
    answers: Generations, rows: Sequence[Mapping[str, Any]], metric: Metric | None
) -> AnswerValues:
    """Values of each answer.

    Args:
        answers: What `generate` gave for `rows`, in their order.
        rows: The rows asked.
        metric: What is right; None leaves it out.

    Raises:
        DataError: Answers and rows do not belong together, or the metric gives no finite number.
    """
    _belong_together(answers, rows)
    right: list[float] = []
    if metric is not None:
        for number, (answer, row) in enumerate(zip(answers, rows, strict=True), 1):
            right.append(metric_value(metric, answer.text, row, number))
    return AnswerValues(
        tuple(right),
        tuple(float(answer.stop == "eos") for answer in answers),
        tuple(distinct_n([answer.text]) for answer in answers),
    )


def usual_metric(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Metric]:
    """Name and metric that the rows call for: the fact they name, else an exact match."""
    if rows and all(_fact(row) for row in rows):
        return "facts found", holds_fact
    return "exact match", exact_match


def exact_match(answer: str, row: Mapping[str, Any]) -> float:
    """1 where the answer is the row's output; case, spaces, width and a last full stop aside."""
    return float(plain_answer(answer) == plain_answer(row["output"]))


def holds_fact(answer: str, row: Mapping[str, Any]) -> float:
    """1 where the answer holds the row's `answer_contains`, whatever the case and line breaks."""
    return float(_fact(row) in _plain(answer))


def plain_answer(text: str) -> str:
    """An answer as it is compared: without a code fence around it, case, and outer marks."""
    fenced = _FENCE.fullmatch(text)
    return normalised(fenced.group(1) if fenced else text).strip(_ENDS)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams, 0 to 1 (Li et al. 2016, arXiv 1510.03055).

    Args:
        texts: One text: how little it repeats itself. Several: how little they repeat each other
            too, which falls as there are more of them, so compare equal numbers only.
        n: Words of a gram; a character is a word in Chinese, Japanese and Korean.

    Returns:
        1 where no text has a gram.
    """
    grams = []
    for text in texts:
        words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def facts_found(answers: Generations, rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of the answers that contain the fact asked for, whatever the case and line breaks.

    Args:
        answers: What `generate` gave for `rows`, in their order.
        rows: Rows with `instruction` and `answer_contains`.

    Returns:
        0 to 1.

    Raises:
        DataError: Answers and rows do not belong together, or a row names no fact.
    """
    _belong_together(answers, rows)
    missing = [i for i, row in enumerate(rows, 1) if not _fact(row)]
    if missing:
        raise DataError(
            f"Rows {missing[:10]} have no `answer_contains`, so what a right answer holds is not "
            "known. Give every row the text that its answer must contain."
        )
    return math.fsum(answer_values(answers, rows, holds_fact).right) / len(answers)


def _belong_together(answers: Generations, rows: Sequence[Mapping[str, Any]]) -> None:
    if [answer.prompt for answer in answers] != [row["instruction"] for row in rows]:
        raise DataError(
            f"{len(answers)} answers and {len(rows)} rows do not belong together: an answer would "
            "be compared with another question's fact. Pass the rows that the answers were made "
            "from."
        )


def metric_value(metric: Metric, answer: str, row: Mapping[str, Any], number: int) -> float:
    """What a metric says of an answer.

    Raises:
        DataError: No finite number; `number` names the row.
    """
    value: Any = metric(answer, row)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(
            f"The metric gave {value!r:.60} for row {number}, but it must give a finite number "
            "(or True / False) for every answer, also for an empty one."
        )
    return found


def _fact(row: Mapping[str, Any]) -> str:
    """The fact that a row names, as `_plain` has it; "" where it names none."""
    value = row.get(RIGHT)
    if isinstance(value, (list, tuple, Mapping)):
        raise DataError(
            f"`{RIGHT}` is {value!r:.60}, but must be one text (or number) that a right answer "
            "contains. Where several will do, give a metric of your own: EvalSet(rows, metric=...)."
        )
    return _plain(as_text(value)[0])


def _plain(text: str) -> str:
    """Without case, and every run of white space one space."""
    return " ".join(text.casefold().split())
