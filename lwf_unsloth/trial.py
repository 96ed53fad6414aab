"""One trial of a sweep, in a process of its own: train, measure, write the result, end.

`python -m lwf_unsloth.trial JOB` reads `job.json` in the folder JOB and leaves `result.json` there.
The process holds all of the GPU memory that a trial takes, so its end gives all of it back.
"""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.sweep_result import COMPLETE, FAILED, SKIPPED
from lwf_unsloth.train_file import TrainFile, checked_sections, load_data, settings_of
from lwf_unsloth.whole_files import write_whole_text

JOB, RESULT = "job.json", "result.json"


def tie_to_parent() -> None:
    """Ends this process when the one that started it is gone, also by SIGKILL.

    The parent holds the other end of standard input and never writes: its end is the parent's.
    """

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be in the way at the end
            pass
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=wait, daemon=True).start()


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes the result so that it is there whole or not at all."""
    write_whole_text(folder / RESULT, json.dumps(result))


def with_settings(base: dict[str, dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
    """The sections of a training file with a trial's settings in their places.

    Args:
        base: `model`, `training`, `data`.
        params: Setting -> value; "lwf_lambda", or with its section: "data.limit".

    Raises:
        ConfigError: A name that no section has.
    """
    from lwf_unsloth.config import LwFConfig, ModelConfig

    known = {
        "model": {one.name for one in fields(ModelConfig)},
        "training": {one.name for one in fields(LwFConfig) if one.init},
    }
    found = {name: dict(base.get(name, {})) for name in ("model", "training", "data")}
    for name, value in params.items():
        section, dot, key = name.partition(".")
        if not dot:
            key, homes = name, [one for one, names in known.items() if name in names]
            if len(homes) != 1:
                where = f"both {' and '.join(homes)}" if homes else "neither model nor training"
                raise ConfigError(
                    f"{name} is to be tried, but {where} has such a setting: write model.{name} or "
                    f"training.{name}."
                )
            section = homes[0]
        elif section not in found:
            raise ConfigError(f"{name} is to be tried, but the sections are {', '.join(found)}.")
        found[section][key] = value
    return found


def file_of(job: dict[str, Any], params: dict[str, Any], output_dir: Path) -> TrainFile:
    """A trial's training file; nothing but the adapter is kept unless the sweep's file says so."""
    sections = with_settings(job["base"], params)
    quiet = {"save_strategy": "no", "disable_tqdm": True}
    sections["training"] = {**quiet, **sections["training"], "output_dir": str(output_dir)}
    path = Path(job["path"])
    return checked_sections(path, {name: part for name, part in sections.items() if part})


def check(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Looks at every value that will be tried, and at the data, before the first trial."""
    for params in job["corners"]:
        file = file_of(job, params, folder)
        settings_of(file)
        _model_settings(file)
    task, _ = load_data(file)
    if not len(task["test"]):
        raise ConfigError(
            "The task has no held-out rows (data.test_size), so no gain can be measured."
        )
    _general(job["evaluate"])
    return {"state": COMPLETE}


def _model_settings(file: TrainFile) -> None:
    from lwf_unsloth.config import ModelConfig

    if file.model:
        ModelConfig(**file.model)


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains and measures as a job says.

    Returns:
        `state` "complete" with `gain`, `forgetting`, `scores`, `adapter`; or "skipped" with
        `reason` where the preflight says that it does not fit.
    """
    from lwf_unsloth.config import ModelConfig  # noqa: F401  (Unsloth goes before transformers)
    from lwf_unsloth.preflight import DoesNotFit, fits, longest_row
    from lwf_unsloth.train_file import save_trained, trainer_from

    file = file_of(job, job["params"], folder)
    args = settings_of(file)
    task, rehearsal = load_data(file)
    try:
        trainer = trainer_from(file, args, task, rehearsal)
    except DoesNotFit as error:
        return {"state": SKIPPED, "reason": str(error)}
    sizes = args.per_device_train_batch_size, longest_row(trainer.rows.dataset)
    fit = fits(trainer.model, *sizes, args=trainer.args, rows=trainer.lwf_rows)
    if not fit:
        return {"state": SKIPPED, "reason": str(fit)}
    trainer.train()
    adapter = save_trained(trainer)
    found = _measure(job["evaluate"], trainer, task)
    config = {
        "model": file.model,
        "training": trainer.args.lwf_settings(),
        "data": file.data,
    }
    extra = {"config": config, "seed": args.seed, "adapter": str(adapter.resolve())}
    extra["file"] = with_settings(job["base"], job["params"])
    return {"state": COMPLETE, **found, **extra, **_machine()}


def _general(given: dict[str, Any]) -> Any:
    """The rows that forgetting is measured on."""
    from lwf_unsloth.alpaca import load_alpaca, load_text

    if given.get("general"):
        return load_alpaca(given["general"], test_size=None)["train"]
    return load_text(given["general_text"], test_size=None)["train"]


def _measure(given: dict[str, Any], trainer: Any, task: Any) -> dict[str, Any]:
    """Gain on the task's held-out rows and forgetting on the general ones."""
    from lwf_unsloth.evaluation import evaluate

    gain, forgetting = given["gain"], given["forgetting"]
    scores = evaluate(
        trainer.model,
        trainer.processing_class,
        {"task": task["test"], "general": _general(given)},
        task="task",
        train_rows=task["train"],
        answers=gain == "right" or forgetting == "leak",
        limit=given["limit"],
        answers_limit=given.get("answers_limit"),
        max_length=trainer.args.max_length,
    )
    gained = scores["task"][gain].gain
    lost = scores["general"][forgetting]
    worse = lost.tuned.value if forgetting == "kl" else -(lost.gain or 0.0)
    values = {
        name: {key: measure.to_dict() for key, measure in one.measures.items()}
        for name, one in scores.items()
    }
    objectives = {"gain": gain, "forgetting": forgetting}
    found = {"gain": gained, "forgetting": worse, "objectives": objectives}
    return {**found, "scores": values, "notes": list(scores.notes)}


def _machine() -> dict[str, Any]:
    """Versions, device and the most memory that torch held."""
    from lwf_unsloth.backend import device_name, on_cuda, versions

    peak = None
    if on_cuda():
        import torch

        peak = torch.cuda.max_memory_allocated()
    return {"versions": versions(), "device": device_name(), "peak_bytes": peak}


def main(folder: Path) -> None:
    """Runs the job of a folder; whatever happens, a result says it."""
    tie_to_parent()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    try:
        result = check(job, folder) if "corners" in job else run(job, folder)
    except Exception as error:  # the reason must reach the study
        traceback.print_exc()
        result = {"state": FAILED, "reason": f"{type(error).__name__}: {error}"}
    write_result(folder, result)
    sys.stderr.flush()
    os._exit(0)  # libraries' own threads and exit hooks hold nothing up


if __name__ == "__main__":
    main(Path(sys.argv[1]))
