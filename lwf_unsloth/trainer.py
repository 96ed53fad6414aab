"""LwFTrainer: TRL's SFTTrainer with the teacher's KL term and rehearsal rows.

With lwf_lambda 0 and no rehearsal rows every override steps aside and it is the SFTTrainer exactly.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.alpaca import check_tokenizer, encode_rows
from lwf_unsloth.backend import prepare
from lwf_unsloth.batches import LwFCollator, Roles, prompt_length, token_roles
from lwf_unsloth.checkpoints import latest_checkpoint, load_teacher, save_teacher
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import DataError
from lwf_unsloth.hidden import head_matches, model_hidden, model_logits, output_head
from lwf_unsloth.locks import model_lock
from lwf_unsloth.losses import LwfLoss, lwf_loss, lwf_loss_from_logits
from lwf_unsloth.meters import Meter
from lwf_unsloth.prechecks import (
    check_trainable,
    match_model,
    resolve_rows,
    stop_probability,
    warn_stopping,
    warn_warmup,
)
from lwf_unsloth.rehearsal import RehearsalSampler, rehearsal_count
from lwf_unsloth.teacher import make_teacher

prepare()

from trl import SFTTrainer  # noqa: E402  (Unsloth patches it, so it comes after prepare)

logger = logging.getLogger(__name__)

COLUMNS = ["input_ids", "labels", "is_rehearsal", "prompt_length"]


class LwFTrainer(SFTTrainer):
    """Fine-tunes on task rows while the KL to the teacher keeps what the model knew.

    loss = sum CE / N_ce + lambda * sum KL / N_kl, N counted over the whole accumulated batch and
    all ranks, so batch 8 x 1 gives the gradient of 1 x 8.
    """

    def __init__(
        self,
        model: nn.Module,
        args: LwFConfig | None = None,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        rehearsal_dataset: Any = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Encodes the rows, makes the teacher and says what will be trained.

        Args:
            model: From `load_model`.
            args: Settings; never written into.
            processing_class: The tokenizer, with its template.
            train_dataset: Task rows: Alpaca or text rows (Dataset or list of dicts), or encoded
                rows.
            eval_dataset: Held-out rows of the same kinds, or a dict of named sets.
            rehearsal_dataset: Rows that keep what the model knew: Alpaca or text rows.
            teacher: A second model; None takes the model as it stands now.
            **kwargs: Passed to SFTTrainer (callbacks, optimizers, compute_metrics).

        Raises:
            ConfigError: Settings that leave a part without effect.
            DataError: Rows that yield no labels.
            ModelError: Nothing is trainable.
            TeacherError: A teacher of another vocabulary.
        """
        args = copy.copy(args) if args is not None else LwFConfig("runs/lwf")
        check_tokenizer(processing_class)
        check_trainable(model)
        match_model(args, model)
        self.lwf_rows = resolve_rows(args, rehearsal_dataset)
        self.plain = args.lwf_lambda == 0 and self.lwf_rows == "none"
        self.label_smoothing = args.label_smoothing_factor
        if not self.plain:
            args.label_smoothing_factor = 0.0
        self._encoding = {"max_length": args.max_length, "train_on": args.train_on}
        self._tokenizer_used = processing_class
        train, self._n_task, self._n_rehearsal = self._mixed(args, train_dataset, rehearsal_dataset)
        if eval_dataset is not None:
            eval_dataset = self._encode_eval(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=train,
            eval_dataset=eval_dataset,
            data_collator=LwFCollator(processing_class.pad_token_id, args.pad_to_multiple_of),
            **kwargs,
        )
        self.args.label_smoothing_factor = self.label_smoothing
        self._start(teacher)

    # ------------------------------------------------------------------ set-up

    def _mixed(self, args: LwFConfig, task: Any, rehearsal: Any) -> tuple[Any, int, int]:
        """Encodes task and rehearsal rows and joins them; the sampler gives the order."""
        from datasets import concatenate_datasets

        if task is None:
            raise DataError(
                "train_dataset is missing: there is nothing to learn. Give "
                "load_alpaca(...)['train']."
            )
        task_rows = self._encode(task, "train_dataset", False)
        if self.lwf_rows == "none" or rehearsal is None or args.rehearsal_ratio == 0:
            return task_rows, len(task_rows), 0
        rehearsal_rows = self._encode(rehearsal, "rehearsal_dataset", True)
        needed = rehearsal_count(len(task_rows), args.rehearsal_ratio)
        logger.info(
            "%d task rows and %d rehearsal rows an epoch (%.0f %% of the mix), drawn from %d.",
            len(task_rows),
            needed,
            100 * args.rehearsal_ratio,
            len(rehearsal_rows),
        )
        if needed > len(rehearsal_rows):
            logger.warning(
                "Rehearsal rows repeat within an epoch: %d drawn from %d.",
                needed,
                len(rehearsal_rows),
            )
        return (
            concatenate_datasets([task_rows, rehearsal_rows]),
            len(task_rows),
            len(rehearsal_rows),
        )

    def _encode(self, rows: Any, name: str, is_rehearsal: bool) -> Any:
        """Rows as input_ids, labels, prompt_length, is_rehearsal; encoded rows pass through."""
        from datasets import Dataset

        if isinstance(rows, list):
            rows = Dataset.from_list(rows)
        if not isinstance(rows, Dataset):
            raise DataError(
                f"{name} is a {type(rows).__name__}, but must be a Dataset or a list of dicts. "
                "load_alpaca and load_text give a dict of them: take its ['train']."
            )
        if len(rows) == 0:
            raise DataError(f"{name} is empty: there is nothing to learn from.")
        if {"input_ids", "labels"} <= set(rows.column_names):
            return _encoded_columns(rows, is_rehearsal)
        encoded, report = encode_rows(
            self._tokenizer_used, rows, is_rehearsal=is_rehearsal, **self._encoding
        )
        logger.info("%s: %s", name, report)
        return encoded

    def _encode_eval(self, rows: Any) -> Any:
        if isinstance(rows, dict):
            return {
                name: self._encode(part, f"eval_dataset[{name!r}]", False)
                for name, part in rows.items()
            }
        return self._encode(rows, "eval_dataset", False)

    def _start(self, teacher: nn.Module | None) -> None:
        """Teacher, head and counters; and what the user must know before the first step."""
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs or not self.plain
        self._counts: Tensor | None = None
        self._meters = {"train": Meter(), "eval": Meter()}
        self.teacher = make_teacher(self.model, teacher) if self.args.lwf_lambda > 0 else None
        self.head = output_head(self.model)
        if self.teacher is not None:
            logger.info("%s", self.teacher)
        if self.head is not None and not self.plain and not self._head_is_whole():
            logger.warning(
                "This model transforms its logits in a way not known here: taking full logits."
            )
            self.head = None
        if self._n_rehearsal and self.teacher is not None:
            self._check_stopping()

    def _check_stopping(self) -> None:
        """Looks at Alpaca rehearsal rows: does the teacher end where their answers end?"""
        assert self.teacher is not None
        eos = self._tokenizer_used.eos_token_id
        last = min(len(self.train_dataset), self._n_task + 64)
        rows = [self.train_dataset[i] for i in range(self._n_task, last)]
        alpaca = [row for row in rows if row["prompt_length"] > 1]
        task_stops = self.train_dataset[0]["labels"][-1] == eos
        where = self.args.device
        found = stop_probability(self.teacher, self.teacher.head, alpaca, eos, where)
        warn_stopping(found, task_stops)

    def _head_is_whole(self) -> bool:
        ids = torch.tensor([self.train_dataset[0]["input_ids"][:8]], device=self.args.device)
        assert self.head is not None
        return head_matches(self.model, self.head, ids)

    # ------------------------------------------------- TRL's preparation, ours

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Our rows are encoded already: TRL would drop rows whose labels are all masked."""
        if isinstance(dataset, list) or not {"input_ids", "labels"} <= set(dataset.column_names):
            return self._encode(dataset, "eval_dataset", False)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that decide the loss."""
        self._signature_columns = list(COLUMNS)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Task and rehearsal rows evenly interleaved, seeded by epoch."""
        if self.plain:
            return super()._get_train_sampler(*args, **kwargs)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        ratio = self.args.rehearsal_ratio if self._n_rehearsal else 0.0
        return RehearsalSampler(self._n_task, self._n_rehearsal, ratio, seed=seed)

    def _send_telemetry(self) -> None:
        """No usage data is sent."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written beside the saved adapter, with the settings that made it."""

    # ---------------------------------------------------------------- the loss

    def _roles(self, batch: dict[str, Tensor], training: bool) -> Roles:
        """In evaluation the KL is measured on every token of the rows."""
        rows = self.lwf_rows if training else "all"
        with_kl = self.teacher is not None
        return token_roles(batch, rows, self.args.rehearsal_ce or not training, with_kl)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Counts the tokens of both terms over the whole accumulated batch, and all ranks."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.plain or not samples:
            return samples, items
        counts = (
            torch.stack([self._roles(batch, True).counts for batch in samples])
            .sum(0)
            .to(self.args.device)
        )
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        self._counts = counts
        return samples, counts[:2].sum().clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch: CE + lambda KL, each over the tokens of the whole batch.

        Args:
            model: The student, wrapped or not.
            inputs: What `LwFCollator` gives; not changed.
            return_outputs: Also the model's outputs, whose logits cost one more forward.
            num_items_in_batch: CE tokens of the whole accumulated batch; None counts this batch
                alone.

        Returns:
            The scalar loss, or (loss, outputs).
        """
        if self.plain:
            batch = {k: v for k, v in inputs.items() if k not in ("is_rehearsal", "prompt_length")}
            return super().compute_loss(
                model, batch, return_outputs, num_items_in_batch=num_items_in_batch
            )
        training = self.model.training and torch.is_grad_enabled()
        roles = self._roles(inputs, training)
        result = self._lwf_loss(model, inputs, roles, *self._totals(roles, num_items_in_batch))
        self._meters["train" if training else "eval"].add(result, roles)
        loss = result.total * (self.accelerator.num_processes if training else 1)
        if not return_outputs:
            return loss
        with torch.no_grad():
            logits = model_logits(model, inputs["input_ids"], inputs["attention_mask"])
        return loss, {"loss": loss, "logits": logits}

    def _totals(self, roles: Roles, items: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """N_ce and N_kl, at least 1."""
        counts = roles.counts
        n_ce = (
            counts[:2].sum()
            if items is None
            else torch.as_tensor(items, device=counts.device).sum()
        )
        if items is not None and self._counts is not None:
            counts = self._counts
        return n_ce.clamp(min=1), counts[2:].sum().clamp(min=1)

    def _lwf_loss(
        self, model: nn.Module, batch: dict[str, Any], roles: Roles, n_ce: Tensor, n_kl: Tensor
    ) -> LwfLoss:
        """Teacher forward on the rows that carry KL, student forward, both terms."""
        full = self.head is None or (self.teacher is not None and self.teacher.head is None)
        kept = roles.kept.flatten()  # (B*(T-1),)
        teacher = self._teacher_rows(batch, roles.kl, full)
        forward = model_logits if full else model_hidden
        student = forward(model, batch["input_ids"], batch["attention_mask"])[:, :-1].flatten(0, 1)[
            kept
        ]
        settings = {
            "kl_rows": roles.kl.flatten()[kept],
            "n_ce": n_ce,
            "n_kl": n_kl,
            "lwf_lambda": self.lwf_lambda,
            "temperature": self.lwf_temperature,
            "kl": self.args.lwf_kl,
            "targets": roles.targets.flatten()[kept],
            "label_smoothing": self.label_smoothing,
            "groups": roles.rehearsal.flatten()[kept].long(),
            "num_groups": 2,
            "return_rows": True,
        }
        labels = roles.labels.flatten()[kept]
        if full:
            return lwf_loss_from_logits(student, labels, teacher_logits=teacher, **settings)
        assert self.head is not None
        other = None if self.teacher is None else self.teacher.head
        return lwf_loss(student, labels, self.head, teacher=teacher, teacher_head=other, **settings)

    def _teacher_rows(self, batch: dict[str, Any], kl: Tensor, full: bool) -> Tensor | None:
        """Teacher outputs (K, H or V) of the tokens that carry KL, from a forward on their rows
        alone.
        """
        rows = kl.any(1).nonzero()[:, 0]
        if self.teacher is None or not len(rows):
            return None
        longest = int(batch["attention_mask"][rows].sum(1).max())
        ids, mask = batch["input_ids"][rows, :longest], batch["attention_mask"][rows, :longest]
        out = self.teacher.logits(ids, mask) if full else self.teacher.hidden(ids, mask)
        return out[:, :-1][kl[rows, : longest - 1]]

    @property
    def lwf_lambda(self) -> float:
        """Weight of the KL term at this step."""
        return float(self.args.lwf_lambda)

    @property
    def lwf_temperature(self) -> float:
        """Temperature at this step."""
        return float(self.args.lwf_temperature)

    # ------------------------------------------------------- evaluation and log

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One evaluation batch; logits only where a metric needs them."""
        if self.plain:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss, outputs["logits"], inputs["labels"]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """As TRL's; `task_loss` and `kl` are weighted by tokens, `loss` is the task loss."""
        self._eval_prefix = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds task_loss, kl, kl_task and kl_rehearsal, in nats per token, to what the Trainer
        logs.
        """
        prefix = getattr(self, "_eval_prefix", "eval")
        if f"{prefix}_loss" in logs and not self.plain:
            found = self._meters["eval"].take(self.accelerator)
            logs[f"{prefix}_loss"] = found["task_loss"]
            logs.update(
                {f"{prefix}_{name}": found[name] for name in ("task_loss", "kl") if name in found}
            )
        elif "loss" in logs:
            logs.update(self._meters["train"].take(self.accelerator) or {"task_loss": logs["loss"]})
        super().log(logs, start_time)

    # ------------------------------------------------------- run and checkpoints

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Trains; `resume_from_checkpoint=True` takes the newest complete checkpoint, or starts
        anew without one.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.info(
                    "No complete checkpoint in %s: starting from the first step.",
                    self.args.output_dir,
                )
            else:
                logger.info("Resuming from %s.", resume_from_checkpoint)
        at = str(resume_from_checkpoint) if resume_from_checkpoint else None
        with model_lock(self.model, "training"):
            return super().train(resume_from_checkpoint=at, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; says it when the warm-up is longer than half the run."""
        warn_warmup(self.args.get_warmup_steps(num_training_steps), num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapter, tokenizer and the teacher's state; no pickle of the arguments, which could hold
        a token.
        """
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        save_teacher(self.teacher, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter, and the teacher of the interrupted run."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_teacher(self.teacher, Path(resume_from_checkpoint))


def _encoded_columns(rows: Any, is_rehearsal: bool) -> Any:
    """Encoded rows with the columns the loss needs, and no others."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": list(row["input_ids"]),
                "labels": list(row["labels"]),
                "prompt_length": prompt_length(row),
                "is_rehearsal": is_rehearsal,
            }
            for row in rows
        ]
    )
