"""Whether an answer keeps to constraints that a program can check, as in IFEval (arXiv 2311.07911).

Prompts and constraints are this project's own (`tasks/instructions.jsonl`, 80 in English and 20 in
Japanese). Checking is strict: the answer as it stands, without blank edges, is judged; an empty one
keeps to nothing.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import DataError

TASKS = Path(__file__).parent / "tasks"
"""Folder of the local tasks: lm-evaluation-harness YAML files and what they read."""

Check = Mapping[str, Any]
"""A constraint: its `kind`, a key of `CHECKS`, and that kind's own settings."""

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?…]+(?=[\"'”’)\]]*(?:\s|$))|[。！？]+")
_BULLET = re.compile(r"^\s*(?:[-*+•]\s+|・\s*)\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*(\d+)[.)．、]\s*\S", re.MULTILINE)
_RULE = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")
_FENCED = re.compile(r"\A```\w*\s*\n(.*?)\n?```\Z", re.DOTALL)
_JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u3005\uff66-\uff9f]")
_ENGLISH = frozenset(
    "a an and are as at be but by can do for from have i in is it like my not of on or so that the "
    "they this to was we will with you your".split()
)
"""Words of which any English text of some length has one."""


def instruction_rows() -> list[dict[str, Any]]:
    """The prompts: `key`, `language` ("en" or "ja"), `prompt` and `checks`."""
    text = (TASKS / "instructions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def score_answer(answer: str, checks: Sequence[Check]) -> list[bool]:
    """Whether an answer keeps to each of its constraints.

    Args:
        answer: The model's text, without a terminator.
        checks: The prompt's constraints.

    Raises:
        DataError: A constraint of an unknown kind.
    """
    return [keeps(answer, check) for check in checks]


def keeps(answer: str, check: Check) -> bool:
    """Whether an answer keeps to one constraint."""
    settings = dict(check)
    kind = settings.pop("kind", None)
    if kind not in CHECKS:
        raise DataError(
            f"A constraint has the kind {kind!r}, which is unknown, so no answer could be judged. "
            f"The kinds: {', '.join(CHECKS)}."
        )
    text = answer.strip()
    return bool(text) and CHECKS[kind](text, **settings)


def _counted(count: Callable[..., int]) -> Callable[..., bool]:
    """A check that a number lies between `min` and `max`, both included, either left out."""

    def check(text: str, min: int | None = None, max: int | None = None, **settings: Any) -> bool:
        found = count(text, **settings)
        return (min is None or found >= min) and (max is None or found <= max)

    return check


def _sentences(text: str) -> int:
    """Parts between full stops, question and exclamation marks that hold a letter or digit."""
    return sum(any(c.isalnum() for c in part) for part in _SENTENCE_END.split(text))


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])


def _lines(text: str) -> int:
    return len([line for line in text.split("\n") if line.strip()])


def _occurrences(text: str, word: str) -> int:
    """Whole words in scripts that part them, case aside; elsewhere the characters."""
    pattern = re.escape(word)
    if word.isascii():
        pattern = rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"
    return len(re.findall(pattern, text, re.IGNORECASE))


def _numbered(text: str, count: int) -> bool:
    """Items numbered 1, 2, ... up to `count`, in this order."""
    found = [unicodedata.normalize("NFKC", n).lstrip("0") for n in _NUMBERED.findall(text)]
    return found == [str(n) for n in range(1, count + 1)]  # as text: int() refuses 4301 digits


def _table(text: str, columns: int, rows: int) -> bool:
    """One markdown table of so many columns, with so many rows below its header."""
    lines = [line.strip() for line in text.split("\n")]
    rules = [i for i, line in enumerate(lines) if "|" in line and _RULE.fullmatch(line)]
    if len(rules) != 1 or rules[0] == 0:
        return False
    at = rules[0]
    body = []
    for line in lines[at + 1 :]:
        if "|" not in line:
            break
        body.append(line)
    cells = [len(re.split(r"(?<!\\)\|", line.strip("|"))) for line in [lines[at - 1], *body]]
    return len(body) == rows and all(number == columns for number in cells)


def _json(text: str, keys: Sequence[str] | None = None, items: int | None = None) -> bool:
    """Nothing but JSON (a code fence around it is fine): an object with just these keys, or a list
    of so many items.
    """
    fenced = _FENCED.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):  # "[[[[..." without end
        return False
    if keys is not None:
        return isinstance(value, dict) and set(value) == set(keys)
    return isinstance(value, list) and len(value) == items


def _case(text: str, case: str) -> bool:
    """All letters lower or upper case, and at least one."""
    return text.islower() if case == "lower" else text.isupper()


def _starts(text: str, words: str | Sequence[str]) -> bool:
    """Begins with the words (or one of several), not with the first letters of a longer word."""
    for start in [words] if isinstance(words, str) else words:
        rest = text[len(start) :]
        longer = start[-1:].isascii() and start[-1:].isalnum() and rest[:1].isalnum()
        if text.startswith(start) and not longer:
            return True
    return False


def _ends(text: str, words: str | Sequence[str]) -> bool:
    """Ends with the words, or with one of several."""
    return text.endswith(words if isinstance(words, str) else tuple(words))


def _options(text: str, options: Sequence[str]) -> bool:
    """Is one of the answers and nothing else; case, quotation marks and a full stop aside."""
    bare = text.strip(" \n.。!！\"'“”「」").lower()
    return bare in {option.lower() for option in options}


def _language(text: str, language: str) -> bool:
    """Japanese: at least 7 of 10 letters are; English: 9 of 10 are ASCII, with English words."""
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return False
    if language == "ja":
        return sum(bool(_JAPANESE.match(c)) for c in letters) >= 0.7 * len(letters)
    words = [word.lower() for word in _WORD.findall(text)]
    ascii_share = sum(c.isascii() for c in letters) / len(letters)
    return ascii_share >= 0.9 and (len(words) < 4 or not _ENGLISH.isdisjoint(words))


def _hiragana(text: str) -> bool:
    """No letter but hiragana (and the long vowel mark)."""
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and all("\u3041" <= c <= "\u309f" or c == "ー" for c in letters)


CHECKS: dict[str, Callable[..., bool]] = {
    "words": _counted(lambda text: len(_WORD.findall(text))),
    "characters": _counted(lambda text: len(re.sub(r"\s", "", text))),
    "sentences": _counted(_sentences),
    "paragraphs": _counted(_paragraphs),
    "lines": _counted(_lines),
    "bullets": _counted(lambda text: len(_BULLET.findall(text))),
    "repeat": _counted(_occurrences),
    "pattern": _counted(lambda text, pattern: len(re.findall(pattern, text, re.MULTILINE))),
    "numbered": _numbered,
    "table": _table,
    "json": _json,
    "include": lambda text, words: all(_occurrences(text, word) for word in words),
    "exclude": lambda text, words: not any(_occurrences(text, word) for word in words),
    "without": lambda text, characters: not any(c in text for c in characters),
    "case": _case,
    "starts": _starts,
    "ends": _ends,
    "options": _options,
    "language": _language,
    "hiragana": _hiragana,
}
"""Kind of constraint -> what judges an answer: `(text, **settings) -> bool`."""
