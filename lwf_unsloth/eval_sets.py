"""The sets of an evaluation, checked: which rows are scored, which prompts are answered."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from lwf_unsloth.answer_scores import Metric, metric_value, usual_metric
from lwf_unsloth.checks import check_count
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.generation import context_limits
from lwf_unsloth.load_report import number_list
from lwf_unsloth.records import prompts_ids, row_kind
from lwf_unsloth.rows import as_rows, is_text_row, row_key


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
class Ready:
    """A set, checked."""

    name: str
    kind: str
    rows: list[Mapping[str, Any]]
    asked: list[Mapping[str, Any]]
    """Rows whose prompts are answered."""
    right_by: str
    metric: Metric | None
    response_only: bool


def ready_sets(
    sets: Mapping[str, Any],
    task: str | Sequence[str] | None,
    limit: int,
    answers_limit: int,
    with_leak: bool,
    form_known: bool,
) -> list[Ready]:
    """Every set with its kind, rows and what is asked of it.

    Args:
        sets: Name -> rows or `EvalSet`.
        task: As `evaluate` takes it.
        limit: Most rows of a set.
        answers_limit: Most answers of a set, 0 for none.
        with_leak: Whether the leak is wanted of general sets.
        form_known: Whether its form can be had without a task set.

    Raises:
        ConfigError, DataError: A set or name that does not fit.
    """
    if not isinstance(sets, Mapping) or not sets:
        raise DataError(
            f"sets is {'empty' if not sets else type(sets).__name__}; it must be a "
            'dict of name -> rows, e.g. {"faq": held_out, "general": general}: results go by name.'
        )
    whole = {
        str(name): rows if isinstance(rows, EvalSet) else EvalSet(rows)
        for name, rows in sets.items()
    }
    if len(whole) < len(sets):
        raise DataError(
            f"Two of the sets {list(sets)} have one name as text: results go by name, so one of "
            "them would be lost. Name them apart."
        )
    tasks = [next(iter(whole))] if task is None else [task] if isinstance(task, str) else list(task)
    unknown = [name for name in tasks if name not in whole]
    if unknown:
        raise ConfigError(
            f"task names {unknown}, but the sets are {list(whole)}. Name sets that are there."
        )
    rows = {name: _rows(name, one, limit) for name, one in whole.items()}
    kinds = {name: _kind(name, one, name in tasks, rows[name]) for name, one in whole.items()}
    with_leak = with_leak and (form_known or "task" in kinds.values())
    return [
        _ready(name, one, kinds[name], rows[name], answers_limit, with_leak)
        for name, one in whole.items()
    ]


def _rows(name: str, given: EvalSet, limit: int) -> list[Mapping[str, Any]]:
    rows = checked_rows(given.rows, f"rows of set {name!r}")
    if not rows:
        raise DataError(f"The set {name!r} has no rows: there is nothing to measure on it.")
    if given.limit is not None:
        check_count(f"limit of set {name!r}", given.limit)
    return _spaced(rows, given.limit or limit)


def checked_rows(given: Any, what: str) -> list[Mapping[str, Any]]:
    """All rows, each an Alpaca or a text row.

    Raises:
        DataError: One is neither; told before any model work, with its place and its set.
    """
    if isinstance(given, (str, bytes, PurePath)):
        raise DataError(
            f"The {what} are {str(given)[:200]!r}, a name and no rows: files are read by "
            'load_alpaca(file, test_size=None)["train"], passages by load_text.'
        )
    rows = list(as_rows(given, what))
    for number, row in enumerate(rows, 1):
        try:
            row_kind(row, number)
        except DataError as error:
            raise DataError(f"The {what}: {error}") from error
    return rows


def _kind(name: str, given: EvalSet, is_task: bool, rows: list[Mapping[str, Any]]) -> str:
    if given.kind not in (None, "task", "general"):
        raise ConfigError(f'kind of set {name!r} is {given.kind!r}; it is "task" or "general".')
    texts = all(is_text_row(row) for row in rows)
    return given.kind or ("task" if is_task and not texts else "general")


def _ready(
    name: str,
    given: EvalSet,
    kind: str,
    rows: list[Mapping[str, Any]],
    answers_limit: int,
    with_leak: bool,
) -> Ready:
    prompts = [row for row in rows if not is_text_row(row)]
    wanted = (kind == "task" or with_leak) if given.answers is None else given.answers
    asked = _spaced(prompts, answers_limit) if wanted and answers_limit else []
    right_by, metric = "", given.metric
    if metric is not None and not callable(metric):
        raise ConfigError(
            f"metric of set {name!r} is {metric!r}; it is a function from an answer and its row to "
            "a number, or None for the usual one."
        )
    if metric is not None:
        right_by = str(getattr(metric, "__name__", "metric")).replace("_", " ")
        if asked:  # what fails would else do so after all the scoring
            metric_value(metric, "", asked[0], 1)
    elif kind == "task" and asked:
        right_by, metric = usual_metric(asked)
    return Ready(name, kind, rows, asked, right_by, metric, given.response_only)


def _spaced(rows: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the rows, evenly spaced, in their order."""
    if len(rows) <= limit:
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def overlap(one: Ready, known: Collection[tuple[str, ...]]) -> list[str]:
    """Notes where rows of a set stand among those trained on (`row_key` of each), or twice."""
    keys = [row_key(row) for row in one.rows]
    first: dict[tuple[str, ...], int] = {}
    for number, key in enumerate(keys, 1):
        first.setdefault(key, number)
    twice = [number for number, key in enumerate(keys, 1) if first[key] < number]
    notes = []
    if twice:
        notes.append(
            f"{len(twice)} of {len(keys)} rows of {one.name!r} repeat an earlier one "
            f"({number_list(twice)}): each counts as a row of its own, so the intervals are too "
            "narrow. Leave repeats out."
        )
    repeated = [number for number, key in enumerate(keys, 1) if key in known]
    if not repeated:
        return notes
    return [
        *notes,
        f"{len(repeated)} of {len(one.rows)} rows of {one.name!r} stand among the training rows "
        f"too ({number_list(repeated)}): on them a model that knows them by heart looks good. "
        "Measure on rows that were held out.",
    ]


def fitting(
    ready: list[Ready], model: Any, tokenizer: Any, max_new_tokens: int
) -> tuple[list[Ready], list[str]]:
    """Leaves out prompts that would not fit the model's context with their answer; says how many.

    One prompt too long would else end the evaluation after all the scoring.
    """
    positions, loaded = context_limits(model)
    limits = [] if positions is None else [positions - max_new_tokens]
    limits += [] if loaded is None else [loaded]
    found, notes = [], []
    for one in ready:
        named = [row for row in one.asked if row["instruction"].strip()]
        if len(named) < len(one.asked):
            notes.append(
                f"{len(one.asked) - len(named)} of {len(one.asked)} prompts of {one.name!r} are "
                "left unanswered: their instruction is empty."
            )
        prompts = prompts_ids(
            tokenizer, [(row["instruction"], row.get("input") or "") for row in named]
        )
        longest = min(limits, default=float("inf"))
        kept = [row for row, ids in zip(named, prompts, strict=True) if len(ids) <= longest]
        if len(kept) < len(named):
            notes.append(
                f"{len(named) - len(kept)} of {len(one.asked)} prompts of {one.name!r} are "
                f"left unanswered: with {max_new_tokens} new tokens they do not fit the model's "
                f"context of {min(limits)} tokens."
            )
        found.append(replace(one, asked=kept))
    return found, notes
