"""What a checkpoint says of the run it comes from: a resume is the same run, or says why not.

Rows, template, tokenizer, base and adapter decide what the rest of the run would train on: with
another one a resumed run is neither the old nor a new one, and is refused. Settings that a run may
well change on its way (lambda, learning rate, length) are told.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwf_unsloth.checkpoints import RUN_FILE, latest_checkpoint
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.teacher_identity import tokenizer_identity
from lwf_unsloth.templates import get_template
from lwf_unsloth.whole_files import write_whole_text

logger = logging.getLogger(__name__)

FORMAT = 1

SAME = {
    "base": "the adapter belongs to the weights that it was trained on",
    "lora": "the saved weights have the shapes of the adapter that they come from",
    "tokenizer": "the ids of the rows mean something else with another one",
    "template": "the first part of the run learned to answer in it",
    "max_length": "it decides where rows are cut",
    "train_on": "it decides the labels",
    "task rows": "the run goes on in their order",
    "rehearsal rows": "they are what is kept",
    "rehearsal_ratio": "it decides the order of the rows",
    "lwf_rows": "it decides where the KL acts",
    "lwf_kl": "it is another objective",
    "rehearsal_ce": "it is another objective",
    "rows a step": "the rows that are passed over are counted in steps",
    "seed": "it decides the order of the rows",
    "data_seed": "it decides the order of the rows",
}
"""What must be the same, and why."""
TOLD = (
    "lwf_lambda",
    "lwf_lambda_schedule",
    "lwf_temperature",
    "lwf_temperature_schedule",
    "lwf_kl_budget",
    "rank_schedule",
    "freeze_schedule",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "num_train_epochs",
    "max_steps",
    "optim",
    "fp16",
    "bf16",
)
"""Settings that a resumed run takes as they are now; a change is told and kept in the record."""


class RunRecord:
    """The record of a trainer's run: made once, written into each checkpoint."""

    def __init__(self, trainer: Any) -> None:
        """Reads the settings and hashes the rows.

        Args:
            trainer: An `LwFTrainer`.
        """
        args, model, rows = trainer.args, trainer.model, trainer.rows
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        n = rows.n_task
        self.same: dict[str, Any] = {
            "base": _base(model),
            "lora": _lora(model),
            "tokenizer": tokenizer_identity(trainer.processing_class),
            "template": _template(trainer.processing_class),
            "task rows": rows_identity(rows.dataset, 0, n),
            "rehearsal rows": rows_identity(rows.dataset, n, len(rows.dataset)),
            "lwf_rows": trainer.lwf_rows,
            "rows a step": a_step,
        }
        self.same.update({name: getattr(args, name) for name in SAME if name not in self.same})
        if not rows.n_rehearsal:
            self.same["rehearsal_ratio"] = 0.0  # without rows it has no effect
        self.told = {name: _plain(getattr(args, name)) for name in TOLD}
        self.written = trainer.written
        """Hash of the file of rows that the model wrote itself; empty where there is none."""
        self.changes: list[dict[str, Any]] = []

    def save(self, folder: Path) -> None:
        """Writes the record into a checkpoint."""
        values = {
            "format": FORMAT,
            "same": self.same,
            "settings": self.told,
            "written": self.written,
            "changes": self.changes,
        }
        write_whole_text(folder / RUN_FILE, json.dumps(values, indent=1) + "\n")

    def check(self, folder: Path) -> None:
        """Compares with the run that a checkpoint comes from; says which settings have changed.

        Args:
            folder: The checkpoint. One without a record (of another tool) is taken as it is.

        Raises:
            ConfigError: Another run; names what differs, before anything is loaded.
        """
        before = read_record(folder)
        if before is None:
            logger.info("%s does not say what run it comes from.", folder.name)
            return
        wrong = [
            f"{name} ({before['same'][name]} there, {now} now: {SAME[name]})"
            for name, now in self.same.items()
            if name in before["same"] and before["same"][name] != now
        ]
        if wrong:
            raise ConfigError(
                f"{folder.name} in {folder.parent} comes from another run than this one: "
                f"{'; '.join(wrong)}. To go on with it, give the trainer the same as before. For "
                "another run take another output_dir; it can begin with the adapter of this "
                "checkpoint: load_model(config, adapter=checkpoint)."
            )
        self._tell(folder, before)

    def _tell(self, folder: Path, before: Mapping[str, Any]) -> None:
        """Says which settings are others from here on."""
        had = before["settings"]
        new = {
            name: [had[name], now]
            for name, now in self.told.items()
            if name in had and had[name] != now
        }
        self.changes = list(before.get("changes") or [])
        if not new:
            return
        self.changes.append({"at": folder.name, **new})
        logger.warning(
            "Resuming from %s with other settings: %s. The rest of the run takes the new values, "
            "so it is not the uninterrupted run with either.",
            folder.name,
            ", ".join(f"{name} {a} -> {b}" for name, (a, b) in new.items()),
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a checkpoint; None where there is none that this version reads."""
    try:
        found = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        usable = found["format"] == FORMAT and isinstance(found["same"], dict)
        return found if usable and isinstance(found["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resumable_written(output_dir: str | Path, sha256: str) -> str:
    """Name of the newest whole checkpoint if its run rehearsed the rows of this file, else "".

    Args:
        output_dir: The run's folder.
        sha256: Hash of its file of self-written rows.
    """
    folder = latest_checkpoint(output_dir, quiet=True)
    record = read_record(folder) if folder is not None else None
    return folder.name if folder and record and record.get("written") == sha256 else ""


def rows_identity(rows: Any, first: int, end: int) -> str:
    """How many encoded rows there are, and a hash of all ids, labels and lengths, in their order.

    Args:
        rows: Dataset with input_ids, labels, prompt_length.
        first: The first row.
        end: The row after the last.
    """
    if first == end:
        return "none"
    whole = hashlib.sha256()
    chosen = rows.select(range(first, end)).with_format("arrow")
    for table in chosen.iter(batch_size=1000):
        for name in ("input_ids", "labels"):
            for part in table.column(name).chunks:
                whole.update(part.value_lengths().to_numpy().astype("int64").tobytes())
                whole.update(part.flatten().to_numpy().astype("int64").tobytes())
        whole.update(table.column("prompt_length").to_numpy().astype("int64").tobytes())
    return f"{end - first} rows {whole.hexdigest()[:16]}"


def _base(model: Any) -> str:
    loaded = getattr(model, "lwf_loaded", None)
    if loaded is None:
        return type(model).__name__
    one = loaded.identity
    mark = one.source or one.fingerprint or one.revision
    return f"{one.name if not mark else mark[:16]}, {loaded.bits} bits"


def _lora(model: Any) -> dict[str, Any]:
    configs = getattr(model, "peft_config", {})
    return {
        name: {
            "r": config.r,
            "target_modules": sorted(map(str, config.target_modules or ())),
            "dropout": config.lora_dropout,
        }
        for name, config in configs.items()
        if hasattr(config, "r")
    }


def _template(tokenizer: Any) -> str:
    template = get_template(tokenizer)
    text = json.dumps(template.to_dict(), sort_keys=True)
    return f"{template.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _plain(value: Any) -> Any:
    """An enum's value, or the value."""
    return getattr(value, "value", value)
