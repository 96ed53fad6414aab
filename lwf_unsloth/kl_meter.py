"""How far the run has moved from its teacher: both KL terms over the steps, and what they mean."""

import html
import logging
import math
from typing import Any

from lwf_unsloth.backend import prepare
from lwf_unsloth.config import LwFConfig

prepare()

from transformers import TrainerCallback  # noqa: E402

logger = logging.getLogger(__name__)

WINDOW = 10
"""Logged values that are smoothed: the mean of the last ten."""
TERMS = {"kl_rehearsal": "rehearsal rows", "kl_task": "task rows"}
"""Name in the log -> where it is measured, the one that decides first."""
LEVELS = (
    (0.02, "up to .02 went with a leak of at most 1.5 % and a change of NLL of at most .011"),
    (0.04, "between .02 and .04 lies between what was seen to leak and what was not: evaluate it"),
    (0.08, "from .04 to .08 went with a leak of 10 to 22 %, even where the NLL stood still"),
    (math.inf, "above .08 is on the way to plain fine-tuning, which was at .12 to 1.0 and leaked"),
)
"""Upper end of a KL in nats a token -> what went with it (167 adapters of SmolLM2-135M-Instruct and
gemma-3-270m taught text-to-SQL; leak: general prompts answered in the task's form)."""


class KLMeter(TrainerCallback):
    """Follows `kl_rehearsal` and `kl_task` of the log, in nats per token.

    It can end the run when the smoothed KL on rehearsal rows (on task rows where there are none)
    is above a limit. A resumed run goes on with the values of the log that it resumes.
    """

    def __init__(self, stop_at: float | None = None, unknown: str = "") -> None:
        """Starts empty.

        Args:
            stop_at: Smoothed KL above which the run ends with a checkpoint; None never.
            unknown: Setting for which no level was measured ("lwf_kl='reverse'"), if any.
        """
        self.stop_at = stop_at
        self.unknown = unknown
        self.values: dict[str, list[tuple[int, float]]] = {name: [] for name in TERMS}
        self.stopped = ""
        """Why the run was ended by it, or empty."""
        self._awaits = ""

    @classmethod
    def of(cls, args: LwFConfig) -> "KLMeter":
        """The meter of a run's settings."""
        unknown = f"lwf_temperature={args.lwf_temperature:g}" * (args.lwf_temperature != 1)
        moves = args.lwf_temperature_schedule != "constant"
        unknown = f"lwf_temperature_schedule={args.lwf_temperature_schedule!r}" * moves or unknown
        unknown = unknown or f"lwf_kl={args.lwf_kl!r}" * (args.lwf_kl != "forward")
        return cls(args.lwf_stop_at_kl, unknown)

    # ------------------------------------------------------------------ the figures

    @property
    def term(self) -> str:
        """The term that decides: "kl_rehearsal" where there is one, else "kl_task"; "" without."""
        return next((name for name in TERMS if self.values[name]), "")

    def last(self, name: str) -> float:
        """The newest value."""
        return self.values[name][-1][1]

    def smoothed(self, name: str) -> float:
        """The mean of the last `WINDOW` values."""
        newest = [value for _, value in self.values[name][-WINDOW:]]
        return math.fsum(newest) / len(newest)

    def max(self, name: str) -> float:
        """The largest value so far."""
        return max(value for _, value in self.values[name])

    def to_dict(self) -> dict[str, Any]:
        """The figures and the verdict as plain values, for reports."""
        found = {
            name: {
                "last": self.last(name),
                "smoothed": self.smoothed(name),
                "max": self.max(name),
                "step": self.values[name][-1][0],
            }
            for name in TERMS
            if self.values[name]
        }
        limits = {"window": WINDOW, "stop_at": self.stop_at, "stopped": self.stopped}
        return {**found, **limits, "unit": "nats per token", "verdict": self.verdict()}

    def verdict(self) -> str:
        """What the smoothed KL means, in words."""
        name = self.term
        if not name:
            return "No KL has been measured yet."
        kl = self.smoothed(name)
        begin = f"KL {kl:.3g} nats a token on {TERMS[name]}"
        if name == "kl_task":
            return (
                f"{begin}: on the new task it is what was learned, not what was forgotten. "
                "Rehearsal rows, or general rows in an evaluation, tell that."
            )
        if self.unknown:
            return f"{begin}: with {self.unknown} no level is known that went with forgetting."
        meant = next(meaning for limit, meaning in LEVELS if kl < limit or limit == math.inf)
        return (
            f"{begin}: on the two small models measured, {meant} (there on held-out prompts; rows "
            "that are trained on read lower)."
        )

    def __str__(self) -> str:
        """A line for each term, then the verdict."""
        lines = [
            f"{name}: {self.smoothed(name):.4f} (mean of the last {WINDOW}), last "
            f"{self.last(name):.4f}, largest {self.max(name):.4f}, step {self.values[name][-1][0]}"
            for name in TERMS
            if self.values[name]
        ]
        return "\n".join([*lines, self.verdict(), *([self.stopped] if self.stopped else [])])

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        head = "".join(
            f"<th>{text}</th>"
            for text in ("nats per token", f"mean of {WINDOW}", "last", "largest")
        )
        rows = "".join(
            f"<tr><td>KL on {where}</td><td>{self.smoothed(name):.4f}</td>"
            f"<td>{self.last(name):.4f}</td><td>{self.max(name):.4f}</td></tr>"
            for name, where in TERMS.items()
            if self.values[name]
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" * bool(rows)
        words = [self.verdict(), *([self.stopped] if self.stopped else [])]
        return table + "".join(f"<p>{html.escape(text)}</p>" for text in words)

    # ------------------------------------------------------------------- the events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the log of the run that is resumed; a new run starts empty."""
        self.values, self.stopped = {name: [] for name in TERMS}, ""
        self._awaits = "kl_rehearsal" * _rehearses(kwargs.get("train_dataloader"))
        for entry in state.log_history:
            self._add(entry.get("step", 0), entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes the newest values, and ends the run where the limit says so."""
        if not self._add(state.global_step, logs or {}) or self.stop_at is None or self.stopped:
            return
        name = self._awaits or self.term  # task rows do not decide before the first rehearsal row
        if len(self.values[name]) < WINDOW or self.smoothed(name) <= self.stop_at:
            return
        self.stopped = (
            f"Ended at step {state.global_step} of {state.max_steps}: the KL on {TERMS[name]}, "
            f"mean of the last {WINDOW} logged values, is {self.smoothed(name):.4f} nats a token, "
            f"above lwf_stop_at_kl={self.stop_at:g}. The checkpoint holds the model as it is now. "
            "To go on, raise the limit or lwf_lambda, or lower learning_rate."
        )
        control.should_training_stop = control.should_save = True
        if state.is_world_process_zero:
            logger.warning("%s", self.stopped)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what it came to, once."""
        if self.term and state.is_world_process_zero:
            logger.info("%s", self)

    def _add(self, step: int, logs: dict[str, Any]) -> bool:
        """Takes the finite values of a log line; whether there was one."""
        found = [name for name in TERMS if math.isfinite(logs.get(name, math.nan))]
        for name in found:
            self.values[name].append((step, float(logs[name])))
        return bool(found)


def _rehearses(loader: Any) -> bool:
    """Whether a run's rows end with rehearsal rows, as the trainer joins them."""
    rows: Any = getattr(loader, "dataset", None)
    if "is_rehearsal" not in (getattr(rows, "column_names", None) or ()):
        return False
    return bool(rows[len(rows) - 1]["is_rehearsal"])
