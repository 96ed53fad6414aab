"""What notebook 01 would take on a T4, by arithmetic: no T4 was at hand.

    python -m benchmarks.t4_estimate    -> benchmarks/results/t4_estimate.json

A part takes the longest of its products at the card's rate, its weights' way through memory, and
the launches of its kernels. In 4 bits every pass reads a weight (half a byte), writes it in fp16
and reads that again. Peak figures are of NVIDIA's data sheet (65 TFLOP/s in fp16, 320 GB/s). What
share of them is reached, and the time of a launch, are assumptions, given in the file.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks._results import write_result


@dataclass(frozen=True)
class Card:
    """A card's peak figures and what of them is reached."""

    flops: float = 65e12
    """fp16 FLOP/s, peak."""
    bytes: float = 320e9
    """Bytes/s, peak."""
    flops_share: float = 0.35
    bytes_share: float = 0.75
    launch: float = 20e-6
    """Seconds between two kernels that wait for Python."""


@dataclass(frozen=True)
class Job:
    """Gemma-2B and the notebook's settings; lengths of 999 Alpaca rows, in Gemma's tokens."""

    trunk: int = 18 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 16384)
    head: int = 256000 * 2048
    layers: int = 18
    steps: int = 60
    rows: int = 8
    rehearsal: float = 0.1
    padded: float = 404.0
    """Longest of 8 rows, mean over batches; rows are cut at 512."""
    answer: float = 148.0
    """Mean answer."""
    prompts: int = 5
    new_tokens: int = 256
    scored_rows: int = 228
    """200 held-out answers and 28 passages."""
    kernels: int = 80
    """Kernel launches of a layer's forward, LoRA included."""


def seconds(card: Card, flops: float, moved: float, kernels: float) -> float:
    """Time of a part: products or memory, whichever is longer, and launches beside them."""
    products = flops / (card.flops * card.flops_share)
    memory = moved / (card.bytes * card.bytes_share)
    return max(products, memory, kernels * card.launch)


def parts(card: Card, job: Job) -> list[dict[str, Any]]:
    """A row for every part of the notebook that the card works on."""
    expanded = 4.5  # bytes that a 4-bit weight moves in a pass
    tokens = job.rows * job.padded
    taught = tokens * job.rehearsal
    labelled = job.rows * (1 - job.rehearsal) * job.answer
    step = {
        "flops": 2 * job.trunk * (3 * tokens + taught)
        + 2 * job.head * (2 * labelled + 3 * job.rows * job.rehearsal * job.answer),
        "moved": job.trunk * expanded * 4 + job.head * 2 * 4,
        "kernels": job.layers * job.kernels * 5,  # forward, again, backward (twice), teacher
    }
    token = {
        "flops": 2 * (job.trunk + job.head) * job.prompts,
        "moved": job.trunk * expanded + job.head * 2,
        "kernels": job.layers * job.kernels,
    }
    batches = job.scored_rows / 8
    scored = {
        "flops": 2 * 2 * (job.trunk * 8 * job.padded + job.head * 8 * job.answer),
        "moved": 2 * (job.trunk * expanded + job.head * 2),
        "kernels": 2 * job.layers * job.kernels,
    }
    counted = [
        ("answers before", job.new_tokens, token),
        (f"{job.steps} steps", job.steps, step),
        ("answers after", job.new_tokens, token),
        ("scores", batches, scored),
    ]
    rows: list[dict[str, Any]] = []
    for name, times, cost in counted:
        each = seconds(card, cost["flops"], cost["moved"], cost["kernels"])
        rows.append(
            {
                "part": name,
                "times": round(times, 1),
                "tflop_each": round(cost["flops"] / 1e12, 3),
                "gb_each": round(cost["moved"] / 1e9, 2),
                "seconds_each": round(each, 3),
                "seconds": round(times * each, 1),
            }
        )
    return rows


def main() -> None:
    card, job = Card(), Job()
    rows = parts(card, job)
    write_result("t4_estimate", rows, {"card": asdict(card), "job": asdict(job)})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
