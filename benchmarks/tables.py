"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results/*.json.

python benchmarks/tables.py           rewrites what stands between <!-- table: NAME --> and
                                      <!-- end -->
python benchmarks/tables.py --check   fails where a table is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, its own folder stands there instead

from benchmarks import answers_table, ddp_table, schedules_table, second_task_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PLACES = [ROOT / "README.md", ROOT / "README.ja.md", ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any] | None:
    """A result file's content, None where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def as_table(head: list[str], rows: list[list[Any]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def source(result: dict[str, Any]) -> str:
    """Card, versions and commit of a result, in a line."""
    meta = result["meta"]
    commits = [row["commit"][:8] for row in result["rows"] if "commit" in row]
    earlier = "".join(
        f" Rows of an earlier run, commit {commit}: {commits.count(commit)}."
        for commit in dict.fromkeys(commits)
    )
    return (
        f"\n{meta['card']}, torch {meta['torch']}, unsloth {meta['unsloth']}, "
        f"commit {meta['commit'][:8]}, {meta['date'][:10]}; `{meta['command']}`.{earlier}\n"
    )


def demo() -> str | None:
    """The demo's own report: what was learned, what was kept."""
    result = read("demo_cpu")
    if result is None:
        return None
    runs = result["rows"]
    mean = lambda *path: sum(_dig(run, path) for run in runs) / len(runs)  # noqa: E731
    base, kept = mean("retention", "nll_before"), mean("retention", "nll_after")
    plain = mean("retention", "nll_after_lambda0")
    rows = [
        [
            "FAQ facts found, of the held-out questions",
            *(f"{mean('heldout', k):.0%}" for k in ("facts_before", "facts_after")),
        ],
        [
            "held-out answers, NLL (nats a token)",
            *(f"{mean('heldout', k):.2f}" for k in ("nll_before", "nll_after")),
        ],
        [
            "answers that end by themselves (EOS)",
            *(f"{mean('eos_rate', k):.0%}" for k in ("before", "after")),
        ],
        [
            "general held-out answers, NLL: **forgetting**",
            f"{base:.3f}",
            f"{kept:.3f} ({kept - base:+.3f})",
        ],
        [
            "the same, without teacher and rehearsal",
            f"{base:.3f}",
            f"{plain:.3f} ({plain - base:+.3f})",
        ],
    ]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return as_table(["`lwf-unsloth demo`, SmolLM2-135M in 4 bits", "before", "after"], rows) + (
        f"\nMean of {len(runs)} run(s) (seed {seeds}), {mean('steps'):.0f} steps, "
        f"{mean('seconds') / 60:.1f} minutes each." + source(result)
    )


def _dig(value: Any, path: tuple[str, ...]) -> float:
    for key in path:
        value = value[key]
    return float(value)


def gpu() -> str | None:
    """The main job on the GPU."""
    result = read("main_job_gpu")
    if result is None:
        return None
    rows = []
    for row in result["rows"]:
        if row.get("error"):
            rows.append([row["run"], "", "", row["error"]])
        elif row["run"] == "gpu_tests":
            rows.append(
                [
                    "GPU tests",
                    "",
                    "",
                    f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped",
                ]
            )
        elif row["run"] == "gemma2b_shape":
            rows.append(
                [
                    "Gemma-2B shape, fp16, 14 GiB free",
                    f"{row['seconds']:.0f} s, {row['steps']} steps",
                    f"{row['peak_gib']:.2f} GiB",
                    "no NaN",
                ]
            )
        else:
            what = (
                f"EOS {row['eos_rate_before']:.0%} -> {row['eos_rate_after']:.0%}; passages "
                f"{row['passage_nll_rise']:+.3f} nats, at lambda 0 "
                f"{row['passage_nll_rise_lambda0']:+.3f}"
            )
            rows.append(
                [
                    "gemma-3-270m on Alpaca rows",
                    f"{row['seconds']:.0f} s, {row['steps']} steps",
                    f"{row['peak_gib']:.2f} GiB",
                    what,
                ]
            )
    return as_table(["run", "time", "GPU memory", "result"], rows) + source(result)


STEPS = {
    "plain_unsloth": "plain Unsloth SFT",
    "ours_r06": "**ours**, default recipe, ratio 0.06",
    "ours_r20": "**ours**, default recipe, ratio 0.2",
    "ours_all": "**ours**, KL on all rows",
    "ours_all_cached": "**ours**, KL on all rows, warm cache",
    "two_models": "the same with a second 4-bit model",
    "two_calls": "Unsloth's fused CE, then its fused JSD",
    "full_logits": "LwF with full logits on Unsloth",
    "trl_gkd": "TRL's GKD loss (no CE), second model",
    "document_script": "the document's script",
}
"""Arms of step_cost as the tables call them, in the tables' order."""


def step_cost() -> str | None:
    """Memory and time of a training step, a table for each share of labelled tokens."""
    result = read("step_cost")
    if result is None:
        return None
    rows = result["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    parts = []
    for labelled in dict.fromkeys(row["labelled"] for row in rows):
        found = {(r["arm"], r["shape"]): r for r in rows if r["labelled"] == labelled}
        lines = [
            [name, *(_step_cell(found, arm, shape) for shape in shapes)]
            for arm, name in STEPS.items()
            if any((arm, shape) in found for shape in shapes)
        ]
        parts.append(as_table([f"{labelled:.0%} of the tokens labelled", *shapes], lines))
    note = "\nPeak GPU memory, and time per task row against plain (plain: ms a step).\n"
    return "\n".join(parts) + note + source(result)


def _step_cell(found: dict[tuple[str, str], dict[str, Any]], arm: str, shape: str) -> str:
    """Peak and relative time of an arm at a size, or why there is none."""
    row, plain = found.get((arm, shape)), found.get(("plain_unsloth", shape), {})
    if row is None or row.get("error"):
        return "" if row is None else row["error"]
    if arm == "plain_unsloth":
        time = f"{row['ms_median']:.0f} ms"
    else:
        time = f"× {_step_ratio(row, plain):.2f}" if plain.get("ms_per_task_row") else ""
    return _memory(row) + time


def _step_ratio(row: dict[str, Any], plain: dict[str, Any]) -> float:
    """Time per task row against plain: of paired rounds, else (another process) of medians."""
    return row.get("ratio") or row["ms_per_task_row"] / plain["ms_per_task_row"]


def _memory(row: dict[str, Any]) -> str:
    return "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB, "


def loss_stage() -> str | None:
    """The loss stage alone: ms, peak memory, gradient error."""
    result = read("loss_stage")
    if result is None:
        return None
    found = {(r["arm"], r["vocab"], r["dtype"]): r for r in result["rows"]}
    cases = list(dict.fromkeys((vocab, dtype) for _, vocab, dtype in found))
    lines = []
    for arm in dict.fromkeys(arm for arm, _, _ in found):
        cells = []
        for case in cases:
            row = found.get((arm, *case), {"error": ""})
            if "error" in row:
                cells.append(row["error"].split(":")[0])
                continue
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} MiB, "
            cells.append(f"{row['ms_median']:.1f} ms, {peak}{_digits(row['grad_error'])}")
        lines.append([f"**{arm}**" if arm == "ours" else arm, *cells])
    head = ["4096 rows, hidden 2048", *(f"V {vocab:,}, {dtype}" for vocab, dtype in cases)]
    note = "\nForward and backward, peak over the inputs, relative error of the gradient.\n"
    return as_table(head, lines) + note + source(result)


def _digits(error: float | None) -> str:
    return "NaN" if error is None else f"{error:.1e}"


FITS = {
    "plain_unsloth": STEPS["plain_unsloth"],
    "ours": "**ours**, default recipe",
    "ours_all": STEPS["ours_all"],
    "full_logits": STEPS["full_logits"],
}


def fits_t4() -> str | None:
    """The longest rows that train where 14 GiB are free."""
    result = read("fits_t4")
    if result is None:
        return None
    found = {(row["arm"], row["batch"]): row for row in result["rows"]}
    batches = sorted({batch for _, batch in found})
    lines = [
        [name, *(_length(found.get((arm, batch))) for batch in batches)]
        for arm, name in FITS.items()
    ]
    head = ["longest rows in tokens, 14 GiB free", *(f"batch {batch}" for batch in batches)]
    return as_table(head, lines) + source(result)


def _length(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return row.get("error") or str(row["longest_length"] or "none")


def hardware() -> str | None:
    """What a step needs, for README.md: from step_cost and, where it is there, fits_t4."""
    result, fits = read("step_cost"), read("fits_t4")
    if result is None:
        return None
    half = {(r["arm"], r["shape"]): r for r in result["rows"] if r["labelled"] == 0.5}
    lengths = {r["arm"]: r for r in fits["rows"] if r["batch"] == 4} if fits else {}
    lengths["ours_r06"] = lengths.get("ours")
    head = ["Gemma-2B in 4 bits, fp16", "batch 4 × 512", "batch 16 × 1024", "time"]
    arms = [arm for arm in STEPS if arm not in ("two_models", "trl_gkd", "document_script")]
    lines = []
    for arm in arms:
        small, large = half.get((arm, "B4xT512"), {}), half.get((arm, "B16xT1024"), {})
        if not (small.get("peak_gib") or large.get("peak_gib")):
            continue
        sizes = [
            f"{r['peak_gib']:.2f} GiB" if r.get("peak_gib") else r.get("error", "")
            for r in (small, large)
        ]
        time = _step_cell(half, arm, "B16xT1024")
        time = time.removeprefix(_memory(large)) if large.get("peak_gib") else ""
        longest = [_length(lengths.get(arm))] if fits else []
        lines.append([STEPS[arm], *sizes, time, *longest])
    head += ["longest, batch 4"] if fits else []
    note = (
        "\nRandom weights in Gemma-2B's shape, half of the tokens labelled: peak GPU memory, and "
        "time per task row at batch 16 × 1024 (plain: a step; the others: times plain). At batch "
        "4 × 512 a step waits for the CPU, so its time says nothing."
    )
    note += " Longest: rows that train where 14 GiB are free, as on a T4.\n" if fits else "\n"
    return as_table(head, lines) + note + source(result)


def t4() -> str | None:
    """Notebook 01 on a T4, by arithmetic."""
    result = read("t4_estimate")
    if result is None:
        return None
    lines = [
        [
            row["part"],
            f"{row['times']:g} × {row['tflop_each']:g} TFLOP, {row['gb_each']:g} GB",
            f"{row['seconds']:.0f} s",
        ]
        for row in result["rows"]
    ]
    total = sum(row["seconds"] for row in result["rows"])
    lines.append(["together, without set-up and download", "", f"{total / 60:.1f} min"])
    card = result["meta"]["settings"]["card"]
    note = (
        f"\nAn estimate, not a measurement: {card['flops'] / 1e12:.0f} TFLOP/s and "
        f"{card['bytes'] / 1e9:.0f} GB/s at peak, of which {card['flops_share']:.0%} and "
        f"{card['bytes_share']:.0%} are taken to be reached; "
        f"`{result['meta']['command']}`.\n"
    )
    return as_table(["part of notebook 01, gemma-2b", "work", "T4"], lines) + note


def _made(name: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str | None]:
    """The table of a result file, and its source; None without the file."""

    def table() -> str | None:
        result = read(name)
        return None if result is None else make(result) + source(result)

    return table


self_rehearsal = _made("self_rehearsal", lambda made: second_task_table.section(made, as_table))


def forgetting() -> str | None:
    """What a new skill costs: the whole section, so that without a result there is none."""
    result = read("forgetting")
    if result is None:
        return None
    from benchmarks import forgetting_table

    return forgetting_table.section(
        result, read("forgetting_items") or {}, RESULTS, as_table, source(result)
    )


def answers() -> str | None:
    """The demo prompts before and after, and the run that answered them."""
    made, result = answers_table.answers(RESULTS), read("main_job_gpu")
    return None if made is None or result is None else made + source(result)


TABLES: dict[str, Callable[[], str | None]] = {
    "demo": demo,
    "gpu": gpu,
    "step_cost": step_cost,
    "loss_stage": loss_stage,
    "fits_t4": fits_t4,
    "hardware": hardware,
    "self_rehearsal": self_rehearsal,
    "schedules": _made("schedules", lambda made: schedules_table.section(made, as_table)),
    "ddp": _made("ddp", lambda made: as_table(*ddp_table.lines(made))),
    "forgetting": forgetting,
    "t4": t4,
    "answers": answers,
    "demo_answers": _made("demo_cpu_answers", answers_table.demo_answers),
}


def filled(text: str) -> str:
    """A page with its tables made anew; those without a result stay as they are."""

    def table(match: re.Match[str]) -> str:
        made = TABLES[match[2]]()
        return match[0] if made is None else match[1] + made + match[4]

    return BLOCK.sub(table, text)


def main() -> int:
    """Writes or checks every page; the number that differ is the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    wrong = 0
    for path in PLACES:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if check and new != text:
            wrong += 1
            print(
                f"{path.name}: a table is not what the results say: run python benchmarks/tables.py"
            )
        elif new != text:
            path.write_text(new, encoding="utf-8")
            print(f"wrote the tables of {path.name}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
