"""What a run leaves on disk and takes up again: checkpoints that are whole, and the same run after
a resume.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lwf_unsloth.backend import prepare
from lwf_unsloth.checkpoints import (
    common_checkpoint,
    data_alone,
    load_teacher,
    refuse_pickled_weights,
    save_teacher,
    saving,
    tell_end,
    tell_missing,
)
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.guard import FiniteSteps
from lwf_unsloth.kept_folders import held
from lwf_unsloth.locks import model_lock
from lwf_unsloth.log_window import LogWindow
from lwf_unsloth.memory import free_memory
from lwf_unsloth.out_of_memory import explained, is_out_of_memory
from lwf_unsloth.ranks import together
from lwf_unsloth.run_record import RunRecord
from lwf_unsloth.teacher_cache import CachedTeacher
from lwf_unsloth.trained_template import train_in
from lwf_unsloth.trainer_inputs import checkpoint_given

prepare()

from transformers import Trainer  # noqa: E402

logger = logging.getLogger(__name__)


class Resuming(Trainer):
    """Checkpoints and the resume of `LwFTrainer`, which sets what is used here."""

    lwf_rows: str
    guard: FiniteSteps
    strength: Any
    curriculum: Any
    teacher: Any
    log_window: LogWindow
    written: str = ""
    """Hash of the file of rows that the model wrote itself; empty without one."""
    rehearses_for: str = ""
    """Checkpoint whose run alone may have these rehearsal rows; empty for any run."""
    _record: RunRecord | None = None
    _counts: Any

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Trains; `resume_from_checkpoint=True` takes the newest complete checkpoint, or starts
        anew without one.

        Raises:
            ConfigError: The checkpoint comes from another run, or another one trains in a folder
                that this one would write to.
            DoesNotFit: Memory ran out; says in which part and what to lower.
            ModelError: A checkpoint could not be written, or no gradient is finite any more.
        """
        with self._alone():
            return self._train_alone(resume_from_checkpoint, **kwargs)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the folders of the run's files: output_dir where it gets checkpoints, and what a
        callback says in `writes_to`.
        """
        args = self.args
        found = [Path(args.output_dir)] if args.save_strategy != "no" else []
        callbacks = self.callback_handler.callbacks
        found += [one.writes_to for one in callbacks if getattr(one, "writes_to", None)]
        with ExitStack() as holds:
            with together("take the run's folder"):
                for folder in {one.resolve(): one for one in found}.values():
                    if args.process_index == 0:
                        holds.enter_context(held(folder))
            yield

    def _train_alone(self, resume_from_checkpoint: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = common_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(
                    "No complete checkpoint in %s: starting from the first step.",
                    self.args.output_dir,
                )
            else:
                logger.info("Resuming from %s.", resume_from_checkpoint)
        at = checkpoint_given(resume_from_checkpoint)
        self._check_rows(at)
        train_in(self.model, self.processing_class)
        self._record = RunRecord(self)
        if at is not None:
            self._record.check(Path(at))
        free = free_memory()
        with model_lock(self.model, "training"):
            try:
                found = super().train(resume_from_checkpoint=at, **kwargs)
                if at is not None:
                    tell_end(Path(at), self.state.global_step)
                return found
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                given = (self.args, self.lwf_rows, self.guard.shape, free)
                raise explained(error, self.model, *given, self.state.global_step + 1) from error
            finally:
                self._counts = None
                if isinstance(self.teacher, CachedTeacher):
                    self.teacher.close()

    def _check_rows(self, at: str | None) -> None:
        """Refuses a new run on rehearsal rows that are kept for another's resume.

        Raises:
            ConfigError: Such rows, and no checkpoint.
        """
        if self.rehearses_for and at is None:
            raise ConfigError(
                f"The rehearsal rows in {self.args.output_dir} belong to the run of "
                f"{self.rehearses_for}, which this is not: they were written by the model as it "
                "was then. Resume that run (train(resume_from_checkpoint=True)), or give the new "
                "one another output_dir, where rows are written anew."
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, but no step more where the resumed run had ended already."""
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; what goes wrong in it can be told with its rows."""
        self.guard.begin(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.curriculum.mask()
        self.guard.end(loss)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's; older ones are removed when the new one is whole."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.flush()
        wait = self.accelerator.wait_for_everyone
        with saving(self.args, self.state, folder, wait):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapter, tokenizer and the teacher's state; no pickle of the arguments, which could hold
        a token.
        """
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        save_teacher(self.teacher, folder)
        self.strength.save(folder)
        if self._record is not None:
            self._record.save(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process's random numbers, and its sums of the log line."""
        super()._save_rng_state(output_dir)
        self.log_window.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter, and the teacher and the log line of the interrupted run."""
        folder = Path(resume_from_checkpoint)
        tell_missing(folder)
        refuse_pickled_weights(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_teacher(self.teacher, folder)
        self.strength.load(folder)
        self.log_window.load(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's; a state that would run code is refused."""
        with data_alone(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """As the Trainer's, where this run scales its loss too: in fp16 alone."""
        if self.accelerator.scaler is None:
            return
        with data_alone(Path(checkpoint or "")):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer's; a state that would run code is refused."""
        with data_alone(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)
