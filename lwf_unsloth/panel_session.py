"""What the panel does, without widgets: each step is the library's own call."""

import contextlib
import gc
import itertools
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lwf_unsloth.adapter_dial import scale_adapter
from lwf_unsloth.adapters import save_adapter
from lwf_unsloth.alpaca import AlpacaData, encode_rows, load_alpaca, load_text
from lwf_unsloth.answers import Generations
from lwf_unsloth.backend import prepare
from lwf_unsloth.comparison import Comparison, compare
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.generation import generate
from lwf_unsloth.locks import model_lock
from lwf_unsloth.model import load_model
from lwf_unsloth.panel_code import SAMPLES, PanelPlan, Rehearsal
from lwf_unsloth.precision import autocast_off
from lwf_unsloth.preflight import Fit, fits
from lwf_unsloth.samples import sample_path
from lwf_unsloth.teacher import trained_tensors
from lwf_unsloth.trainer import LwFTrainer
from lwf_unsloth.whole_files import alone_in, write_whole, writing

prepare()

from transformers import TrainerCallback  # noqa: E402  (Unsloth patches it, so it comes after)
from transformers.trainer_callback import PrinterCallback, ProgressCallback  # noqa: E402


class Follower(TrainerCallback):
    """Shows each log line, and ends the run with a checkpoint when asked to."""

    def __init__(self, stop: threading.Event, show: Callable[[Any], None]) -> None:
        """Starts with nothing to do.

        Args:
            stop: Set from another thread, it ends the run after the step that is under way.
            show: Called with the trainer's state at every log line.
        """
        self.stop = stop
        self.show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves and stops where it was asked for."""
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands the state on."""
        self.show(state)


class PanelSession:
    """Rows, model, trainer and answers of one panel, and the calls that make them."""

    def __init__(self, model: Any = None, tokenizer: Any = None) -> None:
        """Starts without rows.

        Args:
            model: A loaded model, or None.
            tokenizer: Its tokenizer.
        """
        self.task: AlpacaData | None = None
        self.model, self.tokenizer = model, tokenizer
        self.start = {} if model is None else trained_tensors(model)
        self.trainer: Any = None
        self.stopping = threading.Event()
        self._rehearsal: tuple[Rehearsal, Any] = (Rehearsal("none"), None)
        self._longest: tuple[Any, int] = (None, 0)
        self._before: tuple[Any, Generations] | None = None

    # ------------------------------------------------------------------ rows and model

    def load_rows(self, source: str) -> AlpacaData:
        """Reads and checks the task rows.

        Raises:
            DataError: No source, or one that cannot be used.
        """
        if not source.strip():
            raise DataError("No file is named: there is nothing to learn. Upload or name one.")
        self.task, self._longest = None, (None, 0)
        self.task = load_alpaca(source.strip())
        return self.task

    def load_model(self, name: str) -> Any:
        """Loads a model in place of the one that is there, whose memory is freed first.

        Raises:
            ModelError: No name, or not loadable.
        """
        if not name.strip():
            raise ModelError("No model is named: choose one of the list, or write a hub id.")
        self.model = self.tokenizer = self.trainer = self._before = None
        self.start, self._longest = {}, (None, 0)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.model, self.tokenizer = load_model(name.strip())
        self.start = trained_tensors(self.model)
        return self.model

    def rehearsal_rows(self, rehearsal: Rehearsal) -> Any:
        """The rehearsal rows, loaded once: a Dataset, "self" or None."""
        if self._rehearsal[0] != rehearsal:
            self._rehearsal = (rehearsal, _load_rehearsal(rehearsal))
        return self._rehearsal[1]

    # ------------------------------------------------------------------- preflight, training

    def measure(self, plan: PanelPlan) -> None:
        """Finds the longest encoded row, which decides the memory; takes seconds on long files.

        Raises:
            DataError: Rows that cannot be trained on.
        """
        if self.task is None or self.model is None:
            return
        rehearsal = self.rehearsal_rows(plan.rehearsal)
        length = _config(plan).max_length
        sets = [self.task["train"], *([] if isinstance(rehearsal, str | None) else [rehearsal])]
        found = [
            encode_rows(self.tokenizer, rows, max_length=length)[1].longest
            for rows in sets
            if len(rows)
        ]
        self._longest = (self._measured(plan), max(found))

    def fit(self, plan: PanelPlan) -> Fit | None:
        """The preflight's verdict; None where rows or model are not there or not measured yet.

        Raises:
            ConfigError: A setting out of range.
        """
        args = _config(plan)
        if self.task is None or self.model is None or self._longest[0] != self._measured(plan):
            return None
        rows = "rehearsal" if plan.rehearsal.kind != "none" and args.rehearsal_ratio else "all"
        batch = args.per_device_train_batch_size
        return fits(self.model, batch, self._longest[1], args=args, rows=rows)

    def _measured(self, plan: PanelPlan) -> tuple[Any, ...]:
        """What the longest row belongs to."""
        return id(self.task), id(self.tokenizer), plan.rehearsal, plan.training.get("max_length")

    def train(self, plan: PanelPlan, show: Callable[[Any], None]) -> Any:
        """Trains from where the model stood when it was loaded or given, or from a checkpoint.

        Args:
            plan: What is set; with `resume` the newest checkpoint of its output_dir goes on.
            show: Called with the trainer's state at every log line.

        Returns:
            The trainer.

        Raises:
            LwfError: Rows or model are missing, settings out of range, the model in use.
        """
        if self.task is None:
            raise DataError("There are no rows yet: check a file first.")
        if self.model is None:
            raise ModelError("There is no model yet: load one first.")
        args = _config(plan, disable_tqdm=True)
        rehearsal = self.rehearsal_rows(plan.rehearsal)
        with model_lock(self.model, "training"):
            _put_back(self.model, self.start)
            trainer = self.trainer = LwFTrainer(
                self.model,
                args=args,
                processing_class=self.tokenizer,
                train_dataset=self.task["train"],
                rehearsal_dataset=rehearsal,
                callbacks=[Follower(self.stopping, show)],
            )
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            try:
                trainer.train(resume_from_checkpoint=True if plan.resume else None)
            finally:
                autocast_off(trainer)
        return trainer

    # ------------------------------------------------------------------ answers, adapter

    def ask(self, plan: PanelPlan) -> Comparison:
        """The base's answer beside the one at the dial's scale; the model is left as it was.

        Raises:
            LwfError: No model, no prompt, or settings that do not fit.
        """
        if self.model is None:
            raise ModelError("There is no model yet: load one first.")
        asked, tokens = dict(plan.prompt), plan.max_new_tokens
        with model_lock(self.model, "answering"):
            if self._before is None or self._before[0] != (asked, tokens):
                before = generate(
                    self.model,
                    self.tokenizer,
                    asked,
                    max_new_tokens=tokens,
                    adapter=False,
                    label="before",
                )
                self._before = ((asked, tokens), before)
            with _dial(self.model, plan.scale):
                label = "after" if plan.scale == 1 else f"after, dial at {plan.scale:g}"
                after = generate(
                    self.model, self.tokenizer, asked, max_new_tokens=tokens, label=label
                )
        return compare(self._before[1], after)

    def save(self, plan: PanelPlan) -> Path:
        """Saves an ordinary adapter with the dial's scale in it.

        Raises:
            ModelError: There is no model.
        """
        if self.model is None:
            raise ModelError("There is no model yet: load one first.")
        folder = Path(plan.output_dir) / "adapter"
        card: dict[str, Any] = {"scale": plan.scale}
        if self.trainer is not None:
            card["settings"] = self.trainer.args.lwf_settings()
        with model_lock(self.model, "saving"), _dial(self.model, plan.scale):
            return save_adapter(self.model, self.tokenizer, folder, card=card)


def keep_upload(name: str, content: bytes, folder: Path) -> Path:
    """Writes an uploaded file below `folder`, whatever its name holds. One of that name with other
    content stays, since another session may train on it: the new one gets a number.

    Returns:
        Its path.
    """
    plain = re.sub(r"[^\w.\- ]", "_", name.replace("\\", "/").rsplit("/", 1)[-1]).strip(". ")
    plain = plain[-50:].lstrip(". ")  # the ending stays; 50 letters of any script fit a file's name
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", plain):  # devices on Windows
        plain = f"_{plain}"
    first = path = folder / (plain or "upload")
    with writing(folder), alone_in(folder):
        for number in itertools.count(2):
            if path.is_symlink() or not path.is_file() or path.read_bytes() == content:
                break
            path = first.with_name(f"{first.stem}-{number}{first.suffix}")
        write_whole(path, content)
    return path


def next_run(folder: Path) -> Path:
    """The first of run-1, run-2, ... that is not there yet: no run finds another's checkpoints."""
    numbers = [
        int(path.name.removeprefix("run-"))
        for path in folder.glob("run-*")
        if path.name.removeprefix("run-").isdigit()
    ]
    return folder / f"run-{max(numbers, default=0) + 1}"


def new_run(folder: Path) -> Path:
    """`next_run`, made, so that another session in the folder takes the one after it.

    Raises:
        DiskError: The disk is full, or the folder may not be written.
    """
    with writing(folder):
        while True:
            with contextlib.suppress(FileExistsError):
                path = next_run(folder)
                path.mkdir()
                return path


def _config(plan: PanelPlan, **more: Any) -> LwFConfig:
    """The run's settings; what TRL and transformers refuse reads as our own refusal."""
    try:
        return LwFConfig(plan.output_dir, **{**plan.training, **more})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The settings are refused ({error}). Change the one named.") from error


def _load_rehearsal(rehearsal: Rehearsal) -> Any:
    """The rows of a kind."""
    if rehearsal.kind in ("none", "self"):
        return None if rehearsal.kind == "none" else "self"
    name = SAMPLES.get(rehearsal.kind)
    if not name and not rehearsal.path.strip():
        raise DataError("The rehearsal is to come from a file of yours, but none is named.")
    source = sample_path(name) if name else rehearsal.path.strip()
    load = load_alpaca if rehearsal.kind in ("general", "instructions") else load_text
    return load(source, test_size=None)["train"]


def _dial(model: Any, scale: float) -> AbstractContextManager[None]:
    """The adapter at a scale; 1 is the adapter as it stands, also one that knows no scale."""
    return nullcontext() if scale == 1 else scale_adapter(model, scale)


def _put_back(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Copies trained tensors back: every run of the panel starts where the first one did."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
