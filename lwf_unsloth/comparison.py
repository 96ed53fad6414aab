"""Answers before and after, side by side: in the notebook, and as HTML, markdown and JSON."""

import json
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lwf_unsloth.advice import Advice, advise
from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.diagnosis import FAULTS, Diagnoses, Diagnosis, diagnose
from lwf_unsloth.errors import DataError
from lwf_unsloth.facts import TrainingFacts
from lwf_unsloth.markup import markdown_text, page, shown, table
from lwf_unsloth.whole_files import write_whole_text, writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two sets of answers to the same prompts under the same settings."""

    before: Generations
    after: Generations
    notes: tuple[str, ...] = ()
    """What a reader must know to read the table right, e.g. that both sides are the base model."""

    @property
    def rows(self) -> list[tuple[Answer, Answer]]:
        """(before, after) of each prompt, in order."""
        return list(zip(self.before, self.after, strict=True))

    @property
    def eos_rate_before(self) -> float:
        """Share of the answers that the model ended by itself, before."""
        return self.before.eos_rate

    @property
    def eos_rate_after(self) -> float:
        """Share of the answers that the model ended by itself, after."""
        return self.after.eos_rate

    @property
    def mean_tokens_before(self) -> float:
        """Mean length of an answer in tokens, before."""
        return self.before.mean_tokens

    @property
    def mean_tokens_after(self) -> float:
        """Mean length of an answer in tokens, after."""
        return self.after.mean_tokens

    @property
    def labels(self) -> tuple[str, str]:
        """Names of the two sides: those the caller gave, else "before" and "after"."""
        return self.before.label or "before", self.after.label or "after"

    @cached_property
    def diagnoses(self) -> tuple[Diagnoses, Diagnoses]:
        """What is wrong with the answers, before and after."""
        return diagnose(self.before), diagnose(self.after)

    @property
    def fault_changes(self) -> list[tuple[str, int, int]]:
        """(name, answers before, answers after) of every fault that some answer has."""
        left, right = (side.counts for side in self.diagnoses)
        return [(FAULTS[k], left[k], right[k]) for k in FAULTS if left[k] or right[k]]

    def advice(self, facts: TrainingFacts | None = None) -> Advice:
        """What to change so that the faults after training go away.

        Args:
            facts: `TrainingFacts.of(trainer)`; without it only the decoding can be judged.
        """
        return advise(self.after, facts)

    @property
    def caption(self) -> str:
        """Prompts, decoding settings, template and model in a line."""
        models = dict.fromkeys(name for name in (self.before.model, self.after.model) if name)
        parts = [
            f"{len(self.before)} prompt{'s' * (len(self.before) != 1)}",
            str(self.before.settings),
            f"template {self.before.template}" * bool(self.before.template),
            "model " + " → ".join(models) if models else "",
        ]
        return " · ".join(part for part in parts if part)

    def __str__(self) -> str:
        """Rates, lengths and faults, for a terminal."""
        left, right = self.labels
        return shown(
            f"EOS rate {self.eos_rate_before:.0%} {left} -> {self.eos_rate_after:.0%} {right}, "
            f"mean length {self.mean_tokens_before:.0f} -> {self.mean_tokens_after:.0f} tokens, "
            f"without fault {' -> '.join(str(side.sound) for side in self.diagnoses)} of "
            f"{len(self.before)} ({self.caption})"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook; no scripts, no outside resources, everything escaped."""
        faults = [[fault_words(one) for one in side] for side in self.diagnoses]
        left, right = self.diagnoses
        summary = [f"Answers without fault: {left.sound} → {right.sound} of {len(left)}"]
        summary += [f"{name}: {one} → {two}" for name, one, two in self.fault_changes]
        sides = (self.before, self.after)
        return table(sides, self.labels, self.caption, self.notes, faults, summary)

    def to_html(self) -> str:
        """The table as a page of its own, light or dark as the reader's system is."""
        return page(self._repr_html_(), f"{self.labels[0]} / {self.labels[1]}")

    def to_markdown(self) -> str:
        """The table as markdown; model text is text, never markup."""
        heads = [
            f"{shown(label)} ({side.source})"
            for label, side in zip(self.labels, (self.before, self.after), strict=True)
        ]
        lines = [
            f"# {markdown_text(self.labels[0])} / {markdown_text(self.labels[1])}",
            "",
            markdown_text(self.caption),
            "",
            *(f"> {markdown_text(note)}\n" for note in self.notes),
            "| | " + " | ".join(markdown_text(head) for head in heads) + " |",
            "|---|---|---|",
            f"| EOS rate | {self.eos_rate_before:.0%} | {self.eos_rate_after:.0%} |",
            f"| mean tokens | {self.mean_tokens_before:.1f} | {self.mean_tokens_after:.1f} |",
            f"| answers without fault | {' | '.join(str(s.sound) for s in self.diagnoses)} |",
            *(f"| {name} | {one} | {two} |" for name, one, two in self.fault_changes),
            "",
            "| prompt | " + " | ".join(markdown_text(head) for head in heads) + " |",
            "|---|---|---|",
        ]
        for pair, found in zip(self.rows, zip(*self.diagnoses, strict=True), strict=True):
            asked = pair[0].prompt + (f"\n\n{pair[0].input}" if pair[0].input else "")
            ends = [
                "; ".join([stop_words(a), *fault_words(d)])
                for a, d in zip(pair, found, strict=True)
            ]
            cells = [asked, *(f"{a.text}\n\n({end})" for a, end in zip(pair, ends, strict=True))]
            lines.append("| " + " | ".join(markdown_text(cell) for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "eos_rate": {"before": self.eos_rate_before, "after": self.eos_rate_after},
            "mean_tokens": {"before": self.mean_tokens_before, "after": self.mean_tokens_after},
            "notes": list(self.notes),
            "diagnosis": dict(
                zip(("before", "after"), (s.to_dict() for s in self.diagnoses), strict=True)
            ),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Comparison":
        """The object that `to_dict` gave."""
        sides = [Generations.from_dict(values[name]) for name in ("before", "after")]
        return cls(sides[0], sides[1], tuple(values["notes"]))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes comparison.html, comparison.md and comparison.json, each whole or not at all.

        Args:
            folder: Where to; made if it is not there.

        Returns:
            The folder.

        Raises:
            DiskError: The disk is full, or the folder may not be written.
        """
        folder = Path(folder)
        files = {
            "comparison.json": json.dumps(self.to_dict(), ensure_ascii=False, indent=1),
            "comparison.html": self.to_html(),
            "comparison.md": self.to_markdown(),
        }
        with writing(folder):
            for name, text in files.items():
                write_whole_text(folder / name, text)
        return folder


def stop_words(answer: Answer) -> str:
    """Why an answer stopped and how long it is, in words."""
    size = f"{answer.tokens} token{'s' * (answer.tokens != 1)}"
    return f"eos, {size}" if answer.stop == "eos" else f"length, cut at {size}"


def fault_words(diagnosis: Diagnosis) -> list[str]:
    """What is wrong with an answer, beside a cut, which the stop reason says already."""
    return [f"{FAULTS[f.kind]}: {f.detail}" for f in diagnosis.faults if f.kind != "cut"]


def compare(before: Generations, after: Generations) -> Comparison:
    """Puts two sets of answers side by side.

    Args:
        before: Answers of the first model, e.g. `generate(..., adapter=False)`.
        after: Answers of the second to the same prompts with the same settings.

    Returns:
        The comparison; it shows itself as a table in a notebook.

    Raises:
        DataError: Other prompts, settings or template on one side, or one trained adapter on both.
    """
    for name, side in (("before", before), ("after", after)):
        if not isinstance(side, Generations):
            raise DataError(
                f"`{name}` is a {type(side).__name__}, but compare takes what generate() returns: "
                "settings and stop reasons are needed beside the texts."
            )
    _same_prompts(before, after)
    _same_settings(before, after)
    if before.adapter == after.adapter == "on" and before.weights == after.weights:
        raise DataError(
            f"Both sides come from the same trained adapter ({before.weights[:8]}), so `before` is "
            "not before the training: was its cell run again after it? "
            "generate(..., adapter=False) gives the base model's answers at any time."
        )
    notes = _notes(before, after)
    for note in notes:
        logger.info("compare: %s", note)
    return Comparison(before, after, notes)


def _same_prompts(before: Generations, after: Generations) -> None:
    """Raises a DataError unless both sides answer the same prompts in the same order."""
    if len(before) != len(after):
        raise DataError(
            f"before has {len(before)} answers and after {len(after)}: a table needs the same "
            "prompts on both sides. Generate both from one list."
        )
    for number, (left, right) in enumerate(zip(before, after, strict=True)):
        asked = [(answer.prompt, answer.input, answer.prefix) for answer in (left, right)]
        if asked[0] != asked[1]:
            raise DataError(
                f"Prompt {number} is {left.prompt!r:.80} before and {right.prompt!r:.80} after (or "
                "their inputs or forms differ): answers to different questions do not compare. "
                "Generate both from one list, in one order."
            )


def _same_settings(before: Generations, after: Generations) -> None:
    """Raises a DataError that names every setting that differs."""
    left = {**before.settings.to_dict(), "template": before.template}
    right = {**after.settings.to_dict(), "template": after.template}
    if before.settings.greedy and after.settings.greedy:
        left["seed"] = right["seed"] = None  # greedy does not use it
    differing = [
        f"{name} {left[name]!r} before, {right[name]!r} after"
        for name in left
        if left[name] != right[name]
    ]
    if differing:
        raise DataError(
            f"The two sides were generated differently ({'; '.join(differing)}), so a difference "
            "between the answers need not come from the training. Generate both with the same "
            "settings."
        )


def _notes(before: Generations, after: Generations) -> tuple[str, ...]:
    """What else differs, or does not, that a reader should know."""
    notes = []
    if before.weights == after.weights and before.model == after.model:
        notes.append(
            "Both sides come from the base model's weights: no trained adapter was on, so the "
            "answers are the same."
        )
    elif before.adapter == "on":
        notes.append(
            f"The first side already has a trained adapter on ({before.weights[:8]}); the base "
            "model answers with adapter=False."
        )
    if before.model != after.model:
        notes.append(
            f"The two sides come from different models ({before.model}, {after.model}), so not "
            "every difference comes from the training."
        )
    return tuple(notes)
