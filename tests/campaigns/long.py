"""A long run stays as it began: memory flat, logs bounded, checkpoints pruned, one always whole.

    python -m tests.campaigns.long [--steps 2000] [--out tests/campaigns/results/long.json]

Trains the tiny model on the CPU, with the teacher's cache, a log line every 20 steps and a
checkpoint every 50, of which the newest 2 are kept. Memory is what the process has taken; the
first quarter of the steps (imports, the allocator's first growth) is left out. In the second part
every other step has no finite gradient: what is told of it must not grow with the run.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).resolve().parent / "results" / "long.json"
WARM = 0.25
"""Share of the steps that count as warm-up."""
LIMIT = 2
FLAT = 0.02
"""Growth of the memory that still counts as flat."""


def resident():
    """Bytes of memory that this process has taken, swapped out or not; pages of files, which the
    system drops and reads again as others need memory, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


class Records(logging.Handler):
    """Counts log records and their characters."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.count = self.characters = 0

    def emit(self, record):
        self.count += 1
        self.characters += len(record.getMessage())


def watcher(run, every, records):
    """A callback that notes memory, log and checkpoints; and its notes."""
    from transformers import TrainerCallback

    from lwf_unsloth.checkpoints import is_complete

    notes = {"step": [], "resident": [], "records": [], "checkpoints": [], "whole": []}

    class Watcher(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every:
                return
            folders = list(run.glob("checkpoint-*"))
            for name, value in {
                "step": state.global_step,
                "resident": resident(),
                "records": records.count,
                "checkpoints": len(folders),
                "whole": sum(map(is_complete, folders)),
            }.items():
                notes[name].append(value)

    return Watcher(), notes


def long_run(folder, steps, spoil=False, **changes):
    """Trains; the figures of the run.

    Args:
        folder: An empty folder.
        steps: Optimizer steps.
        spoil: Whether every other step has a gradient that is not finite.
        **changes: Settings of the run.
    """
    from tests.campaigns.work import trainer_of

    records = Records()
    log = logging.getLogger("lwf_unsloth")
    level = log.level
    every = max(1, steps // 100)
    values = {
        "max_steps": steps, "logging_steps": 20, "save_steps": max(2, steps // 40),
        "save_total_limit": LIMIT, **changes,
    }  # fmt: skip
    trainer = trainer_of(folder, **values)
    watch, notes = watcher(folder / "run", every, records)
    trainer.add_callback(watch)
    if spoil:
        _spoil(trainer)
    log.addHandler(records)
    log.setLevel(logging.INFO)
    begun = time.monotonic()
    try:
        trainer.train()
    finally:
        log.removeHandler(records)
        log.setLevel(level)
    seconds = time.monotonic() - begun
    return {
        **figures(notes, steps, values["save_steps"]),
        **_left(folder, trainer, records, seconds),
    }


def _spoil(trainer):
    """Makes the gradient of every other step infinite."""
    step = trainer.training_step

    def spoiled(model, inputs, *args, **kwargs):
        loss = step(model, inputs, *args, **kwargs)
        if trainer.state.global_step % 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return loss

    trainer.training_step = spoiled


def figures(notes, steps, save_steps):
    """Memory, log and checkpoints of a run, from what was noted of it."""
    warm = [n for n, step in enumerate(notes["step"]) if step > WARM * steps]
    memory = [notes["resident"][n] for n in warm]
    tenth = max(1, len(memory) // 10)
    first, last = (sum(part) / tenth for part in (memory[:tenth], memory[-tenth:]))
    saved = [n for n, step in enumerate(notes["step"]) if step > save_steps]
    return {
        "steps": steps,
        "resident_mib_after_warm_up": round(first / 2**20, 1),
        "resident_mib_at_the_end": round(last / 2**20, 1),
        "growth": round(last / first - 1, 4),
        "spread": round(max(memory) / min(memory) - 1, 4),
        "records_after_warm_up": notes["records"][-1] - notes["records"][warm[0]],
        "most_checkpoints": max(notes["checkpoints"][n] for n in saved),
        "fewest_whole": min(notes["whole"][n] for n in saved),
    }


def _left(folder, trainer, records, seconds):
    """What the run has left."""
    run = folder / "run"
    lines = trainer.state.log_history
    return {
        "log_records": records.count,
        "log_characters": records.characters,
        "log_lines_of_the_trainer": len(lines),
        "trainer_state_kib": round(len(json.dumps(lines)) / 1024, 1),
        "run_folder_mib": round(sum(p.stat().st_size for p in run.rglob("*")) / 2**20, 1),
        "skipped_steps": trainer.guard.skipped,
        "seconds": round(seconds, 1),
    }


def broken(found):
    """What a run's figures say against it; empty where nothing."""
    wrong = []
    if found["growth"] > FLAT:
        wrong.append(f"memory grew by {found['growth']:.2%}")
    if found["most_checkpoints"] > LIMIT:
        wrong.append(f"{found['most_checkpoints']} checkpoints at a time")
    if found["fewest_whole"] < 1:
        wrong.append("no whole checkpoint at one time")
    if found["records_after_warm_up"] > 20:
        wrong.append(f"{found['records_after_warm_up']} log records after the warm-up")
    return wrong


def main():
    """Both parts, in this process."""
    from tests.campaigns.kill import about

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    meta = about(0, f"python -m tests.campaigns.long --steps {asked.steps}")
    rows = []
    for spoil in (False, True):
        with tempfile.TemporaryDirectory(prefix="lwf-long-") as root:
            found = long_run(Path(root), asked.steps if not spoil else asked.steps // 4, spoil)
        row = {"part": "every other step spoiled" if spoil else "as it is", **found}
        rows.append({**row, "wrong": broken(found)})
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
