"""The log line that a checkpoint falls into: its sums so far go on in a resumed run.

Else the first line after a resume would be the mean of the steps after it alone.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from lwf_unsloth.backend import prepare
from lwf_unsloth.whole_files import write_whole_text

prepare()

from transformers import TrainerCallback  # noqa: E402


class LogWindow(TrainerCallback):
    """Carries a trainer's meter, and the Trainer's own sums of the loss, over a resume."""

    def __init__(self, trainer: Any) -> None:
        """Takes the trainer, whose sums it reads and sets."""
        self.trainer = trainer
        self._found: dict[str, Any] | None = None

    def _path(self, folder: Path) -> Path:
        """Each process has sums of its own."""
        args = self.trainer.args
        return folder / f"lwf_log-{args.process_index}-of-{args.world_size}.json"

    def save(self, folder: Path) -> None:
        """Writes the sums since the newest log line."""
        trainer = self.trainer
        sums = trainer._meters["train"].sums
        values = {
            "meter": None if sums is None else sums.tolist(),
            "loss": float(trainer._tr_loss),
            "total": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
        }
        write_whole_text(self._path(folder), json.dumps(values) + "\n")

    def load(self, folder: Path) -> None:
        """Reads the sums of a checkpoint; they are set when training begins."""
        try:
            self._found = json.loads(self._path(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # of an earlier version, or of another number of processes
            self._found = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the sums of the run that is resumed; a new run starts empty."""
        found, self._found, trainer = self._found, None, self.trainer
        meter = trainer._meters["train"]
        meter.sums = None
        if found is None or state.global_step == 0:
            return
        loss = float(found["loss"])
        if found["meter"] is not None:
            meter.sums = torch.tensor(found["meter"], dtype=torch.float64, device=args.device)
        if math.isfinite(loss):
            trainer._tr_loss = torch.tensor(loss, device=args.device)
        trainer._total_loss_scalar = float(found["total"])
        trainer._globalstep_last_logged = int(found["logged"])
