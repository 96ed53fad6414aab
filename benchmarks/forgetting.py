"""What a new skill costs: text-to-SQL learned in many ways, gain against forgetting, on one model.

    python -m benchmarks.forgetting --prepare FOLDER --general alpaca.json --wiki wiki.txt
    python -m benchmarks.forgetting --data FOLDER --model smollm2-135m-instruct --workers 4 \
        --limit-seconds 540
    python -m benchmarks.forgetting --report           the table and plots of benchmarks/README.md
    python -m benchmarks.forgetting --smoke --model-path FOLDER --out X     a few steps on a CPU

Every finished adapter's row is written at once; the same command goes on where it was ended, and
ends by itself before the limit. Workers are processes that share the card and the list of
adapters: small models leave it waiting for the CPU. Results: forgetting.json, and what each test
row gave in forgetting_items.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks._forgetting_arms import FROZEN, NAMES, Job, Row, plan, unavailable
from benchmarks._forgetting_store import Store
from benchmarks._results import RESULTS
from benchmarks._switches import compile_less

PLACES = ("--data", "--out", "--model-path")
FIRST_SECONDS = 120.0
"""What a job is taken to need before one has been seen."""
MARGIN = 1.15
MOST_FAILED = 3
"""Failures in a row after which a process ends: an error of the card spoils all that follow."""


def work(options: argparse.Namespace, until: float) -> int:
    """Jobs, one after another, until none is left or the next would not end in time.

    Args:
        options: The command's.
        until: `time.monotonic()` by which all must be over.

    Returns:
        The number of jobs done.
    """
    from lwf_unsloth.backend import prepare

    prepare()
    from dataclasses import fields

    from benchmarks import _sql_task
    from benchmarks._forgetting_bench import Bench
    from lwf_unsloth.config import LwFConfig

    data = _sql_task.load(options.data, options.model)
    data = data.few(options.rows) if options.rows else data
    store = Store(options.out, options.scratch, options.model, data.identity(), _settings(options))
    bench = Bench(options, data)
    skip = unavailable([field.name for field in fields(LwFConfig)])
    longest, done, failed = 0.0, 0, 0

    def wanted(rows: list[Row]) -> list[Job]:
        return plan(rows, options.seeds, options.arms, skip)

    while options.most is None or done < options.most:
        if time.monotonic() + MARGIN * (longest or FIRST_SECONDS) > until:
            print(f"{until - time.monotonic():.0f} s left: too little for another job", flush=True)
            break
        job, more = store.take(wanted)
        if job is None and not more:
            print("nothing is left to do", flush=True)
            break
        if job is None:
            time.sleep(1.0)
            continue
        started = time.monotonic()
        failed = 0 if _one(bench, store, job) else failed + 1
        done += 1
        if failed == MOST_FAILED:
            raise SystemExit(f"{failed} jobs failed one after another: the process may be spoilt.")
        if job.arm != FROZEN:  # which trains nothing
            longest = max(longest, time.monotonic() - started)
    return done


def _one(bench: Any, store: Store, job: Job) -> bool:
    """Runs a job and writes its rows; an exception becomes its row's "error". True without one."""
    from benchmarks._steps import failure

    print(f"begin {job.key}", flush=True)
    items: dict[str, dict[str, str]] = {}
    try:
        rows, items = bench.run(job)
    except Exception as error:  # the others still count
        traceback.print_exc()
        rows = [{"arm": job.arm, "lr": job.lr, "seed": job.seed, "error": failure(error)}]
    store.add(rows, items)
    store.end(job)
    shown = ("new_score", "gain", "kl_general", "leak_rate", "seconds_train", "seconds_measure")
    for row in rows:
        print(f"end {row['arm']} {job.lr:g} {job.seed}", {k: row.get(k) for k in shown}, flush=True)
    return bool(items)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers."""
    names = ("rank", "steps", "seeds", "rows", "dtype", "benchmarks", "benchmark_items", "workers")
    return {name: getattr(options, name) for name in names}


def spread(options: argparse.Namespace) -> int:
    """Starts the workers and waits for all of them; the first exit code that is not 0."""
    command = [sys.executable, "-m", "benchmarks.forgetting", *sys.argv[1:]]
    left = options.limit_seconds - 2 if options.limit_seconds else 0
    own = ["--scratch", str(options.scratch)]
    runs = []
    for number in range(options.workers):
        limit = ["--limit-seconds", str(left - number * options.stagger)] if left else []
        env = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.workers)),
            **os.environ,
            "UNSLOTH_COMPILE_LOCATION": str(options.scratch / f"compiled{number}"),
        }
        runs.append(subprocess.Popen([*command, *own, *limit], env=env))
        time.sleep(options.stagger)
    codes = [run.wait() for run in runs]  # of all: they share a folder that ends with this process
    return next((code for code in codes if code), 0)


def _public(words: list[str]) -> list[str]:
    """The command as the user gave it, without places on this machine."""
    words = words[: words.index("--scratch")] if "--scratch" in words else words
    hidden = {i for i, word in enumerate(words) if word in PLACES}
    return [word for i, word in enumerate(words) if not {i, i - 1} & hidden]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--model-path", help="folder to load in its place, as for a try-out")
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=list(NAMES), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit-seconds", type=float, help="ends by itself before")
    parser.add_argument("--most", type=int, help="end after so many jobs (of each worker)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--stagger", type=float, default=5.0, help="seconds between their starts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--data", type=Path, help="prepared folder; default: the user's cache")
    parser.add_argument("--steps", type=int, default=166)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="None takes bf16 where the device has it")
    parser.add_argument("--rows", type=int, help="only so many rows of each kind")
    parser.add_argument("--score-batch", type=int, default=64)
    parser.add_argument("--answer-batch", type=int, default=368)
    parser.add_argument("--benchmarks", nargs="*", default=[], help="e.g. local_piqa local_siqa")
    parser.add_argument("--benchmark-items", type=int, default=400)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="fill a folder for --data")
    parser.add_argument("--general", type=Path, help="with --prepare: Alpaca rows (JSON)")
    parser.add_argument("--wiki", type=Path, help="with --prepare: text, an article a line")
    parser.add_argument("--sdist", type=Path, help="with --prepare: the package's file")
    parser.add_argument("--report", action="store_true", help="plots and tables of the results")
    parser.add_argument("--smoke", action="store_true", help="2 steps, a few rows; needs --out")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """The command; its exit code."""
    started, options = time.monotonic(), _parser().parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars would fill the log
    compile_less(options.model)
    if options.prepare:
        from benchmarks import _sql_task

        _sql_task.prepare(options.prepare, options.general, options.wiki, options.sdist)
        return 0
    if options.report:
        from benchmarks import _forgetting_plots, tables

        for path in _forgetting_plots.draw(options.out):
            print(f"wrote {path}")
        sys.argv = sys.argv[:1]
        return tables.main()
    if options.smoke:
        options.steps, options.rows = min(options.steps, 2), options.rows or 16
        options.score_batch = options.answer_batch = 8
        if options.out == RESULTS:
            raise SystemExit("--smoke writes no results of the project's: give --out FOLDER.")
    until = started + (options.limit_seconds or float("inf"))
    with tempfile.TemporaryDirectory(prefix="lwf-forgetting-run-") as scratch:
        alone, options.scratch = options.scratch is None, options.scratch or Path(scratch)
        if alone and options.workers > 1:
            return spread(options)
        sys.argv = [sys.argv[0], *_public(sys.argv[1:])]  # what the result's meta shows
        work(options, until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
