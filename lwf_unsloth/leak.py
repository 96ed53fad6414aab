"""Leak: general questions answered in the new task's form, e.g. in SQL.

NLL and KL can stand almost still while a tenth of all general answers already come in the wrong
form, so it is counted on written answers. The form is a pattern or a function of the user's, or it
is learned: what many answers of the task share (how they open and end, which words and marks they
hold) and the base model's own answers to general prompts lack.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lwf_unsloth.errors import ConfigError

SHARED = 0.2
"""A sign of the form stands in this share of the task's answers at least ..."""
OPENING = 0.05
"""The same for an opening: a form has a few of them (`def`, `import`, `class`)."""
RARER = 5.0
"""... and is so many times rarer among general answers."""
NEEDED = 8
"""Answers of either kind that a form can be learned from."""
OUTLIERS = 0.02
"""Share of the base's general answers that may be in the form: a prompt may ask for it."""
MOST = 2000
"""Answers of either kind that a form is learned from, evenly spaced: more only cost memory."""
STRONGEST = 3
"""Signs of a kind that count."""
CLOSE = 0.7
"""An answer in the form reaches this share of what the weakest fifth of the task's reaches."""
FOUND = 0.8
"""Share of the task's answers that a learned form must recognise, or there is none to speak of."""

_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u9fff]+|[^\w\s]|_")
_FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)(?:\n?```\s*)?", re.S)
_END = "<end>"
Sign = tuple[str, str]
FormLike = str | re.Pattern[str] | Callable[[str], Any]


@dataclass(frozen=True)
class Form:
    """Recognises answers in a task's form."""

    description: str
    """The form in words, for reports."""
    fires: Callable[[str], bool]
    """Whether an answer is in the form."""
    learned: bool = False
    """Whether it was learned from answers."""
    near: Callable[[str], bool] | None = None
    """Of a learned form, whether an answer opens like it: a prompt that the base answers so asks
    for it, and is no question of leak."""

    def __call__(self, answer: str) -> bool:
        """Whether an answer is in the form."""
        return bool(self.fires(answer))

    def flags(self, answers: Iterable[str]) -> tuple[float, ...]:
        """1 for each answer in the form, else 0."""
        return tuple(float(self(answer)) for answer in answers)

    def leaks(self, answers: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, ...]]:
        """Flags of both models' answers to the same prompts.

        Args:
            answers: "tuned", and "base" where there is one.

        Returns:
            The flags by side. With a learned form, prompts whose base answer opens like it are
            left out.
        """
        base = answers.get("base", ())
        asks = [self.near is not None and self.near(answer) for answer in base]
        kept = [i for i in range(len(answers["tuned"])) if not (asks and asks[i])]
        return {side: self.flags(texts[i] for i in kept) for side, texts in answers.items()}


def given_form(form: FormLike) -> Form:
    """The form that a user gives.

    Args:
        form: A regular expression, searched for anywhere in an answer (begin it with `^` for the
            start, `(?i)` for any case), or a function from an answer to True or False.

    Raises:
        ConfigError: No regular expression and no function.
    """
    if isinstance(form, str):
        try:
            form = re.compile(form)
        except re.error as error:
            raise ConfigError(
                f"leak is {form!r}, which is no regular expression ({error}): it must say what an "
                "answer in the task's form looks like. Escape special characters with a backslash."
            ) from error
    if isinstance(form, re.Pattern):
        pattern = form
        return Form(f"pattern {pattern.pattern}", lambda text: bool(pattern.search(text)))
    if callable(form):
        function = form
        name = getattr(function, "__name__", type(function).__name__)
        return Form(f"function {name}", lambda text: bool(function(text)))
    raise ConfigError(
        f"leak is a {type(form).__name__}, but must be a regular expression, a function from an "
        'answer to True or False, "learned", or None to leave it out.'
    )


def learn_form(task: Sequence[str], general: Sequence[str]) -> Form | None:
    """Learns a task's form.

    Args:
        task: Answers of the task, as its rows give them.
        general: The base model's own answers to general prompts.

    Returns:
        The form, or None where the task's answers share nothing that tells them from general ones
        (as with a task of general instructions), or where there are fewer than 8 of either.
    """
    if min(len(task), len(general)) < NEEDED:
        return None
    task, general = _spaced(task), _spaced(general)
    ours, theirs = ([_signs(text) for text in texts] for texts in (task, general))
    scale = _scale(ours, theirs)
    found = sorted(map(scale.score, ours))
    others = sorted(map(scale.score, theirs), reverse=True)
    low = found[math.floor((1 - FOUND) * len(found))]
    for highest in others[: math.floor(OUTLIERS * len(theirs)) + 1]:
        if low > highest:
            needed = max((low + highest) / 2, CLOSE * low)
            fires = partial(_reaches, scale, needed)
            near = partial(_reaches, scale, 0.0 if scale.must_open else CLOSE * needed)
            return Form(f"learned: {scale}", fires, learned=True, near=near)
    return None


def _spaced(texts: Sequence[str]) -> Sequence[str]:
    """At most `MOST` of the texts, evenly spaced."""
    if len(texts) <= MOST:
        return texts
    return [texts[i * len(texts) // MOST] for i in range(MOST)]


def any_form(forms: Sequence[Form]) -> Form | None:
    """The form that fires where any of them does; None of none."""
    if len(forms) < 2:
        return forms[0] if forms else None
    nears = [form.near for form in forms if form.near is not None]
    return Form(
        "; ".join(form.description for form in forms),
        lambda text: any(form(text) for form in forms),
        all(form.learned for form in forms),
        lambda text: any(near(text) for near in nears),
    )


@dataclass(frozen=True)
class _Scale:
    """How much an answer looks like the task's."""

    weights: dict[Sign, float]
    """Log-odds of each sign of the form."""
    must_open: bool
    """Whether nearly all of the task's answers open with a sign: then an answer has to."""

    def score(self, signs: set[Sign]) -> float:
        """Sum of each kind's strongest few weights, so a short answer scores as a long one does."""
        kinds: dict[str, list[float]] = {}
        for sign in signs & self.weights.keys():
            kinds.setdefault(sign[0], []).append(self.weights[sign])
        if self.must_open and "opens" not in kinds:
            return 0.0
        return math.fsum(sum(sorted(found)[-STRONGEST:]) for found in kinds.values())

    def __str__(self) -> str:
        """The strongest signs, openings first."""
        order = sorted(
            self.weights, key=lambda sign: (sign[0] != "opens", -self.weights[sign], sign)
        )
        return ", ".join(f"{kind} {text!r}" for kind, text in order[:5])


def _reaches(scale: _Scale, needed: float, answer: str) -> bool:
    return scale.score(_signs(answer)) > needed


def _scale(ours: list[set[Sign]], theirs: list[set[Sign]]) -> _Scale:
    """Weighs the signs that many task answers show and few general ones do."""
    task, general = (Counter(sign for signs in side for sign in signs) for side in (ours, theirs))
    weights = {}
    for sign, count in task.items():
        needed = OPENING if sign[0] == "opens" else SHARED
        rate = (count + 0.5) / (len(ours) + 1)
        other = (general[sign] + 0.5) / (len(theirs) + 1)
        if count >= max(2, needed * len(ours)) and rate >= RARER * other:
            weights[sign] = math.log(rate / other)
    opened = sum(any(sign in weights for sign in signs if sign[0] == "opens") for signs in ours)
    return _Scale(weights, opened >= FOUND * len(ours))


def _signs(text: str) -> set[Sign]:
    """How an answer opens and ends, the words, marks and pairs in it, and whether it is JSON."""
    text = unicodedata.normalize("NFKC", text).strip()
    fenced = _FENCE.fullmatch(text)
    text = fenced.group(1).strip() if fenced else text
    tokens = [*_TOKEN.findall(text.casefold()), _END]
    pairs = [" ".join(pair) for pair in zip(tokens, tokens[1:], strict=False)]
    signs: set[Sign] = {("opens", tokens[0]), *(("holds", token) for token in tokens[:-1])}
    signs |= {("holds pair", pair) for pair in pairs}
    if pairs:
        signs |= {("opens with", pairs[0]), ("ends", pairs[-1])}
    kind = _json_kind(text)
    return signs | {("is", kind)} if kind else signs


def _json_kind(text: str) -> str:
    """What JSON the whole text is, "" where it is none."""
    if text[:1] not in ("{", "["):
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return "a JSON object" if isinstance(value, dict) else "a JSON list"
