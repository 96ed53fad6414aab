"""A training run as a YAML file: model, training and data, every key known before any work."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.ranks import from_first, together

SECTIONS = ("model", "training", "data")
TASK_KEYS = ("shares", "columns", "limit", "test_size", "seed", "split")
REHEARSAL_KEYS = ("rehearsal", "rehearsal_text")
SELF = "self"
"""As data.rehearsal: the model writes the rows itself."""
FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


@dataclass(frozen=True)
class TrainFile:
    """The three sections of a training file, their keys known."""

    path: Path
    model: dict[str, Any]
    """Arguments of `ModelConfig`; empty takes the default model."""
    training: dict[str, Any]
    """Arguments of `LwFConfig`."""
    data: dict[str, Any]
    """`task`, `rehearsal` (a source, or "self") or `rehearsal_text`, and arguments of `load_alpaca`
    for the task."""


def read_train_file(path: str | Path) -> TrainFile:
    """Reads a training file; no model library is loaded for it.

    Args:
        path: A YAML file with the sections `model`, `training` and `data`.

    Raises:
        ConfigError: Not readable, not YAML, or sections and data keys that are not known.
    """
    path = Path(path)
    return checked_sections(path, read_yaml(path))


def checked_sections(path: Path, values: Any) -> TrainFile:
    """The sections of what a file holds.

    Args:
        path: The file, for what is said about it.
        values: What was read from it.

    Raises:
        ConfigError: Sections and data keys that are not known, or no task.
    """
    found = values if isinstance(values, dict) else {}
    if not found or not all(isinstance(part, dict) for part in found.values()):
        raise ConfigError(
            f"{path} holds {type(values).__name__}; it needs the sections {', '.join(SECTIONS)}, "
            "each with settings under it: without them it does not say what to train. "
            "`lwf-unsloth train --help` shows an example."
        )
    refuse_unknown(path, "sections", found, SECTIONS)
    file = TrainFile(path, *(dict(found.get(name, {})) for name in SECTIONS))
    refuse_unknown(path, "data", file.data, ("task", *REHEARSAL_KEYS, *TASK_KEYS))
    if not file.data.get("task"):
        raise ConfigError(f"{path} has no data.task: there is nothing to learn. Name a source.")
    if all(file.data.get(key) for key in REHEARSAL_KEYS):
        raise ConfigError(
            f"{path} has data.rehearsal and data.rehearsal_text; one pool is rehearsed, so only "
            "one of them would act. Keep Alpaca rows (rehearsal) or passages (rehearsal_text)."
        )
    return file


def train_from(file: TrainFile, *, resume: bool = False) -> Path:
    """Trains as the file says and saves the adapter; in one process, or in each of several.

    Args:
        file: From `read_train_file`.
        resume: Go on from the newest whole checkpoint of its output_dir, if there is one.

    Returns:
        The adapter's folder, `adapter` in the run's output_dir.

    Raises:
        LwfError: Unknown or wrong settings, bad data, a model that cannot be loaded.
    """
    with together("take the settings"):
        args = settings_of(file)
    with together("read the data"):
        task, rehearsal = load_data(file)
    with together("load the model and make the trainer"):
        trainer = trainer_from(file, args, task, rehearsal)
    trainer.train(resume_from_checkpoint=True if resume else None)
    return save_trained(trainer)


def settings_of(file: TrainFile) -> Any:
    """The run's `LwFConfig`; the model's keys are looked at too.

    Raises:
        ConfigError: Unknown or wrong settings.
    """
    from lwf_unsloth.config import LwFConfig, ModelConfig

    refuse_unknown(file.path, "model", file.model, (f.name for f in fields(ModelConfig)))
    refuse_unknown(
        file.path, "training", file.training, (f.name for f in fields(LwFConfig) if f.init)
    )
    return LwFConfig(**{"output_dir": f"runs/{file.path.stem}", **file.training})


def load_data(file: TrainFile) -> tuple[Any, Any]:
    """The task's splits, and what is rehearsed: rows, "self" or None.

    Raises:
        DataError: A source that cannot be read.
    """
    from lwf_unsloth.alpaca import load_alpaca, load_text

    settings = {key: file.data[key] for key in TASK_KEYS if key in file.data}
    task = load_alpaca(file.data["task"], **settings)
    rehearsal: Any = None
    if file.data.get("rehearsal") == SELF:
        rehearsal = SELF  # the model writes the rows, once it is loaded
    elif file.data.get("rehearsal"):
        rehearsal = load_alpaca(file.data["rehearsal"], test_size=None)["train"]
    elif file.data.get("rehearsal_text"):
        rehearsal = load_text(file.data["rehearsal_text"], test_size=None)["train"]
    return task, rehearsal


def trainer_from(file: TrainFile, args: Any, task: Any, rehearsal: Any) -> Any:
    """Loads the model and makes the `LwFTrainer`."""
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import default_model, load_model
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = load_model(ModelConfig(**file.model) if file.model else default_model())
    return LwFTrainer(
        model,
        args=args,
        processing_class=tokenizer,
        train_dataset=task["train"],
        eval_dataset=task["test"] if len(task["test"]) else None,
        rehearsal_dataset=rehearsal,
    )


def save_trained(trainer: Any) -> Path:
    """Saves the adapter, with a card of settings and rows, into the run's output_dir; of several
    processes the first writes, and the others wait.
    """
    from lwf_unsloth.adapters import save_adapter

    rows = {"task": trainer.rows.n_task, "rehearsal": trainer.rows.n_rehearsal}
    card = {"settings": trainer.args.lwf_settings(), "rows": rows}
    folder = Path(trainer.args.output_dir) / "adapter"
    given = (trainer.model, trainer.processing_class, folder)
    return from_first(lambda: save_adapter(*given, card=card), "save the adapter")


def read_yaml(path: Path) -> Any:
    """The file's values; 2e-4 is a number, as in YAML 1.2 (PyYAML alone reads it as text)."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, with its own table of what looks like a number."""

    Loader.yaml_implicit_resolvers = {
        first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} could not be read as YAML ({error}), so it does not say what to train."
        ) from error


def refuse_unknown(path: Path, where: str, values: Iterable[Any], known: Iterable[str]) -> None:
    """Raises a ConfigError that names what is not known and what was probably meant."""
    names = list(known)
    wrong = [str(key) for key in values if key not in names]
    if not wrong:
        return
    close = [match for key in wrong for match in difflib.get_close_matches(key, names, n=1)]
    meant = f" Did you mean {', '.join(close)}?" if close else ""
    raise ConfigError(
        f"{path}, {where}: {', '.join(wrong)} is not known here and would have no effect.{meant} "
        f"Known: {', '.join(names)}."
    )
