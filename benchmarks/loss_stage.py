"""The loss stage alone: cross entropy + teacher KL of 4096 rows, from hidden states to gradient.

    python -m benchmarks.loss_stage            every arm -> benchmarks/results/loss_stage.json
    python -m benchmarks.loss_stage --tune     ours by body and chunk -> loss_stage_tuning.json
    python -m benchmarks.loss_stage --smoke    tiny sizes on a CPU, to see that it runs

Every arm computes mean cross entropy + mean KL(teacher || student) at T = 1 over all rows, and the
gradient of the student's hidden states; the head is frozen. In fp16 the total carries a loss scale
of 65536, as a GradScaler's. Arms run in rounds whose order alternates; the median counts. Peak is
over what was there before the call. The gradient's error is relative (L2, all rows), against fp64
from the same half-precision inputs.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._results import earlier_rows, write_result

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
VOCABS = (256000, 49152, 151936)
CUDA = torch.cuda.is_available()


class Case:
    """Inputs of one vocabulary and dtype: logits of standard deviation 2.5, a teacher near by."""

    def __init__(self, rows: int, hidden: int, vocab: int, dtype: str, seed: int) -> None:
        device = "cuda" if CUDA else "cpu"
        draw = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=draw, device=device)
        self.weight = torch.empty(vocab, hidden, device=device, dtype=DTYPES[dtype])
        for block in self.weight.split(16384):
            block.copy_(normal(len(block), hidden) * (2.5 / hidden**0.5))
        student = normal(rows, hidden)
        self.student = student.to(DTYPES[dtype]).requires_grad_()
        self.teacher = (student + 0.3 * normal(rows, hidden)).to(DTYPES[dtype])
        self.labels = torch.randint(0, vocab, (rows,), generator=draw, device=device)
        self.scale = 65536.0 if dtype == "fp16" else 1.0

    def step(self, arm: Callable[["Case"], Tensor]) -> Tensor:
        """Forward and backward of an arm; the gradient, with the loss scale still in it."""
        self.student.grad = None
        (arm(self) * self.scale).backward()
        return self.student.grad


def ours(case: Case, **options: Any) -> Tensor:
    from lwf_unsloth.losses import Head, lwf_loss

    head = Head(case.weight)
    return lwf_loss(case.student, case.labels, head, teacher=case.teacher, **options).total


def full_logits(case: Case) -> Tensor:
    """Textbook: both logits whole, softmax in fp32."""
    logits = (case.student @ case.weight.T).float()
    with torch.no_grad():
        target = (case.teacher @ case.weight.T).float().log_softmax(-1)
    ce = F.cross_entropy(logits, case.labels)
    return ce + F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)


def unsloth_two_calls(case: Case) -> Tensor:
    """Unsloth's fused cross entropy, then its fused JSD at beta 0, which is forward KL."""
    from lwf_unsloth.backend import prepare

    prepare()
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_jsd

    count = torch.tensor(len(case.labels), device=case.labels.device)
    ce = unsloth_fused_ce_loss(
        None, case.student[None], case.weight, None, case.labels[None],
        n_items=count, scaling=case.scale, shift_labels=False,
    )  # fmt: skip
    kl = fused_linear_jsd(
        case.student, case.weight, case.teacher, case.weight,
        beta=0.0, num_items_in_batch=count, scaling=case.scale,
    )  # fmt: skip
    return ce + kl


def liger(case: Case, compiled: bool = True) -> Tensor:
    """Liger's cross entropy + JSD at beta 0 in one call; it takes the head's gradient too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1.0, 1.0, beta=0.0, compiled=compiled)
    return loss(case.student, case.weight, case.teacher, case.weight, case.labels)


def trl(case: Case) -> Tensor:
    """TRL's chunked log-probabilities, then its chunked divergence at beta 0."""
    from lwf_unsloth.backend import prepare

    prepare()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    one = (1.0, 1.0, None, 1.0, None)  # temperature, then scale and softcap of both
    gold = ChunkedLogProbFunction.apply(
        case.student, case.weight, None, case.labels, 1.0, 32768, None, 1.0, ()
    )[0]
    divergence = ChunkedDivergenceFunction.apply(
        case.student, case.weight, None, case.teacher, case.weight, None, 0.0, *one
    )[0]
    return (divergence.sum() - gold.sum()) / len(case.labels)


ARMS: dict[str, list[tuple[str, Callable[[Case], Tensor]]]] = {
    "ours": [("", ours)],
    "full_logits": [("", full_logits)],
    "unsloth_two_calls": [("", unsloth_two_calls)],
    "liger": [("compiled", liger), ("eager", partial(liger, compiled=False))],
    "trl": [("", trl)],
}
"""Arm -> its variants, of which the faster one counts."""


def reference_gradient(case: Case) -> Tensor:
    """The gradient in fp64, by chunks of rows; exact up to fp64 rounding."""
    rows, weight, grads = len(case.labels), case.weight.double(), []
    for part in torch.arange(rows).split(128):
        z = case.student.detach()[part].double() @ weight.T
        dz = 2.0 * z.softmax(-1)
        del z
        dz -= (case.teacher[part].double() @ weight.T).softmax(-1)
        at = torch.arange(len(part), device=dz.device)
        dz[at, case.labels[part]] -= 1.0
        grads.append(dz @ weight / rows)
    return torch.cat(grads)


def clock(case: Case, arm: Callable[[Case], Tensor]) -> float:
    """Milliseconds of one forward and backward."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    case.step(arm)
    if CUDA:
        torch.cuda.synchronize()
    return 1000.0 * (time.perf_counter() - start)


def peak(case: Case, arm: Callable[[Case], Tensor]) -> float | None:
    """MiB over what was allocated before the call; None where torch can't tell (CPU)."""
    if not CUDA:
        return None
    case.student.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.step(arm)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def prepare_arm(case: Case, variants: list[tuple[str, Any]], truth: Tensor) -> tuple[Any, dict]:
    """The faster variant that runs after a warm-up, with its error and peak; or the error."""
    found: list[tuple[float, str, Any]] = []
    problem = "no variant"
    for name, arm in variants:
        try:
            for _ in range(3):
                case.step(arm)
            found.append((min(clock(case, arm) for _ in range(3)), name, arm))
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        case.student.grad = None
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if not found:
        return None, {"error": problem}
    _, name, arm = min(found, key=lambda one: one[0])
    grad = case.step(arm).double() / case.scale
    error = ((grad - truth).norm() / truth.norm()).item()
    known = None if math.isnan(error) else float(f"{error:.4g}")
    record = {"peak_mib": peak(case, arm), "grad_error": known}
    return arm, record | ({"variant": name} if name else {})


def measure(case: Case, arms: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """A record for each arm: medians of rounds in which all arms run, in alternating order."""
    truth = reference_gradient(case)
    ready: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, variants in arms.items():
        ready[name], records[name] = prepare_arm(case, variants, truth)
    del truth
    running = [name for name, arm in ready.items() if arm is not None]
    times: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name in running if turn % 2 == 0 else reversed(running):
            times[name].append(clock(case, ready[name]))
    for name in running:
        records[name]["ms_median"] = round(statistics.median(times[name]), 3)
        records[name]["ms_min"] = round(min(times[name]), 3)
    return [{"arm": name, **record} for name, record in records.items()]


def tuning_arms() -> dict[str, Any]:
    """Ours by body, chunk and block; and parts of it, whose gradient means nothing."""
    arms: dict[str, Any] = {}
    for chunk in (128, 256, 384, 512, 1024, 2048):
        for body in ("triton", "compiled"):
            arms[f"ours {body} {chunk}"] = partial(ours, body=body, chunk_rows=chunk)
        arms[f"logits only {chunk}"] = partial(products, chunk=chunk, logits=2)
        for splits in (1, 4, 8, 16):
            arms[f"dh only {chunk} splits {splits}"] = partial(products, chunk=chunk, splits=splits)
    for block, warps in ((2048, 8), (4096, 8), (8192, 16), (8192, 32)):
        arms[f"ours triton 512 block {block} warps {warps}"] = partial(blocks, block, warps)
    return {name: [("", arm)] for name, arm in arms.items()}


def blocks(block: int, warps: int, case: Case) -> Tensor:
    """Ours with another block of the Triton kernel."""
    from lwf_unsloth import loss_triton

    before = loss_triton.BLOCK, loss_triton.WARPS
    loss_triton.BLOCK, loss_triton.WARPS = block, warps
    try:
        return ours(case, body="triton", chunk_rows=512)
    finally:
        loss_triton.BLOCK, loss_triton.WARPS = before


@torch.no_grad()
def products(case: Case, chunk: int, logits: int = 0, splits: int = 0) -> Tensor:
    """Head products alone: `logits` of them per chunk, and dz @ W split so many times over V."""
    weight, rows = case.weight, len(case.labels)
    z = torch.zeros(min(chunk, rows), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, rows, chunk):
        hidden = case.student[start : start + chunk]
        part = z[: len(hidden)]
        for _ in range(logits):
            torch.mm(hidden, weight.T, out=part)
        if splits == 1:
            torch.mm(part, weight, out_dtype=torch.float32)
        elif splits:
            dz = part.view(len(part), splits, -1).transpose(0, 1)  # (splits, M, V / splits)
            by_part = weight.view(splits, -1, weight.shape[1])
            torch.bmm(dz, by_part, out_dtype=torch.float32).sum(0)
    return zero_of(case)


def zero_of(case: Case) -> Tensor:
    """A total of 0 that hangs on the student, for what only takes time."""
    with torch.enable_grad():
        return case.student[:1].sum() * 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabs", type=int, nargs="+", default=list(VOCABS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder of the result; default benchmarks/results")
    parser.add_argument("--tune", action="store_true", help="bodies and chunk sizes of ours")
    parser.add_argument("--add", action="store_true", help="keep rows that are not measured now")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, result to --out only")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.hidden, options.vocabs, options.rounds = 64, 32, [1000], 2
    rows: list[dict[str, Any]] = []
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "seed")}
    name = "loss_stage_tuning" if options.tune else "loss_stage"
    for vocab in options.vocabs:
        for dtype in options.dtypes:
            case = Case(options.rows, options.hidden, vocab, dtype, options.seed)
            arms = tuning_arms() if options.tune else {arm: ARMS[arm] for arm in options.arms}
            for record in measure(case, arms, options.rounds):
                rows.append({"vocab": vocab, "dtype": dtype, **record})
                print(rows[-1], flush=True)
            del case
            if options.out or not options.smoke:
                kept = earlier_rows(name, ("vocab", "dtype", "arm"), rows) if options.add else []
                write_result(name, [*kept, *rows], settings, options.seed, options.out)


if __name__ == "__main__":
    main()
