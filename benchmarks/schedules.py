"""Do schedules, a KL budget or a growing rank help retention? The demo's FAQ, one setting changed.

    python -m benchmarks.schedules                     every arm, three seeds
    python -m benchmarks.schedules --seeds 0 --steps 60 --arms constant budget
    python -m benchmarks.schedules --smoke --out X     a few steps on a CPU, to see that it runs

Every arm of a seed starts from the same adapter and sees the same batches. A row that is there is
not run again, so an interrupted run goes on. Writes benchmarks/results/schedules.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, sourced
from lwf_unsloth.backend import device_name, prepare

prepare()

from benchmarks.second_task import Bench, Rows, loaded, reported  # noqa: E402

NAME = "schedules"
ARMS: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"lwf_lambda_schedule": "linear:4->0"},
    "cosine": {"lwf_lambda_schedule": "cosine:4->0.5"},
    "warmup": {"lwf_lambda_schedule": "warmup:0.1"},
    "budget": {"lwf_kl_budget": 0.02},
    "budget too low": {"lwf_kl_budget": 0.0002, "lwf_lambda_max": 8.0},
    "rank": {"rank_schedule": [(0.0, 2), (0.3, 8)]},
    "freeze": {"freeze_schedule": [(0.0, "mlp"), (0.3, "")]},
    "smoothing": {"label_smoothing_factor": 0.1},
    "temperature": {"lwf_temperature_schedule": "linear:4->1"},
}
"""Arm -> what it changes of the demo's settings."""


class Schedules(Bench):
    """The FAQ with general rehearsal rows and one change."""

    def arm(self, name: str, seed: int) -> None:
        """Trains, measures and keeps one arm."""
        self.fresh(seed)
        row: dict[str, Any] = {"arm": name, "seed": seed, "steps": self.options.steps}
        with reported(self, row):
            steps, rows = self.options.steps, self.rows
            row |= self.train(name, rows.faq, rows.general, seed, steps, changes=ARMS[name])
            row |= self.measured()
            row |= self.moved()

    def moved(self) -> dict[str, Any]:
        """Lambda's path and the KL's, where something moves lambda: first, middle and last step."""
        log = self.log
        at = (0, len(log) // 2, -1)
        found: dict[str, Any] = {"kl_path": [round(log[i]["kl_rehearsal"], 5) for i in at]}
        if "lwf_lambda" in log[0]:
            found["lambda_path"] = [round(log[i]["lwf_lambda"], 4) for i in at]
        return found


def earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows that are there."""
    path = (options.out or RESULTS) / f"{NAME}.json"
    return sourced(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--again", action="store_true", help="run rows that are there once more")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--smoke", action="store_true", help="a few steps, result to --out only")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps = options.seeds[:1], 4
    model, tokenizer = loaded(options)
    kept, card = earlier(options), device_name()

    def there(row: dict[str, Any], arm: str, seed: int) -> bool:
        key = (arm, seed, options.steps, card)
        return (row["arm"], row["seed"], row["steps"], row.get("card", card)) == key

    with tempfile.TemporaryDirectory() as folder:
        rows = Rows.of(options.smoke)
        bench = Schedules(options, model, tokenizer, rows, Path(folder), NAME, kept)
        for seed in options.seeds:
            for arm in options.arms:
                same = [row for row in bench.found if there(row, arm, seed)]
                if same and not options.again and "error" not in same[0]:
                    continue
                bench.found = [row for row in bench.found if row not in same]
                bench.arm(arm, seed)


if __name__ == "__main__":
    main()
