"""Where a text says the same again: loops of a few words, and whole sentences or lines."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from lwf_unsloth.prose import CJK, Part, parts, same, sentences, size, tokens

LONGEST_LOOP = 60
"""Tokens of the longest loop looked for; longer ones are found as sentences."""
SHORTEST_LOOP = 12
"""Letters of a loop of short words, all of it: a drawn-out exclamation is none."""
_STUTTER = re.compile(r"([^\W\d_].{0,7}?)\1{9,}", re.S)
_RULERS = set("-=_*~#.|+: ")


@dataclass(frozen=True)
class Repeat:
    """A stretch of text that is said more than once."""

    unit: str
    """What is repeated, once."""
    times: int
    """How often it is said."""
    start: int
    """Where the first one begins."""
    end: int
    """Where the last one ends."""


def find_repeat(text: str, verse: bool = False) -> Repeat | None:
    """The repetition that takes most of the text, or None.

    Args:
        text: Any text. Tables and code are held to laxer rules than prose: equal cells and lines
            are usual there.
        verse: A song or poem: a refrain is no fault, only a loop is.
    """
    found: list[Repeat] = []
    for part in parts(text):
        found += _stutters(part)
        if part.kind != "table":
            found += _loops(part, verse)
        found += _lines(part)
        if part.kind == "prose" and not verse:
            found += _sentences(part)
        if part.kind == "prose" and not verse and not found:
            found += _long_ngrams(part)
    return max(found, key=lambda one: (one.end - one.start, one.times), default=None)


def _stutters(part: Part) -> list[Repeat]:
    """Letters without end, such as hahahaha."""
    matches = _STUTTER.finditer(part.text)
    return [
        Repeat(m[1], len(m[0]) // len(m[1]), part.start + m.start(), part.start + m.end())
        for m in matches
        if len(m[0]) >= 24
    ]


def _loops(part: Part, verse: bool) -> list[Repeat]:
    """N-grams that follow each other directly."""
    marks = tokens(part.text)
    names = [name for name, _, _ in marks]
    found = []
    for period in range(1, min(LONGEST_LOOP, len(names) // 2) + 1):
        run = 0
        for i in range(period, len(names) + 1):
            if i < len(names) and names[i] == names[i - period]:
                run += 1
                continue
            first = i - run - period
            while run and first < i - period and not names[first][0].isalnum():
                first, run = first + 1, run - 1  # a loop begins with a word
            times = run // period + 1
            fewest = 3 if verse else 2
            if times >= fewest and _is_loop(names[first : first + period], times, part.kind):
                unit = part.text[marks[first][1] : marks[first + period - 1][2]]
                start, end = (
                    part.start + marks[first][1],
                    part.start + marks[first + times * period - 1][2],
                )
                found.append(Repeat(unit, times, start, end))
            run = 0
    return found


def _is_loop(unit: list[str], times: int, kind: str) -> bool:
    """Whether so many of this n-gram are too many."""
    if not any(name[0].isalpha() for name in unit):
        return times >= 20 and not set("".join(unit)) <= _RULERS
    if kind == "code":
        return times >= 8 and len(unit) >= 3
    length = size(" ".join(unit))
    if length >= 6:
        return times >= 2
    return times >= (3 if length >= 2 else 5) and times * len("".join(unit)) >= SHORTEST_LOOP


def _lines(part: Part) -> list[Repeat]:
    """Equal lines that follow each other, such as items of a list or rows of a table."""
    least = 6 if part.kind == "code" else 3
    found, run, at = [], 1, part.start
    before, start, end = "", 0, 0
    for line in [*part.text.splitlines(keepends=True), ""]:
        name = same(line)
        if name and name == before:
            run, end = run + 1, at + len(line.rstrip())
        elif name or not line:
            if run >= least and any(character.isalpha() for character in before):
                found.append(Repeat(before, run, start, end))
            run, before, start = 1, name, at
        at += len(line)
    return found


def _sentences(part: Part) -> list[Repeat]:
    """Sentences that come again, also with others between them."""
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for start, end in sentences(part.text):
        places[same(part.text[start:end])].append((start, end))
    found = []
    for name, spans in places.items():
        length = size(name)
        if len(spans) >= 2 and length >= (6 if len(spans) == 2 else 3):
            start, end = part.start + spans[0][0], part.start + spans[-1][1]
            found.append(Repeat(part.text[slice(*spans[0])].strip(), len(spans), start, end))
    return found


def _long_ngrams(part: Part) -> list[Repeat]:
    """N-grams as long as a sentence that come three times or more."""
    marks = tokens(part.text)
    dense = len(re.findall(f"[{CJK}]", part.text)) > len(part.text) / 3
    n = 24 if dense else 14
    grams = [tuple(name for name, _, _ in marks[i : i + n]) for i in range(len(marks) - n + 1)]
    if not grams:
        return []
    gram, times = Counter(grams).most_common(1)[0]
    if times < 3 or not any(name[0].isalpha() for name in gram):
        return []
    first = grams.index(gram)
    last = len(grams) - 1 - grams[::-1].index(gram)
    unit = part.text[marks[first][1] : marks[first + n - 1][2]]
    return [Repeat(unit, times, part.start + marks[first][1], part.start + marks[last + n - 1][2])]
