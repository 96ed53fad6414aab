"""How long a prompt asks its answer to be, and how far an answer is from it."""

import re
from dataclasses import dataclass

from lwf_unsloth.prose import letters, parts, sentences, words

_WORDS = {
    word: n
    for n, word in enumerate(
        "one two three four five six seven eight nine ten eleven twelve".split(), start=1
    )
} | {"a": 1, "a single": 1, "fifty": 50, "a hundred": 100, "one hundred": 100}
_N = (
    r"(\d{1,4}|a single|a hundred|one hundred|"
    + "|".join(word for word in _WORDS if " " not in word and word != "a")
    + ")"
)
_KANJI = {kanji: n for n, kanji in enumerate("一二三四五六七八九", start=1)}
_JN = r"([0-9０-９]{1,4}|[一二三四五六七八九十百]{1,5})"
_UNIT = r"[- ](word|sentence|paragraph|line|character)s?\b"
_KINDS = (
    (
        "max",
        rf"\b(?:at most|no more than|not more than|up to|under|less than|fewer than|within|"
        rf"(?:a )?maximum of) {_N}{_UNIT}",
    ),
    ("max", rf"{_N}{_UNIT},? (?:or less|or fewer|at most|maximum|max)\b"),
    ("min", rf"\b(?:at least|(?:a )?minimum of|no fewer than|more than|over) {_N}{_UNIT}"),
    ("min", rf"{_N}{_UNIT} or more\b"),
    ("about", rf"\b(?:about|around|approximately|roughly) {_N}{_UNIT}"),
    (
        "exact",
        rf"\b(?:in|using|with|exactly)(?: exactly| just| only)? "
        rf"(?!(?<=with )\w+ character){_N}{_UNIT}(?! (?:on|in) the\b)",
    ),
    (
        "exact",
        r"\b(?:write|give|compose|as) (?:me )?(?:a |an |exactly )?(\d{1,4}|"
        + "|".join(w for w in _WORDS if " " not in w)
        + r")[- ](sentence|paragraph|line)s?\b"
        r"(?! \w* ?(?:command|script|program|function|solution|regex|code))",
    ),
    (
        "exact",
        r"\b(\d{1,4}|one|two|three|four|five|six|fifty)-(word|sentence|paragraph|line)\b"
        r"(?! \w* ?(?:command|script|program|function|solution|regex|code))",
    ),
)
_RANGE = re.compile(
    rf"{_N}(?: ?[-–] ?| to | or ){_N} (word|sentence|paragraph|line|character)s?\b", re.I
)
_J_UNITS = {
    "文字": "character",
    "字": "character",
    "文": "sentence",
    "行": "line",
    "段落": "paragraph",
}
_JAPANESE = re.compile(
    rf"{_JN}(文字|字|文(?!字|章)|行|段落)(以内|以下|未満|まで|以上|程度|前後|くらい|ぐらい|ほど|で)"
)
_J_KINDS = {
    "以内": "max",
    "以下": "max",
    "未満": "max",
    "まで": "max",
    "以上": "min",
    "で": "exact",
}


_OF_EACH = re.compile(r"\beach\b[^.!?\n]{0,30}$", re.I)
"""Before a length that is asked of every part, so that the whole answer is longer."""


@dataclass(frozen=True)
class Length:
    """A length that was asked for: from `low` to `high` units."""

    unit: str
    """"word", "sentence", "paragraph", "line" or "character"."""
    low: float
    high: float
    asked: str
    """As the prompt says it."""

    def missing(self, text: str, cut: bool) -> str:
        """How the answer misses it, in words; a cut answer may be too short. "" where it fits."""
        found = measure(text, self.unit)
        if found > self.high or (found < self.low and not cut):
            return f'{found} {self.unit}{"s" * (found != 1)} where "{self.asked}" was asked for'
        return ""


def measure(text: str, unit: str) -> int:
    """Length of a text in a unit; sentences are counted in its prose."""
    if unit == "word":
        return words(text)
    if unit == "character":
        return letters(text)
    if unit == "line":
        return sum(bool(line.strip()) for line in text.splitlines())
    if unit == "paragraph":
        return sum(bool(block.strip()) for block in re.split(r"\n\s*\n", text))
    prose = (part.text for part in parts(text) if part.kind == "prose")
    return sum(len(sentences(one)) for one in prose)


def asked_lengths(prompt: str) -> list[Length]:
    """The lengths that a prompt asks for; of several of one unit the first."""
    found: dict[str, Length] = {}
    for match in _RANGE.finditer(prompt):
        low, high = _number(match[1]), _number(match[2])
        found.setdefault(match[3].lower(), _length(match[3], low, high, match[0]))
    for kind, pattern in _KINDS:
        for match in re.finditer(pattern, prompt, re.I):
            if kind == "exact" and _OF_EACH.search(prompt[: match.start()]):
                continue
            number, unit = _number(match[1]), match[2].lower()
            found.setdefault(unit, _of_kind(kind, number, unit, match[0]))
    for match in _JAPANESE.finditer(prompt):
        unit = _J_UNITS[match[2]]
        kind = _J_KINDS.get(match[3], "about")
        found.setdefault(unit, _of_kind(kind, _number(match[1]), unit, match[0]))
    if re.search(r"\b(?:in|as) (?:a|one|a single) paragraph\b", prompt, re.I):
        found.setdefault("paragraph", Length("paragraph", 1, 1, "one paragraph"))
    if "一言で" in prompt or "ひとことで" in prompt:
        found.setdefault("character", Length("character", 1, 30, "一言で"))
    return list(found.values())


def _of_kind(kind: str, number: int, unit: str, asked: str) -> Length:
    """The range that a bound allows; words and characters get a little room."""
    if kind == "max":
        return _length(unit, 0, number, asked)
    if kind == "min":
        return _length(unit, number, 10**9, asked)
    if kind == "about":
        return Length(unit, 0.6 * number, max(1.4 * number, number + 1), asked)
    loose = unit in ("word", "character") and number >= 5
    room = 0.25 * number if loose else 0
    return Length(unit, number - room, number + room, asked)


def _length(unit: str, low: int, high: int, asked: str) -> Length:
    room = 0.05 if unit.lower() in ("word", "character") else 0.0
    return Length(unit.lower(), low * (1 - room), high * (1 + room), asked)


def _number(text: str) -> int:
    """A number in digits (also wide ones), English or Japanese words."""
    text = text.lower()
    if text.isdigit():
        return int(text)
    if text in _WORDS:
        return _WORDS[text]
    total, last = 0, 0
    for kanji in text:
        if kanji in _KANJI:
            last = _KANJI[kanji]
        else:
            total += max(last, 1) * (10 if kanji == "十" else 100)
            last = 0
    return total + last
