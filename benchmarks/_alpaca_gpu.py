"""A base model is taught to answer Alpaca instructions, with the KL and at lambda 0 beside it.

Rehearsal is plain passages: what a base model knows is text, and KL on template prompts, which it
never ends, would keep it from ending them. Asked before and after: the five demo prompts and
held-out instructions. Rows whose own answer does not end within --new-tokens are left out of
training and of the test alike, since no answer of their kind could end there.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS
from benchmarks._switches import compile_less

NAME = "alpaca_gemma3_270m"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The row of the run; the comparison of the demo prompts lies in a folder of its name."""
    compile_less(options.model)
    from lwf_unsloth.backend import prepare

    prepare()
    from benchmarks.main_job_gpu import keep
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_model

    started = time.perf_counter()
    settings: dict[str, Any] = {"dtype": "float32", "max_seq_length": 512} if options.smoke else {}
    model, tokenizer = load_model(
        ModelConfig(
            options.model,
            r=options.rank,
            lora_alpha=options.rank,
            random_state=options.seed,
            **{"max_seq_length": 1024, **settings},
        )
    )
    print(model.lwf_loaded, flush=True)
    job = Job(options, model, tokenizer)
    if options.lambda0_to:
        found = job.lambda0(*candidates(options)[0])
        options.lambda0_to.write_text(json.dumps(found), encoding="utf-8")
        return found
    beside = _beside(options) if options.beside else None
    job.ask_before()
    chosen, tried = job.choose()
    job.compare(chosen.answers)
    row = {**chosen.row, "loaded": str(model.lwf_loaded), "candidates": "; ".join(tried)}
    row |= job.measured("", chosen.answers)
    print(json.dumps(row, indent=1), f"{time.perf_counter() - started:.0f} s", flush=True)
    # A run that is cut off from here on leaves this row; else the whole one takes its place.
    keep({"run": NAME, **row, "error": "ended before lambda 0"}, options)
    try:
        first = (chosen.steps, chosen.rate) == candidates(options)[0]
        row |= beside() if beside and first else job.lambda0(chosen.steps, chosen.rate)
    except Exception as error:  # what was measured before still counts
        traceback.print_exc()
        row["error"] = f"lambda 0: {type(error).__name__}: {error}"[:400]
    row["seconds_total"] = round(time.perf_counter() - started, 1)
    return row


def candidates(options: argparse.Namespace) -> list[tuple[int, float]]:
    """(steps, learning rate) in the order in which they are tried."""
    given = [text.split(":") for text in options.candidates]
    return [(int(steps), float(rate)) for steps, rate in given] or [
        (options.steps or 110, options.lr)
    ]


def _beside(options: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """Starts lambda 0 with the first candidate in a process of its own, for a second GPU or one
    that is idle half of the time; gives what waits for it.
    """
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "benchmarks.main_job_gpu", *sys.argv[1:]]
    log = (folder / "log.txt").open("wb")
    run = subprocess.Popen(
        [*command, "--lambda0-to", str(folder / "row.json")], stdout=log, stderr=log
    )

    def wait() -> dict[str, Any]:
        code = run.wait()
        print((folder / "log.txt").read_text(errors="replace")[-3000:], flush=True)
        if code:
            raise RuntimeError(f"the run at lambda 0 ended with {code}")
        return dict(json.loads((folder / "row.json").read_text(encoding="utf-8")))

    return wait


@dataclasses.dataclass
class Run:
    """A training and the answers after it."""

    steps: int
    rate: float
    row: dict[str, Any]
    answers: Any


class Job:
    """Model, rows and the answers before; every training starts from the same adapter."""

    def __init__(self, options: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        from lwf_unsloth.alpaca import load_text
        from lwf_unsloth.generation import DEMO_PROMPTS
        from lwf_unsloth.samples import sample_path

        self.options, self.model, self.tokenizer = options, model, tokenizer
        self.start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.task = self._task_rows()
        passages = load_text(sample_path("passages"), test_size=0.25, seed=options.seed)
        self.rehearsal, self.passages = passages["train"], passages["test"]
        self.wiki = wiki_passages(options.wiki) if options.wiki else []
        asked = self.task["test"].select(range(min(options.instructions, len(self.task["test"]))))
        self.demo = len(DEMO_PROMPTS)
        self.prompts = [*DEMO_PROMPTS, *asked]
        self.before: Any = None

    def ask_before(self) -> None:
        """The answers of the base: the adapter is off, which is the same and quicker."""
        self.before = self.answer("before", adapter=False)
        print(self.before, flush=True)

    def lambda0(self, steps: int, rate: float) -> dict[str, Any]:
        """What plain fine-tuning on as many task rows does."""
        plain = self.learn(steps, rate, lwf_lambda=0.0)
        kept = ("task_loss_last", "seconds", "peak_gib")
        row = {f"{key}_lambda0": plain.row[key] for key in kept}
        return row | self.measured("_lambda0", plain.answers)

    def _task_rows(self) -> Any:
        from lwf_unsloth.alpaca import load_alpaca
        from lwf_unsloth.samples import sample_path

        options = self.options
        source = options.rows or sample_path("general")
        rows = load_alpaca(source, test_size=0)["train"].to_list()
        longest = options.longest_answer
        longest = options.new_tokens - 1 if longest is None else longest
        kept = [row for row in rows if not longest or self._length(row["output"]) <= longest]
        self.left_out = len(rows) - len(kept)
        return load_alpaca(kept, test_size=min(options.held_out, len(kept) // 2), seed=options.seed)

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def answer(self, label: str, adapter: bool = True) -> Any:
        """Greedy answers to all prompts in one batch."""
        from lwf_unsloth.generation import generate

        return generate(
            self.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.options.new_tokens,
            batch_size=len(self.prompts),
            adapter=adapter,
            label=label,
        )

    def choose(self) -> tuple[Run, list[str]]:
        """The first candidate that reaches the target EOS rate, else the one nearest to it."""
        best, tried = None, []
        for steps, rate in candidates(self.options):
            found = self.learn(steps, rate)
            eos = self.split(found.answers, demo=False).eos_rate
            tried.append(f"{steps} steps at {rate:g}: EOS {eos:.2f}")
            print(tried[-1], flush=True)
            if best is None or eos > self.split(best.answers, demo=False).eos_rate:
                best, weights = found, self._weights()
            if eos >= self.options.eos_target:
                break
        assert best is not None
        self._restore(weights)
        return best, tried

    def learn(self, steps: int, rate: float, lwf_lambda: float | None = None) -> Run:
        """Trains from the start: the default recipe, or lambda 0 with as many task rows a step."""
        from benchmarks.main_job_gpu import trained
        from lwf_unsloth.config import LwFConfig
        from lwf_unsloth.trainer import LwFTrainer

        self._restore(self.start)
        batch, plain = self.options.batch, lwf_lambda == 0
        settings: dict[str, Any] = {
            "max_steps": steps,
            "learning_rate": rate,
            "gradient_accumulation_steps": 1,
            "max_length": 128 if self.options.smoke else 512,
            "seed": self.options.seed,
            "save_strategy": "no",
            "logging_steps": 5 if steps >= 20 else 1,
            "disable_tqdm": True,
            "per_device_train_batch_size": batch if plain else round(batch / 0.9),
        }
        if plain:
            settings["lwf_lambda"] = 0.0
        trainer = LwFTrainer(
            self.model,
            args=LwFConfig(tempfile.mkdtemp(), **settings),
            processing_class=self.tokenizer,
            train_dataset=self.task["train"],
            rehearsal_dataset=None if plain else self.rehearsal,
        )
        row = trained(trainer)
        row |= {"lr": rate, "batch": settings["per_device_train_batch_size"]}
        row |= {"lwf_lambda": trainer.args.lwf_lambda, "ratio": 0.0 if plain else 0.1}
        row |= {"rows_task": len(self.task["train"]), "rows_left_out": self.left_out}
        row |= {"rows_rehearsal": 0 if plain else len(self.rehearsal)}
        return Run(steps, rate, row, self.answer("lambda 0" if plain else "after"))

    def measured(self, suffix: str, answers: Any) -> dict[str, Any]:
        """EOS rate and NLLs of the model as it stands; those of the base without a suffix."""
        from lwf_unsloth.scoring import score

        after = self.split(answers, demo=False)
        found = {
            f"eos_rate_after{suffix}": after.eos_rate,
            f"mean_tokens_after{suffix}": round(after.mean_tokens, 1),
        }
        sets = {"heldout": self.task["test"], "passage": self.passages, "wiki": self.wiki}
        base: dict[str, Any] = {}
        if self.before is not None:
            before = self.split(self.before, demo=False)
            base = {"eos_rate_before": before.eos_rate, "mean_tokens_before": before.mean_tokens}
        for name, rows in sets.items():
            if not len(rows):
                continue
            scored = score(self.model, self.tokenizer, rows, batch_size=32)
            print(f"{name}{suffix}: {scored}", flush=True)
            base |= {f"{name}_nll_before": scored.base_nll, f"{name}_rows": scored.rows}
            found |= {f"{name}_nll_after{suffix}": scored.nll, f"{name}_kl{suffix}": scored.kl}
            found[f"{name}_nll_rise{suffix}"] = scored.rise
        return found if suffix else {**base, **found}

    def split(self, answers: Any, demo: bool) -> Any:
        """The answers to the demo prompts, or those to the held-out instructions."""
        part = slice(0, self.demo) if demo else slice(self.demo, None)
        return dataclasses.replace(answers, answers=tuple(answers.answers[part]))

    def compare(self, answers: Any) -> None:
        """Saves the table of the demo prompts, and every answer."""
        from lwf_unsloth.comparison import compare

        table = compare(self.split(self.before, demo=True), self.split(answers, demo=True))
        every = {"before": self.before.to_dict(), "after": answers.to_dict()}
        for folder in (None if self.options.smoke else RESULTS, self.options.out):
            if folder:
                table.save(folder / NAME)
        if self.options.out:
            path = self.options.out / NAME / "answers.json"
            path.write_text(json.dumps(every, indent=1, ensure_ascii=False), encoding="utf-8")

    def _weights(self) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if n in self.start}

    def _restore(self, weights: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])


def wiki_passages(path: Path, size: int = 900, each: int = 3) -> list[dict[str, str]]:
    """Passages of about `size` characters from beginning, middle and end of every article."""
    found = []
    for article in path.read_text(encoding="utf-8").splitlines():
        sentences = article.replace("\t", " ").split(". ")
        for place in range(each):
            text, at = "", len(sentences) * place // each
            while len(text) < size and at < len(sentences):
                text, at = f"{text}{sentences[at]}. ", at + 1
            if len(text) >= size // 2:
                found.append({"text": text[: 2 * size].strip()})
    return found
