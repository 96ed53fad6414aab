"""What is wrong with an answer, found in its text, its prompt and why it stopped.

The faults, each of which an answer can have beside others:

- empty: no word in it.
- cut: max_new_tokens ended it, not the model.
- mid_sentence, mid_code: it ends inside a sentence, list item or table row, or inside code.
- repetition: it says a phrase, sentence or line again and again.
- echo: it gives the prompt, or the input, back.
- markers: text of a prompt template, or special tokens, stand in it.
- form: a form that the prompt asks for is not there.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.asked import wishes
from lwf_unsloth.endings import dangling, ends_inside_code
from lwf_unsloth.errors import DataError
from lwf_unsloth.prose import same, size
from lwf_unsloth.repeats import find_repeat

FAULTS: Mapping[str, str] = {
    "empty": "empty",
    "cut": "cut by length",
    "mid_sentence": "cut mid-sentence",
    "mid_code": "cut mid-code",
    "repetition": "repeats itself",
    "echo": "repeats the prompt",
    "markers": "template markers",
    "form": "asked form missing",
}
"""Kind of fault -> its name for a person."""

MARKERS = re.compile(
    r"(?:(?<=\s)|^)#{2,4}[ \t]*(?:Instruction|Input|Response|指示|入力|応答)[ \t]*(?:[:：]|$)|"
    r"^[ \t]*#{2,4}[ \t]*(?:Question|Answer|質問|回答)[ \t]*[:：]|"
    r"<\|[a-zA-Z_]{1,30}\|>|</?(?:start|end)_of_turn>|"
    r"\[/?INST\]|<</?SYS>>|<(?:pad|bos|eos|unk|mask|s|/s)>|<unused\d+>|"
    r"Below is an instruction that describes a task|"
    r"^(?:User|Human|Assistant|AI|ユーザー|アシスタント)[ \t]*[:：]",
    re.M,
)
_SPEAKERS = re.compile(r"\b(?:dialog|conversation|chat|script|interview)|対話|会話|台本", re.I)
_HTML = re.compile(r"\bHTML\b|\btags?\b|タグ", re.I)
_VERSE = re.compile(
    r"\b(?:poems?|songs?|raps?|jingles?|screenplays?|lyrics?|chorus|refrain|haiku|verses?|mantra|chant|repeat)\b|詩|歌|歌詞|俳句|"
    r"繰り返",
    re.I,
)
_GIVEN_BACK = re.compile(
    r"\b(?:repeat|copy|fix|correct|edit|rewrite|proofread|punctuat\w*|format|continue|complete|"
    r"capitali[sz]e|quote|echo|expand|sort|clean|add|insert|divide|split|organi[sz]e|arrange|"
    r"rearrange|reorder|order|begin(?:s|ning)? with|start(?:s|ing)? with)\b|"
    r"校正|直し|修正|続き|繰り返|復唱|訂正|整え|並べ",
    re.I,
)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with an answer."""

    kind: str
    """One of FAULTS."""
    detail: str
    """What was found, in words."""
    span: tuple[int, int] | None = None
    """Where it stands in the answer's text, from and to, where it has a place."""
    form: str = ""
    """Of a missing form, which: "table", "list", "code", "json", "language" or "length"."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with one answer."""

    stop: str | None
    """"eos", "length", or None where only the text is known."""
    faults: tuple[Fault, ...]
    """None where all is well."""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its faults."""
        return frozenset(fault.kind for fault in self.faults)

    def __str__(self) -> str:
        """One line."""
        return "; ".join(f"{FAULTS[one.kind]}: {one.detail}" for one in self.faults) or "no fault"


@dataclass(frozen=True, repr=False)
class Diagnoses(Sequence[Diagnosis]):
    """The diagnosis of each answer of a set, with counts and rates."""

    each: tuple[Diagnosis, ...]

    @overload
    def __getitem__(self, index: int) -> Diagnosis: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Diagnosis]: ...
    def __getitem__(self, index: int | slice) -> Diagnosis | Sequence[Diagnosis]:
        """The diagnosis of an answer, by its place."""
        return self.each[index]

    def __len__(self) -> int:
        """Number of answers."""
        return len(self.each)

    @property
    def counts(self) -> dict[str, int]:
        """Answers that have a fault, by kind, in the order of FAULTS; 0 where none has."""
        return {kind: sum(kind in one.kinds for one in self.each) for kind in FAULTS}

    @property
    def rates(self) -> dict[str, float]:
        """Share of the answers that have a fault, by kind, 0 to 1."""
        return {kind: count / max(len(self), 1) for kind, count in self.counts.items()}

    @property
    def sound(self) -> int:
        """Answers without a fault."""
        return sum(not one.faults for one in self.each)

    def __repr__(self) -> str:
        """Counts in a line."""
        found = [f"{FAULTS[kind]} {count}" for kind, count in self.counts.items() if count]
        return f"{self.sound} of {len(self)} answers without fault" + "".join(
            f", {one}" for one in found
        )

    def to_dict(self) -> dict[str, Any]:
        """Counts, and the faults of each answer, as plain values for JSON."""
        faults = [
            [{"kind": f.kind, "detail": f.detail, "span": f.span} for f in one.faults]
            for one in self.each
        ]
        return {
            "answers": len(self),
            "sound": self.sound,
            "counts": self.counts,
            "faults": faults,
        }


@overload
def diagnose(answer: Generations) -> Diagnoses: ...
@overload
def diagnose(
    answer: Answer | str, prompt: str = "", *, input: str = "", stop: str | None = None
) -> Diagnosis: ...
def diagnose(
    answer: Answer | Generations | str,
    prompt: str = "",
    *,
    input: str = "",
    stop: str | None = None,
) -> Diagnosis | Diagnoses:
    """Finds what is wrong with an answer, or with each of a set.

    Args:
        answer: An answer or a set of them by `generate`, or a text.
        prompt: Of a text, the instruction that it answers; without one neither an echo nor a
            missing form can be seen.
        input: Of a text, the input that came with the instruction.
        stop: Of a text, "eos" or "length"; None where it is not known.

    Returns:
        The diagnosis, or of a set one of each answer.

    Raises:
        DataError: Another type, or another stop.
    """
    if isinstance(answer, Generations):
        return Diagnoses(tuple(diagnose(one) for one in answer))
    if isinstance(answer, str):
        answer = Answer(prompt, answer, stop or "", 0, input)
    if not isinstance(answer, Answer) or answer.stop not in ("", "eos", "length"):
        got = answer.stop if isinstance(answer, Answer) else type(answer).__name__
        raise DataError(
            f"diagnose got {got!r}, but takes an Answer or Generations by generate(), or a text "
            'whose stop is "eos", "length" or None: a cut cannot be told otherwise.'
        )
    return Diagnosis(answer.stop or None, tuple(_faults(answer)))


def _faults(answer: Answer) -> list[Fault]:
    text, cut = answer.text, answer.stop == "length"
    found = [Fault("cut", "max_new_tokens ended it")] if cut else []
    marks = _markers(text, answer.prompt)
    if marks:
        names = ", ".join(dict.fromkeys(m.group().strip() for m in marks))
        found.append(Fault("markers", _short(names), marks[0].span()))
    if not any(character.isalnum() for character in MARKERS.sub("", text)):
        return [Fault("empty", "there is no word in it"), *found]
    if not (marks and marks[-1].end() >= len(text.rstrip()) - _AFTER_MARK):
        found += _ending(text, answer.stop)
    repeat = find_repeat(text, verse=bool(_VERSE.search(answer.prompt)))
    if repeat:
        said = f"{_short(repeat.unit)!r} {repeat.times} times"
        found.append(Fault("repetition", said, (repeat.start, repeat.end)))
    found += _echo(answer)
    for wish in wishes(answer.prompt):
        missing = wish.missing(text, cut)
        if missing:
            found.append(Fault("form", missing, None, wish.form))
    return found


_AFTER_MARK = 12
"""Characters after the last marker that make no sentence, such as the name of a role."""


def _short(text: str, longest: int = 60) -> str:
    """The text in a line, its middle left out where it is long."""
    text = " ".join(text.split())
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _markers(text: str, prompt: str) -> list[re.Match[str]]:
    """Template text in the answer that the prompt did not ask about."""
    found = []
    for match in MARKERS.finditer(text):
        mark = match.group().strip()
        asked = mark.rstrip(":：") in prompt
        asked = asked or (mark in ("<s>", "</s>") and bool(_HTML.search(prompt)))
        asked = asked or (mark[:1] not in "#<[B" and bool(_SPEAKERS.search(prompt)))
        if not asked:
            found.append(match)
    return found


def _ending(text: str, stop: str) -> list[Fault]:
    """Whether the end of the text is inside code or a sentence."""
    inside = ends_inside_code(text, stop)
    if inside is not None:
        return [Fault("mid_code", f"ends with {_short(text[-40:])!r}")] if inside else []
    why = dangling(text, stop)
    return [Fault("mid_sentence", f"{why}, {_short(text[-40:])!r}")] if why else []


def _echo(answer: Answer) -> list[Fault]:
    """Whether the answer begins with its prompt or holds it as a line, or is its input."""
    text, prompt = same(answer.text), same(answer.prompt)
    if size(prompt) < 2.5:
        return []
    if _begins(text, prompt) or prompt in map(same, answer.text.splitlines()):
        where = answer.text.casefold().find(answer.prompt.strip().casefold())
        span = (where, where + len(answer.prompt.strip())) if where >= 0 else None
        return [Fault("echo", "the instruction stands in it", span)]
    given = same(answer.input)
    if size(given) >= 5 and _begins(text, given) and not _GIVEN_BACK.search(answer.prompt):
        return [Fault("echo", "the input is given back")]
    return []


def _begins(text: str, prompt: str) -> bool:
    """Whether the text begins with the prompt as a sentence of its own, up to small changes."""
    bare = prompt.rstrip(" .?!。？！:：")
    head = text[: len(bare)]
    if head != bare:
        ratio = difflib.SequenceMatcher(None, head, bare, autojunk=False).quick_ratio()
        if len(bare) < 30 or len(bare) > 2000 or ratio < 0.97:
            return False
        if difflib.SequenceMatcher(None, head, bare, autojunk=False).ratio() < 0.97:
            return False
    rest = text[len(bare) :].lstrip("\"'”’」")
    return not rest or rest[0] in ".?!。？！:：\n"
