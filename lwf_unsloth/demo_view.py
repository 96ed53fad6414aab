"""What the demo shows: a line a stage, a bar while it trains, the table at the end."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.backend import prepare
from lwf_unsloth.unseen import shown as shown_text

prepare()

from transformers import TrainerCallback  # noqa: E402  (Unsloth patches it, so it comes after)
from transformers.trainer_callback import PrinterCallback, ProgressCallback  # noqa: E402

LONGEST = 260
"""Characters of an answer shown in the terminal; the saved comparison holds all."""


class DemoView:
    """Writes to one console; text of models is never read as markup."""

    def __init__(self, console: Console | None, stages: int) -> None:
        """Starts before the first stage.

        Args:
            console: Where to; None takes the terminal.
            stages: How many stages there will be.
        """
        self.console = console or Console()
        self.stages = stages
        self.at = 0

    def stage(self, text: str) -> None:
        """Begins the next stage."""
        self.at += 1
        self.console.print(
            Text(f"\n[{self.at}/{self.stages}] {text}", style="bold"), soft_wrap=True
        )

    def say(self, text: str) -> None:
        """A line under a stage."""
        self.console.print(Text(f"  {shown_text(text)}"), soft_wrap=True)

    def follow(self, trainer: Any) -> None:
        """Replaces the trainer's line a step by one bar with the losses."""
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(TrainingBar())

    def report(
        self, report: dict[str, Any], shown: list[tuple[Answer, Answer]], folder: Path
    ) -> None:
        """Answers before and after, the numbers, and where things lie."""
        self.console.print(answer_table(shown))
        self.console.print(number_table(report))
        minutes = report["seconds"] / 60
        gib = report["peak_memory_bytes"] / 2**30
        self.say(
            f"{report['steps']} steps on {report['device']}: {minutes:.1f} minutes in all, "
            f"peak memory {gib:.1f} GiB"
        )
        self.say(f"All answers: {folder / 'comparison.html'}, {folder / 'comparison.md'}")
        self.say(f"Every number and setting: {folder / 'report.json'}")
        self.say(f"The adapter: {folder / 'adapter'}")

    def without_rehearsal(self, report: dict[str, Any], folder: Path) -> None:
        """What the run without KL and rehearsal forgot, beside what ours did."""
        kept = report["retention"]
        if kept["nll_after_lambda0"] is None:
            return
        rises = [kept[name] - kept["nll_before"] for name in ("nll_after", "nll_after_lambda0")]
        self.say(
            f"Rise of the NLL on rows to be kept: {rises[0]:+.4f} with KL and rehearsal, "
            f"{rises[1]:+.4f} without (nats per token). Added to {folder / 'report.json'}"
        )


class TrainingBar(TrainerCallback):
    """One bar over the optimizer steps, with the losses of the last one."""

    def __init__(self) -> None:
        """The bar appears when training begins."""
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self.bar = tqdm(total=state.max_steps, desc="train", unit="step", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves it."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Shows the losses."""
        names = [name for name in ("task_loss", "kl") if name in (logs or {})]
        if self.bar is not None and logs and names:
            self.bar.set_postfix({name: f"{logs[name]:.4f}" for name in names})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes it."""
        self.bar.close()


def pairs(
    before: Generations, after: Generations, places: list[int]
) -> list[tuple[Answer, Answer]]:
    """(before, after) at some places of two lists of answers."""
    return [(before[place], after[place]) for place in places]


def answer_table(
    shown: list[tuple[Answer, Answer]], left: str = "before", right: str = "after"
) -> Table:
    """Prompt and both answers; what was cut says so."""
    table = Table(box=box.ROUNDED, show_lines=True)
    for name in ("prompt", left, right):
        table.add_column(
            Text(shown_text(name)), ratio=2 if name == "prompt" else 3, overflow="fold"
        )
    for before, after in shown:
        table.add_row(
            Text(shown_text(before.prompt)), *(_shortened(answer) for answer in (before, after))
        )
    return table


def _shortened(answer: Answer) -> Text:
    text = shown_text(answer.text.strip())
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    stop = "stopped by itself" if answer.stop == "eos" else "cut at the limit of tokens"
    return Text.assemble(text, "\n", (f"({stop}, {answer.tokens} tokens)", "dim"))


def number_table(report: dict[str, Any]) -> Table:
    """The numbers of the report, before and after."""
    held, kept, stopped = report["heldout"], report["retention"], report["eos_rate"]
    rows = [
        (f"answers ended by the model ({stopped['prompts']} held-out questions)", "{:.0%}",
         stopped["before"], stopped["after"]),
        ("facts found in them", "{:.0%}", held["facts_before"], held["facts_after"]),
        ("NLL of the right answers, nats per token", "{:.3f}", held["nll_before"],
         held["nll_after"]),
        (f"NLL on {report['settings']['rehearsal']} to be kept", "{:.3f}", kept["nll_before"],
         kept["nll_after"]),
        ("KL from the base on them, nats per token", "{:.4f}", 0.0, kept["kl"]),
    ]  # fmt: skip
    table = Table(box=box.ROUNDED)
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for name, form, before, after in rows:
        table.add_row(name, form.format(before), form.format(after))
    return table
