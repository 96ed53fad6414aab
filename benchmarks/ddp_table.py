"""The table of training on several GPUs, from results/ddp.json."""

from typing import Any

NAMES = {
    "plain": "plain Unsloth SFT",
    "ours": "**ours**, default recipe",
    "ours_all": "**ours**, KL on all rows",
}


def lines(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: an arm a line, a number of GPUs a column; then the gradients.

    Args:
        result: What benchmarks/ddp.py wrote.
    """
    rows = {(row["arm"], row["ranks"]): row for row in result["rows"]}
    counts = sorted({ranks for _, ranks in rows})
    found = [
        [name, *(_cell(rows.get((arm, count))) for count in counts)]
        for arm, name in NAMES.items()
        if any((arm, count) in rows for count in counts)
    ]
    for arm, name in (
        ("gradient_shared", "gradient, relative difference to one GPU's with the whole batch"),
        ("gradient_accumulated", "the same for one GPU that accumulates it (rounding alone)"),
    ):
        if any((arm, count) in rows for count in counts):
            each = [rows.get((arm, count), {}).get("grad_error") for count in counts]
            found.append([name, *("" if one is None else f"{one:.1e}" for one in each)])
    batches = {row["per_rank_batch"] for row in rows.values() if row["arm"] in NAMES}
    said = f"batch {', '.join(map(str, sorted(batches)))} a GPU"
    return [said, *(f"{count} GPU{'s' * (count > 1)}" for count in counts)], found


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return str(row["error"])
    text = f"{row['tokens_per_second']:,.0f} tokens/s"
    if row["ranks"] > 1 and "speedup" in row:
        text += f", × {row['speedup']:.2f}"
    return text if row["peak_gib"] is None else f"{text}, {row['peak_gib']:.2f} GiB"
