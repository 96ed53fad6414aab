"""The whole path on the sample data: before, training, after, and a report of both.

The FAQ of an invented company is the new task. General instructions (for a base model that never
stops: plain passages) are the rehearsal; rows of the same kind that no run trains on show what was
kept.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from lwf_unsloth.adapters import save_adapter
from lwf_unsloth.answer_scores import facts_found
from lwf_unsloth.answers import Generations
from lwf_unsloth.backend import device_name, on_cuda, prepare, versions
from lwf_unsloth.comparison import compare
from lwf_unsloth.config import LwFConfig, ModelConfig
from lwf_unsloth.demo_data import DemoData, demo_data
from lwf_unsloth.demo_view import DemoView, pairs
from lwf_unsloth.generation import DEMO_PROMPTS, generate
from lwf_unsloth.model import default_model, load_model
from lwf_unsloth.precision import autocast_off
from lwf_unsloth.scoring import score
from lwf_unsloth.teacher import trained_tensors
from lwf_unsloth.trainer import LwFTrainer
from lwf_unsloth.whole_files import write_whole_text, writing

TASK_ROWS = 8
"""Task rows an optimizer step; one rehearsal row comes with them."""
GENERAL_PROMPTS = (DEMO_PROMPTS[0], DEMO_PROMPTS[2], DEMO_PROMPTS[3])
SHOWN_QUESTIONS = 3


class Answers(NamedTuple):
    """What the model answers to the held-out questions and to a few general prompts."""

    questions: Generations
    general: Generations

    @property
    def all(self) -> Generations:
        """Both, questions first."""
        return replace(self.questions, answers=self.questions.answers + self.general.answers)


def run_demo(
    output_dir: str | Path = "runs/demo",
    model: ModelConfig | str | None = None,
    *,
    seed: int = 42,
    steps: int = 110,
    questions: int | None = None,
    max_new_tokens: int = 96,
    lambda0: bool = True,
    console: Console | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Teaches the default model an invented FAQ, with teacher KL and rehearsal, and reports.

    Args:
        output_dir: Gets report.json, comparison.html, comparison.md and adapter/.
        model: What to load, settings or a name; None takes `default_model()`.
        seed: Of the adapter's initial values, the order of the rows and the training.
        steps: Optimizer steps, each of 8 task rows and 1 rehearsal row.
        questions: Ask only so many held-out questions; None asks all.
        max_new_tokens: Most tokens of an answer.
        lambda0: After the report train once more without KL and rehearsal: what that forgets.
        console: Where it is shown; None takes the terminal.
        **training: Further settings of `LwFConfig`.

    Returns:
        What report.json holds.

    Raises:
        LwfError: What hinders it, and what to do.
    """
    prepare()
    started, folder, view = time.perf_counter(), Path(output_dir), DemoView(console, 5 + lambda0)
    with writing(folder):  # before the minutes of work
        pass
    view.stage("Loading the model and the rows")
    net, tokenizer = load_model(_model_config(model, seed))
    data = demo_data(net, tokenizer, questions)
    args = training_settings(net, folder, seed, steps, training)
    view.say(f"{net.lwf_loaded}")
    view.say(f"{data}")
    view.stage("Answers before training")
    before = _answer(net, tokenizer, data, max_new_tokens, "before")
    view.stage(f"Training, {steps} steps: cross entropy on the task, teacher KL on the rehearsal")
    untrained = trained_tensors(net)
    trainer = _train(net, tokenizer, data, args, view)
    view.stage("Answers after training")
    after = _answer(net, tokenizer, data, max_new_tokens, "after")
    view.stage("Measuring what was learned and what was kept")
    report = {
        **_circumstances(net, data, args, trainer, max_new_tokens),
        **_measured(net, tokenizer, data, before, after),
    }
    save_adapter(net, tokenizer, folder / "adapter", card=_card(report))
    compare(before.all, after.all).save(folder)
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["peak_memory_bytes"] = peak_memory_bytes()
    _write(report, folder)
    places = [*range(SHOWN_QUESTIONS), *range(-len(GENERAL_PROMPTS), 0)]
    view.report(report, pairs(before.all, after.all, places), folder)
    if lambda0:
        view.stage("The same without KL and rehearsal (Ctrl-C ends it; the report above stands)")
        _add_lambda0(report, net, tokenizer, data, args, untrained, view)
        _write(report, folder)
        view.without_rehearsal(report, folder)
    return report


def training_settings(
    model: Any, folder: Path, seed: int, steps: int, changes: dict[str, Any]
) -> LwFConfig:
    """The demo's `LwFConfig`: a high rate, which the KL on rehearsal rows allows.

    2e-3 was tried on the embedded models; a model of over a billion weights gets a quarter of it.
    On CPU the nine rows of a step go in threes: only one of the three forwards is then padded to
    the length of the rehearsal row, which is what costs time there.
    """
    rows = TASK_ROWS + 1
    values: dict[str, Any] = {
        "learning_rate": 2e-3 if model.lwf_loaded.parameters < 1e9 else 5e-4,
        "warmup_steps": min(10, steps // 10),
        "max_steps": steps,
        "per_device_train_batch_size": rows if on_cuda() else 3,
        "gradient_accumulation_steps": 1 if on_cuda() else 3,
        "rehearsal_ratio": 1 / rows,
        "max_length": 128,
        "seed": seed,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return LwFConfig(str(folder), **{**values, **changes})


def _model_config(model: ModelConfig | str | None, seed: int) -> ModelConfig:
    """Settings given stay as they are; a name gets the demo's."""
    if isinstance(model, ModelConfig):
        return model
    config = default_model() if model is None else ModelConfig(model)
    checkpointing = config.use_gradient_checkpointing if on_cuda() else False
    return replace(
        config, max_seq_length=512, random_state=seed, use_gradient_checkpointing=checkpointing
    )


def _answer(model: Any, tokenizer: Any, data: DemoData, max_new_tokens: int, label: str) -> Answers:
    """Greedy answers to the held-out questions and the general prompts."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "label": label}
    asked = [{"instruction": row["instruction"]} for row in data.heldout]
    return Answers(
        generate(model, tokenizer, asked, batch_size=max(1, len(asked)), **settings),
        generate(model, tokenizer, GENERAL_PROMPTS, **settings),
    )


def _train(model: Any, tokenizer: Any, data: DemoData, args: LwFConfig, view: DemoView) -> Any:
    """Trains with rehearsal, or without where lambda is 0."""
    trainer = LwFTrainer(
        model,
        args=args,
        processing_class=tokenizer,
        train_dataset=data.task,
        rehearsal_dataset=data.rehearsal if args.lwf_lambda else None,
    )
    view.follow(trainer)
    try:
        trainer.train()
    finally:
        autocast_off(trainer)
    return trainer


def _circumstances(
    model: Any, data: DemoData, args: LwFConfig, trainer: Any, max_new_tokens: int
) -> dict[str, Any]:
    """What decides the result, and how the training went."""
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    ends = {}
    for name in ("task_loss", "kl"):
        values = [entry[name] for entry in logs if name in entry]
        ends[f"{name}_first"], ends[f"{name}_last"] = (
            (values[0], values[-1]) if values else (None, None)
        )
    settings = {"rehearsal": data.kind, "max_new_tokens": max_new_tokens}
    return {
        "model": json.loads(json.dumps(model.lwf_loaded.to_dict())),
        "device": device_name(),
        "versions": versions(),
        "settings": {**trainer.args.lwf_settings(), **settings},
        "seed": args.seed,
        "rows": {
            "task": len(data.task),
            "rehearsal": len(data.rehearsal),
            "dropped": data.dropped,
        },
        "steps": trainer.state.global_step,
        **ends,
    }


def _measured(
    model: Any, tokenizer: Any, data: DemoData, before: Answers, after: Answers
) -> dict[str, Any]:
    """Answers, EOS rate, facts, NLL and KL; before is the same model with its adapter off."""
    learned = score(model, tokenizer, data.heldout, batch_size=16)
    kept = score(model, tokenizer, data.retention)
    return {
        "before": _plain(before),
        "after": _plain(after),
        "eos_rate": {
            "before": before.questions.eos_rate,
            "after": after.questions.eos_rate,
            "prompts": len(after.questions),
        },
        "heldout": {
            "nll_before": learned.base_nll,
            "nll_after": learned.nll,
            "facts_before": facts_found(before.questions, data.heldout),
            "facts_after": facts_found(after.questions, data.heldout),
        },
        "retention": {
            "nll_before": kept.base_nll,
            "nll_after": kept.nll,
            "kl": kept.kl,
            "nll_after_lambda0": None,
        },
        "scores": {"heldout": learned.to_dict(), "retention": kept.to_dict()},
    }


def _plain(answers: Answers) -> list[dict[str, Any]]:
    """Answers for JSON, each with what it was asked for."""
    return [
        {
            "prompt": one.prompt,
            "text": one.text,
            "stop": one.stop,
            "tokens": one.tokens,
            "kind": kind,
        }
        for kind, part in zip(("heldout", "general"), answers, strict=True)
        for one in part
    ]


def _add_lambda0(
    report: dict[str, Any],
    model: Any,
    tokenizer: Any,
    data: DemoData,
    args: LwFConfig,
    untrained: dict[str, torch.Tensor],
    view: DemoView,
) -> None:
    """Trains from the same start by cross entropy alone and fills in what that forgets."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in untrained.items():
            parameters[name].copy_(tensor)
    plain = training_settings(
        model,
        Path(args.output_dir),
        args.seed,
        args.max_steps,
        {
            "learning_rate": args.learning_rate,
            "lwf_lambda": 0.0,
            "rehearsal_ratio": 0.0,
            "per_device_train_batch_size": TASK_ROWS,
            "gradient_accumulation_steps": 1,
        },
    )
    try:
        _train(model, tokenizer, data, plain, view)
    except KeyboardInterrupt:
        view.say("Ended before its time: the report has no figure for it.")
        return
    forgot = score(model, tokenizer, data.retention)
    report["retention"] |= {"nll_after_lambda0": forgot.nll, "kl_lambda0": forgot.kl}


def _card(report: dict[str, Any]) -> dict[str, Any]:
    """What the adapter's model card says of the run."""
    names = ("settings", "seed", "rows", "steps", "eos_rate", "heldout", "retention", "versions")
    return {name: report[name] for name in names}


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU where one trains, else of the process."""
    if on_cuda():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write(report: dict[str, Any], folder: Path) -> None:
    text = json.dumps(report, ensure_ascii=False, indent=1)
    with writing(folder):
        write_whole_text(folder / "report.json", text)
