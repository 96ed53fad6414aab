"""`evaluate`: base and tuned model on several sets in one load, with intervals.

For each set NLL, KL(base || tuned) and calibration, from one forward of either model a batch; for
task sets also greedy answers and whether they are right; for general sets the leak, the share of
answers in the new task's form. Answers cost most of the time, so a limited number is asked for.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import monotonic
from typing import Any

from lwf_unsloth.answer_scores import answer_values
from lwf_unsloth.answers import Generations
from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import device_name, on_cuda, prepare, versions
from lwf_unsloth.checks import check_count
from lwf_unsloth.errors import DataError, ModelError
from lwf_unsloth.eval_sets import (
    EvalSet,
    Ready,
    checked_rows,
    fitting,
    overlap,
    ready_sets,
)
from lwf_unsloth.generation import generate
from lwf_unsloth.leak import Form, FormLike, any_form, given_form, learn_form
from lwf_unsloth.locks import model_lock
from lwf_unsloth.rows import is_text_row, row_key
from lwf_unsloth.scores import Scores, SetScores
from lwf_unsloth.scoring import Score, score
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher, Teacher

__all__ = ["EvalSet", "evaluate"]
logger = logging.getLogger(__name__)

LEARNED = "learned"
PATIENCE = 2.0
"""Minutes that a user waits without being told."""


@checked("sets")
def evaluate(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Any],
    *,
    task: str | Sequence[str] | None = None,
    base: Teacher | str | None = "adapter_off",
    train_rows: Any = None,
    leak: FormLike | None = LEARNED,
    answers: bool = True,
    limit: int = 500,
    answers_limit: int | None = None,
    max_new_tokens: int = 96,
    max_length: int | None = 512,
    batch_size: int | None = None,
    seed: int = 0,
    label: str = "",
) -> Scores:
    """Measures what a tuned model learned and what it kept, beside its base.

    Args:
        model: From `load_model`, trained or not; left as it was found.
        tokenizer: Its tokenizer, which carries the prompt template.
        sets: Name -> rows, or `EvalSet`.
        task: Names of the sets that hold new tasks; None: the first one, unless its rows are plain
            text. The others are general: what the model should keep.
        base: "adapter_off"; a teacher made before (`make_teacher(model)` before a second task),
            for the model as it stood then; None measures the tuned model alone.
        train_rows: The rows trained on: rows that stand in both are told, and the task's form is
            learned from them.
        leak: The task's form: a regular expression, a function from an answer to True or False,
            "learned" (from `train_rows`, else the task sets, against the base's own answers), or
            None.
        answers: False asks for no answers at all: NLL, KL and calibration alone.
        limit: Rows a set, evenly spaced through it.
        answers_limit: Answers a set of either model; None takes 64, on a CPU 16.
        max_new_tokens: Most tokens of an answer.
        max_length: Tokens a scored row; longer rows lose their tail.
        batch_size: Rows at a time; None takes it from the device. The numbers stay.
        seed: Of the intervals' resampling.
        label: A name for the scores ("after task A").

    Returns:
        The scores: per set a `measures` dict, a table, `save` and `load`.

    Raises:
        ConfigError: A setting out of range.
        DataError: A set without usable rows.
        ModelError: The model is in use by another thread, or gives no finite numbers.
    """
    prepare()
    answers_limit = (64 if on_cuda() else 16) if answers_limit is None else answers_limit
    counts = {"limit": limit, "answers_limit": answers_limit, "max_new_tokens": max_new_tokens}
    for name, value in (
        counts | ({} if batch_size is None else {"batch_size": batch_size})
    ).items():
        check_count(name, value)
    form = None if leak in (None, LEARNED) else given_form(leak)
    if form is not None:
        form("")  # a function that fails would else do so after all the scoring
    with_leak = form is not None or (leak == LEARNED and base is not None)
    asked = answers_limit if answers else 0
    form_known = form is not None or train_rows is not None
    ready = ready_sets(sets, task, limit, asked, with_leak, form_known)
    train_rows = None if train_rows is None else checked_rows(train_rows, "training rows")
    known = {row_key(row) for row in train_rows or ()}
    notes = [note for one in ready for note in overlap(one, known)]
    ready, told = fitting(ready, model, tokenizer, max_new_tokens)
    notes += told
    with model_lock(model, "evaluating"):
        size = batch_size or (32 if on_cuda() else 8)
        scored = _score_all(ready, model, tokenizer, max_length, size, base)
        notes += [note for one in ready for note in _unscored(one, scored[one.name])]
        if any(one.settings.get("adapter") == "off" for one in scored.values()):
            notes.append(
                "The adapter is switched off, so the tuned model is the base: nothing learned is "
                "measured. Switch it on: model.enable_adapter_layers()."
            )
        written = _answers(model, tokenizer, ready, base, max_new_tokens, batch_size)
    if leak == LEARNED:
        form, told = _learn(ready, written, train_rows)
        notes += told
    for note in notes:
        logger.warning("evaluate: %s", note)
    found = {
        one.name: _assemble(one, scored[one.name], written.get(one.name, {}), form, seed)
        for one in ready
    }
    settings = {
        "limit": limit,
        "answers_limit": answers_limit if answers else 0,
        "max_new_tokens": max_new_tokens,
        "leak": None if form is None else form.description,
        "seed": seed,
        "device": device_name(),
        "versions": versions(),
    }
    return Scores(found, settings, tuple(notes), label)


def _score_all(
    ready: list[Ready],
    model: Any,
    tokenizer: Any,
    max_length: int | None,
    batch_size: int,
    base: Teacher | str | None,
) -> dict[str, Score]:
    """The score of each set; says after the first how long the others will take, if long."""
    found: dict[str, Score] = {}
    start = monotonic()
    for one in ready:
        try:
            found[one.name] = score(
                model,
                tokenizer,
                one.rows,
                max_length=max_length,
                batch_size=batch_size,
                response_only=one.response_only,
                base=base,
            )
        except DataError as error:
            raise DataError(f"Set {one.name!r}: {error}") from error
        _check_finite(one.name, found[one.name])
        if len(found) == 1:
            left = sum(len(other.rows) for other in ready[1:]) / len(one.rows)
            minutes = left * (monotonic() - start) / 60
            if minutes > PATIENCE:
                logger.warning(
                    "evaluate: about %.0f minutes more for the other sets, beside the answers; a "
                    "smaller limit shortens it.",
                    minutes,
                )
    return found


def _check_finite(name: str, scored: Score) -> None:
    """Raises a ModelError where a model gives NaN: every mean over the set would be NaN."""
    sides = {"tuned model": scored.row_nll, "base": scored.row_base_nll or ()}
    for side, sums in sides.items():
        bad = [number for number, one in enumerate(sums, 1) if not math.isfinite(one)]
        if bad:
            raise ModelError(
                f"The {side} gives no finite loss on {len(bad)} of {len(sums)} rows of set "
                f"{name!r} (the first is row {bad[0]}), so nothing can be measured. The training "
                "diverged, or the model overflows in its precision: load an earlier checkpoint, "
                "lower the learning rate, or load the model in another dtype."
            )


def _unscored(one: Ready, scored: Score) -> list[str]:
    """Notes on rows that were not scored, or not to their end."""
    cut, dropped = (scored.settings.get(name) or 0 for name in ("cut", "dropped"))
    limit, rows = scored.settings.get("max_length"), f"of {len(one.rows)} rows of {one.name!r}"
    notes = []
    if cut:
        notes.append(
            f"{cut} {rows} are scored without their end: they were cut when they were written, or "
            f"are longer than max_length={limit}."
        )
    if dropped:
        notes.append(
            f"{dropped} {rows} are not scored: they have no token to score within "
            f"max_length={limit}."
        )
    return notes


def _answers(
    model: Any,
    tokenizer: Any,
    ready: list[Ready],
    base: Teacher | str | None,
    max_new_tokens: int,
    batch_size: int | None,
) -> dict[str, dict[str, Generations]]:
    """Greedy answers of both models to all sets' prompts, in one call a model."""
    prompts = [row for one in ready for row in one.asked]
    if not prompts:
        return {}

    def ask(who: Any, **more: Any) -> Generations:
        size = batch_size or (64 if on_cuda() else 32)
        return generate(
            who, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=size, **more
        )

    sides = {"tuned": ask(model, label="tuned")}
    if isinstance(base, ModelTeacher):
        sides["base"] = ask(base.model, label="base")
    elif isinstance(base, OwnTeacher):
        with base.in_place() if base.snapshot is not None else nullcontext():
            sides["base"] = ask(model, label="base", adapter=base.snapshot is not None)
    elif isinstance(base, str):
        sides["base"] = ask(model, label="base", adapter=False)
    return _split(ready, sides)


def _split(
    ready: list[Ready], sides: Mapping[str, Generations]
) -> dict[str, dict[str, Generations]]:
    """The answers by set again."""
    found, at = {}, 0
    for one in ready:
        part = slice(at, at + len(one.asked))
        at = part.stop
        if one.asked:
            found[one.name] = {
                side: replace(whole, answers=whole.answers[part]) for side, whole in sides.items()
            }
    return found


def _learn(
    ready: list[Ready], written: Mapping[str, Mapping[str, Generations]], train_rows: Any
) -> tuple[Form | None, list[str]]:
    """The form of each task from its rows and the base's answers; a note where there is none."""
    general = [
        answer.text
        for one in ready
        if one.kind == "general" and one.name in written
        for answer in written[one.name].get("base", ())
    ]
    if not general:
        return None, []
    tasks = {one.name: one.rows for one in ready if one.kind == "task"}
    if train_rows is not None:
        tasks = {"training rows": train_rows}
    forms, notes = [], []
    for name, rows in tasks.items():
        task = [row["output"] for row in rows if not is_text_row(row)]
        form = learn_form(task, general)
        if form is not None:
            forms.append(form)
        elif task:
            notes.append(
                f"No leak of {name!r} is told: its {len(task)} answers share no form that tells "
                f"them from the base's {len(general)} general answers (8 or more of both are "
                'needed). Give the form as a pattern: evaluate(..., leak=r"(?i)^select ").'
            )
    return any_form(forms), notes


def _assemble(
    one: Ready,
    scored: Any,
    written: Mapping[str, Generations],
    form: Callable[[str], bool] | None,
    seed: int,
) -> SetScores:
    values = {side: answer_values(whole, one.asked, one.metric) for side, whole in written.items()}
    leak: dict[str, tuple[float, ...]] = {}
    if isinstance(form, Form) and one.kind == "general" and written:
        texts = {side: [answer.text for answer in whole] for side, whole in written.items()}
        found = form.leaks(texts)
        leak = found if found["tuned"] else {}
    return SetScores(one.name, one.kind, scored, one.right_by, written, values, leak, seed)
