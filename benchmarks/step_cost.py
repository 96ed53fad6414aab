"""A training step in Gemma-2B's shape: memory and time of ours against plain Unsloth SFT and more.

    python -m benchmarks.step_cost             every arm -> benchmarks/results/step_cost.json
    python -m benchmarks.step_cost --profile   and where the time goes -> step_cost_profile.txt
    python -m benchmarks.step_cost --smoke     a tiny shape on a CPU, to see that it runs

Random weights, 4-bit, fp16 with a GradScaler, LoRA r 8 on 7 modules, checkpointing "unsloth"; rows
without padding; `labelled` 0.5 masks the first half of every task row. A step is forward, backward
and optimizer. Arms run in rounds whose order alternates; medians count, and `ratio`, the cost per
task row against plain, is the median over rounds of ratios within a round. The rehearsal arms run
the make-ups of batches that hold their share exactly (ours_r06: 1/16, ours_r20: 1/5), weighted as
they come. ours_all_cached reads the teacher's hidden states from a warm cache on disk (the page
cache serves it, as in an epoch after the first). The document's script runs in a process of its
own, without Unsloth.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _steps
from benchmarks._clock import CUDA, clock
from benchmarks._results import RESULTS, ROOT, earlier_rows, write_result
from benchmarks._steps import Kind, Loop, Loss, Size, period, tried
from lwf_unsloth.backend import prepare

SHAPES = ("B4xT512", "B2xT4096", "B16xT1024")
"""Ascending: Unsloth's offloading buffers grow with the tokens and stay."""
FIRST = ("plain_unsloth", "ours_all", "ours_all_cached", "ours_r06", "ours_r20")
"""Arms of every round."""
OTHERS = ("two_calls", "full_logits")
"""Arms of the first rounds only."""
SECOND = ("two_models", "trl_gkd")
"""Arms with a second model, measured after the rest, so that it is in no other arm's memory."""
ARMS = (*FIRST, *OTHERS, *SECOND, "document_script")
FEW = 4
"""Rounds of the arms that are not in `FIRST`."""
KEYS = ("shape", "labelled", "arm")
SHARES = {"ours_r06": Fraction(1, 16), "ours_r20": Fraction(1, 5)}


@dataclass
class Item:
    """An arm on one make-up of its batches."""

    arm: str
    kind: Kind
    run: Callable[[], Tensor]
    peak: float | None = None
    times: list[float] = field(default_factory=list)
    """ms of each round, in order."""


def items_of(loop: Loop, arm: str, size: Size, seed: int) -> list[Item]:
    """An arm's items, one for each kind of batch."""
    kinds = period(size.batch, SHARES[arm]) if arm in SHARES else [Kind()]
    loss: Loss = _steps.ours_rehearsal if arm in SHARES else getattr(_steps, arm)
    found = []
    for kind in kinds:
        batch = loop.batch(size, kind.rehearsal, seed)
        if arm == "ours_all_cached":
            loss = _steps.ours_all_cached(loop, batch)
        found.append(Item(arm, kind, partial(loop.step, loss, batch)))
    return found


def warm(item: Item) -> None:
    """Steps for kernels and buffers (Unsloth's offloading settles in the second), then the peak."""
    for _ in range(2 if item.arm == "plain_unsloth" else 1):
        item.run()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    loss = float(item.run())
    if CUDA:
        torch.cuda.synchronize()
        item.peak = torch.cuda.max_memory_allocated() / 2**30
    if loss != loss:
        raise FloatingPointError(f"the loss is {loss}")


def cell(
    loop: Loop, size: Size, arms: list[str], rounds: int, seconds: float, seed: int
) -> list[dict[str, Any]]:
    """Rows of all arms at one size.

    Args:
        loop: The model in training.
        size: The batch.
        arms: `plain_unsloth` first, against which ratios are taken.
        rounds: At most so many.
        seconds: No round starts that would end after so many; three run in any case.
        seed: Of the tokens.
    """
    start = time.perf_counter()
    ready: dict[str, list[Item]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for arm in arms:
        made = tried(loop, partial(_prepared, loop, arm, size, seed))
        if made.error is None:
            ready[arm] = made.value
        else:
            rows[arm] = {"error": made.error}
    longest = 0.0
    for turn in range(rounds):
        began = time.perf_counter()
        if turn >= 3 and began - start + longest > seconds:
            break
        running = [arm for arm in ready if arm in FIRST or turn < FEW]
        for arm in running if turn % 2 == 0 else reversed(running):
            made = tried(loop, partial(_turn, ready[arm]))
            if made.error is not None:
                rows[arm] = {"error": made.error}
                del ready[arm]
        longest = time.perf_counter() - began
    plain = ready.get("plain_unsloth")
    rows |= {arm: record(items, plain, size.batch) for arm, items in ready.items()}
    shape = {"shape": str(size), "labelled": size.labelled}
    return [{**shape, "arm": arm, **rows[arm]} for arm in arms]


def _turn(items: list[Item]) -> None:
    for item in items:
        item.times.append(clock(item.run))


def _prepared(loop: Loop, arm: str, size: Size, seed: int) -> list[Item]:
    loop.clean()
    items = items_of(loop, arm, size, seed)
    for item in items:
        warm(item)
    return items


def record(items: list[Item], plain: list[Item] | None, batch: int) -> dict[str, Any]:
    """Figures of an arm; times are means over its period, at the median or least of each kind."""
    batches = sum(item.kind.times for item in items)
    task = sum(item.kind.times * (batch - item.kind.rehearsal) for item in items)

    def mean(pick: Callable[[list[float]], float]) -> float:
        return sum(item.kind.times * pick(item.times) for item in items) / batches

    turns = range(len(items[0].times))
    ratios = [
        sum(item.kind.times * item.times[turn] for item in items)
        / task
        / (plain[0].times[turn] / batch)
        for turn in turns
        if plain
    ]
    peaks = [item.peak for item in items if item.peak is not None]
    return {
        "peak_gib": round(max(peaks), 3) if peaks else None,
        "ms_median": round(mean(statistics.median), 2),
        "ms_min": round(mean(min), 2),
        "ms_per_task_row": round(mean(statistics.median) * batches / task, 3),
        "ratio": round(statistics.median(ratios), 4) if ratios else None,
        "rounds": len(turns),
    }


def document_rows(folder: Path, sizes: list[Size], seconds: float) -> list[dict[str, Any]]:
    """Rows of the document's script, from its own process."""
    shown = [{"shape": str(s), "labelled": s.labelled, "arm": "document_script"} for s in sizes]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        command = [sys.executable, "-m", "benchmarks._document_script", str(folder), str(out)]
        command += [f"{size}:{size.labelled}" for size in sizes]
        try:
            subprocess.run(command, cwd=ROOT, check=True, timeout=seconds)
            problem = "not measured"
        except (subprocess.SubprocessError, OSError) as error:
            problem = _steps.failure(error)
        found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    default = {"error": problem}
    return [
        {**row, **found.get(f"{size}:{size.labelled}", default)}
        for row, size in zip(shown, sizes, strict=True)
    ]


def with_peak_ratio(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds each row's peak against plain's at its size."""
    plain = {
        (row["shape"], row["labelled"]): row.get("peak_gib")
        for row in rows
        if row["arm"] == "plain_unsloth"
    }
    for row in rows:
        base = plain.get((row["shape"], row["labelled"]))
        if base and row.get("peak_gib"):
            row["peak_ratio"] = round(row["peak_gib"] / base, 4)
    return rows


def measure(options: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """The document's script while nothing else is on the card, every cell, then the arms with a
    second model.
    """
    from benchmarks._shape import load_second, load_student, make_folder

    start = time.perf_counter()
    prepare()
    folder = make_folder(options.folder, options.smoke)
    sizes = [Size.of(shape, share) for shape in options.shapes for share in options.labelled]
    rows: list[dict[str, Any]] = []

    def add(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        for row in found:
            print(f"{time.perf_counter() - start:4.0f} s", row, flush=True)
        save(with_peak_ratio(rows))

    if "document_script" in options.arms:
        add(document_rows(folder, sizes, max(options.budget_seconds / 3, 90.0)))
    second = [arm for arm in SECOND if arm in options.arms]
    single = [arm for arm in (*FIRST, *OTHERS) if arm in options.arms]
    if not (second or single):
        return
    loop = Loop(*load_student(folder, options.smoke))
    until = start + options.budget_seconds * (0.8 if second else 1.0)
    for place, size in enumerate(sizes):
        share = weight_of(size) / sum(map(weight_of, sizes[place:]))
        seconds = (until - time.perf_counter()) * share
        add(cell(loop, size, single, options.rounds, seconds, options.seed))
        loop.clean()
    if options.profile:
        from benchmarks._profile import write_profile

        size = Size.of("B2xT32" if options.smoke else "B16xT1024")
        write_profile(loop, size, options.seed, Path(options.out or RESULTS))
    if second:
        made = tried(loop, lambda: loop.use_second(load_second(folder, options.smoke)))
        for size in sizes:
            add(second_rows(loop, size, second, made.error, options.seed))
            loop.clean()


def second_rows(
    loop: Loop, size: Size, arms: list[str], problem: str | None, seed: int
) -> list[dict[str, Any]]:
    """Rows of the arms with a second model, beside plain's rounds, which are not shown again."""
    if problem is not None:
        shape = {"shape": str(size), "labelled": size.labelled}
        return [{**shape, "arm": arm, "error": problem} for arm in arms]
    found = cell(loop, size, ["plain_unsloth", *arms], FEW, 0.0, seed)
    return [row for row in found if row["arm"] in arms]


def weight_of(size: Size) -> float:
    """A cell's share of the time: its tokens, and something for starting up."""
    return size.batch * size.length + 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--labelled", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=12, help="at most")
    parser.add_argument("--budget-seconds", type=float, default=360.0)
    parser.add_argument("--folder", type=Path, help="the model; made where it is not there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder of the result; default benchmarks/results")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--add", action="store_true", help="keep rows that are not measured now")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, result to --out only")
    options = parser.parse_args()
    if options.smoke:
        options.shapes, options.rounds = ["B2xT32", "B4xT16"], 2
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "seed", "folder")}

    def save(rows: list[dict[str, Any]]) -> None:
        if options.out or not options.smoke:
            kept = earlier_rows("step_cost", KEYS, rows) if options.add else []
            write_result("step_cost", [*kept, *rows], settings, options.seed, options.out)

    measure(options, save)


if __name__ == "__main__":
    main()
