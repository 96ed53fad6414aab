"""What is known of a training: its rows, its loss curve, its KL, and what was kept."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lwf_unsloth.asked import has_form
from lwf_unsloth.errors import DataError
from lwf_unsloth.records import encode_row
from lwf_unsloth.rows import is_text_row
from lwf_unsloth.templates import text_tokenizer

SHAPES = ("table", "list", "code", "json")
LOOKED_AT = 400
"""Answers, evenly taken from the rows, in which forms are looked for."""
KL_LOGS = 10
"""Logged values that make the KL at the end."""
SETTINGS = (
    "learning_rate num_train_epochs max_steps max_length lwf_lambda rehearsal_ratio "
    "lwf_lambda_schedule lwf_kl_budget lwf_kl lwf_temperature lwf_temperature_schedule"
).split()


@dataclass(frozen=True)
class TrainingFacts:
    """What is known; None or empty where it is not, and then nothing is advised from it."""

    answer_tokens: tuple[int, ...] = ()
    """Length of each task answer in tokens with its EOS, as far as it was trained on."""
    ended: int = 0
    """Task answers, of those, that end in EOS."""
    cut: int = 0
    """Task rows that lost their end at max_length."""
    longest_row: int | None = None
    """Tokens of the longest task row before any cut; None where only cut rows were seen."""
    looked_at: int = 0
    """Task answers in which forms were looked for."""
    shapes: Mapping[str, int] = field(default_factory=dict)
    """Form -> how many of those have it."""
    task_loss: tuple[float, ...] = ()
    """Logged task losses, nats per token, in order."""
    eval_loss: tuple[tuple[float, float], ...] = ()
    """(epoch, held-out task loss) of each evaluation, nats per token."""
    kl: float | None = None
    """KL on rehearsal rows at the end, nats per token; None where there are none: on task rows it
    is what was learned, not what was forgotten."""
    rehearsal_rows: int | None = None
    """Rows in the rehearsal pool."""
    rise: float | None = None
    """How far the NLL of what was to be kept rose over the base's, nats per token."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """SETTINGS of the run."""

    @property
    def ended_share(self) -> float | None:
        """Share of the task answers that end in EOS, 0 to 1."""
        return self.ended / len(self.answer_tokens) if self.answer_tokens else None

    def quantile(self, share: float) -> int | None:
        """Tokens within which this share of the task answers ends."""
        lengths = sorted(self.answer_tokens)
        return lengths[math.ceil(share * len(lengths)) - 1] if lengths else None

    @classmethod
    def of(cls, trainer: Any, *, retention: Any = None) -> "TrainingFacts":
        """The facts of a trainer, before or after its training.

        Args:
            trainer: An `LwFTrainer`.
            retention: A `Score` of rows that were to be kept, as `score(model, tokenizer, rows)`
                gives it.
        """
        tokenizer = text_tokenizer(trainer.processing_class)
        rows = trainer.rows.dataset.select(range(trainer.rows.n_task))
        limit = trainer.args.max_length
        found = _Counted(tokenizer, len(rows))
        for row in rows:
            labels = [label for label in row["labels"] if label != -100]
            ended = labels[-1:] == [tokenizer.eos_token_id]
            found.add(labels, ended, not ended and len(row["input_ids"]) == limit)
        longest = None if found.cut else max(map(len, rows["input_ids"]))
        return cls(
            **found.values(),
            longest_row=longest,
            rehearsal_rows=trainer.rows.n_rehearsal,
            **_curves(trainer.state.log_history),
            **_kept(retention),
            settings=_settings(trainer.args),
        )

    @classmethod
    def of_rows(
        cls,
        tokenizer: Any,
        rows: Iterable[Mapping[str, Any]],
        config: Any = None,
        *,
        log_history: Iterable[Mapping[str, Any]] = (),
        retention: Any = None,
    ) -> "TrainingFacts":
        """The facts of raw task rows, also before a trainer is there.

        Args:
            tokenizer: The tokenizer, with its template.
            rows: Alpaca or text rows.
            config: The run's `LwFConfig`, for its lengths and rates.
            log_history: `trainer.state.log_history`, or that list of a trainer_state.json.
            retention: A `Score` of rows that were to be kept.

        Raises:
            DataError: There are no rows.
        """
        rows = list(rows)
        if not rows:
            raise DataError("There are no rows to take facts from: give the task rows.")
        limit, longest = getattr(config, "max_length", None), 0
        found = _Counted(text_tokenizer(tokenizer), len(rows))
        for row in rows:
            encoded = encode_row(tokenizer, row, max_length=None)
            size = len(encoded.input_ids)
            longest = max(longest, size)
            cut = limit is not None and size > limit
            text = row["text"] if is_text_row(row) else row["output"]
            labels = [label for label in encoded.labels if label != -100]
            found.add(labels, not cut and not encoded.cut, cut, text)
        return cls(
            **found.values(),
            longest_row=longest,
            **_curves(log_history),
            **_kept(retention),
            settings=_settings(config),
        )


class _Counted:
    """Counts over task rows, one by one."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self._tokenizer, self._step = tokenizer, max(1, rows // LOOKED_AT)
        self._lengths: list[int] = []
        self._shapes = dict.fromkeys(SHAPES, 0)
        self.looked_at = self.ended = self.cut = 0

    def add(self, labels: list[int], ended: bool, cut: bool, text: str | None = None) -> None:
        """A row; of some the text is looked at, decoded where it is not given."""
        if len(self._lengths) % self._step == 0:
            if text is None:
                text = self._tokenizer.decode(labels, skip_special_tokens=True)
            self.looked_at += 1
            for shape in SHAPES:
                self._shapes[shape] += has_form(shape, text)
        self._lengths.append(len(labels))
        self.ended += ended
        self.cut += cut

    def values(self) -> dict[str, Any]:
        """The counts by the names of the fields."""
        return {
            "answer_tokens": tuple(self._lengths),
            "ended": self.ended,
            "cut": self.cut,
            "looked_at": self.looked_at,
            "shapes": self._shapes,
        }


def _curves(log_history: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Losses and KL from what the Trainer logged."""
    logs = list(log_history)
    kl = [entry["kl_rehearsal"] for entry in logs if "kl_rehearsal" in entry][-KL_LOGS:]
    evals = [
        (float(entry["epoch"]), entry["eval_task_loss"])
        for entry in logs
        if "eval_task_loss" in entry and "epoch" in entry
    ]
    return {
        "task_loss": tuple(entry["task_loss"] for entry in logs if "task_loss" in entry),
        "eval_loss": tuple(evals),
        "kl": sum(kl) / len(kl) if kl else None,
    }


def _kept(retention: Any) -> dict[str, Any]:
    return {} if retention is None else {"rise": retention.rise}


def _settings(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
