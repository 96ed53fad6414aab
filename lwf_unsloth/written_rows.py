"""Rows that a model wrote, as plain data: what leads to them, what is kept and what is dropped.

A row is `{"instruction", "input", "output", "whole"}` or `{"text", "whole"}`; `whole` is False
where the length limit ended it, and then no EOS is put after it (see `encode_row`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lwf_unsloth.rows import normalised, prompt_key, row_key
from lwf_unsloth.templates import PromptTemplate

EMPTY = "empty or too short"
REPEATS = "repeats itself"
MARKER = "holds a marker of the template"
CONTROL = "holds a control token"
NO_WORDS = "hardly a word in it"
BROKEN = "holds half a character"
TWICE = "written before"
NOT_ENDED = "instruction without an end"
NO_INSTRUCTION = "instruction too short"
ECHO = "answer that is its instruction again"
SURPLUS = "more than were wanted"
ASKED_TWICE = "instruction written before"

LEAST_DISTINCT = 0.6
"""Share of a text's n-grams that must be distinct; a loop has far fewer, prose about 0.9."""
LEAST_INSTRUCTION = 8
"""Characters."""
LEAST_PASSAGE = 40
"""Characters."""

PROBES = (
    "What is the capital of France?",
    "Name three colours.",
    "How many days does a week have?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Give me a word that means happy.",
    "Why do people wear coats in winter?",
    "Translate 'good morning' into Spanish.",
)
"""Questions with short answers: does the model end them?"""
OPENINGS = (
    "The first", "In the", "A small", "When the", "There are", "It is", "Many people", "For a",
    "This is", "At the", "One of", "After the",
)  # fmt: skip
"""First words of passages, for models without a token that begins a text."""
ASKING = (
    "", "Explain", "Write", "What is", "How do", "List", "Describe", "Why", "Give", "",
    "Name", "Summarize", "What are", "Create", "How can", "Compare", "Translate", "Who",
    "Suggest", "Find", "", "Rewrite", "When", "Tell me", "Is it", "Where", "Which",
)  # fmt: skip
"""First words of instructions in turn, for variety: left alone, small models ask one thing."""


@dataclass
class WrittenReport:
    """What became of everything that was written."""

    kind: str = "answers"
    """"answers" to prompts that were given, "prompts" with answers, or "passages"."""
    asked: int = 0
    """Rows that were wanted."""
    tried: int = 0
    """Rows that were begun; tried == kept + the sum of dropped."""
    kept: int = 0
    ended: int = 0
    """Kept rows that the model ended by itself; the others are cut and marked `whole: false`."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    note: str = ""
    """Why this kind, where it was chosen by trial."""
    seconds: float = 0.0
    reused: bool = False
    """Whether they were read from a file written before."""

    def __str__(self) -> str:
        """One line."""
        what = {"answers": "answers", "prompts": "instructions with answers"}.get(
            self.kind, self.kind
        )
        came = "read from a file" if self.reused else f"written in {self.seconds:.0f} s"
        text = f"{self.kept} {what} by the model itself, {came}; {self.ended} ended, "
        text += f"{self.kept - self.ended} cut"
        if self.dropped:
            reasons = ", ".join(f"{why}: {count}" for why, count in self.dropped.items())
            text += f"; of {self.tried} tried, dropped: {reasons}"
        return f"{text}. {self.note}".strip()


class WrittenRows(list[dict[str, Any]]):
    """The rows, a list of dicts as LwFTrainer and mix_rehearsal take it, with how they came to be.

    Attributes:
        report: What was kept and dropped.
        origin: What decides the rows: model, template, settings; equal origins, equal rows.
        sha256: Hash of the file that holds them, empty without one.
        run: Name of the checkpoint whose run they belong to, where only that run may have them.
    """

    sha256: str = ""
    run: str = ""

    def __init__(
        self, rows: Iterable[dict[str, Any]], report: WrittenReport, origin: dict[str, Any]
    ) -> None:
        super().__init__(rows)
        self.report = report
        self.origin = origin

    def __repr__(self) -> str:
        return f"WrittenRows({self.report})"


class Sieve:
    """Takes candidates in order; keeps the usable ones and counts the others by reason."""

    def __init__(self, template: PromptTemplate, controls: Iterable[str]) -> None:
        """Starts empty.

        Args:
            template: The served template, whose markers no row may hold.
            controls: Texts of the tokenizer's control tokens.
        """
        self.template = template
        self.markers = template_markers(template)
        self.controls = [text for text in controls if text]
        self.rows: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.tried = 0
        self._seen: set[tuple[str, ...]] = set()
        self._asked: set[tuple[str, ...]] = set()

    def instruction(self, written: str, ended: bool) -> str | None:
        """The instruction in what was written after the template's head; None counts a drop.

        A candidate that is given back is counted when its answer is taken.
        """
        text, why = instruction_in(written, ended, self.template)
        key = prompt_key({"instruction": text})
        why = why or self._fault(text, LEAST_INSTRUCTION, NO_INSTRUCTION)
        if not why and key in self._asked:
            why = ASKED_TWICE
        if why:
            self._drop(why)
            return None
        self._asked.add(key)
        return text

    def answer(self, instruction: str, given: str, written: str, ended: bool) -> bool:
        """Takes an answer to an instruction; whether it is kept."""
        text = _tidy(written, ended)
        row = {"instruction": instruction, "input": given, "output": text, "whole": ended}
        why = self._fault(text, 1, EMPTY)
        if not why and normalised(text) == normalised(instruction):
            why = ECHO
        return self._take(row, why)

    def passage(self, written: str, ended: bool) -> bool:
        """Takes a passage; whether it is kept."""
        text = _tidy(written, ended)
        why = self._fault(text, LEAST_PASSAGE, EMPTY)
        if not why and sum(map(str.isalpha, text)) * 2 < len(text):
            why = NO_WORDS
        return self._take({"text": text, "whole": ended}, why)

    def leave(self, count: int) -> None:
        """Counts instructions that stay without an answer, since there are rows enough."""
        if count:
            self.tried += count
            self.dropped[SURPLUS] += count

    def report(self, kind: str, asked: int, note: str) -> WrittenReport:
        """What became of everything, where `asked` rows are kept."""
        kept = self.rows[:asked]
        dropped = dict(self.dropped)
        if len(self.rows) > asked:
            dropped[SURPLUS] = dropped.get(SURPLUS, 0) + len(self.rows) - asked
        ended = sum(row["whole"] for row in kept)
        return WrittenReport(kind, asked, self.tried, len(kept), ended, dropped, note)

    def _take(self, row: dict[str, Any], why: str) -> bool:
        key = row_key(row)
        why = why or (TWICE if key in self._seen else "")
        if why:
            self._drop(why)
            return False
        self.tried += 1
        self._seen.add(key)
        self.rows.append(row)
        return True

    def _drop(self, why: str) -> None:
        self.tried += 1
        self.dropped[why] += 1

    def _fault(self, text: str, least: int, too_short: str) -> str:
        if len(text) < least:
            return too_short
        if any(control in text for control in self.controls):
            return CONTROL
        if any(marker in text for marker in self.markers):
            return MARKER
        if "\ufffd" in text:
            return BROKEN
        return REPEATS if repeats(text) else ""


def _tidy(written: str, ended: bool) -> str:
    """Without blank edges and, where the limit cut it, without half a character at the end."""
    return (written if ended else written.rstrip("\ufffd")).strip()


def template_markers(template: PromptTemplate) -> list[str]:
    """The lines of a template that no data should hold; short ones only at the start of a line."""
    lines = []
    for half in (template.with_input, template.without_input):
        for text in half.replace("{input}", "{instruction}").split("{instruction}"):
            lines += [line.strip() for line in text.splitlines()]
    marked = [line if len(line) >= 4 else f"\n{line}" for line in lines if line]
    return list(dict.fromkeys(marked))


def head_of(template: PromptTemplate) -> str:
    """What stands before an instruction, without a space at its end; "" where nothing does."""
    head = template.without_input.split("{instruction}", 1)[0].rstrip(" ")
    return head if head.strip() else ""


def instruction_in(written: str, ended: bool, template: PromptTemplate) -> tuple[str, str]:
    """The instruction that a model wrote after the template's head, and what is wrong with it.

    Args:
        written: The continuation.
        ended: Whether the model ended it by itself.
        template: The template, whose next marker ends the instruction; where none comes, the
            first blank line does.

    Returns:
        The text and "", or the text and a reason.
    """
    tail = template.without_input.split("{instruction}", 1)[1]
    ends = [end for end in (tail, tail.rstrip(), *template_markers(template)) if end.strip() or end]
    written = written.lstrip()
    places = [place for place in map(written.find, ends) if place >= 0]
    if not places and not ended:
        places = [written.find("\n\n")]
    if not places:
        return written.strip(), ""
    end = min(places)
    return (written[:end].strip(), "") if end >= 0 else (written.strip(), NOT_ENDED)


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: too few of its n-grams are distinct.

    n is 3 words; where a text has hardly any spaces (Japanese), 6 characters.
    """
    units: list[str] = normalised(text).split()
    size = 3
    if len(units) * 12 < len(text):
        units, size = list("".join(units)), 6
    grams = [tuple(units[at : at + size]) for at in range(len(units) - size + 1)]
    return len(grams) >= 6 and len(set(grams)) < LEAST_DISTINCT * len(grams)
