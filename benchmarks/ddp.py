"""Training on several GPUs: tokens a second and memory against one, and the same gradient.

    python -m benchmarks.ddp            1 and 2 GPUs -> benchmarks/results/ddp.json
    python -m benchmarks.ddp --smoke    a tiny shape on a CPU with gloo, to see that it runs

Gemma-2B's shape with random weights, 4-bit, fp16, LoRA r 8, checkpointing "unsloth", half of a task
row's tokens labelled, through `LwFTrainer`; several processes are started by torchrun. Tokens are
those of all rows and all processes, over the steps after the first few, on the wall clock. A
gradient is that of one batch of as many rows, on one process and shared out; `grad_error` is the
norm of the difference over the norm, and the arm "accumulated" shows what rounding alone makes of
it: one process, the same rows in as many forwards.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._results import ROOT, earlier_rows, write_result
from benchmarks._steps import Size

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"lwf_lambda": 0.0},
    "ours": {},
    "ours_all": {"lwf_rows": "all"},
}
"""TRL's SFTTrainer exactly; the default recipe; KL on every token."""
WARM = 4
"""Steps before the clock starts."""
SWITCHES = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "OMP_NUM_THREADS": "1",
}
"""NVLink multicast is off: on shared hosts it can put the GPUs out of service."""
KEYS = ("ranks", "per_rank_batch", "arm")


# ------------------------------------------------------------------ in each process


def work(options: argparse.Namespace) -> None:
    """One process's part: a file of rows, and the gradients from the first process."""
    from lwf_unsloth import ranks
    from lwf_unsloth.backend import prepare

    prepare()
    from benchmarks._shape import make_folder

    folder = ranks.from_first(lambda: make_folder(options.folder, options.smoke), "make the model")
    size, found = Size.of(options.shape, 0.5), []
    for arm in options.arms:
        found.append({"arm": arm, **timed(options, folder, arm, size)})
        print(f"process {ranks.rank()}: {found[-1]}", flush=True)
    path = options.worker / f"rows-{ranks.world()}-{ranks.rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    part = Size(size.batch // max(options.ranks), size.length, 0.5)
    ways = {"shared": part.batch * max(options.ranks) // ranks.world()}
    if ranks.world() == 1:
        ways["accumulated"] = part.batch
    for name, batch in ways.items():
        gradient(options, folder, Size(batch, size.length, 0.5), f"{name}-{ranks.world()}")
    ranks.leave()


def made(options: argparse.Namespace, folder: Path, size: Size, **changes: Any) -> Any:
    """A trainer on random rows of one length; the settings are the defaults otherwise."""
    from benchmarks._gemma2b_shape import rows
    from benchmarks._shape import load_student
    from lwf_unsloth import ranks
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = load_student(folder, options.smoke)
    steps = changes["max_steps"] * changes.get("gradient_accumulation_steps", 1)
    count = steps * size.batch * ranks.world()
    settings = {
        "per_device_train_batch_size": size.batch,
        "gradient_accumulation_steps": 1,
        "max_length": size.length,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": options.seed,
    }
    task = rows(count, size.length, size.labelled, options.seed, options.smoke)
    kept = None
    if changes.get("lwf_lambda") != 0.0:
        kept = rows(64, size.length, 1.0, options.seed + 1, options.smoke)
    return LwFTrainer(
        model,
        args=LwFConfig(str(options.worker / "run"), **{**settings, **changes}),
        processing_class=tokenizer,
        train_dataset=task,
        rehearsal_dataset=kept,
    )


def timed(options: argparse.Namespace, folder: Path, arm: str, size: Size) -> dict[str, Any]:
    """Tokens a second of all processes, and this one's peak, less what an earlier arm has left."""
    import torch
    from transformers import TrainerCallback

    from lwf_unsloth import ranks

    cuda, steps = torch.cuda.is_available(), options.steps
    marks: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (WARM, WARM + steps):
                if cuda:
                    torch.cuda.synchronize()
                marks[state.global_step] = time.perf_counter()

    before = torch.cuda.memory_allocated() if cuda else 0
    trainer = made(options, folder, size, max_steps=WARM + steps, **ARMS[arm])
    trainer.add_callback(Clock())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = marks[WARM + steps] - marks[WARM]
    tokens = steps * size.batch * size.length * ranks.world()
    found = {
        "tokens_per_second": round(tokens / seconds, 1),
        "ms_step": round(1000 * seconds / steps, 2),
        "peak_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
        if cuda
        else None,
        "loss_last": trainer.state.log_history[-2]["loss"],
    }
    del trainer
    free()
    return found


def gradient(options: argparse.Namespace, folder: Path, size: Size, name: str) -> None:
    """The gradient of the first step from a disturbed adapter, saved by the first process."""
    import torch
    from transformers import TrainerCallback

    from lwf_unsloth import ranks

    rows = Size.of(options.shape).batch // max(options.ranks) * max(options.ranks)
    steps = rows // (size.batch * ranks.world())
    run = {"max_steps": 1, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
    trainer = made(options, folder, size, **run, lwf_rows="all", rehearsal_ratio=0.25)
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        scaler._init_scale = 1024.0  # a first step that is skipped would have no gradient
    with torch.no_grad():  # away from the teacher, else the KL's gradient is 0
        draw = torch.Generator().manual_seed(options.seed)
        for key, weight in trainer.model.named_parameters():
            if "lora_B" in key:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.02)
    found: dict[str, Any] = {}

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            scale = 1.0 if scaler is None else scaler.get_scale()
            parts = [p.grad.float().flatten().cpu() / scale for p in model.parameters()
                     if p.grad is not None]  # fmt: skip
            found["gradient"] = torch.cat(parts)

    trainer.add_callback(Gradient())
    trainer.train()
    found["loss"] = torch.tensor(trainer.state.log_history[-2]["loss"])
    if ranks.rank() == 0:
        torch.save(found, options.worker / f"{name}.pt")
    del trainer
    free()


def free() -> None:
    """Gives back what a trainer held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- in the first


def started(options: argparse.Namespace, processes: int, scratch: Path) -> str | None:
    """Runs the processes; what went wrong, or None."""
    command = [sys.executable]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [*launcher, str(processes)]
    command += ["-m", "benchmarks.ddp", *sys.argv[1:], "--worker", str(scratch)]
    env = {**SWITCHES, **os.environ, "PYTHONPATH": str(ROOT)}
    if processes == 1:
        env.setdefault("CUDA_VISIBLE_DEVICES", "0")
    run = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = run.wait(options.budget_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the launcher and its processes
        return f"not through after {options.budget_seconds:.0f} s"
    return None if code == 0 else f"exit code {code}"


def rows_of(options: argparse.Namespace, processes: int, scratch: Path) -> list[dict[str, Any]]:
    """Rows of the arms: the first process's clock, and the largest peak of all."""
    about = {"ranks": processes, "per_rank_batch": Size.of(options.shape).batch}
    problem = started(options, processes, scratch)
    files = [scratch / f"rows-{processes}-{rank}.json" for rank in range(processes)]
    if not all(file.is_file() for file in files):
        return [{**about, "arm": arm, "error": problem} for arm in options.arms]
    each = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    found = []
    for same in zip(*each, strict=True):
        peaks = [row["peak_gib"] for row in same if row["peak_gib"] is not None]
        found.append({**about, **same[0], "peak_gib": max(peaks, default=None)})
    return found


def with_speedup(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its tokens a second over one process's, where both are there."""
    alone = {row["arm"]: row.get("tokens_per_second") for row in rows if row["ranks"] == 1}
    for row in rows:
        if alone.get(row["arm"]) and "tokens_per_second" in row:
            row["speedup"] = round(row["tokens_per_second"] / alone[row["arm"]], 3)
    return rows


def gradient_rows(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """How far each gradient is from that of one process and one forward."""
    import torch

    whole = scratch / "shared-1.pt"
    if not whole.is_file():
        return []
    wanted = torch.load(whole, weights_only=True)
    batch = Size.of(options.shape).batch // max(options.ranks)
    found = []
    for path in sorted(scratch.glob("*.pt")):
        if path == whole:
            continue
        name, processes = path.stem.split("-")
        ours = torch.load(path, weights_only=True)
        error = (ours["gradient"] - wanted["gradient"]).norm() / wanted["gradient"].norm()
        row = {"ranks": int(processes), "per_rank_batch": batch, "arm": f"gradient_{name}"}
        row |= {"grad_error": float(f"{error.item():.3e}")}
        row |= {"loss": ours["loss"].item(), "loss_alone": wanted["loss"].item()}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="B8xT1024", help="rows and tokens a process")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="GPUs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "ours"])
    parser.add_argument("--steps", type=int, default=24, help="timed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-seconds", type=float, default=285.0, help="a number of GPUs")
    parser.add_argument("--folder", type=Path, help="the model; made where it is not there")
    parser.add_argument("--out", help="folder of the result; default benchmarks/results")
    parser.add_argument("--add", action="store_true", help="keep rows that are not measured now")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, result to --out only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.steps = "B4xT32", 3
    if options.worker is not None:
        work(options)
        return
    unsaid = ("out", "seed", "folder", "worker")
    settings = {k: v for k, v in vars(options).items() if k not in unsaid}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for processes in options.ranks:
            rows = with_speedup([*rows, *rows_of(options, processes, Path(scratch))])
            found = [*rows, *gradient_rows(options, Path(scratch))]
            print(json.dumps(found, indent=1), flush=True)
            if options.out or not options.smoke:
                kept = earlier_rows("ddp", KEYS, found) if options.add else []
                write_result("ddp", [*kept, *found], settings, options.seed, options.out)
    sys.exit(any("error" in row for row in found))


if __name__ == "__main__":
    main()
