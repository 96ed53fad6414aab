"""LwFTrainer: TRL's SFTTrainer with the teacher's KL term and rehearsal rows.

With lwf_lambda 0 and no rehearsal rows every override steps aside and it is the SFTTrainer exactly.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.alpaca import check_tokenizer
from lwf_unsloth.backend import prepare
from lwf_unsloth.batches import LwFCollator, Roles, token_roles
from lwf_unsloth.cache_plan import with_cache
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.curriculum import Curriculum
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.guard import FiniteSteps
from lwf_unsloth.hidden import model_logits
from lwf_unsloth.kl_meter import KLMeter
from lwf_unsloth.log_window import LogWindow
from lwf_unsloth.measured import Measured
from lwf_unsloth.meters import Meter
from lwf_unsloth.objective import Objective, probe_tokens
from lwf_unsloth.prechecks import (
    check_trainable,
    match_model,
    resolve_rows,
    restore_precision,
    stop_probability,
    warn_stopping,
    warn_warmup,
)
from lwf_unsloth.preflight import tell_memory
from lwf_unsloth.progress import show_progress
from lwf_unsloth.rank_callbacks import CacheSharing, EpochOrder, SameTrained
from lwf_unsloth.rehearsal import RehearsalSampler
from lwf_unsloth.resuming import Resuming
from lwf_unsloth.strength import Strength
from lwf_unsloth.teacher import Teacher, make_teacher
from lwf_unsloth.teacher_cache import CachedTeacher
from lwf_unsloth.train_data import ENCODED, RowEncoder, written_rehearsal
from lwf_unsloth.trainer_inputs import check_ids, check_inputs
from lwf_unsloth.without_effect import check_without_effect

prepare()

from trl import SFTTrainer  # noqa: E402  (Unsloth patches it, so it comes after prepare)

logger = logging.getLogger(__name__)

REFUSED = ("data_collator", "formatting_func", "compute_loss_func", "peft_config")
"""SFTTrainer's arguments that would act on a loss, rows or an adapter that are made here."""
COLUMNS = ["input_ids", "labels", "is_rehearsal", "prompt_length"]


class LwFTrainer(Resuming, Measured, SFTTrainer):
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
            rehearsal_dataset: Rows that keep what the model knew: Alpaca or text rows; or "self":
                the teacher writes them first, into output_dir/rehearsal.jsonl.
            teacher: A second model; None takes the model as it stands now.
            **kwargs: Passed to SFTTrainer (callbacks, optimizers, compute_metrics).

        Raises:
            ConfigError: Settings that leave a part without effect.
            DataError: Rows that yield no labels.
            ModelError: Nothing is trainable.
            TeacherError: A teacher of another vocabulary.
        """
        for name in REFUSED:
            if kwargs.pop(name, None) is not None:
                raise ConfigError(
                    f"{name} was given, but rows, loss and adapter are made here, so it would have "
                    "no effect: leave it out (LoRA's settings stand in ModelConfig)."
                )
        given = {**kwargs, "eval_dataset": eval_dataset}
        check_inputs(model, args, teacher, given)
        args = copy.copy(args) if args is not None else LwFConfig("runs/lwf")
        check_tokenizer(processing_class)
        check_trainable(model)
        match_model(args, model)
        self.lwf_rows = resolve_rows(args, rehearsal_dataset)
        self.plain = args.lwf_lambda == 0 and self.lwf_rows == "none"
        check_without_effect(args, own_loss=not self.plain)
        self.label_smoothing = args.label_smoothing_factor
        if not self.plain:
            args.label_smoothing_factor = 0.0
        self._encode = RowEncoder(processing_class, args.max_length, args.train_on)
        rehearsal = None if self.lwf_rows == "none" else rehearsal_dataset
        if isinstance(rehearsal, str):
            rehearsal = written_rehearsal(
                rehearsal, model, processing_class, args, train_dataset, teacher
            )
        self.written = getattr(rehearsal, "sha256", "")
        self.rehearses_for = getattr(rehearsal, "run", "")
        self.rows = self._encode.training(
            train_dataset, rehearsal, args.rehearsal_ratio, eval_dataset
        )
        held_out = self._encode.evaluation(eval_dataset)
        for name, rows in (("the rows", self.rows.dataset), ("eval_dataset", held_out)):
            check_ids(rows, model, name)
        precise = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=self.rows.dataset,
            eval_dataset=held_out,
            data_collator=LwFCollator(processing_class.pad_token_id, args.pad_to_multiple_of),
            **kwargs,
        )
        self.args.label_smoothing_factor = self.label_smoothing
        # On CUDA Unsloth's __init__ puts the model's own length here, and turns on an evaluation
        # that casts the model, LoRA included, to half precision for good.
        self.args.max_length = self._encode.max_length
        self.args.fp16_full_eval = self.args.bf16_full_eval = False
        self.guard = FiniteSteps(
            args.lwf_max_bad_steps,
            self.rows.dataset,
            self.rows.n_task,
            processing_class,
            args.output_dir,
        )
        self.log_window = LogWindow(self)
        for callback in (self.guard, self.log_window):
            self.add_callback(callback)
        restore_precision(self.model, precise)
        self._start(teacher)

    # ------------------------------------------------------------------ set-up

    def _start(self, teacher: nn.Module | None) -> None:
        """Teacher, head and counters; and what the user must know before the first step."""
        if not self.plain:
            self.model_accepts_loss_kwargs = True  # the loss is divided here, not by the Trainer
        if not self.args.disable_tqdm:
            show_progress(self)
        self.kl_meter = KLMeter.of(self.args)
        self.strength = Strength(self.args, self.accelerator)
        self.curriculum = Curriculum(self.model, self.args)
        for callback in (self.kl_meter, self.strength, self.curriculum):
            self.add_callback(callback)
        tell_memory(self.model, self.args, self.rows.dataset, self.lwf_rows)
        self._counts: Tensor | None = None
        self._meters = {"train": Meter(), "eval": Meter()}
        given = make_teacher(self.model, teacher) if self.args.lwf_lambda > 0 else None
        probe = probe_tokens(self.rows.dataset[0], self.args.device)
        self.objective = Objective.of(
            self.model,
            given,
            probe,
            kl=self.args.lwf_kl,
            label_smoothing=self.label_smoothing,
        )
        if given is not None:
            self.objective.teacher = with_cache(
                given,
                self.args,
                self._encode.tokenizer,
                self.rows.dataset,
                self.rows.n_task,
                self.lwf_rows,
                from_logits=self.objective.full_logits,
            )
            if self.args.world_size > 1 and isinstance(self.teacher, CachedTeacher):
                self.add_callback(CacheSharing(self.teacher))
            logger.info("%s", self.teacher)
            if self.rows.n_rehearsal:
                self._check_stopping(given)

    @property
    def teacher(self) -> Teacher | None:
        """Gives the KL's targets; None where lambda is 0."""
        return self.objective.teacher

    def _check_stopping(self, teacher: Teacher) -> None:
        """Looks at Alpaca rehearsal rows: does the teacher end where their answers end?"""
        rows, first = self.rows.dataset, self.rows.n_task
        some = [rows[i] for i in range(first, min(len(rows), first + 64))]
        alpaca = [row for row in some if row["prompt_length"] > 1]
        eos = self._encode.tokenizer.eos_token_id
        found = stop_probability(teacher, teacher.head, alpaca, eos, self.args.device)
        warn_stopping(found, task_stops=rows[0]["labels"][-1] == eos)

    # ------------------------------------------------- TRL's preparation, ours

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Our rows are encoded already: TRL would drop rows whose labels are all masked."""
        if isinstance(dataset, list) or not set(dataset.column_names) >= ENCODED:
            return self._encode(dataset, "eval_dataset")
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that decide the loss."""
        self._signature_columns = list(COLUMNS)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Task and rehearsal rows evenly interleaved, seeded by epoch."""
        if self.plain:
            return super()._get_train_sampler(*args, **kwargs)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        ratio = self.args.rehearsal_ratio if self.rows.n_rehearsal else 0.0
        sampler = RehearsalSampler(
            self.rows.n_task,
            self.rows.n_rehearsal,
            ratio,
            seed=seed,
            ranks=self.args.world_size,
            batch=self._rank_batch(self._train_batch_size),
            steps=self.args.gradient_accumulation_steps,
        )
        self._drawn = len(sampler)
        if self.args.world_size > 1:
            for callback in (EpochOrder(sampler), SameTrained(self.model)):
                self.remove_callback(type(callback))
                self.add_callback(callback)
        return sampler

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
        if not self.args.dataloader_drop_last:
            samples[-1] = self._counted_once(samples[-1], self._train_batch_size, self._drawn)
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
        n_ce, n_kl = self._totals(roles, num_items_in_batch)
        used = self.lwf_lambda, self.lwf_temperature
        if not training:  # evaluations are compared with each other: always the same measure
            used = used[0], float(self.args.lwf_temperature)
        result = self.objective(model, inputs, roles, n_ce, n_kl, *used)
        self._meters["train" if training else "eval"].add(result, roles)
        if training:
            self.strength.add(result, roles, used)
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

    @property
    def lwf_lambda(self) -> float:
        """Weight of the KL term at this step."""
        return self.strength.at(self.state)[0]

    @property
    def lwf_temperature(self) -> float:
        """Temperature at this step."""
        return self.strength.at(self.state)[1]

    # ------------------------------------------------------------------ the run

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; says it when the warm-up is longer than half the run."""
        warn_warmup(self.args.get_warmup_steps(num_training_steps), num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)
