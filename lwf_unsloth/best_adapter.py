"""Keeps the best adapter of a run: the one that learned most among those that forgot little."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lwf_unsloth.adapters import save_adapter
from lwf_unsloth.backend import prepare
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.scoring import score
from lwf_unsloth.teacher import make_teacher
from lwf_unsloth.whole_files import write_whole, writing

prepare()

from transformers import TrainerCallback  # noqa: E402

logger = logging.getLogger(__name__)

MEASURES = ("kl", "nll")
HISTORY = "history.jsonl"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Reading:
    """Gain and forgetting of the adapter at one step, against the model as it stood at the start.

    All in nats per token.
    """

    step: int
    gain: float
    """Fall of the NLL on the task sets, mean over the sets; above 0 something was learned."""
    forgetting: float
    """Of the general set that fared worst: KL to the start, or rise of the NLL."""
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each set: nll, rise (of the NLL) and kl."""
    kept: bool = False
    """Whether it was better than all before it, so that its adapter was saved."""

    def __str__(self) -> str:
        """One line."""
        mark = ", kept" if self.kept else ""
        return f"step {self.step}: gain {self.gain:+.4f}, forgetting {self.forgetting:+.4f}{mark}"


def is_better(new: Reading, old: Reading | None, budget: float) -> bool:
    """The rule: the largest gain among readings whose forgetting is within the budget; while there
    is none, the smallest forgetting. A reading that is no number is never better.

    Args:
        new: The later reading.
        old: The best so far; None where there is none.
        budget: Most forgetting allowed, nats per token.
    """
    if not (math.isfinite(new.gain) and math.isfinite(new.forgetting)):
        return False
    if old is None:
        return True
    within, was_within = new.forgetting <= budget, old.forgetting <= budget
    if within != was_within:
        return within
    if within:
        return (new.gain, -new.forgetting) > (old.gain, -old.forgetting)
    return (new.forgetting, -new.gain) < (old.forgetting, -old.gain)


class BestAdapter(TrainerCallback):
    """Scores the adapter during the run and saves the best one in a folder of its own.

    Give it to the trainer: `LwFTrainer(..., callbacks=[BestAdapter(model, tokenizer, task=...,
    general=...)])`. It reads at every evaluation and checkpoint (or every `every` steps), and at
    the end of the run.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        task: Any,
        general: Any,
        folder: str | Path = "runs/best",
        budget: float = 0.02,
        forgetting: str = "kl",
        every: int | None = None,
        batch_size: int = 16,
        max_length: int | None = 512,
    ) -> None:
        """Takes the model as it stands now as the start that later readings are compared with.

        Args:
            model: The model to train, before the training (also before a resumed one).
            tokenizer: Its tokenizer.
            task: Held-out rows of the task, or a dict of named sets of them.
            general: Rows of what must be kept, or a dict of named sets; none is trained on.
            folder: Gets `adapter/`, the best adapter so far, and `history.jsonl`, a line a reading.
            budget: Most forgetting that the best adapter may show, nats per token, 0 or more. The
                default is the KL under which hardly any leak was seen.
            forgetting: "kl", KL(start || now), or "nll", the rise of the NLL.
            every: Optimizer steps between two readings; None reads at evaluations and checkpoints.
            batch_size: Rows at a time in a reading.
            max_length: Tokens a row.

        Raises:
            ConfigError: A setting out of range.
            DataError: A set without rows, or the same name twice.
        """
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
            raise ConfigError(f"budget is {budget!r}, but must be a number of 0 or more (nats).")
        if forgetting not in MEASURES:
            raise ConfigError(f"forgetting is {forgetting!r}, but must be one of {MEASURES}.")
        if every is not None and (
            isinstance(every, bool) or not isinstance(every, int) or every < 1
        ):
            raise ConfigError(f"every is {every!r}, but must be None or a whole number from 1.")
        self.task, self.general = _named(task, "task"), _named(general, "general")
        both = self.task.keys() & self.general.keys()
        if both:
            raise DataError(
                f"The sets {sorted(both)} are among task and general: what is learned there could "
                "not be told from what is forgotten. Give them different names."
            )
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        self.budget, self.measure, self.every = float(budget), forgetting, every
        self.settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        self.start = make_teacher(model)
        self.readings: list[Reading] = []
        self.best: Reading | None = None

    @property
    def writes_to(self) -> Path:
        """The folder that a trainer of ours holds for this run."""
        return self.folder

    @property
    def adapter(self) -> Path:
        """Folder of the best adapter so far, for `load_adapter`."""
        return self.folder / ADAPTER

    def __str__(self) -> str:
        """The rule, the readings and which one is kept."""
        what = "KL to the start" if self.measure == "kl" else "rise of NLL"
        rule = f"largest gain with a forgetting ({what}) of at most {self.budget:g} nats a token"
        lines = [f"Rule: {rule}; else the smallest forgetting.", *map(str, self.readings)]
        if self.best is not None:
            within = "within" if self.best.forgetting <= self.budget else "none was within"
            lines.append(f"Best: step {self.best.step}, {within} the budget, in {self.adapter}.")
        return "\n".join(lines)

    # ------------------------------------------------------------------- the events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run goes on with its history; a new one starts a new one."""
        path, self.readings, self.best = self.folder / HISTORY, [], None
        if not state.is_world_process_zero:
            return
        before = _read_history(path, self.measure) if state.global_step > 0 else []
        if not before:
            for left in (path, self.adapter):  # else an earlier run's adapter passed for this one's
                _set_aside(left)
            return
        kept = [reading for reading in before if reading.kept]
        self.best = kept[-1] if kept and self.adapter.is_dir() else None
        # Steps after the checkpoint are taken again, and read again.
        self.readings = [reading for reading in before if reading.step <= state.global_step]
        write_whole(path, "".join(map(self._line, self.readings)).encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads where `every` says so."""
        if self.every is not None and state.global_step % self.every == 0:
            self.read(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads after an evaluation of the trainer."""
        if self.every is None:
            self.read(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads at a checkpoint."""
        if self.every is None:
            self.read(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the final adapter and says which one is kept."""
        self.read(state)
        if state.is_world_process_zero:
            logger.info("%s", self)

    def read(self, state: Any) -> Reading | None:
        """Scores the adapter as it stands and saves it if it is the best so far.

        Args:
            state: The trainer's state: `global_step`, `is_world_process_zero`.

        Returns:
            The reading; None where this step was read already, or on another process.
        """
        step = state.global_step
        if not state.is_world_process_zero or any(r.step == step for r in self.readings[-1:]):
            return None
        found = {**self._scores(self.task), **self._scores(self.general)}
        reading = Reading(
            step,
            gain=-sum(found[name]["rise"] for name in self.task) / len(self.task),
            forgetting=max(
                found[name]["kl" if self.measure == "kl" else "rise"] for name in self.general
            ),
            sets=found,
        )
        again = self.best is not None and self.best.step == step  # the resumed run's own counts
        if again or is_better(reading, self.best, self.budget):
            reading = Reading(**{**asdict(reading), "kept": True})
            card = {"best adapter": {**asdict(reading), "budget": self.budget}}
            save_adapter(self.model, self.tokenizer, self.adapter, card=card)
            self.best = reading
        self.readings.append(reading)
        self._write(reading)
        logger.info("%s", reading)
        return reading

    def _scores(self, sets: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        found = {}
        for name, rows in sets.items():
            one = score(self.model, self.tokenizer, rows, base=self.start, **self.settings)
            found[name] = {"nll": one.nll, "rise": one.rise or 0.0, "kl": one.kl or 0.0}
        return found

    def _write(self, reading: Reading) -> None:
        """Appends a line; a half line of a run that was killed is passed over when read."""
        with (
            writing(self.folder),
            (self.folder / HISTORY).open("a", encoding="utf-8") as file,
        ):
            file.write(self._line(reading))

    def _line(self, reading: Reading) -> str:
        values = {**asdict(reading), "budget": self.budget, "measure": self.measure}
        return f"{json.dumps(values)}\n"


def _named(rows: Any, name: str) -> dict[str, Any]:
    """One set or several, by name.

    Raises:
        DataError: A set has no rows, or there is no set.
    """
    sets = dict(rows) if isinstance(rows, Mapping) else {name: rows}
    empty = [one for one, part in sets.items() if part is None or not len(part)]
    if empty or not sets:
        raise DataError(
            f"The {name} sets {empty} hold no rows, so nothing would be measured on them. Give "
            "held-out rows, as load_alpaca(...)['test']."
        )
    return sets


def _set_aside(path: Path) -> None:
    """Renames what an earlier run left, in the place of what was set aside before."""
    if not path.exists():
        return
    old = path.with_name(f"{path.name}.old")
    if old.is_dir():
        shutil.rmtree(old)
    path.replace(old)


def _read_history(path: Path, measure: str) -> list[Reading]:
    """The readings of a history file, in their order; none where there is no file.

    Those by another measure are left out: their forgetting is no figure to compare with.
    """
    names = {"step", "gain", "forgetting", "sets", "kept"}
    readings = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            values = json.loads(line) if line.strip() else None
        except ValueError:
            continue
        if not isinstance(values, dict) or not names <= values.keys():
            continue
        if values.get("measure", measure) == measure:
            readings.append(Reading(**{name: values[name] for name in names}))
    return readings
