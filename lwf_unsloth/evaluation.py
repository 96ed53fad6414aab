"""`evaluate`: base and tuned model on several sets in one load, with intervals.

For each set NLL, KL(base || tuned) and calibration, from one forward of either model a batch; for
task sets also greedy answers and whether they are right; for general sets the leak, the share of
answers in the new task's form. Answers cost most of the time, so a limited number is asked for.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from lwf_unsloth.answer_scores import Metric, answer_values, usual_metric
from lwf_unsloth.answers import Generations
from lwf_unsloth.backend import device_name, on_cuda, prepare, versions
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.generation import generate
from lwf_unsloth.leak import Form, FormLike, given_form, learn_form
from lwf_unsloth.load_report import number_list
from lwf_unsloth.locks import model_lock
from lwf_unsloth.rows import as_rows, is_text_row, row_key
from lwf_unsloth.scores import Scores, SetScores
from lwf_unsloth.scoring import score
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher, Teacher

logger = logging.getLogger(__name__)

LEARNED = "learned"


@dataclass(frozen=True)
class EvalSet:
    """Rows with what to measure on them; plain rows in its place take the defaults."""

    rows: Any
    """Alpaca or text rows: a Dataset or a list of dicts, not trained on."""
    kind: str | None = None
    """"task" (a new skill) or "general" (to be kept); None: as `evaluate`'s `task` says."""
    answers: bool | None = None
    """Whether greedy answers are asked for; None: of a task, and of a general set for its leak."""
    metric: Metric | None = None
    """(answer, row) -> number, higher is better; None takes the fact that the rows name
    (`answer_contains`), else an exact match, on task sets alone."""
    response_only: bool = True
    """Score answers alone, or prompts too. Text rows are scored whole."""
    limit: int | None = None
    """Rows of this set; None takes `evaluate`'s."""


@dataclass(frozen=True)
class _Ready:
    """A set, checked."""

    name: str
    kind: str
    rows: list[Mapping[str, Any]]
    asked: list[Mapping[str, Any]]
    """Rows whose prompts are answered."""
    right_by: str
    metric: Metric | None
    response_only: bool


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
        ModelError: The model is in use by another thread.
    """
    prepare()
    answers_limit = (64 if on_cuda() else 16) if answers_limit is None else answers_limit
    for name, value in (("limit", limit), ("answers_limit", answers_limit)):
        _check_count(name, value)
    form = None if leak in (None, LEARNED) else given_form(leak)
    ready = _ready_sets(sets, task, limit, answers_limit if answers else 0, leak is not None)
    notes = [note for one in ready for note in _overlap(one, train_rows)]
    with model_lock(model, "evaluating"):
        scored = {
            one.name: score(
                model,
                tokenizer,
                one.rows,
                max_length=max_length,
                batch_size=batch_size or (32 if on_cuda() else 8),
                response_only=one.response_only,
                base=base,
            )
            for one in ready
        }
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


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number from 1.")


def _ready_sets(
    sets: Mapping[str, Any],
    task: str | Sequence[str] | None,
    limit: int,
    answers_limit: int,
    with_leak: bool,
) -> list[_Ready]:
    """Every set with its kind, rows and what is asked of it."""
    if not isinstance(sets, Mapping) or not sets:
        raise DataError(
            f"sets is {type(sets).__name__} of length {len(sets) if sets else 0}; it must be a "
            'dict of name -> rows, e.g. {"faq": held_out, "general": general}: results go by name.'
        )
    whole = {
        str(name): rows if isinstance(rows, EvalSet) else EvalSet(rows)
        for name, rows in sets.items()
    }
    tasks = [next(iter(whole))] if task is None else [task] if isinstance(task, str) else list(task)
    unknown = [name for name in tasks if name not in whole]
    if unknown:
        raise ConfigError(
            f"task names {unknown}, but the sets are {list(whole)}. Name sets that are there."
        )
    return [
        _ready(name, one, name in tasks, limit, answers_limit, with_leak)
        for name, one in whole.items()
    ]


def _ready(
    name: str, given: EvalSet, is_task: bool, limit: int, answers_limit: int, with_leak: bool
) -> _Ready:
    rows = list(as_rows(given.rows, f"rows of set {name!r}"))
    if not rows:
        raise DataError(f"The set {name!r} has no rows: there is nothing to measure on it.")
    if given.limit is not None:
        _check_count(f"limit of set {name!r}", given.limit)
    if given.kind not in (None, "task", "general"):
        raise ConfigError(f'kind of set {name!r} is {given.kind!r}; it is "task" or "general".')
    rows = _spaced(rows, given.limit or limit)
    prompts = [row for row in rows if not is_text_row(row)]
    kind = given.kind or ("task" if is_task and prompts else "general")
    wanted = (kind == "task" or with_leak) if given.answers is None else given.answers
    asked = _spaced(prompts, answers_limit) if wanted and answers_limit else []
    right_by, metric = "", given.metric
    if metric is not None:
        right_by = str(getattr(metric, "__name__", "metric")).replace("_", " ")
    elif kind == "task" and asked:
        right_by, metric = usual_metric(asked)
    return _Ready(name, kind, rows, asked, right_by, metric, given.response_only)


def _spaced(rows: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the rows, evenly spaced, in their order."""
    if len(rows) <= limit:
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _overlap(one: _Ready, train_rows: Any) -> list[str]:
    """A note where rows of a set stand among those trained on."""
    if train_rows is None:
        return []
    known = {row_key(row) for row in as_rows(train_rows, "training rows")}
    repeated = [number for number, row in enumerate(one.rows, 1) if row_key(row) in known]
    if not repeated:
        return []
    return [
        f"{len(repeated)} of {len(one.rows)} rows of {one.name!r} stand among the training rows "
        f"too ({number_list(repeated)}): on them a model that knows them by heart looks good. "
        "Measure on rows that were held out."
    ]


def _answers(
    model: Any,
    tokenizer: Any,
    ready: list[_Ready],
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
    ready: list[_Ready], sides: Mapping[str, Generations]
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
    ready: list[_Ready], written: Mapping[str, Mapping[str, Generations]], train_rows: Any
) -> tuple[Form | None, list[str]]:
    """The task's form from the task's rows and the base's answers; a note where there is none."""
    general = [
        answer.text
        for one in ready
        if one.kind == "general" and one.name in written
        for answer in written[one.name].get("base", ())
    ]
    if not general:
        return None, []
    rows: Iterable[Any] = (row for one in ready if one.kind == "task" for row in one.rows)
    if train_rows is not None:
        rows = as_rows(train_rows, "training rows")
    task = [row["output"] for row in rows if not is_text_row(row)]
    form = learn_form(task, general)
    if form is not None or not task:
        return form, []
    return None, [
        f"No leak is told: the task's {len(task)} answers share no form that tells them from the "
        f"base's {len(general)} general answers (8 or more of both are needed). Give the form as a "
        'pattern: evaluate(..., leak=r"(?i)^select ").'
    ]


def _assemble(
    one: _Ready,
    scored: Any,
    written: Mapping[str, Generations],
    form: Callable[[str], bool] | None,
    seed: int,
) -> SetScores:
    values = {side: answer_values(whole, one.asked, one.metric) for side, whole in written.items()}
    leak = {}
    if isinstance(form, Form) and one.kind == "general":
        leak = {
            side: form.flags(answer.text for answer in whole) for side, whole in written.items()
        }
    return SetScores(one.name, one.kind, scored, one.right_by, written, values, leak, seed)
