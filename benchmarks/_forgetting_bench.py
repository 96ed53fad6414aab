"""One loaded model, on which the forgetting benchmark trains and measures adapter after adapter.

The base stays loaded; an adapter is begun anew by filling its tensors, which gives the numbers of
a fresh load (tests/test_forgetting_benchmark.py).
"""

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._adapters import fresh
from benchmarks._forgetting_arms import DIALS, FAMILIES, FROZEN, Job, Row, scaled, settings_of
from benchmarks._forgetting_store import packed
from benchmarks._sql_task import LEAK, TASK, Data, exact_sql
from lwf_unsloth.backend import on_cuda, prepare

prepare()

import torch  # noqa: E402

from lwf_unsloth.adapter_dial import scale_adapter  # noqa: E402
from lwf_unsloth.answer_scores import AnswerValues, answer_values  # noqa: E402
from lwf_unsloth.config import LwFConfig, ModelConfig  # noqa: E402
from lwf_unsloth.generation import generate  # noqa: E402
from lwf_unsloth.leak import given_form  # noqa: E402
from lwf_unsloth.model import load_model  # noqa: E402
from lwf_unsloth.precision import autocast_off  # noqa: E402
from lwf_unsloth.row_writer import self_rehearsal  # noqa: E402
from lwf_unsloth.scoring import score  # noqa: E402
from lwf_unsloth.trainer import LwFTrainer  # noqa: E402

TOKENS = 64
"""Most tokens of an answer: a query (the longest has 58), or the start of a general answer."""
SELF_ROWS = 200
Items = dict[str, dict[str, str]]


class Bench:
    """A model in 4 bits, its rows, and a job at a time."""

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        """Loads the model once.

        Args:
            options: The command's, with model, rank, steps, answers, benchmarks.
            data: Of this model.
        """
        self.options, self.data = options, data
        self.model, self.tokenizer = load_model(
            ModelConfig(
                options.model_path or options.model,
                max_seq_length=1024 if not options.smoke else 512,
                r=options.rank,
                lora_alpha=options.rank,
                use_gradient_checkpointing=False,
                dtype=options.dtype,
            )
        )
        self.folder = Path(tempfile.mkdtemp(prefix="lwf-forgetting-"))
        self._written: dict[str, Any] = {}

    def run(self, job: Job) -> tuple[list[Row], Items]:
        """Trains and measures; of plain SFT the turned-down adapters too.

        Returns:
            The rows, and by job key each test row's values.
        """
        _give_back()  # what a job that failed has left
        fresh(self.model, job.seed)
        trained = {} if job.arm == FROZEN else self.train(job)
        rows, items = [], {}
        scales = DIALS if job.arm == "plain_sft" and job.seed == self.options.seeds[0] else ()
        for scale in (1.0, *scales):
            at = job if scale == 1 else scaled(job, scale)
            with scale_adapter(self.model, scale):
                found, items[at.key] = self.measure(with_skills=scale == 1)
            rows.append({"task": TASK, "arm": at.arm, "lr": job.lr, "seed": job.seed, **found})
        rows[0] |= trained
        return [{k: _rounded(v) for k, v in row.items()} for row in rows], items

    # -------------------------------------------------------------------- training

    def train(self, job: Job) -> Row:
        """Trains the adapter as it stands; seconds, memory and the log's last figures."""
        family = FAMILIES[job.arm]
        settings = settings_of(job, self.options.steps, self.options.rank)
        pool = None if family.pool is None else self.pool(family.pool)
        if on_cuda():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer = LwFTrainer(
            self.model,
            args=LwFConfig(str(self.folder / "run"), **settings),
            processing_class=self.tokenizer,
            train_dataset=_alpaca(self.data.train),
            rehearsal_dataset=pool,
        )
        try:
            trainer.train()
        finally:
            autocast_off(trainer)
        log = trainer.state.log_history
        losses = [line.get("task_loss", line.get("loss")) for line in log]
        kl = [line["kl_rehearsal"] for line in log if line.get("kl_rehearsal") is not None]
        row = {
            "steps_done": trainer.state.global_step,
            "seconds_train": round(time.perf_counter() - started, 1),
            "task_loss_last": next((one for one in reversed(losses) if one is not None), None),
            "kl_rehearsal_last": kl[-1] if kl else None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda() else None,
            "settings": {**family.changes, "rehearsal_ratio": settings["rehearsal_ratio"]},
        }
        del trainer
        _give_back()
        return row

    def pool(self, name: str) -> Any:
        """Rehearsal rows; what the base writes is written once a process, before it is trained."""
        if name == "general":
            return self.data.pool
        if name not in self._written:
            smoke = self.options.smoke
            more: dict[str, Any] = {"kind": "answers"} if name == "answers" else {}
            if name == "answers":
                asked = self.data.pool[:SELF_ROWS]
                more["prompts"] = [{k: row[k] for k in ("instruction", "input")} for row in asked]
            self._written[name] = self_rehearsal(
                self.model,
                self.tokenizer,
                rows=4 if smoke else SELF_ROWS,
                max_new_tokens=48 if smoke else 128,
                batch_size=SELF_ROWS if on_cuda() else None,
                progress=False,
                **more,
            )
        return self._written[name]

    # ------------------------------------------------------------------- measuring

    def measure(self, with_skills: bool) -> tuple[Row, dict[str, str]]:
        """The figures of the adapter as it stands, and the values that they are made of."""
        started = time.perf_counter()
        size, data = self.options.score_batch, self.data
        task, general = (
            score(self.model, self.tokenizer, _alpaca(rows), batch_size=size)
            for rows in (data.test, data.general)
        )
        web = score(self.model, self.tokenizer, data.web, batch_size=size) if data.web else None
        answers, leaks, ended_general = self._answers()
        right, ended = answers.right, answers.ended
        assert (
            task.base_nll is not None
            and task.row_base_nll
            and task.row_kl
            and general.row_base_nll
            and general.row_kl
        )
        row = {
            "new_score": _mean(right),
            "new_nll_base": task.base_nll,
            "new_nll": task.nll,
            "gain": task.base_nll - task.nll,
            "kl_task": task.kl,
            "kl_general": general.kl,
            "nll_general_base": general.base_nll,
            "nll_general_tuned": general.nll,
            "nll_web_base": web and web.base_nll,
            "nll_web_tuned": web and web.nll,
            "kl_web": web and web.kl,
            "leak_rate": _mean(leaks),
            "eos_rate": _mean(ended),
            "eos_rate_general": _mean(ended_general),
            "accuracy": self._skills() if with_skills else {},
        }
        row["seconds_measure"] = round(time.perf_counter() - started, 1)
        rises = zip(general.row_nll, general.row_base_nll, strict=True)
        return row, {
            "right": "".join(str(int(one)) for one in right),
            "leak": "".join(str(int(one)) for one in leaks),
            "task_gain": packed(
                [b - a for a, b in zip(task.row_nll, task.row_base_nll, strict=True)]
            ),
            "general_kl": packed(general.row_kl),
            "general_rise": packed([a - b for a, b in rises]),
            "general_tokens": " ".join(map(str, general.row_tokens)),
        }

    def _answers(self) -> tuple[AnswerValues, tuple[float, ...], tuple[float, ...]]:
        """Greedy answers to test and general rows, in batches of both: a decoding step takes the
        CPU as long for many rows as for few.

        Returns:
            Whether each query is right and ended by itself; of each general answer whether it is
            in SQL, and whether it ended by itself.
        """
        test, general = self.data.test, self.data.general
        found = generate(
            self.model, self.tokenizer, _prompts([*test, *general]),
            max_new_tokens=4 if self.options.smoke else TOKENS,
            batch_size=self.options.answer_batch,
        )  # fmt: skip
        queries, prose = found.answers[: len(test)], found.answers[len(test) :]
        values = answer_values(replace(found, answers=queries), test, exact_sql)
        flags = given_form(LEAK).flags(answer.text for answer in prose)
        return values, flags, tuple(float(answer.stop == "eos") for answer in prose)

    def _skills(self) -> dict[str, float]:
        """Accuracy by task of the harness, where some were asked for."""
        if not self.options.benchmarks:
            return {}
        from lwf_unsloth.harness import evaluate_benchmarks

        found = evaluate_benchmarks(
            self.model, self.tokenizer, self.options.benchmarks,
            limit=self.options.benchmark_items, batch_size=64, base=None,
        )  # fmt: skip
        return accuracies(found)


def _give_back() -> None:
    """Frees what nothing holds any more: other processes share the card."""
    gc.collect()
    if on_cuda():
        torch.cuda.empty_cache()


def accuracies(found: Any) -> dict[str, float]:
    """Task -> the tuned model's accuracy, of `evaluate_benchmarks`' result."""
    return {
        one.task: round(one.tuned_score.value, 4)
        for one in found.scores
        if one.metric == "acc" and one.tuned_score is not None
    }


def _alpaca(rows: list[Row]) -> list[dict[str, str]]:
    return [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]


def _prompts(rows: list[Row]) -> list[dict[str, str]]:
    return [{name: row[name] for name in ("instruction", "input")} for row in rows]


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
