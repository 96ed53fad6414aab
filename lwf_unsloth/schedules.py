"""Lambda and temperature over the training: a plain string becomes a function of the progress.

    "constant"       the setting itself, all through
    "linear:0->2"    in a straight line from 0 at the first step to 2 at the end
    "cosine:4->0.5"  the same two ends along half a cosine: slow, fast, slow
    "warmup:0.1"     up to the setting over the first tenth of the steps, then constant

Progress is `steps done / all steps`, which a resumed run reads from its checkpoint: it gets the
values of an undisturbed one.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.errors import ConfigError

FORMS = '"constant", "linear:START->END", "cosine:START->END" or "warmup:SHARE"'
NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*"
BETWEEN = re.compile(rf"\s*(linear|cosine)\s*:{NUMBER}->{NUMBER}", re.IGNORECASE)
WARMUP = re.compile(rf"\s*warm-?up\s*:{NUMBER}", re.IGNORECASE)


@dataclass(frozen=True)
class Schedule:
    """A value over the training; called with the progress, it gives the value there."""

    shape: str
    """"constant", "linear", "cosine" or "warmup"."""
    start: float
    """Value at progress 0."""
    end: float
    """Value at progress 1."""
    share: float = 1.0
    """Share of the run over which the value moves, 0 < share <= 1."""

    def __call__(self, progress: float) -> float:
        """The value.

        Args:
            progress: Share of the run that is done, 0 to 1; what lies outside counts as the end
                that it is nearest to.
        """
        if self.constant:
            return self.end
        done = min(max(progress, 0.0) / self.share, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return (1 - done) * self.start + done * self.end

    @property
    def constant(self) -> bool:
        """Whether the value never moves."""
        return self.shape == "constant"


def parse_schedule(
    text: str, value: float, *, name: str, default: float, rest: float, positive: bool = False
) -> Schedule:
    """Reads a schedule.

    Args:
        text: One of the four forms, as in "linear:0->2".
        value: The setting beside it: the constant value, and what a warm-up ends at.
        name: That setting's name; the schedule's is `name` + "_schedule".
        default: The setting's default, which a "linear" or "cosine" puts aside without a word.
        rest: Where a warm-up begins: the value that does nothing.
        positive: Whether 0 is out of range too.

    Raises:
        ConfigError: No such form, values out of range, or a schedule that says something else than
            the setting beside it.
    """
    field = f"{name}_schedule"
    if not isinstance(text, str):
        raise _refuse(field, text)
    if text.strip().lower() == "constant":
        return Schedule("constant", value, value)
    if found := WARMUP.fullmatch(text):
        return _warmup(field, text, float(found[1]), name, value, rest)
    found = BETWEEN.fullmatch(text)
    if found is None:
        raise _refuse(field, text)
    start, end = float(found[2]), float(found[3])
    low = min(start, end)
    if low < 0 or (positive and low == 0) or not math.isfinite(max(start, end)):
        raise ConfigError(
            f"{field} is {text!r}, but both ends must be {'> 0' if positive else '>= 0'}, which is "
            f"the range of {name}."
        )
    if start == end:
        raise ConfigError(
            f"{field} is {text!r}, which never moves. Set {name}={end:g} and leave {field} out."
        )
    if value not in (default, start, end):
        raise ConfigError(
            f"{name} is {value:g}, but {field}={text!r} goes from {start:g} to {end:g}, so "
            f"{value:g} would never act. Leave {name} out, or change the ends of the schedule."
        )
    return Schedule(found[1].lower(), start, end)


def schedules_of(args: Any) -> tuple[Schedule, Schedule]:
    """Lambda's and the temperature's schedule of a run's settings.

    Args:
        args: `LwFConfig`: `lwf_lambda`, `lwf_temperature`, their schedules, and `lwf_cache`.

    Raises:
        ConfigError: A schedule that cannot be read, or that leaves a part without effect.
    """
    defaults = type(args)
    strength = parse_schedule(
        args.lwf_lambda_schedule,
        args.lwf_lambda,
        name="lwf_lambda",
        default=defaults.lwf_lambda,
        rest=0.0,
    )
    temperature = parse_schedule(
        args.lwf_temperature_schedule,
        args.lwf_temperature,
        name="lwf_temperature",
        default=defaults.lwf_temperature,
        rest=1.0,
        positive=True,
    )
    if args.lwf_lambda == 0 and not strength.constant:
        raise ConfigError(
            f"lwf_lambda is 0, which leaves the teacher out, but lwf_lambda_schedule is "
            f"{args.lwf_lambda_schedule!r}: leave lwf_lambda out, the schedule says where lambda "
            "begins and ends."
        )
    if not temperature.constant and args.lwf_cache == "topk":
        raise ConfigError(
            f'lwf_cache is "topk" and lwf_temperature_schedule {args.lwf_temperature_schedule!r}, '
            "but the mass of the rest is summed at one temperature. Take "
            'lwf_cache="hidden", or leave one of them out.'
        )
    return strength, temperature


def _warmup(field: str, text: str, share: float, name: str, value: float, rest: float) -> Schedule:
    """A straight line from `rest` to the setting, which then stays."""
    if not 0 < share <= 1:
        raise ConfigError(
            f"{field} is {text!r}, but the share of the run after which {name} is reached must be "
            'in 0 < share <= 1: "warmup:0.1" takes the first tenth of the steps.'
        )
    if value == rest:
        raise ConfigError(
            f"{field} is {text!r}, which goes from {rest:g} to {name}, and {name} is {value:g} "
            f"too: it would have no effect. Set {name}, or leave {field} out."
        )
    return Schedule("warmup", rest, value, share)


def _refuse(field: str, text: object) -> ConfigError:
    return ConfigError(
        f'{field} is {text!r}, but must be {FORMS}, as in "linear:0->2" or "warmup:0.1": '
        "otherwise it does not say how the value moves."
    )
