"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results/*.json.

python benchmarks/tables.py           rewrites what stands between <!-- table: NAME --> and <!-- end -->
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
    return (
        f"\n{meta['card']}, torch {meta['torch']}, unsloth {meta['unsloth']}, commit {meta['commit'][:8]}, "
        f"{meta['date'][:10]}; `{meta['command']}`.\n"
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
        f"\nMean of {len(runs)} runs (seeds {seeds}), {mean('steps'):.0f} steps, {mean('seconds') / 60:.1f} minutes each."
        + source(result)
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
                f"{row['passage_nll_rise']:+.3f} nats, at lambda 0 {row['passage_nll_rise_lambda0']:+.3f}"
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


TABLES: dict[str, Callable[[], str | None]] = {"demo": demo, "gpu": gpu}


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
