"""A panel over the library for those who would rather click: rows, settings, training, answers.

No logic of its own: each button is one step of `PanelSession`, and the code that does the same
stands below. Work runs in a thread, so that Stop is heard; the model's lock keeps the notebook's
cells off meanwhile. Runs wherever ipywidgets do: Colab, JupyterLab, voila.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as ipw

from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import prepare
from lwf_unsloth.errors import ConfigError, LwfError
from lwf_unsloth.panel_code import PanelPlan, Rehearsal, script
from lwf_unsloth.panel_parts import NUMBERS, Parts, code_box, message, uploads
from lwf_unsloth.panel_session import PanelSession, keep_upload, new_run, next_run
from lwf_unsloth.panel_work import outcome
from lwf_unsloth.plots import plot_training

REDRAWN = 1.0
"""Seconds between two drawings of the chart."""
ROWS_A_STEP = 8


class Panel(ipw.VBox):
    """The panel; `session` holds its rows, model and trainer, `parts` its widgets."""

    def __init__(self, session: PanelSession, folder: Path, max_new_tokens: int) -> None:
        """Wires the widgets; `panel` is what users call."""
        self.session, self.folder, self.max_new_tokens = session, folder, max_new_tokens
        self.parts = Parts()
        self.more: dict[str, Any] = {}
        """Further arguments of `LwFConfig`, which have no widget."""
        self.error: BaseException | None = None
        """What the last message of an error was made from."""
        self.run = next_run(folder)
        self._made: Path | None = None
        """The run's folder, once it is this session's."""
        self._worker: threading.Thread | None = None
        self._working = False
        self._turn = threading.RLock()
        """Held by who shows what is so now: the worker at its end, or a click meanwhile."""
        self._drawn, self._row, self._own = 0.0, -1, session.model is not None
        super().__init__(self.parts.box())
        self.add_class("lwf-panel")
        self._wire()
        self._refresh()
        self._free()

    # -------------------------------------------------------------------- what is set

    @property
    def plan(self) -> PanelPlan:
        """What is set now."""
        parts = self.parts
        training = {name: widget.value for name, widget in parts.numbers.items()}
        batch = training["per_device_train_batch_size"]
        training["gradient_accumulation_steps"] = max(1, ROWS_A_STEP // max(1, batch))
        given = {"input": parts.given.value} if parts.given.value.strip() else {}
        return PanelPlan(
            source=parts.source.value.strip(),
            model="" if self._own else parts.model.value.strip(),
            rehearsal=Rehearsal(parts.rehearsal.value, parts.rehearsal_path.value.strip()),
            training={**training, **self.more},
            output_dir=self.run.as_posix(),
            prompt={"instruction": parts.prompt.value, **given},
            max_new_tokens=self.max_new_tokens,
            scale=parts.dial.value,
        )

    def _wire(self) -> None:
        parts = self.parts
        clicks = {
            parts.check: self.check_rows,
            parts.load: self.load_model,
            parts.train: self.train,
            parts.resume: lambda: self.train(resume=True),
            parts.stop: self.stop,
            parts.held_out: self.next_held_out,
            parts.ask: self.ask,
            parts.save: self.save,
        }
        for button, action in clicks.items():
            button.on_click(lambda _, action=action: action())
        parts.upload.observe(self._uploaded, "value")
        parts.dial.observe(lambda _: self._turned(), "value")
        parts.rehearsal.observe(lambda _: self._rehearsal_chosen(), "value")
        for widget in (parts.rehearsal_path, *parts.numbers.values()):
            widget.observe(lambda _: self._refresh(), "value")
        for widget in (parts.source, parts.model, parts.prompt, parts.given):
            widget.observe(lambda _: self._show_code(), "value")

    def _show_code(self) -> None:
        self.parts.code.value = code_box(script(self.plan))

    def _refresh(self) -> None:
        """The preflight's verdict and the code, after a setting has changed."""
        with self._turn:  # else the worker's verdict on older settings could come last
            self._verdict()

    def _verdict(self) -> None:
        parts, plan = self.parts, self.plan
        own = plan.rehearsal.kind in ("instructions", "texts")
        parts.rehearsal_path.layout.display = None if own else "none"
        self._show_code()
        try:
            found = self.session.fit(plan)
        except LwfError as error:
            parts.said["fit"].value = message(str(error), "bad")
            return
        if found is None:
            text = "Whether it fits the memory shows here, once rows and model are there."
            parts.said["fit"].value = message(text)
            return
        first, *rest = str(found).splitlines()
        text, kind = f"{first} {rest[-1]}", "ok" if found.fits else "bad"
        parts.said["fit"].value = message(text, kind, details="\n".join(rest[:-1]))

    def _rehearsal_chosen(self) -> None:
        self._refresh()
        kind = self.parts.rehearsal.value
        if kind in ("instructions", "texts") and not self.parts.rehearsal_path.value:
            return
        self._start("fit", "Measuring the rows …", str, measure=True)

    # --------------------------------------------------------------------- the actions

    def check_rows(self) -> None:
        """Reads the named file and shows the load report."""

        def work() -> str:
            data = self.session.load_rows(self.parts.source.value)
            self._row = -1
            self.next_held_out()
            kind = "warn" if data.report.dropped else "ok"
            return message(str(data.report), kind, fixed=True)

        self._start("rows", "Reading and checking the rows …", work, measure=True)

    def load_model(self) -> None:
        """Loads the chosen model and says what was loaded."""

        def work() -> str:
            self._own = False
            model = self.session.load_model(self.parts.model.value)
            self.run = next_run(self.folder)
            return message(str(model.lwf_loaded), "ok")

        doing = "Loading the model; the first time takes a minute …"
        self._start("model", doing, work, measure=True)

    def train(self, resume: bool = False) -> None:
        """Trains with a live chart, from the start or from the stopped run's checkpoint."""

        def work() -> str:
            if not resume:
                self._made = self.run = new_run(self.folder)
            self._show_code()
            plan = self.plan
            try:
                trainer = self.session.train(replace(plan, resume=resume), self._follow)
            except BaseException:
                with suppress(OSError):  # there is something in it
                    self.run.rmdir()
                raise
            self._draw(trainer.state)
            return self._ended(trainer)

        self.session.stopping.clear()
        self._drawn = 0.0
        self._start("training", "Preparing the rows and the teacher …", work)

    def stop(self) -> None:
        """Ends the training after this step, with a checkpoint."""
        self.session.stopping.set()
        self.parts.said["training"].value = message("Stopping after this step …", "wait")

    def next_held_out(self) -> None:
        """Puts the next row that is not trained on into the prompt."""
        task, parts = self.session.task, self.parts
        if task is None or not len(task["test"]):
            text = "There is no held-out row: check a file of ten rows or more first."
            parts.said["answers"].value = message(text, "warn")
            return
        self._row = (self._row + 1) % len(task["test"])
        row = task["test"][self._row]
        parts.prompt.value, parts.given.value = row["instruction"], row["input"] or ""
        parts.said["answers"].value = message(f"Your file's answer: {row['output']}")

    def ask(self) -> None:
        """Shows the base's answer beside the adapter's at the dial's scale."""

        def work() -> str:
            comparison = self.session.ask(self.plan)
            self.parts.table.value = comparison._repr_html_()  # to_html styles a whole page
            return self._kept_answer()

        self._start("answers", "Answering …", work)

    def save(self) -> None:
        """Saves the adapter with the dial's scale in it."""

        def work() -> str:
            if self._made != self.run:  # an untrained adapter
                self._made = self.run = new_run(self.folder)
            folder = self.session.save(self.plan)
            return message(f"Saved at scale {self.parts.dial.value:g}: {folder}", "ok")

        self._start("answers", "Saving …", work)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the work under way.

        Returns:
            Whether it has ended.
        """
        if self._worker is not None:
            self._worker.join(seconds)
        return not self.busy

    # ----------------------------------------------------------------- behind them

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._working

    def _start(
        self, place: str, doing: str, work: Callable[[], str], *, measure: bool = False
    ) -> None:
        """Runs work in a thread; its message, or its error, ends up in a section.

        Args:
            place: The section.
            doing: What is said meanwhile.
            work: Returns the message as HTML.
            measure: Whether the preflight's longest row may have changed.
        """
        with self._turn:
            if self.busy:
                text = "Something else is under way; wait until it has ended, or press Stop."
                self.parts.said[place].value = message(text, "warn")
                return
            self.parts.said[place].value = message(doing, "wait")
            self._free(busy=True, training=place == "training")
            given = (place, work, measure)
            self._worker = threading.Thread(target=self._work, args=given, daemon=True)
            self._working = True
            self._worker.start()

    def _work(self, place: str, work: Callable[[], str], measure: bool) -> None:
        """In the thread: no error leaves it but as a message."""
        done = outcome(work)
        said = message(done.trouble, "bad") or done.said
        self.parts.said[place].value = said + message("", "warn", notes=done.notes)
        self.error = done.error
        if measure and not done.error:
            measured = outcome(self._measure)
            self.error = measured.error
        self._refresh()
        if measure and self.error and not done.error:
            self.parts.said["fit"].value = message(measured.trouble, "bad")
        with self._turn:  # a button that can be pressed does something, though this has yet to end
            self._working = False
            self._free()

    def _measure(self) -> str:
        self.session.measure(self.plan)
        return ""

    def _free(self, busy: bool = False, training: bool = False) -> None:
        """Which buttons can be pressed."""
        parts = self.parts
        for button in (parts.check, parts.load, parts.train, parts.ask, parts.save):
            button.disabled = busy
        parts.upload.disabled = parts.dial.disabled = busy
        parts.stop.disabled = not training
        stopped = self._made == self.run and any(self.run.glob("checkpoint-*"))
        parts.resume.disabled = busy or not stopped

    def _uploaded(self, change: dict[str, Any]) -> None:
        """Keeps the file beside the runs, names it, checks it."""
        for name, content in uploads(change["new"]):
            path = keep_upload(name, content, self.folder / "uploads")
            self.parts.source.value = path.as_posix()
            self.check_rows()
        if change["new"]:
            self.parts.upload.value = type(change["new"])()  # the same file can come again

    def _turned(self) -> None:
        """The dial was moved: the answer that is shown is asked for anew."""
        self._show_code()
        if self.parts.table.value and not self.busy:
            self.ask()

    def _kept_answer(self) -> str:
        """The file's own answer stays while its row is asked."""
        task = self.session.task
        if task is None or self._row < 0:
            return ""
        row = task["test"][self._row]
        same = row["instruction"] == self.parts.prompt.value
        return message(f"Your file's answer: {row['output']}") if same else ""

    def _follow(self, state: Any) -> None:
        """At every log line: the bar and the figures, and now and then the chart."""
        parts = self.parts
        logs = (one for one in reversed(state.log_history) if "task_loss" in one)
        last: dict[str, float] = next(logs, {})
        parts.bar.max, parts.bar.value = max(1, state.max_steps), state.global_step
        names = {"task_loss": "task loss", "kl_task": "KL task", "kl_rehearsal": "KL rehearsal"}
        found = [f"{text} {last[name]:.3g}" for name, text in names.items() if name in last]
        at = [f"step {state.global_step} of {state.max_steps}", *found]
        parts.at.value = message(" · ".join(at))
        if not self.session.stopping.is_set():
            parts.said["training"].value = message("Training …", "wait")
        if time.monotonic() - self._drawn > REDRAWN:
            self._draw(state)

    def _draw(self, state: Any) -> None:
        self.parts.chart.value = plot_training(state.log_history, state.max_steps)._repr_png_()
        self.parts.chart.layout.display = None
        self._drawn = time.monotonic()

    def _ended(self, trainer: Any) -> str:
        """How the training ended."""
        state, plan = trainer.state, self.plan
        verdict = trainer.kl_meter.verdict() if trainer.kl_meter.term else ""
        if state.global_step < state.max_steps:
            text = trainer.kl_meter.stopped or (
                f"Stopped at step {state.global_step} of {state.max_steps}. The checkpoint is "
                f"{plan.output_dir}/checkpoint-{state.global_step}; Go on takes it up there."
            )
            return message(f"{text} {verdict}", "warn")
        folder = self.session.save(replace(plan, scale=1.0))
        text = f"{state.global_step} steps trained, adapter saved in {folder}. {verdict}"
        return message(text, "ok")


@checked("model", "tokenizer")
def panel(
    model: Any = None,
    tokenizer: Any = None,
    *,
    source: str | Path = "",
    output_dir: str | Path = "runs/panel",
    max_new_tokens: int = 128,
    **settings: Any,
) -> Panel:
    """A panel to check a file, train on it and compare answers, in any notebook.

    Args:
        model: A loaded model, or the name of one that is loaded when the button is pressed.
        tokenizer: The loaded model's tokenizer.
        source: Rows to begin with: a file, folder or hub id.
        output_dir: Gets uploads, and a folder for each run with its checkpoints and adapter.
        max_new_tokens: Most tokens of an answer, 1 or more.
        **settings: Values to begin with, by the names of `LwFConfig` (`max_steps`, `lwf_lambda`,
            ...).

    Returns:
        The panel; as the last line of a cell it shows itself.

    Raises:
        ConfigError: A loaded model without its tokenizer.
    """
    prepare()  # in the main thread: Unsloth is not to be imported first by a worker
    loaded = model is not None and not isinstance(model, str)
    if loaded and tokenizer is None:
        raise ConfigError(
            "panel got a model without its tokenizer, which renders the prompts. Give both, as "
            "load_model returns them, or only the model's name."
        )
    session = PanelSession(model, tokenizer) if loaded else PanelSession()
    made = Panel(session, Path(output_dir), max_new_tokens)
    parts = made.parts
    parts.source.value = str(source)
    if isinstance(model, str):
        parts.model.value = model
    for name, value in settings.items():
        if name in NUMBERS:
            parts.numbers[name].value = value
        else:
            made.more[name] = value
    if loaded:
        parts.model.value = str(getattr(getattr(model, "lwf_loaded", None), "base", ""))
        parts.said["model"].value = message(
            f"{getattr(model, 'lwf_loaded', 'The given model')}", "ok"
        )
    made._refresh()
    return made
