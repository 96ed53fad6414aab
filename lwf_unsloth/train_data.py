"""Rows for the trainer: task and rehearsal rows encoded with one tokenizer and template."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.alpaca import encode_rows
from lwf_unsloth.batches import IGNORED, prompt_length
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.kept_folders import held
from lwf_unsloth.ranks import from_first
from lwf_unsloth.rehearsal import drop_overlap, rehearsal_count
from lwf_unsloth.row_writer import self_rehearsal, writer_identity
from lwf_unsloth.run_record import resumable_written
from lwf_unsloth.teacher import adapter_is_fresh
from lwf_unsloth.written_file import load_written

logger = logging.getLogger(__name__)

ENCODED = {"input_ids", "labels"}
SELF = "self"
"""As rehearsal_dataset: the teacher writes the rows."""
WRITTEN_FILE = "rehearsal.jsonl"
"""In output_dir: the rows that the teacher wrote, which a resumed run takes again."""


@dataclass(frozen=True)
class TrainRows:
    """Task rows, then the rehearsal pool, in one dataset; the sampler gives the order."""

    dataset: Any
    """Dataset with input_ids, labels, prompt_length, is_rehearsal."""
    n_task: int
    """Task rows: the first ones."""
    n_rehearsal: int
    """Rehearsal rows in the pool, 0 where none take part."""


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows as the trainer needs them."""

    tokenizer: Any
    max_length: int | None
    train_on: str

    def __call__(self, rows: Any, name: str, is_rehearsal: bool = False) -> Any:
        """Encodes Alpaca or text rows; encoded rows pass through.

        Args:
            rows: Dataset or list of dicts.
            name: What the user calls them, for messages.
            is_rehearsal: The role of these rows.

        Returns:
            Dataset with input_ids, labels, prompt_length, is_rehearsal.

        Raises:
            DataError: Another type, no rows, or rows that yield no labels.
        """
        from datasets import Dataset

        if not isinstance(rows, (Dataset, list)):
            raise DataError(
                f"{name} is a {type(rows).__name__}, but must be a Dataset or a list of dicts. "
                "load_alpaca and load_text give a dict of them: take its ['train']."
            )
        if len(rows) == 0:
            raise DataError(f"{name} is empty: there is nothing to learn from.")
        if _is_encoded(rows):
            return _encoded(rows, name, is_rehearsal, self.max_length)
        encoded, report = encode_rows(
            self.tokenizer,
            rows,
            max_length=self.max_length,
            train_on=self.train_on,
            is_rehearsal=is_rehearsal,
        )
        logger.info("%s: %s", name, report)
        return encoded

    def evaluation(self, rows: Any) -> Any:
        """Held-out rows, or a dict of named sets of them, encoded; None where there are none."""
        if isinstance(rows, dict):
            named = {name: self(part, f"eval_dataset[{name!r}]") for name, part in filled(rows)}
            return named or None
        return None if rows is None or len(rows) == 0 else self(rows, "eval_dataset")

    def training(self, task: Any, rehearsal: Any, ratio: float, held_out: Any = None) -> TrainRows:
        """Task and rehearsal rows joined.

        Args:
            task: Task rows.
            rehearsal: Rehearsal rows, or None where none take part.
            ratio: Share of rehearsal rows in the mix.
            held_out: Evaluation rows: rehearsal rows with the same text are left out, and told.

        Raises:
            DataError: A set is missing or empty, or yields no labels.
        """
        from datasets import concatenate_datasets

        if task is None:
            raise DataError(
                "train_dataset is missing: there is nothing to learn. Give "
                "load_alpaca(...)['train']."
            )
        _refuse_mixed(task)
        rows = self(task, "train_dataset")
        if rehearsal is None or ratio == 0:
            return TrainRows(rows, len(rows), 0)
        pool = self(without(rehearsal, held_out), "rehearsal_dataset", True)
        needed = rehearsal_count(len(rows), ratio)
        if needed == 0:
            raise ConfigError(
                f"rehearsal_ratio {ratio:g} beside {len(rows)} task rows makes less than half a "
                "rehearsal row, so none would come and nothing would be kept. Raise it to "
                f"{1 / (len(rows) + 1):.2g} or more, or leave rehearsal_dataset out."
            )
        counts = (len(rows), needed, 100 * ratio, len(pool))
        logger.info("An epoch has %d task rows and %d rehearsal rows (%.0f %%), from %d.", *counts)
        if needed > len(pool):
            logger.warning(
                "Rehearsal rows repeat in an epoch: %d drawn from %d.", needed, len(pool)
            )
        same = pool if pool.features == rows.features else pool.cast(rows.features)
        return TrainRows(concatenate_datasets([rows, same]), len(rows), len(pool))


def written_rehearsal(
    asked: str, model: Any, tokenizer: Any, args: LwFConfig, task: Any, teacher: Any = None
) -> Any:
    """Rehearsal rows by the teacher: the model as it stands, or a second model.

    Args:
        asked: What was given as rehearsal_dataset: "self".
        model: The model to train.
        tokenizer: Its tokenizer.
        args: The run's settings; output_dir keeps the rows, so that a resumed run has the same.
        task: The task rows, which say how many rehearsal rows the run can use.
        teacher: A second model, or None.

    Returns:
        The rows, None where the ratio takes none.

    Raises:
        DataError: Another text than "self", no task rows, or not a row that could be used.
    """
    if asked != SELF:
        raise DataError(
            f"rehearsal_dataset is the text {asked!r}; the one text that is known is {SELF!r} (the "
            "model writes the rows itself). For a file give load_alpaca(path)['train'] or "
            "load_text(path)['train']."
        )
    if args.rehearsal_ratio == 0 or task is None or not len(task):
        return None

    writer = model if teacher is None else teacher
    adapter = teacher is None and not adapter_is_fresh(model)
    wanted = min(args.self_rehearsal_rows, usable_rehearsal(args, len(task)))

    def write() -> Any:
        path = Path(args.output_dir) / WRITTEN_FILE
        if path.is_file():
            kept = _of_interrupted(path, writer_identity(writer, tokenizer, adapter), wanted, args)
            if kept is not None:
                return kept
        with held(path.parent):  # none writes over rows that another run trains on
            return self_rehearsal(
                writer,
                tokenizer,
                rows=wanted,
                seed=args.seed,
                adapter=adapter,
                path=path,
                rewrite=True,
                progress=not args.disable_tqdm,
            )

    return from_first(write, "write rehearsal rows")


def _of_interrupted(path: Path, writer: dict[str, Any], wanted: int, args: LwFConfig) -> Any:
    """The rows of the run that a checkpoint in output_dir comes from, where they would be written
    over: by the same model, which has been trained since, or because more are wanted now.

    Args:
        path: The file of rows.
        writer: `writer_identity` of who would write now.
        wanted: Rows wanted now.
        args: The run's settings.

    Returns:
        The rows, marked as that run's alone; None where they may be written or serve as they are.
    """
    try:
        found = load_written(path)
    except DataError:
        return None
    differ = {name for name in writer if found.origin.get(name) != writer[name]}
    short = len(found) < wanted and found.report.asked < wanted
    if differ - {"adapter"} or found.origin.get("seed") != args.seed or not (differ or short):
        return None
    found.run = resumable_written(args.output_dir, found.sha256)
    if not found.run:
        return None
    logger.warning(
        "%s holds the rows that the run of %s rehearses, and is kept for its resume: %s.",
        path,
        found.run,
        "the model has been trained since" if differ else f"{wanted} rows would be written now",
    )
    return found


def usable_rehearsal(args: LwFConfig, n_task: int) -> int:
    """Rehearsal rows that a whole run draws, at least 1."""
    if args.max_steps > 0:
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return max(1, math.ceil(args.max_steps * step * args.rehearsal_ratio))
    return max(1, math.ceil(args.num_train_epochs * rehearsal_count(n_task, args.rehearsal_ratio)))


def filled(sets: dict[str, Any]) -> list[tuple[str, Any]]:
    """The named sets that hold rows."""
    return [(name, rows) for name, rows in sets.items() if rows is not None and len(rows)]


def without(rehearsal: Any, held_out: Any) -> Any:
    """Rehearsal rows less those that are held out for evaluation; says how many."""
    sets = [rows for _, rows in filled(held_out if isinstance(held_out, dict) else {"": held_out})]
    for rows in sets:
        if not len(rehearsal) or any(_is_encoded(some) for some in (rows, rehearsal)):
            continue
        rehearsal, dropped = drop_overlap(rehearsal, rows)
        if dropped:
            logger.warning(
                "%d rehearsal rows are left out, since they are in eval_dataset too (rows %s).",
                len(dropped),
                ", ".join(map(str, dropped[:10])),
            )
    return rehearsal


def _is_encoded(rows: Any) -> bool:
    if isinstance(rows, list):
        return bool(rows) and all(isinstance(row, Mapping) and set(row) >= ENCODED for row in rows)
    return set(getattr(rows, "column_names", None) or ()) >= ENCODED


def _refuse_mixed(task: Any) -> None:
    """Refuses task rows among which rehearsal rows are marked: they would be learned as task rows.

    Raises:
        DataError: A row says is_rehearsal.
    """
    if isinstance(task, list):
        marked = sum(isinstance(row, Mapping) and bool(row.get("is_rehearsal")) for row in task)
    else:
        known = "is_rehearsal" in (getattr(task, "column_names", None) or ())
        marked = sum(map(bool, task["is_rehearsal"])) if known else 0
    if marked:
        raise DataError(
            f"{marked} rows of train_dataset are marked is_rehearsal (as mix_rehearsal gives "
            "them), but all of train_dataset is learned by cross entropy. Pass the task rows as "
            "train_dataset and the others as rehearsal_dataset: the trainer mixes them itself."
        )


def _encoded(rows: Any, name: str, is_rehearsal: bool, max_length: int | None) -> Any:
    """Encoded rows with the columns the loss needs, cut at max_length; told as `encode_rows` tells.

    Raises:
        DataError: Ids and labels of different lengths, or no row with a label.
    """
    from datasets import Dataset

    kept: list[dict[str, Any]] = []
    cut = dropped = 0
    for number, row in enumerate(rows, start=1):
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) != len(labels):
            raise DataError(
                f"Row {number} of {name} has {len(ids)} input_ids and {len(labels)} labels: each "
                "token needs its label, -100 where it is not learned."
            )
        cut += max_length is not None and len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if not any(label != IGNORED for label in labels[1:]):
            dropped += 1
            continue
        length = min(prompt_length({**row, "labels": labels}), len(ids))
        kept.append(
            {
                "input_ids": ids,
                "labels": labels,
                "prompt_length": length,
                "is_rehearsal": is_rehearsal,
            }
        )
    if not kept:
        raise DataError(
            f"No row of {name} has a label at max_length={max_length}, so nothing could be "
            "learned. Raise max_length, or look at the labels: -100 marks what is not learned."
        )
    if cut or dropped:
        text = "%s: %d of %d encoded rows are cut at max_length=%s, %d without a label are dropped."
        logger.warning(text, name, cut, len(kept) + dropped, max_length, dropped)
    return Dataset.from_list(kept)
