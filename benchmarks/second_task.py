"""Rehearsal that the model writes itself against given rows and none; then a second task on top.

    python -m benchmarks.second_task                  all parts; a few minutes on an H100
    python -m benchmarks.second_task --parts first    a FAQ is learned: self, general, none
    python -m benchmarks.second_task --parts second   FAQ, then code: who teaches, what is kept
    python -m benchmarks.second_task --smoke --out X  a few steps on a CPU, to see that it runs

Every arm of a seed starts from the same adapter. Held out: questions in other words, general
instructions that nothing trains on, code rows. Writes benchmarks/results/self_rehearsal.json.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._adapters import fresh
from benchmarks._results import RESULTS, sourced, write_result
from lwf_unsloth.backend import device_name, on_cuda, prepare

prepare()

import torch  # noqa: E402

from lwf_unsloth.alpaca import load_alpaca, load_text  # noqa: E402
from lwf_unsloth.answer_scores import facts_found  # noqa: E402
from lwf_unsloth.config import ModelConfig  # noqa: E402
from lwf_unsloth.demo import TASK_ROWS, training_settings  # noqa: E402
from lwf_unsloth.demo_data import HELD_OUT_SEED  # noqa: E402
from lwf_unsloth.generation import generate  # noqa: E402
from lwf_unsloth.model import load_model  # noqa: E402
from lwf_unsloth.precision import autocast_off  # noqa: E402
from lwf_unsloth.samples import sample_path  # noqa: E402
from lwf_unsloth.scoring import score  # noqa: E402
from lwf_unsloth.teacher import OwnTeacher, trained_tensors  # noqa: E402
from lwf_unsloth.trainer import LwFTrainer  # noqa: E402

NAME = "self_rehearsal"
GIB = 2**30
FIRST = ("self", "general", "none")
SECOND = {
    "snapshot, self": ("snapshot", "self"),
    "snapshot, general": ("snapshot", "general"),
    "snapshot, general and FAQ": ("snapshot", "both"),
    "base, general": ("base", "general"),
    "none": ("none", "none"),
}
"""Arm of the second task -> whose KL, on which rehearsal rows."""


@dataclass
class Rows:
    """What is trained and measured on."""

    faq: Any
    questions: list[dict[str, str]]
    """Held out, in other words, each with `answer_contains`."""
    general: Any
    general_heldout: Any
    code: Any
    code_heldout: Any

    @classmethod
    def of(cls, smoke: bool) -> "Rows":
        """The samples, split as the demo splits them."""
        general = load_alpaca(sample_path("general"), test_size=60, seed=HELD_OUT_SEED)
        code = load_alpaca(sample_path("code_task"), test_size=11, seed=HELD_OUT_SEED)
        faq = load_alpaca(sample_path("faq_task"), test_size=None)["train"]
        lines = sample_path("faq_heldout").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines]
        if smoke:
            few = range(4)
            general = {half: rows.select(few) for half, rows in general.items()}
            return cls(
                faq.select(range(16)), questions[:2], general["train"], general["test"],
                code["train"].select(range(8)), code["test"].select(few),
            )  # fmt: skip
        return cls(faq, questions, general["train"], general["test"], code["train"], code["test"])


@dataclass
class Bench:
    """One loaded model and the rows found so far."""

    options: argparse.Namespace
    model: Any
    tokenizer: Any
    rows: Rows
    folder: Path
    name: str = NAME
    """File of the result, without suffix."""
    found: list[dict[str, Any]] = field(default_factory=list)
    after_faq: dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]] = field(
        default_factory=dict
    )
    """Seed -> the adapter that has learned the FAQ with general rows, and what was measured."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """The steps of the newest training, as they were logged."""

    def fresh(self, seed: int) -> None:
        """The adapter as PEFT makes it, from a seed."""
        fresh(self.model, seed)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """The adapter as it stood when `trained_tensors` copied it."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in state.items():
                parameters[name].copy_(tensor)

    def train(
        self,
        part: str,
        task: Any,
        rehearsal: Any,
        seed: int,
        steps: int,
        teacher: str = "",
        changes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One arm from the adapter as it stands; seconds, memory, what the log says."""
        changes = dict(changes or {})
        if rehearsal is None:
            changes |= {
                "lwf_lambda": 0.0, "rehearsal_ratio": 0.0, "gradient_accumulation_steps": 1,
                "per_device_train_batch_size": TASK_ROWS,
            }  # fmt: skip
        args = training_settings(self.model, self.folder / f"{part}-{seed}", seed, steps, changes)
        if on_cuda():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer = LwFTrainer(
            self.model,
            args=args,
            processing_class=self.tokenizer,
            train_dataset=task,
            rehearsal_dataset=rehearsal,
        )
        prepared = time.perf_counter() - started
        if teacher == "base":  # what no user would do: the first task is not in this teacher
            trainer.objective.teacher = OwnTeacher(self.model)
        try:
            trainer.train()
        finally:
            autocast_off(trainer)
        log = self.log = [line for line in trainer.state.log_history if "task_loss" in line]
        kl = [line["kl_rehearsal"] for line in log[-10:] if "kl_rehearsal" in line]
        return {
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_before": round(prepared, 1),
            "rehearsal_rows": trainer.rows.n_rehearsal,
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if on_cuda() else None,
            "task_loss_last": log[-1]["task_loss"],
            "kl_rehearsal_last": sum(kl) / len(kl) if kl else None,
        }

    def facts(self) -> float:
        """Share of the held-out questions whose answer holds the fact."""
        asked = [{"instruction": row["instruction"]} for row in self.rows.questions]
        tokens = 8 if self.options.smoke else 96
        settings = {"max_new_tokens": tokens, "batch_size": len(asked)}
        return facts_found(
            generate(self.model, self.tokenizer, asked, **settings), self.rows.questions
        )

    def measured(self) -> dict[str, Any]:
        """Facts, NLL of all three held-out sets, and KL to the base on general rows."""
        sets = (self.rows.questions, self.rows.general_heldout, self.rows.code_heldout)
        faq, general, code = (
            score(self.model, self.tokenizer, rows, batch_size=32) for rows in sets
        )
        return {
            "facts": self.facts(),
            "nll_task": faq.nll,
            "nll_code": code.nll,
            "kl_general": general.kl,
            "nll_general_rise": general.rise,
        }

    def add(self, **row: Any) -> None:
        """Keeps a row and writes the file, so that a run that is cut off has what it had."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        self.found.append(rounded)
        print(rounded, flush=True)
        settings = {k: v for k, v in vars(self.options).items() if k not in ("out", "seeds")}
        if self.options.out or not self.options.smoke:
            write_result(self.name, self.found, settings, self.options.seeds, self.options.out)


def first(bench: Bench, seed: int, arms: tuple[str, ...] = FIRST) -> None:
    """The FAQ with rows of its own, given rows and none, from the same adapter."""
    pools = {"self": "self", "general": bench.rows.general, "none": None}
    bench.fresh(seed)
    start = trained_tensors(bench.model)
    for arm in arms:
        bench.restore(start)
        row = {"part": "first", "arm": arm, "seed": seed}
        with reported(bench, row):
            row |= bench.train("first", bench.rows.faq, pools[arm], seed, bench.options.steps)
            row |= (found := bench.measured())
            if arm == "general":
                bench.after_faq[seed] = (trained_tensors(bench.model), found)


def second(bench: Bench, seed: int) -> None:
    """Code after the FAQ, on the same adapter, with every teacher and pool."""
    from datasets import concatenate_datasets

    rows = bench.rows
    columns = ["instruction", "input", "output"]
    both = concatenate_datasets([pool.select_columns(columns) for pool in (rows.general, rows.faq)])
    pools = {"self": "self", "general": rows.general, "both": both, "none": None}
    if seed not in bench.after_faq:
        bench.fresh(seed)
        bench.train("before", rows.faq, rows.general, seed, bench.options.steps)
        bench.after_faq[seed] = (trained_tensors(bench.model), bench.measured())
    learned, before = bench.after_faq[seed]
    bench.add(part="second", arm="after the FAQ", seed=seed, **before)
    for arm, (teacher, pool) in SECOND.items():
        bench.restore(learned)
        row = {"part": "second", "arm": arm, "seed": seed, "facts": before["facts"]}
        with reported(bench, row):
            steps = bench.options.second_steps
            row |= bench.train(f"second {pool}", rows.code, pools[pool], seed, steps, teacher)
            after = bench.measured()
            row |= {**after, "facts": before["facts"], "facts_after_second": after["facts"]}


def evaluation(bench: Bench) -> None:
    """Time of evaluating one adapter on 5 sets of 200 rows."""
    from lwf_unsloth.evaluation import evaluate

    count = 4 if bench.options.smoke else 200
    sets = {
        "faq": bench.rows.faq,
        "general": load_alpaca(sample_path("general"), test_size=None)["train"],
        "passages": load_text(sample_path("passages"), test_size=None)["train"],
        "questions": bench.rows.questions,
        "code": bench.rows.code,
    }
    # A sample of fewer rows comes round again, which takes the same time as others would.
    sized = {name: [dict(rows[i % len(rows)]) for i in range(count)] for name, rows in sets.items()}
    row: dict[str, Any] = {"part": "evaluation", "arm": evaluation_arm(count), "seed": 0}
    with reported(bench, row):
        started = time.perf_counter()
        evaluate(bench.model, bench.tokenizer, sized)
        row |= {"seconds": round(time.perf_counter() - started, 1)}


def evaluation_arm(count: int) -> str:
    """Named by the kind of machine, so that the time on a CPU stays beside that on a GPU."""
    return f"5 sets x {count} rows, {'GPU' if on_cuda() else 'CPU'}"


@contextmanager
def reported(bench: Bench, row: dict[str, Any]) -> Iterator[None]:
    """Adds the row at the end of the block; an exception becomes its "error"."""
    try:
        yield
    except Exception as error:  # the other arms still count
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    bench.add(**row)


def other_parts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of parts (with --add, of seeds too, on this card) that this run leaves alone, each with
    the commit, date and card that it was measured with: from the folder of the result, else (an
    empty one) from the committed file.
    """
    places = [options.out or RESULTS, *([] if options.smoke else [RESULTS])]
    path = next((p for p in (place / f"{NAME}.json" for place in places) if p.is_file()), None)
    if path is None:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    arm = evaluation_arm(4 if options.smoke else 200)

    def stays(row: dict[str, Any]) -> bool:
        if row["part"] not in options.parts:
            return True
        if row["part"] == "evaluation":
            return bool(row["arm"] != arm)
        return options.add and row["seed"] not in options.seeds and row["card"] == device_name()

    return [row for row in sourced(found) if stays(row)]


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Prints how long the block took, also after an exception, which the other parts outlive."""
    started = time.perf_counter()
    try:
        yield
    except Exception:
        traceback.print_exc()
    print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer; `options.model` becomes the base's own name."""
    model, tokenizer = load_model(
        ModelConfig(options.model, max_seq_length=512, use_gradient_checkpointing=False)
    )
    options.model = model.lwf_loaded.base
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--second-seeds", type=int, default=2, help="so many seeds do both tasks")
    parser.add_argument("--steps", type=int, default=110, help="of the FAQ")
    parser.add_argument("--second-steps", type=int, default=60, help="of the code")
    parser.add_argument(
        "--parts", nargs="+", default=["first", "second", "evaluation"],
        choices=["first", "second", "evaluation"],
    )  # fmt: skip
    parser.add_argument("--add", action="store_true", help="keep the rows of other seeds")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--smoke", action="store_true", help="a few steps, result to --out only")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.second_seeds = options.seeds[:1], 1
        options.steps = options.second_steps = 2
    model, tokenizer = loaded(options)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, model, tokenizer, Rows.of(options.smoke), Path(folder))
        bench.found += other_parts(options)
        measured = any(row["arm"] == "base" for row in bench.found)
        if "first" in options.parts and not measured:
            with timed("base"):
                bench.add(part="first", arm="base", seed=options.seeds[0], **bench.measured())
        for seed in options.seeds if "first" in options.parts else []:
            with timed(f"first, seed {seed}"):
                first(bench, seed)
        for seed in options.seeds[: options.second_seeds] if "second" in options.parts else []:
            with timed(f"second, seed {seed}"):
                second(bench, seed)
        if "evaluation" in options.parts:
            with timed("evaluation"):
                evaluation(bench)


if __name__ == "__main__":
    main()
