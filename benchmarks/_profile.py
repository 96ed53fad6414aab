"""Where a step's time goes: its stages, and the kernels that take most."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import _steps
from benchmarks._clock import CUDA, clock
from benchmarks._steps import Loop, Loss, Size

KERNELS = 16
STEPS = 3


def write_profile(loop: Loop, size: Size, seed: int, folder: Path) -> None:
    """Writes step_cost_profile.txt: plain and ours with every token labelled, and with half."""
    half = Size(size.batch, size.length, 0.5)
    cases: list[tuple[str, Size, int, Loss]] = [
        ("plain_unsloth", size, 0, _steps.plain_unsloth),
        ("ours_all", size, 0, _steps.ours_all),
        ("plain_unsloth", half, 0, _steps.plain_unsloth),
        ("ours, one rehearsal row", half, 1, _steps.ours_rehearsal),
    ]
    lines = [f"{size}; ms a step. Stages are clocked one by one: what overlaps else adds up here."]
    for name, shape, rehearsal, loss in cases:
        step = partial(loop.step, loss, loop.batch(shape, rehearsal, seed))
        step()
        lines += [f"\n{name}, {shape.labelled:.0%} of the tokens labelled"]
        lines += [f"  {ms:9.2f}  {stage}" for stage, ms in stages(loop, step).items()]
        lines += kernels(step)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (folder / "step_cost_profile.txt").write_text(text, encoding="utf-8")
    print(text, flush=True)


def stages(loop: Loop, step: Callable[[], Any]) -> dict[str, float]:
    """Mean ms of the whole step, left alone, and of its stages, each from idle to idle."""
    alone = [clock(step) for _ in range(STEPS)]
    times: dict[str, list[float]] = {}
    with _stamped(loop, times):
        whole = sum(clock(step) for _ in range(STEPS)) / STEPS
    found = {name: sum(part) / STEPS for name, part in times.items()}
    rest = whole - sum(found.values())
    return {"whole step": sum(alone) / STEPS, **found, "rest (roles, clipping, optimizer)": rest}


@contextmanager
def _stamped(loop: Loop, times: dict[str, list[float]]) -> Iterator[None]:
    """Clocks the student's forward, the teacher's, the loss and the backward pass."""
    from lwf_unsloth import objective

    def stamped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            kept: list[Any] = []
            ms = clock(lambda: kept.append(function(*args, **kwargs)))
            times.setdefault(name, []).append(ms)
            return kept[0]

        return run

    model, teacher, accelerator = loop.model, loop.teacher, loop.accelerator
    forward = "forward, with the loss where the model takes it"
    with (
        patch.object(model, "forward", _apart(stamped, forward, model, teacher)),
        patch.object(teacher, "hidden", stamped("teacher's forward", teacher.hidden)),
        patch.object(objective, "lwf_loss", stamped("loss", objective.lwf_loss)),
        patch.object(accelerator, "backward", stamped("backward", accelerator.backward)),
    ):
        yield


def _apart(stamped: Any, name: str, model: Any, teacher: Any) -> Callable[..., Any]:
    """The model's forward, clocked only with gradients: the teacher's is clocked as a whole."""
    plain, clocked = model.forward, stamped(name, model.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (clocked if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def kernels(step: Callable[[], Any]) -> list[str]:
    """Lines of the kernels that take most of a step: ms, share, calls, name."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
    with profile(activities=activities) as recorded:
        step()
        if CUDA:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = [event for event in recorded.key_averages() if event.device_type == wanted]
    events.sort(key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events) or 1.0
    lines = [f"  kernels, {total / 1000:.1f} ms in all"]
    for event in events[:KERNELS]:
        spent = getattr(event, field)
        lines.append(
            f"  {spent / 1000:9.2f}  {spent / total:5.1%}  {event.count:6d}  {event.key[:90]}"
        )
    return lines
