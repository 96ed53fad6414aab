"""One progress bar with both terms of the loss, in the terminal and in notebooks."""

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = ("task_loss", "kl_task", "kl_rehearsal")


class LwFProgress(TrainerCallback):
    """Shows the step, the task loss and the KL (nats per token); the whole log is in `state`."""

    def __init__(self) -> None:
        """Starts without a bar."""
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar, on the main process alone."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Puts the newest terms beside the bar; evaluations get a line of their own."""
        if self.bar is None or not logs:
            return
        shown = {name: f"{logs[name]:.4g}" for name in SHOWN if name in logs}
        if shown:
            self.bar.set_postfix(shown)
        held_out = {k: v for k, v in logs.items() if k.endswith(("eval_task_loss", "eval_kl"))}
        if held_out:
            found = ", ".join(f"{name} {value:.4f}" for name, value in held_out.items())
            self.bar.write(f"step {state.global_step}: {found}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def show_progress(trainer: Any) -> None:
    """One bar with both terms, in place of a printed dict a step or a table of the sum alone."""
    shown = [c for c in trainer.callback_handler.callbacks if "Progress" in type(c).__name__]
    for callback in shown:
        trainer.remove_callback(callback)
    trainer.add_callback(LwFProgress())
