"""Steps whose gradient is not finite: skipped, told with their rows, and the end of a run of
nothing else.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lwf_unsloth.adapters import save_adapter
from lwf_unsloth.errors import LwfError, ModelError
from lwf_unsloth.templates import get_template

logger = logging.getLogger(__name__)

LAST_GOOD = "last_good"
"""In output_dir: the adapter of a run that ended for want of a finite gradient."""
SHOWN = 8
"""Rows of a step that are named."""
WORDS = 60
"""Characters of a row that are shown."""
TOLD = 8
"""Skipped steps that are each told; after them only every one that doubles their number."""


@dataclass
class _Step:
    """One optimizer step: its micro-batches and their losses."""

    number: int = 0
    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    bad: Tensor | None = None
    """Whether a gradient is not finite, on the CPU once `event` has come."""
    event: Any = None


class FiniteSteps(TrainerCallback):
    """Keeps NaN out of the adapter: one such step would make every later one NaN, and be saved.

    On a GPU nothing waits for the check: the fused optimizer (or the GradScaler) passes over the
    step there, and the answer is read with the next step, when the Trainer has waited anyway.
    """

    def __init__(self, most: int, rows: Any, n_task: int, tokenizer: Any, folder: str) -> None:
        """Starts without a skipped step.

        Args:
            most: Such steps in a row that end the run.
            rows: The encoded rows, task rows first.
            n_task: How many are task rows.
            tokenizer: The one that encoded them.
            folder: Where the last good adapter goes when the run ends.
        """
        self.most, self.folder = most, Path(folder)
        self.rows, self.n_task, self.tokenizer = rows, n_task, tokenizer
        self.in_a_row = self.skipped = 0
        self.late: bool | None = None
        """Whether the answer is read with the next step; None decides by device and optimizer."""
        self._now, self._before = _Step(), _Step()
        self._marked: Any = None

    # ------------------------------------------------------------------ what the trainer tells

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Takes a micro-batch before its forward; it is kept until its step is checked."""
        self._now.inputs.append(inputs)

    def end(self, loss: Tensor) -> None:
        """Takes its loss; nothing is moved off the device."""
        self._now.losses.append(loss.detach())

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and tokens of the newest micro-batch."""
        newest = self._now.inputs or self._before.inputs
        if not newest:
            return None
        rows, tokens = newest[-1]["input_ids"].shape
        return int(rows), int(tokens)

    # ------------------------------------------------------------------ the events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets what an earlier run has left."""
        self._now, self._before, self.in_a_row = _Step(), _Step(), 0

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Drops gradients that are not finite, so that the optimizer leaves its state alone.

        Raises:
            ModelError: `most` steps in a row.
        """
        self._settle(model, state)
        step, self._now = self._now, _Step()
        step.number = state.global_step + 1
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not grads:
            return
        bad = ~torch.stack(torch._foreach_norm(grads)).isfinite().all()
        inner = getattr(optimizer, "optimizer", optimizer)
        late = (bad.is_cuda and (args.fp16 or _skips(inner))) if self.late is None else self.late
        if late:
            if not args.fp16:
                inner.found_inf, self._marked = bad.float(), inner
            step.bad, step.event = _on_its_way(bad)
            self._before = step
            return
        step.bad = bad.cpu()
        self._before = step
        if bool(step.bad) and not args.fp16:  # the GradScaler skips the step, and must see why
            for parameter in model.parameters():
                parameter.grad = None
        self._settle(model, state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the mark off the optimizer."""
        if self._marked is not None:
            del self._marked.found_inf
            self._marked = None

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        """Reads the newest answer: the checkpoint has waited for the device."""
        self._settle(model, state)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any
    ) -> None:
        """Reads the last answer; says how many steps were skipped, once."""
        self._settle(model, state)
        if self.skipped and state.is_world_process_zero:
            logger.warning("%d steps had a gradient that is not finite.", self.skipped)

    # ------------------------------------------------------------------ the answer

    def _settle(self, model: Any, state: Any) -> None:
        """Counts the step that was checked last.

        Raises:
            ModelError: It was the last of `most` in a row.
        """
        step, self._before = self._before, _Step()
        if step.bad is None:
            return
        if step.event is not None:
            step.event.synchronize()
        if not bool(step.bad):
            self.in_a_row = 0
            return
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        last, count = self.in_a_row >= self.most, self.skipped
        told = last or count <= TOLD or count & (count - 1) == 0
        if not told:
            return
        rows = self._named(step)
        logger.warning(
            "Step %d has a gradient that is not finite: it is skipped (%d so far%s). Its rows: %s.",
            *(step.number, count, _then(count), rows),
        )
        if not last:
            return
        raise ModelError(
            f"The gradient was not finite in {self.most} steps in a row, up to step {step.number}: "
            f"nothing more is learned. The last one's rows: {rows}. {self._keep(model, state)} "
            "Look at these rows, lower learning_rate, or take bf16 or float32 where this was fp16; "
            "then resume from the newest checkpoint. lwf_max_bad_steps says how many such steps "
            "end a run."
        )

    def _keep(self, model: Any, state: Any) -> str:
        """Saves the adapter as it was before these steps, which have left it alone."""
        folder = self.folder / LAST_GOOD
        if not state.is_world_process_zero:
            return "The adapter is as it was before them."
        card = {"adapter": "as it was when no gradient was finite any more"}
        try:
            save_adapter(model, self.tokenizer, folder, card=card)
        except (LwfError, OSError) as error:
            return f"The adapter is as it was before them, in memory; not saved: {error}"
        return f"The adapter as it was before them is in {str(folder)!r}."

    # ------------------------------------------------------------------ the rows

    def _named(self, step: _Step) -> str:
        """The rows of the micro-batches whose loss is not finite; of all where none is to blame."""
        pairs = list(zip(step.inputs, step.losses, strict=False))
        guilty = [inputs for inputs, loss in pairs if not bool(loss.isfinite().all())]
        found = [
            self._name(ids[: int(mask.sum())].tolist(), bool(rehearsal))
            for inputs in (guilty or step.inputs)
            for ids, mask, rehearsal in zip(
                inputs["input_ids"].cpu(),
                inputs["attention_mask"].cpu(),
                inputs.get("is_rehearsal", torch.zeros(len(inputs["input_ids"]))).cpu(),
                strict=True,
            )
        ]
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return "; ".join(found[:SHOWN]) + more

    def _name(self, ids: list[int], rehearsal: bool) -> str:
        """One row: its place among the rows of its role, from 0, and its first words, escaped."""
        place = find_row(self.rows, ids)
        number = "?" if place is None else str(place - self.n_task * (place >= self.n_task))
        role = "rehearsal row" if rehearsal else "task row"
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        template = get_template(self.tokenizer)
        for head in (template.with_input, template.without_input):
            text = text.removeprefix(head.split("{", 1)[0].rstrip(" "))
        words = text.strip()
        return f"{role} {number} {words[:WORDS]!a}{'...' * (len(words) > WORDS)}"


def find_row(rows: Any, ids: list[int]) -> int | None:
    """Place of the first encoded row with these ids, None where there is none."""
    import pyarrow.compute as compute

    table = None if getattr(rows, "_indices", None) else rows.data.column("input_ids")
    if table is None:
        places: Any = range(len(rows))
    else:
        same = compute.equal(compute.list_value_length(table), len(ids))
        places = compute.indices_nonzero(same).to_pylist()
    return next((place for place in places if rows[place]["input_ids"] == ids), None)


def _then(count: int) -> str:
    """What is told of the steps to come, so that a long run's log does not grow with them."""
    return f"; the next is told at {1 << count.bit_length()}" if count >= TOLD else ""


def _skips(optimizer: Any) -> bool:
    """Whether an optimizer passes over a step on the device where its `found_inf` says so."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _on_its_way(flag: Tensor) -> tuple[Tensor, Any]:
    """A copy on the CPU that a GPU fills in its own time, and the event that says when."""
    if not flag.is_cuda:
        return flag.clone(), None
    copy = torch.empty_like(flag, device="cpu", pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
