"""Lambda and temperature of the step: constant, by a schedule, or moved by a KL budget."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from lwf_unsloth.backend import prepare
from lwf_unsloth.batches import Roles
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.kl_budget import KLBudget
from lwf_unsloth.losses import LwfLoss
from lwf_unsloth.schedules import Schedule, schedules_of

prepare()

from transformers import TrainerCallback  # noqa: E402

logger = logging.getLogger(__name__)

STATE_FILE = "lwf_budget.json"


class Strength(TrainerCallback):
    """How strongly the teacher pulls at each step; the same after a resume."""

    def __init__(self, args: LwFConfig, accelerator: Any) -> None:
        """Reads the settings.

        Args:
            args: The run's settings.
            accelerator: Sums over all ranks, so that every rank has the same lambda.
        """
        self.args = args
        self.budget = KLBudget.of(args)
        self.accelerator = accelerator
        self._sums: Tensor | None = None  # (2,) KL in nats, tokens
        self._used: tuple[float, float] | None = None

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Lambda's and the temperature's, as the settings are now."""
        return schedules_of(self.args)

    def at(self, state: Any) -> tuple[float, float]:
        """Lambda and temperature of the step that follows `state.global_step`."""
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        strength, temperature = (one(progress) for one in self.schedules)
        return float(strength if self.budget is None else self.budget.value), float(temperature)

    def add(self, loss: LwfLoss, roles: Roles, used: tuple[float, float]) -> None:
        """Takes a micro-batch of training; nothing is moved off the device.

        Args:
            loss: Its result.
            roles: Its roles.
            used: The lambda and temperature that it was taken with.
        """
        self._used = used
        if self.budget is None:
            return
        tokens = roles.counts[2:].sum().to(loss.kl_group_sums.device)
        found = loss.kl_group_sums.sum().detach().double()
        sums = found.new_tensor([0.0, 0.0])
        sums[0], sums[1] = found, tokens
        self._sums = sums if self._sums is None else self._sums + sums

    def logged(self) -> dict[str, float]:
        """What moves, at its newest value, for the log."""
        if self._used is None:
            return {}
        strength, temperature = self.schedules
        names = {"lwf_lambda": self.budget is not None or not strength.constant}
        names["lwf_temperature"] = not temperature.constant
        return {name: self._used[i] for i, (name, moves) in enumerate(names.items()) if moves}

    # ------------------------------------------------------------------ the events

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves lambda by the KL of the whole step, over all ranks."""
        if self.budget is None or self._sums is None:
            return
        sums, self._sums = self._sums, None
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)
        kl, tokens = sums.tolist()
        if tokens:
            self.budget.step(kl / tokens)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what the budget came to, once."""
        if self.budget is None or not state.is_world_process_zero:
            return
        level = logging.INFO if self.budget.met or not self.budget.steps else logging.WARNING
        logger.log(level, "%s", self.budget)

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """Writes the controller's state beside the adapter."""
        if self.budget is not None:
            text = json.dumps(self.budget.state())
            (folder / STATE_FILE).write_text(text, encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Takes the controller's state of the run that is resumed; says so where it has none."""
        if self.budget is None:
            return
        path = folder / STATE_FILE
        if not path.is_file():
            logger.warning(
                "%s comes from a run without lwf_kl_budget: lambda begins at lwf_lambda=%g.",
                folder.name,
                self.budget.value,
            )
            return
        self.budget.restore(json.loads(path.read_text(encoding="utf-8")))
