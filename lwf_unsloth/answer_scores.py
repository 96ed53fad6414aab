"""What written answers are worth: facts found."""

from collections.abc import Mapping, Sequence
from typing import Any

from lwf_unsloth.answers import Generations
from lwf_unsloth.errors import DataError


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
    asked = [answer.prompt for answer in answers]
    if asked != [row["instruction"] for row in rows]:
        raise DataError(
            f"{len(asked)} answers and {len(rows)} rows do not belong together: an answer would be "
            "compared with another question's fact. Pass the rows that the answers were made from."
        )
    missing = [i for i, row in enumerate(rows, 1) if not _plain(row.get("answer_contains") or "")]
    if missing:
        raise DataError(
            f"Rows {missing[:10]} have no `answer_contains`, so what a right answer holds is not "
            "known. Give every row the text that its answer must contain."
        )
    return sum(
        _plain(row["answer_contains"]) in _plain(answer.text)
        for answer, row in zip(answers, rows, strict=True)
    ) / len(asked)


def _plain(text: str) -> str:
    """Without case, and every run of white space one space."""
    return " ".join(text.casefold().split())
