"""A budget for the KL, in nats per token: a controller moves lambda to keep the KL under it.

It is a proportional-integral controller on logarithms, so that it works alike for a budget of .01
and of 1, and for a lambda of .1 and of 50:

    e      = ln(KL / (0.9 * budget)), KL the smoothed KL of the steps, e held within bounds
    ln L  += INTEGRAL * e             the remembered part, held within the bounds
    lambda = L * exp(PROPORTIONAL * e), held within the bounds

The KL answers a change of lambda only after some steps, and it is noisy where a batch has few
tokens that carry it. Both gains are small enough for a delay of some ten steps: the tests hold them
against such a plant.
"""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from lwf_unsloth.errors import ConfigError

logger = logging.getLogger(__name__)

AIM = 0.9
"""Share of the budget that is aimed at: the rest is room for the noise."""
SMOOTHING = 0.8
"""Share of the smoothed KL that stays at each step: about the last 5 steps count."""
INTEGRAL = 0.06
PROPORTIONAL = 0.8
E_LEAST, E_MOST = -0.4, 2.0
"""Bounds of the error. Down it is held tightly, since every run begins at a KL of 0, which says
nothing yet about the lambda; a KL that is far too high may move it fast."""
PATIENCE = 20
"""Steps at the upper bound and above the budget after which that is said."""


def check_budget(args: Any) -> None:
    """Checks the fields of the budget.

    Args:
        args: `LwFConfig`.

    Raises:
        ConfigError: A value out of range, or a second setting that moves lambda.
    """
    budget, low, high = args.lwf_kl_budget, args.lwf_lambda_min, args.lwf_lambda_max
    for name, value in {
        "lwf_lambda_min": low,
        "lwf_lambda_max": high,
        "lwf_kl_budget": budget,
    }.items():
        if value is not None or name != "lwf_kl_budget":
            _check_positive(name, value)
    if budget is None:
        return
    if not low <= args.lwf_lambda <= high or low == high:
        raise ConfigError(
            f"lwf_lambda is {args.lwf_lambda:g}, lwf_lambda_min {low:g}, lwf_lambda_max {high:g}: "
            "with lwf_kl_budget lambda begins at the first and moves between the others, so it "
            "must lie between them, and they must differ."
        )
    for name in ("lwf_lambda_schedule", "lwf_temperature_schedule"):
        if getattr(args, name) != "constant":
            raise ConfigError(
                f"lwf_kl_budget is {budget:g} and {name} is {getattr(args, name)!r}: the budget "
                "moves lambda, by a KL at one temperature. Leave one of the two out."
            )


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        why = "it is nats per token" if name == "lwf_kl_budget" else "it bounds lambda"
        raise ConfigError(f"{name} is {value!r}, but must be a number > 0: {why}.")


@dataclass
class KLBudget:
    """Moves lambda by the KL that each step had."""

    budget: float
    """Nats per token."""
    value: float
    """Lambda, now."""
    low: float
    """Least lambda."""
    high: float
    """Most lambda."""
    remembered: float = 0.0
    """The integral: ln of the lambda without the proportional part; 0 steps: ln of `value`."""
    smoothed_sum: float = 0.0
    """Decayed sum of the KLs."""
    weight: float = 0.0
    """Decayed number of them."""
    steps: int = 0
    """Steps that had a KL."""
    stuck: int = 0
    """Steps on end at the upper bound with a smoothed KL above the budget."""
    told: bool = False
    """Whether it was said that the budget cannot be met."""

    @classmethod
    def of(cls, args: Any) -> "KLBudget | None":
        """The controller of a run's settings, None without a budget."""
        if args.lwf_kl_budget is None:
            return None
        bounds = float(args.lwf_lambda_min), float(args.lwf_lambda_max)
        return cls(float(args.lwf_kl_budget), float(args.lwf_lambda), *bounds)

    @property
    def kl(self) -> float:
        """The smoothed KL, nats per token; nan before the first step."""
        return self.smoothed_sum / self.weight if self.weight else math.nan

    def step(self, kl: float) -> float:
        """Takes the KL of a step and gives the lambda for the next one.

        Args:
            kl: Nats per token over the tokens that carry KL; what is not finite is passed over.

        Returns:
            Lambda, within the bounds.
        """
        if not math.isfinite(kl):
            return self.value
        if not self.steps:
            self.remembered = math.log(self.value)
        self.steps += 1
        self.smoothed_sum = SMOOTHING * self.smoothed_sum + max(kl, 0.0)
        self.weight = SMOOTHING * self.weight + 1
        ratio = self.kl / (AIM * self.budget)
        error = min(max(math.log(ratio), E_LEAST), E_MOST) if ratio > 0 else E_LEAST
        self.remembered = self._held(self.remembered + INTEGRAL * error)
        wanted = self._held(self.remembered + PROPORTIONAL * error)
        exact = {math.log(bound): bound for bound in (self.low, self.high)}  # exp(ln 8) is not 8
        self.value = min(max(exact.get(wanted, math.exp(wanted)), self.low), self.high)
        self._look()
        return self.value

    def _held(self, logarithm: float) -> float:
        """The ln of a lambda, within the bounds."""
        return min(max(logarithm, math.log(self.low)), math.log(self.high))

    def _look(self) -> None:
        """Says it once when lambda has stood at its bound for some time and the KL is too high."""
        at_bound = self.value >= self.high and self.kl > self.budget
        self.stuck = self.stuck + 1 if at_bound else 0
        if self.stuck < PATIENCE or self.told:
            return
        self.told = True
        logger.warning(
            "The KL budget cannot be met: lambda is at lwf_lambda_max=%g for %d steps, and the KL "
            "is %.4g nats a token, above lwf_kl_budget=%g. Lower learning_rate, raise "
            "lwf_lambda_max or the budget, or take more rehearsal rows.",
            self.high,
            self.stuck,
            self.kl,
            self.budget,
        )

    @property
    def met(self) -> bool:
        """Whether the smoothed KL is under the budget now."""
        return self.kl <= self.budget

    def __str__(self) -> str:
        """What it has come to."""
        if not self.steps:
            return "KL budget: no step had a KL yet."
        verdict = "under" if self.met else "ABOVE"
        return (
            f"KL {self.kl:.4g} nats a token, {verdict} the budget of {self.budget:g}, at lambda "
            f"{self.value:.4g} (bounds {self.low:g} to {self.high:g})."
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up the state of an interrupted run; budget and bounds stay this run's own."""
        kept = {"budget", "low", "high", "told"}
        for name in asdict(self).keys() - kept:
            setattr(self, name, type(getattr(self, name))(state[name]))
        self.value = min(max(self.value, self.low), self.high)
        if self.steps:
            self.remembered = self._held(self.remembered)
