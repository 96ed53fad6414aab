"""The longest rows that train on a T4, stood in for by a card of which 14.0 GiB are free.

    python -m benchmarks.fits_t4            -> benchmarks/results/fits_t4.json
    python -m benchmarks.fits_t4 --smoke    a tiny shape on a CPU, to see that it runs

Gemma-2B's shape with random weights, 4-bit, fp16, LoRA r 8, checkpointing "unsloth"; lengths are
multiples of 256 up to 8192, every token labelled, and a length fits if 3 steps run. "ours" is the
default recipe with one rehearsal row in the batch (with 1 row a batch: every other step),
"ours_all" has KL on every token. What else a T4 does differently (its kernels) is not seen here.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import _steps
from benchmarks._results import write_result
from benchmarks._stand_in import free_memory
from benchmarks._steps import Loop, Loss, Size, tried
from lwf_unsloth.backend import prepare

ARMS: dict[str, Loss] = {
    "plain_unsloth": _steps.plain_unsloth,
    "ours": _steps.ours_rehearsal,
    "ours_all": _steps.ours_all,
    "full_logits": _steps.full_logits,
}
BATCHES = (4, 2, 1)
FREE_GIB = 14.0
STEPS = 3


def trains(loop: Loop, arm: str, size: Size) -> float | None:
    """Peak in GiB (0 on a CPU) of a few steps, None where memory does not suffice."""
    _forget_buffers()
    loop.clean()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    made = tried(loop, partial(_run, loop, arm, size))
    if made.error is None:
        return float(made.value)
    if made.error != _steps.OUT_OF_MEMORY:
        raise RuntimeError(f"{arm} at {size}: {made.error}")
    return None


def _run(loop: Loop, arm: str, size: Size) -> float:
    for turn in range(STEPS):
        rehearsal = int(arm == "ours" and (size.batch > 1 or turn % 2 == 1))
        loss = float(loop.step(ARMS[arm], loop.batch(size, rehearsal, turn)))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _forget_buffers() -> None:
    """Unsloth's offloading buffers keep the size of the longest row that was tried."""
    try:
        from unsloth_zoo.gradient_checkpointing import reset_unsloth_gradient_checkpointing_buffers
    except ImportError:
        return
    if torch.cuda.is_available():
        reset_unsloth_gradient_checkpointing_buffers()


def longest(fits: Callable[[int], float | None], step: int, most: int) -> tuple[int, float | None]:
    """The longest multiple of `step` up to `most` that fits, 0 if none does, and its peak.

    The longest is tried first, since it is what one hopes for; then halves.
    """
    peak = fits(most)
    if peak is not None:
        return most, peak
    good, bad, found = 0, most // step, None
    while bad - good > 1:
        middle = (good + bad) // 2
        peak = fits(middle * step)
        if peak is None:
            bad = middle
        else:
            good, found = middle, peak
    return good * step, found


def measure(options: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """A row for every batch and arm."""
    from benchmarks._shape import load_student, make_folder

    start = time.perf_counter()
    prepare()
    folder = make_folder(options.folder, options.smoke)
    rows: list[dict[str, Any]] = []
    with free_memory(options.free_gib) as free:
        print(f"{free:.2f} GiB free", flush=True)
        loop = Loop(*load_student(folder, options.smoke))
        for batch, arm in itertools.product(options.batches, options.arms):
            row: dict[str, Any] = {"batch": batch, "arm": arm}
            if time.perf_counter() - start > options.budget_seconds:
                row["error"] = "no time left"
            else:
                row |= found(loop, batch, arm, options.step, options.longest)
            rows.append(row)
            print(row, f"{time.perf_counter() - start:.0f} s", flush=True)
            save(rows)


def found(loop: Loop, batch: int, arm: str, step: int, most: int) -> dict[str, Any]:
    """The figures of a row, or its error."""
    try:
        length, peak = longest(lambda n: trains(loop, arm, Size(batch, n)), step, most)
    except RuntimeError as error:
        return {"error": _steps.failure(error)}
    return {"longest_length": length, "peak_gib": None if peak is None else round(peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--step", type=int, default=256)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--free-gib", type=float, default=FREE_GIB)
    parser.add_argument("--budget-seconds", type=float, default=180.0)
    parser.add_argument("--folder", type=Path, help="the model; made where it is not there")
    parser.add_argument("--out", help="folder of the result; default benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, result to --out only")
    options = parser.parse_args()
    if options.smoke:
        options.batches, options.step, options.longest = [2, 1], 16, 32
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "folder")}

    def save(rows: list[dict[str, Any]]) -> None:
        if options.out or not options.smoke:
            write_result("fits_t4", rows, settings, 0, options.out)

    measure(options, save)


if __name__ == "__main__":
    main()
