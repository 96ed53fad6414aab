"""What the trainer measures: evaluation weighted by tokens, and both terms in every log line."""

from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.backend import prepare
from lwf_unsloth.batches import without_repeats
from lwf_unsloth.errors import DataError
from lwf_unsloth.meters import Meter

prepare()

from transformers import Trainer  # noqa: E402


class Measured(Trainer):
    """Evaluation and log of `LwFTrainer`, which sets what is used here."""

    plain: bool
    """Whether it is the SFTTrainer exactly."""
    strength: Any
    """Its `Strength`."""
    curriculum: Any
    """Its `Curriculum`."""
    _meters: dict[str, Meter]
    _drawn: int
    """Rows that the sampler draws in an epoch."""

    def _rank_batch(self, batch: int) -> int:
        """Rows of a process's forward, of a data loader's batch size."""
        split = self.args.accelerator_config.split_batches
        return batch // self.accelerator.num_processes if split else batch

    def _counted_once(
        self, inputs: dict[str, Any], batch: int, drawn: int | None = None
    ) -> dict[str, Any]:
        """The newest forward without the terms of rows that fill it up; see `without_repeats`.

        Args:
            inputs: What `LwFCollator` gave; not changed.
            batch: The data loader's batch size.
            drawn: Rows of the whole epoch; None takes those of the data set.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader:
            return inputs
        batch = self._rank_batch(batch)
        left = state.remainder if drawn is None else drawn % (batch * processes)
        own = left - batch * self.accelerator.process_index
        return without_repeats(inputs, own) if left > 0 else inputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One evaluation batch; logits only where a metric needs them."""
        once = self._counted_once(inputs, self.args.eval_batch_size)
        if self.plain:
            inputs = {**inputs, "labels": once["labels"]}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(once)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss, outputs["logits"], inputs["labels"]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """As TRL's; `task_loss` and `kl` are weighted by tokens, `loss` is the task loss."""
        if eval_dataset is None and self.eval_dataset is None:
            raise DataError(
                "There is no eval_dataset, neither here nor when the trainer was made: nothing "
                "could be evaluated. Give load_alpaca(...)['test']."
            )
        self._eval_prefix = metric_key_prefix
        self._meters["eval"] = Meter()  # what predict, or an evaluation that was cut off, has left
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds task_loss, kl, kl_task and kl_rehearsal, in nats per token, to what the Trainer
        logs.
        """
        prefix = getattr(self, "_eval_prefix", "eval")
        if f"{prefix}_loss" in logs and not self.plain:
            found = self._meters["eval"].take(self.accelerator)
            logs[f"{prefix}_loss"] = found["task_loss"]
            logs.update(
                {f"{prefix}_{name}": found[name] for name in ("task_loss", "kl") if name in found}
            )
        elif "loss" in logs:
            logs.update(self._meters["train"].take(self.accelerator) or {"task_loss": logs["loss"]})
            logs.update({**self.strength.logged(), **self.curriculum.logged()})
        super().log(logs, start_time)
