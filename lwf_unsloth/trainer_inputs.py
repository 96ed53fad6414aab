"""What the trainer was given, looked at before any work: kinds of arguments, ids of tokens."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pyarrow.compute
from torch import nn

from lwf_unsloth.backend import prepare
from lwf_unsloth.batches import IGNORED
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError, DataError, ModelError, TeacherError
from lwf_unsloth.field_types import short
from lwf_unsloth.whole_files import writing

prepare()

from transformers import TrainerCallback  # noqa: E402


def check_inputs(model: Any, args: Any, teacher: Any, given: Mapping[str, Any]) -> None:
    """Checks the kinds of what `LwFTrainer` is given.

    Args:
        model: What is to be trained.
        args: The settings, or None.
        teacher: A second model, or None.
        given: Its other arguments: eval_dataset, callbacks, compute_metrics.

    Raises:
        LwFError: Of the kind of what is wrong, with what is needed.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model is {_said(model)}, but it must be the model that load_model gives."
        )
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TeacherError(
            f"teacher is {_said(teacher)}, but it must be a loaded model, or None for the model "
            "itself as it stands now."
        )
    if args is not None and not isinstance(args, LwFConfig):
        raise ConfigError(
            f"args is a {type(args).__name__}, but must be an LwFConfig, which is an SFTConfig "
            "with the lwf_ and rehearsal settings: give it the same settings by the same names."
        )
    _check_output(args)
    _check_callbacks(given.get("callbacks"))
    if not (given.get("compute_metrics") is None or callable(given["compute_metrics"])):
        raise ConfigError(
            f"compute_metrics is {_said(given['compute_metrics'])}, but it must be a function of "
            "predictions, or None."
        )
    _check_held_out(given.get("eval_dataset"))


def _said(value: Any) -> str:
    return f"{short(value)} ({type(value).__name__})"


def _check_output(args: LwFConfig | None) -> None:
    """Makes the run's folder, and tries it where checkpoints will be written: not hours later.

    Raises:
        DiskError: It may not be made or written.
    """
    if args is None or not args.should_save:
        return
    folder = Path(args.output_dir)
    with writing(folder):
        if args.save_strategy != "no" and not os.access(folder, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _check_callbacks(callbacks: Any) -> None:
    """A list of callbacks or their classes."""
    if callbacks is None:
        return
    listed = isinstance(callbacks, (list, tuple))
    for callback in callbacks if listed else ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ConfigError(
                f"callbacks holds {_said(callback)}, but each must be a TrainerCallback."
            )
    if not listed:
        raise ConfigError(f"callbacks is {_said(callbacks)}, but it must be a list of callbacks.")


def _check_held_out(rows: Any) -> None:
    """A set of rows, or a dict of named sets."""
    for name, part in rows.items() if isinstance(rows, dict) else [("", rows)]:
        where = f"eval_dataset[{name!r}]" if isinstance(rows, dict) else "eval_dataset"
        if part is None and not isinstance(rows, dict):
            return
        if isinstance(part, (str, bytes)) or not hasattr(part, "__len__"):
            raise DataError(
                f"{where} is {_said(part)}, but it must be a Dataset or a list of dicts: "
                "load_alpaca(...)['test'], or a dict of such sets by name."
            )


def check_ids(dataset: Any, model: nn.Module, name: str) -> None:
    """Every token and label has a place in the model's vocabulary.

    Args:
        dataset: Encoded rows.
        model: The model that they go into.
        name: What the user calls them, for the message.

    Raises:
        DataError: Ids beyond the embedding, as a tokenizer that was given tokens makes them.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for part, rows in dataset.items():
            check_ids(rows, model, f"{name}[{part!r}]")
        return
    size = cast(Any, model).get_input_embeddings().num_embeddings
    for column in ("input_ids", "labels"):
        ids = pyarrow.compute.list_flatten(dataset.data.column(column))
        if column == "labels":
            ids = pyarrow.compute.filter(ids, pyarrow.compute.not_equal(ids, IGNORED))
        found = pyarrow.compute.min_max(ids).as_py()
        low, high = found["min"], found["max"]
        if low is not None and (low < 0 or high >= size):
            raise DataError(
                f"{column} of {name} go from {low} to {high}, but the model has {size} tokens, "
                f"0 to {size - 1}. Encode the rows with the model's own tokenizer; one that was "
                "given new tokens needs a model with as many embeddings."
            )


def checkpoint_given(value: Any) -> str | None:
    """The folder of resume_from_checkpoint, None where the run starts anew.

    Args:
        value: What was given, other than True.

    Raises:
        ConfigError: No path, or no folder there.
    """
    if value is None or value is False or value == "":
        return None
    if not isinstance(value, (str, os.PathLike)) or "\0" in os.fspath(value):
        raise ConfigError(
            f"resume_from_checkpoint is {_said(value)}, but it must be True (the newest whole "
            "checkpoint), the folder of one, or None."
        )
    if not Path(value).is_dir():
        raise ConfigError(
            f"resume_from_checkpoint is {os.fspath(value)!r}, but there is no such folder. True "
            "takes the newest whole checkpoint of output_dir."
        )
    return os.fspath(value)
