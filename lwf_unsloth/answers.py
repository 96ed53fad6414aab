"""Answers as data: what was asked, what came, why it stopped, which weights and settings did it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from lwf_unsloth.decoding import Decoding


@dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    prompt: str
    """The instruction as asked."""
    text: str
    """What the model wrote, up to its terminator; other special tokens are shown, not hidden."""
    stop: str
    """"eos": the model ended it; "length": max_new_tokens ended it, the text is cut."""
    tokens: int
    """Length of the answer in tokens, without the terminator."""
    input: str = ""
    """The input that came with the instruction, if any."""
    prefix: str = ""
    """What the answer had to begin with, by its form; it is part of `text` and `tokens`."""


@dataclass(frozen=True, repr=False)
class Generations(Sequence[Answer]):
    """Answers with all that is needed to compare them honestly with others."""

    answers: tuple[Answer, ...]
    settings: Decoding
    label: str = ""
    """A name given by the caller ("before", "lambda 2"), or empty."""
    model: str = ""
    """The model that answered."""
    weights: str = "base"
    """"base", or a fingerprint of the adapter that was on: equal fingerprints are equal weights."""
    adapter: str = "none"
    """"none", "off", "untrained" (on, but it changes nothing yet) or "on"."""
    template: str = ""
    """Name of the prompt template."""

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Answer]: ...
    def __getitem__(self, index: int | slice) -> Answer | Sequence[Answer]:
        """The answer to a prompt, by its place in the list of prompts."""
        return self.answers[index]

    def __len__(self) -> int:
        """Number of answers."""
        return len(self.answers)

    @property
    def eos_rate(self) -> float:
        """Share of the answers that the model ended by itself, 0 to 1."""
        return sum(answer.stop == "eos" for answer in self.answers) / len(self.answers)

    @property
    def mean_tokens(self) -> float:
        """Mean length of an answer in tokens."""
        return sum(answer.tokens for answer in self.answers) / len(self.answers)

    @property
    def source(self) -> str:
        """Which weights answered, in words."""
        if self.adapter == "on":
            return f"adapter {self.weights[:8]}"
        return {"none": "no adapter", "off": "adapter off", "untrained": "untrained adapter"}[
            self.adapter
        ]

    def __repr__(self) -> str:
        """Figures and settings in a line; the answers themselves are in a comparison's table."""
        return (
            f"Generations({self.label or self.source}: {len(self)} answers, EOS rate "
            f"{self.eos_rate:.0%}, mean {self.mean_tokens:.0f} tokens; {self.settings})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; `from_dict` reads it back."""
        return {
            "label": self.label,
            "model": self.model,
            "adapter": self.adapter,
            "weights": self.weights,
            "template": self.template,
            "settings": self.settings.to_dict(),
            "eos_rate": self.eos_rate,
            "mean_tokens": self.mean_tokens,
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Generations":
        """The object that `to_dict` gave."""
        names = ("label", "model", "adapter", "weights", "template")
        return cls(
            answers=tuple(Answer(**answer) for answer in values["answers"]),
            settings=Decoding(**values["settings"]),
            **{name: values[name] for name in names},
        )
