"""The main job on a GPU: a base model is taught to answer, keeps what it knew, and is compared.

    python -m benchmarks.main_job_gpu --run gpu_tests
    python -m benchmarks.main_job_gpu --run gemma2b_shape
    python -m benchmarks.main_job_gpu --run alpaca_gemma3_270m --rows alpaca.json --wiki wiki.txt

Each run puts its row into benchmarks/results/main_job_gpu.json beside the others' (and into --out).
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, ROOT, write_result

NAME = "main_job_gpu"
GIB = 2**30
PATIENCE = 15.0
"""Seconds that an interrupted test process has for its report."""


def keep(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Puts a run's row into the result files, in the place of its last one."""
    if options.lambda0_to is not None:  # the other process writes the whole row
        return
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("run", "out", "folder", "rows", "wiki", "lambda0_to")
    }
    for folder in dict.fromkeys([None if options.smoke else RESULTS, options.out]):
        if folder:
            save(row, settings, options.seed, folder)


def save(row: dict[str, Any], settings: dict[str, Any], seed: int, folder: Path) -> None:
    """Puts a run's row into one result file."""
    path = folder / f"{NAME}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = [old for old in before.get("rows", []) if old["run"] != row["run"]]
    known = before.get("meta", {}).get("settings", {})
    write_result(NAME, [*rows, row], {**known, row["run"]: settings}, seed, folder)


# ------------------------------------------------------------------ the suite with -m gpu


def gpu_tests(options: argparse.Namespace) -> dict[str, Any]:
    """Every GPU test; its files in processes of their own, side by side, since Unsloth's patches of
    one architecture last as long as the process.
    """
    started = time.perf_counter()
    files = sorted((ROOT / "tests").glob("test_gpu_*.py"))
    files = [path for path in files if not options.tests or path.stem[9:] in options.tests]
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [(path.stem, *_start(path, Path(scratch))) for path in files]
        until = started + (options.limit_seconds or math.inf)
        crashed = [name for name, run, _ in runs if _ended(run, until) not in (0, 1, 5)]
        logs = {name: log.read_text(errors="replace") for name, _, log in runs}
        for name in logs:
            report = Path(scratch) / f"{name}.xml"
            for suite in tree.parse(report).iter("testsuite") if report.is_file() else ():
                for key in counts:
                    counts[key] += int(suite.get(key, 0))
    print("\n".join(f"===== {name}\n{log[-5000:]}" for name, log in logs.items()), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        whole = "\n".join(f"===== {name}\n{log}" for name, log in logs.items())
        (options.out / "gpu_tests.log").write_text(whole, encoding="utf-8")
    failed = counts["failures"] + counts["errors"] + len(crashed)
    row: dict[str, Any] = {
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    if crashed:
        row["error"] = f"crashed or interrupted: {', '.join(crashed)}"
    elif not row["passed"]:
        row["error"] = "no test ran"
    return row


def _ended(run: subprocess.Popen[bytes], until: float) -> int:
    """Waits for a process, till a time; then it is interrupted, which pytest tells and counts."""
    left = max(0.0, until - time.perf_counter())
    try:
        return run.wait(left if math.isfinite(left) else None)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
    try:
        return run.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        run.kill()
        return run.wait()


def _start(path: Path, scratch: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A pytest process on one file, and where its output goes."""
    log, report = scratch / f"{path.stem}.log", scratch / f"{path.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-rs", str(path)]
    command += ["-o", "addopts="]  # strict settings would ask for plugins that such machines lack
    command += ["--durations=8", f"--junitxml={report}"]
    own = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(scratch / f"{path.stem}_compiled")}
    with log.open("wb") as out:
        run = subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=subprocess.STDOUT)
    return run, log


# -------------------------------------------------------- Gemma-2B's shape on 14 GiB


def gemma2b_shape(options: argparse.Namespace) -> dict[str, Any]:
    """20 fp16 steps of the pre-quantised shape while another process leaves 14 GiB free."""
    from lwf_unsloth.backend import on_cuda, prepare

    prepare()
    import torch

    from benchmarks._gemma2b_shape import prequantised, rows
    from benchmarks._stand_in import free_memory
    from lwf_unsloth.config import LwFConfig, ModelConfig
    from lwf_unsloth.model import load_model
    from lwf_unsloth.trainer import LwFTrainer

    tiny, length = options.smoke, 32 if options.smoke else 512
    folder = options.folder or Path(tempfile.gettempdir()) / "lwf-gemma-2b-shape-bnb-4bit"
    prequantised(folder, tiny)
    with free_memory(options.free_gib) as free:
        dtype = "float16" if on_cuda() else "float32"
        model, tokenizer = load_model(
            ModelConfig(str(folder), max_seq_length=length, dtype=dtype, random_state=options.seed)
        )
        print(model.lwf_loaded, f"{free:.2f} GiB free before", flush=True)
        settings = LwFConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=options.steps or 20,
            max_length=length,
            seed=options.seed,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = LwFTrainer(
            model,
            args=settings,
            processing_class=tokenizer,
            train_dataset=rows(160, length, 0.5, options.seed, tiny),
            rehearsal_dataset=rows(16, length, 1.0, options.seed + 1, tiny),
        )
        row = trained(trainer)
        finite = all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)
        row |= {"bits": model.lwf_loaded.bits, "free_gib": round(free, 2), "finite": bool(finite)}
    if not (finite and row.pop("all_losses_finite")):
        row["error"] = "NaN or infinity in the losses or in the adapter"
    return row


def trained(trainer: Any) -> dict[str, Any]:
    """Trains, and what the log and the card say of it."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    kl = [line["kl"] for line in lines if "kl" in line]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if cuda else None,
        "task_loss_first": lines[0]["task_loss"],
        "task_loss_last": lines[-1]["task_loss"],
        "kl_first": kl[0] if kl else None,
        "kl_last": kl[-1] if kl else None,
        "all_losses_finite": all(math.isfinite(line["loss"]) for line in lines),
    }


# ------------------------------------------------------------------------------- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, nargs="+", choices=list(RUNS))
    parser.add_argument("--out", type=Path, help="also writes the results there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    tests = parser.add_argument_group("gpu_tests")
    tests.add_argument("--tests", nargs="*", metavar="NAME", help="of test_gpu_NAME.py; all")
    tests.add_argument("--limit-seconds", type=float, help="what still runs then is interrupted")
    shape = parser.add_argument_group("gemma2b_shape")
    shape.add_argument("--folder", type=Path, help="the model; made where it is not there")
    shape.add_argument("--free-gib", type=float, default=14.0)
    alpaca = parser.add_argument_group("alpaca_gemma3_270m")
    alpaca.add_argument("--model", default="gemma-3-270m")
    alpaca.add_argument("--rows", type=Path, help="Alpaca rows, JSON")
    alpaca.add_argument("--wiki", type=Path, help="plain text, an article a line, to measure on")
    alpaca.add_argument("--lr", type=float, default=1e-3)
    alpaca.add_argument("--batch", type=int, default=16, help="task rows a step")
    alpaca.add_argument("--rank", type=int, default=16)
    alpaca.add_argument("--candidates", nargs="*", default=[], metavar="STEPS:LR")
    alpaca.add_argument("--held-out", type=int, default=170)
    alpaca.add_argument("--instructions", type=int, default=100, help="answered before and after")
    alpaca.add_argument("--new-tokens", type=int, default=256)
    alpaca.add_argument("--longest-answer", type=int, help="tokens; default --new-tokens, 0 any")
    alpaca.add_argument("--beside", action="store_true", help="lambda 0 in a process beside it")
    alpaca.add_argument("--lambda0-to", type=Path, help=argparse.SUPPRESS)
    alpaca.add_argument("--eos-target", type=float, default=0.8)
    return parser.parse_args()


def alpaca_gemma3_270m(options: argparse.Namespace) -> dict[str, Any]:
    """A base model taught to answer; see benchmarks/_alpaca_gpu.py."""
    from benchmarks._alpaca_gpu import run

    return run(options)


RUNS = {
    "gpu_tests": gpu_tests,
    "gemma2b_shape": gemma2b_shape,
    "alpaca_gemma3_270m": alpaca_gemma3_270m,
}


def main() -> None:
    options = parse()
    failed = False
    for name in options.run:
        try:
            row = {"run": name, **RUNS[name](options)}
        except Exception as error:  # the other runs still count
            import traceback

            traceback.print_exc()
            row = {"run": name, "error": f"{type(error).__name__}: {error}"[:400]}
        failed = failed or "error" in row or bool(row.get("failed"))
        print(json.dumps(row, indent=1), flush=True)
        keep(row, options)
    sys.exit(failed)


if __name__ == "__main__":
    main()
