"""From what is wrong with the answers and what is known of the training to settings that cure it.

Every hint rests on a figure, and the figure is in its sentence; without evidence nothing is said.
The bounds come from this project's own measurements where it has them: on SmolLM2-135M and
gemma-3-270m a KL under 0.02 nats a token never came with more than 1.5 % leak, 0.04 and more came
with 10 % and more; lambda 0.5 to 5 was flat.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from lwf_unsloth.answers import Generations
from lwf_unsloth.arguments import checked
from lwf_unsloth.asked import wishes
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.diagnosis import Diagnoses, Diagnosis, diagnose
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.facts import TrainingFacts
from lwf_unsloth.forms import FORMS
from lwf_unsloth.loss_curve import Trend, falling, overfitted, rising
from lwf_unsloth.markup import html_text, shown

HIGH_KL = 0.04
HIGH_RISE = 0.05
"""Nats per token above which too much was forgotten."""
MOST_LAMBDA = 5.0
FEW_ROWS = 0.05
"""Share of the training answers under which a form is rare."""
MOST_ENDED = 0.95
DECODING = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True)
class Hint:
    """One thing to do."""

    topic: str
    """"max_new_tokens", "repetition", "eos", "loss", "form", "rows" or "retention"."""
    sentence: str
    """What to do and the figure it rests on."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> value; empty where it is not a setting that has to change."""
    form: str = ""
    """The form that prompts should ask for."""


@dataclass(frozen=True, repr=False)
class Advice(Sequence[Hint]):
    """What to change, most telling first; empty where all is well."""

    hints: tuple[Hint, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Hint: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hint]: ...
    def __getitem__(self, index: int | slice) -> Hint | Sequence[Hint]:
        """A hint by its place."""
        return self.hints[index]

    def __len__(self) -> int:
        """Number of hints."""
        return len(self.hints)

    @property
    def changes(self) -> dict[str, Any]:
        """All settings to change, for decoding and training."""
        return {name: value for hint in self.hints for name, value in hint.changes.items()}

    def __str__(self) -> str:
        """A line a hint."""
        return "\n".join(f"- {shown(hint.sentence)}" for hint in self.hints) or "Nothing to change."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The hints as a list."""
        if not self.hints:
            return "<p>Nothing to change.</p>"
        lines = "".join(f"<li>{html_text(hint.sentence)}</li>" for hint in self.hints)
        return f'<ul class="tex2jax_ignore mathjax_ignore">{lines}</ul>'

    def apply(self, given: Any) -> Any:
        """A copy of settings with the changes that are for them; what was given stays as it is.

        Args:
            given: An `LwFConfig`, a `Decoding`, or a dict of `generate`'s keywords.

        Returns:
            The same kind with the changed values.

        Raises:
            ConfigError: Another type, or a changed value that contradicts another setting.
        """
        decoding = {name: value for name, value in self.changes.items() if name in DECODING}
        training = {name: value for name, value in self.changes.items() if name not in DECODING}
        if isinstance(given, Decoding):
            return replace(given, **decoding)
        if isinstance(given, Mapping):
            return {**given, **decoding}
        if not all(hasattr(given, name) for name in ("learning_rate", "lwf_lambda")):
            raise ConfigError(
                f"apply got a {type(given).__name__}, but changes an LwFConfig, a Decoding or a "
                "dict of generate's keywords: other settings have other names."
            )
        changed = copy.copy(given)
        for name, value in training.items():
            setattr(changed, name, value)
        from lwf_unsloth.config import check_lwf

        check_lwf(changed)
        return changed

    def with_forms(self, prompts: Iterable[str | Mapping[str, Any]]) -> list[Any]:
        """The prompts, those that ask for a form which was missing as rows with that form.

        Args:
            prompts: Instructions or rows, as for `generate`.
        """
        advised = {hint.form for hint in self.hints if hint.form}
        changed: list[Any] = []
        for prompt in prompts:
            row = {"instruction": prompt} if isinstance(prompt, str) else prompt
            asked = (wish.form for wish in wishes(str(row.get("instruction", ""))))
            form = next((one for one in asked if one in advised), None)
            changed.append({**row, "form": form} if form and not row.get("form") else prompt)
        return changed


@checked("answers", "facts")
def advise(answers: Generations, facts: TrainingFacts | None = None) -> Advice:
    """Says what to change so that the faults of the answers go away.

    Args:
        answers: Answers of the trained model.
        facts: What is known of the training; without it only the decoding can be judged.

    Returns:
        The advice; empty where all is well.

    Raises:
        ConfigError: Other types.
    """
    for value, kind in ((answers, Generations), (facts, (TrainingFacts, type(None)))):
        if not isinstance(value, kind):
            raise ConfigError(
                f"advise got a {type(value).__name__}, but takes what generate() returns, and "
                "TrainingFacts.of(trainer) or None: settings and stop reasons are needed."
            )
    case = _Case(answers, diagnose(answers), facts or TrainingFacts())
    hints = [*_length(case), *_repetition(case), *_loss(case), *_forms(case), *_retention(case)]
    return Advice(tuple(hints))


@dataclass(frozen=True)
class _Case:
    """What the rules look at."""

    answers: Generations
    found: Diagnoses
    facts: TrainingFacts

    def of(self, *kinds: str) -> list[Diagnosis]:
        """Answers that have one of these faults."""
        return [one for one in self.found if one.kinds & set(kinds)]

    def share(self, some: Sequence[Any]) -> str:
        """So many of all, in words."""
        return f"{len(some)} of {len(self.found)} answers"

    def setting(self, name: str) -> Any:
        return self.facts.settings.get(name)


def _length(case: _Case) -> Iterator[Hint]:
    """Cut answers: too few new tokens, or no EOS learned. Loops are cut in any case."""
    limit, facts = case.answers.settings.max_new_tokens, case.facts
    share = facts.ended_share
    if case.of("cut") and share is not None and share < MOST_ENDED:
        yield _eos(case, case.of("cut"), share)
    cut = [one for one in case.of("cut") if "repetition" not in one.kinds]
    if not cut:
        return
    needed = facts.quantile(0.99)
    if needed is None:
        wanted = 2 * limit
        yield Hint(
            "max_new_tokens",
            f"{case.share(cut)} were cut at {limit} tokens: set max_new_tokens={wanted}, twice "
            "that, and look whether they end.",
            {"max_new_tokens": wanted},
        )
    elif needed > limit:
        wanted = 32 * math.ceil((needed + 8) / 32)
        yield Hint(
            "max_new_tokens",
            f"{case.share(cut)} were cut at {limit} tokens, but 99 % of the training answers need "
            f"up to {needed}: set max_new_tokens={wanted}.",
            {"max_new_tokens": wanted},
        )


def _eos(case: _Case, cut: list[Diagnosis], share: float) -> Hint:
    """Training answers without EOS do not teach to stop."""
    facts, limit = case.facts, case.setting("max_length")
    said = (
        f"{case.share(cut)} do not end by themselves, and only {share:.0%} of "
        f"{len(facts.answer_tokens)} training answers end in EOS"
    )
    if not facts.cut or not isinstance(limit, int):
        return Hint(
            "eos",
            f"{said}, so the model is not taught to stop: give rows with instruction and output, "
            "which get an EOS, or append the EOS id to encoded rows and their labels.",
        )
    wanted = 32 * math.ceil((facts.longest_row or 2 * limit) / 32)
    return Hint(
        "eos",
        f"{said}: {facts.cut} rows lose their end at max_length {limit}. Set max_length={wanted}"
        + (
            f" (the longest row has {facts.longest_row} tokens)." * bool(facts.longest_row)
            or ", and load the model with as large a max_seq_length."
        ),
        {"max_length": wanted},
    )


def _repetition(case: _Case) -> Iterator[Hint]:
    """A penalty first; where it is on already, a longest n-gram; then a stronger penalty."""
    loops = case.of("repetition")
    if not loops:
        return
    settings = case.answers.settings
    example = next(f.detail for f in loops[0].faults if f.kind == "repetition")
    said = f"{case.share(loops)} repeat themselves ({example})"
    if settings.repetition_penalty < 1.1:
        name, value = "repetition_penalty", 1.1
        why = f"at repetition_penalty {settings.repetition_penalty:g}: set 1.1"
    elif settings.no_repeat_ngram_size == 0:
        name, value = "no_repeat_ngram_size", 6
        penalty = f"{settings.repetition_penalty:g}"
        why = f"even at repetition_penalty {penalty}: set no_repeat_ngram_size=6"
    elif settings.repetition_penalty < 1.3:
        name, value = "repetition_penalty", round(min(1.3, settings.repetition_penalty + 0.1), 2)
        why = f"at repetition_penalty {settings.repetition_penalty:g}: set {value:g}"
    else:
        return
    yield Hint("repetition", f"{said} {why}.", {name: value})


def _loss(case: _Case) -> Iterator[Hint]:
    """The curve: a rate too high, too many epochs, or too few."""
    facts, rate = case.facts, case.setting("learning_rate")
    up, over, down = rising(facts.task_loss), overfitted(facts.eval_loss), falling(facts.task_loss)
    if up and isinstance(rate, float):
        yield Hint(
            "loss",
            f"The task loss rose from {up.before:.2f} to {up.now:.2f} nats a token: the rate "
            f"{rate:g} is too high, set learning_rate={rate / 2:g}.",
            {"learning_rate": rate / 2},
        )
    elif over:
        yield _fewer_epochs(case, over)
    elif down and case.of("cut", "form", "markers", "echo", "repetition", "empty"):
        yield _more_epochs(case, down)


def _fewer_epochs(case: _Case, over: Trend) -> Hint:
    best = max(1, round(over.epoch))
    said = (
        f"The held-out task loss was lowest at epoch {over.epoch:g} ({over.before:.2f}) and rose "
        f"to {over.now:.2f}"
    )
    fewer = isinstance(epochs := case.setting("num_train_epochs"), (int, float)) and best < epochs
    if fewer and (case.setting("max_steps") or 0) <= 0:
        return Hint(
            "loss", f"{said}: set num_train_epochs={best}.", {"num_train_epochs": float(best)}
        )
    rate = case.setting("learning_rate") or 2e-4
    return Hint(
        "loss",
        f"{said} within the run: set learning_rate={rate / 2:g}, half of what it was.",
        {"learning_rate": rate / 2},
    )


def _more_epochs(case: _Case, down: Trend) -> Hint:
    steps, epochs = case.setting("max_steps") or 0, case.setting("num_train_epochs") or 1
    longer = ("max_steps", 2 * steps) if steps > 0 else ("num_train_epochs", epochs + 1.0)
    faulty = [one for one in case.found if one.faults]
    return Hint(
        "loss",
        f"{case.share(faulty)} have faults, and the task loss was still falling at the end "
        f"({down.before:.2f} to {down.now:.2f} nats a token in the last fifth): set "
        f"{longer[0]}={longer[1]:g}.",
        {longer[0]: longer[1]},
    )


def _forms(case: _Case) -> Iterator[Hint]:
    """A template for a form that was asked for in vain, and rows that show it."""
    facts = case.facts
    for name in FORMS:
        missing = [
            one
            for one in case.found
            if any(f.kind == "form" and f.form == name for f in one.faults)
        ]
        if not missing:
            continue
        yield Hint(
            "form",
            f"In {case.share(missing)} the {name} that was asked for is missing: give such prompts "
            f'as rows with form="{name}", which begins the answer with one.',
            form=name,
        )
        count, seen = facts.shapes.get(name, 0), facts.looked_at
        if not seen or count >= FEW_ROWS * seen:
            continue
        rows = len(facts.answer_tokens)
        more = math.ceil((FEW_ROWS - count / seen) * rows / (1 - FEW_ROWS))
        yield Hint(
            "rows",
            f"{count} of {seen} training answers looked at hold a {name}, while {len(missing)} "
            f"prompts asked for one in vain: add about {more} rows that do, then it is in one of "
            "twenty.",
        )


def _retention(case: _Case) -> Iterator[Hint]:
    """Too much forgotten: rehearsal rows, then a larger lambda, then a lower rate."""
    facts = case.facts
    said = [
        f"the KL to the model before training ended at {facts.kl:.3f} nats a token (under 0.02 "
        "nothing leaked in our runs)"
        if facts.kl is not None and facts.kl > HIGH_KL and _usual_kl(case)
        else "",
        f"the NLL of what was to be kept rose by {facts.rise:.2f} nats a token"
        if facts.rise is not None and facts.rise > HIGH_RISE
        else "",
    ]
    why = " and ".join(filter(None, said))
    if not why:
        return
    why = why[0].upper() + why[1:]
    strength, ratio = case.setting("lwf_lambda"), case.setting("rehearsal_ratio")
    rate = case.setting("learning_rate")
    changes: dict[str, Any] = {}
    if not ratio or facts.rehearsal_rows == 0:
        changes["rehearsal_ratio"] = max(ratio or 0.0, 0.1)
    if _lambda_acts(case) and strength is not None and strength < MOST_LAMBDA:
        changes["lwf_lambda"] = 2.0 if strength < 1 else min(MOST_LAMBDA, 2 * strength)
    if not changes and ratio is not None and ratio < 0.2:
        changes["rehearsal_ratio"] = 0.2
    if not changes and rate:
        changes["learning_rate"] = rate / 2
    if not changes:
        return
    do = " and ".join(f"{name}={value:g}" for name, value in changes.items())
    rows = ' and give rehearsal rows (rehearsal_dataset="self" needs none)'
    yield Hint(
        "retention",
        f"{why}: set {do}{rows * (facts.rehearsal_rows == 0)}.",
        changes,
    )


def _usual_kl(case: _Case) -> bool:
    """Whether the KL was measured as those that its bound rests on: forward, temperature 1."""
    usual = {"lwf_kl": "forward", "lwf_temperature": 1, "lwf_temperature_schedule": "constant"}
    return all(case.setting(name) in (None, value) for name, value in usual.items())


def _lambda_acts(case: _Case) -> bool:
    """Whether `lwf_lambda` decides: a schedule from one value to another stands in its place, and
    under a budget it is where lambda begins.
    """
    schedule = case.setting("lwf_lambda_schedule") or "constant"
    fixed = schedule == "constant" or schedule.startswith("warmup")
    return fixed and case.setting("lwf_kl_budget") is None
