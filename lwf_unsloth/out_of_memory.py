"""What to say when memory ran out: in which part, what was foretold for it, and what to lower."""

import re
import traceback
from pathlib import Path
from typing import Any

import torch

from lwf_unsloth.errors import ModelError
from lwf_unsloth.memory import free_memory
from lwf_unsloth.preflight import GIB, SHORT, DoesNotFit, Fit, fits

CPU_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch says it on a CPU, as a RuntimeError."""
PARTS = {
    "kept": "the forward (kept activations)",
    "layer": "the backward (one layer computed again)",
    "loss": "the loss",
    "teacher": "the teacher's forward",
    "optimizer": "the optimizer's state",
}
"""Part of an `Estimate` -> its name."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in said.lower() or any(words in said for words in CPU_WORDS)
    )


def part_of(error: BaseException) -> str:
    """The part of a step in which an error came: a key of `PARTS`."""
    part = "kept"
    for frame in traceback.extract_tb(error.__traceback__):
        stem = Path(frame.filename).stem
        if stem in ("teacher", "teacher_cache"):
            part = "teacher"
        elif stem == "losses" or re.match(r"loss_(pass|kernels|topk|rows|triton)", stem):
            part = "loss"
        elif part == "kept" and frame.name == "backward":
            part = "layer"
        elif "optim" in frame.filename and frame.name.startswith(("step", "_init_group")):
            part = "optimizer"
    return part


def in_evaluation(error: BaseException) -> bool:
    """Whether an error came during an evaluation."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name in ("evaluation_loop", "prediction_step") for frame in frames)


def explained(
    error: BaseException,
    model: Any,
    args: Any,
    rows: str,
    shape: tuple[int, int] | None,
    free_before: int | None,
    step: int,
) -> DoesNotFit:
    """The error for the user; the old one's frames are let go, and with them what they hold.

    Args:
        error: The error of the allocation.
        model: The student.
        args: The settings.
        rows: `lwf_rows`, "auto" resolved.
        shape: Rows and tokens of the batch.
        free_before: Free bytes before the run.
        step: The optimizer step.
    """
    evaluating, part = in_evaluation(error), part_of(error)
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    begin = f"Memory ran out in step {step}, in {PARTS[part]}"
    if evaluating:
        return DoesNotFit(
            f"{begin}, during an evaluation ({reason[:200]}). Lower per_device_eval_batch_size, "
            f"now {args.per_device_eval_batch_size}; the run can be resumed with it."
        )
    batch, length = shape or (args.per_device_train_batch_size, args.max_length or 512)
    try:
        found = fits(model, batch, length, args=args, rows=rows)
        foretold = _foretold(found, part, free_before)
    except ModelError as unknown:
        foretold = f"Nothing was foretold: {unknown}"
    return DoesNotFit(
        f"{begin}, on a batch of {batch} x {length} tokens ({reason[:200]}). {foretold} "
        f"{_advice(args, batch, length, part)}"
    )


def _foretold(found: Fit, part: str, before: int | None) -> str:
    """Which number of the estimate was wrong."""
    one = found.estimate
    name = PARTS[part].split(" (")[0]
    text = f"Foretold were {_gib(getattr(one, part))} for {name}, {_gib(one.needed)} in all"
    if before is None:
        return f"{text}; how much was free is not known."
    now = free_memory()
    if one.needed > before:
        return f"{text}, and {_gib(before)} were free before the run: as foretold, it does not fit."
    late = "" if now is None else f" ({_gib(now)} are free now)"
    return (
        f"{text}, and {_gib(before)} were free before the run{late}: the number for {name} was too "
        "low, or another process has taken memory since."
    )


def _advice(args: Any, batch: int, length: int, part: str) -> str:
    """What to lower, the way that changes no result first."""
    ways = []
    if batch > 1:
        half = max(1, args.per_device_train_batch_size // 2)
        times = args.per_device_train_batch_size // half
        steps = args.gradient_accumulation_steps * times
        ways.append(
            f"set per_device_train_batch_size={half} and gradient_accumulation_steps={steps} (the "
            "same steps in smaller parts: the run can be resumed with them)"
        )
    if args.max_length and length // 2 >= SHORT:
        ways.append(f"lower max_length to {length // 2} or so (another run: rows are cut there)")
    if part == "teacher" and args.lwf_cache == "off":
        ways.append('take lwf_cache="hidden", which spares the teacher\'s forward from epoch 2 on')
    if part == "optimizer":
        ways.append('take optim="adamw_8bit"')
    if part in ("kept", "layer") and not args.gradient_checkpointing:
        ways.append('load with use_gradient_checkpointing="unsloth"')
    text = "; or ".join(ways) or "take a smaller model"
    return f"{text[0].upper()}{text[1:]}. fits(model, batch, length) shows the parts."


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
