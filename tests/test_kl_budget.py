"""The KL budget: lambda finds the value that the budget needs, against delay and noise."""

import json
import logging
import math
import random
from collections import deque

import pytest

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.kl_budget import AIM, PATIENCE, KLBudget


class Plant:
    """A KL that follows lambda: it falls as strength / lambda ** slope, is reached only slowly,
    seen some steps late, and with noise."""

    def __init__(self, strength, slope=0.8, late=5, slowness=0.85, noise=0.3, seed=0):
        self.strength, self.slope, self.slowness, self.noise = strength, slope, slowness, noise
        self.random, self.now = random.Random(seed), 0.0
        self.pipe = deque([0.0] * late)

    def __call__(self, pull):
        goal = self.strength / pull**self.slope
        self.now = self.slowness * self.now + (1 - self.slowness) * goal
        self.pipe.append(self.now * math.exp(self.random.gauss(0, self.noise)))
        return self.pipe.popleft()


def run(plant, budget=0.05, steps=300, start=2.0, low=0.05, high=100.0):
    """(KL seen, lambda) of each step, and the controller."""
    control, seen = KLBudget(budget, start, low, high), []
    for _ in range(steps):
        kl = plant(control.value)
        seen.append((kl, control.step(kl)))
    return seen, control


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("strength", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("late", [0, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_converges_to_the_budget_with_delay_and_noise(strength, late, seed):
    seen, _ = run(Plant(strength, late=late, seed=seed))
    kls, lambdas = zip(*seen[150:], strict=True)
    mean = sum(kls) / len(kls)
    assert 0.75 * 0.05 < mean < 1.05 * 0.05
    needed = (strength / (AIM * 0.05)) ** (1 / 0.8)
    assert 0.6 * needed < geometric_mean(lambdas) < 1.6 * needed
    assert max(lambdas) / min(lambdas) < 4, "it settles; it does not swing"


@pytest.mark.parametrize("strength", [1e-6, 0.1, 1e6])
def test_lambda_never_leaves_its_bounds(strength):
    seen, _ = run(Plant(strength, noise=1.5), low=0.5, high=8.0, steps=400)
    assert all(0.5 <= value <= 8.0 for _, value in seen)


def test_a_budget_that_cannot_be_met_is_told_once_and_lambda_waits_at_its_bound(caplog):
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        _, control = run(Plant(50.0), high=8.0)
    told = [r.getMessage() for r in caplog.records if "cannot be met" in r.getMessage()]
    assert len(told) == 1 and "lwf_lambda_max=8" in told[0] and "lwf_kl_budget=0.05" in told[0]
    assert control.value == 8.0 and not control.met and "ABOVE the budget" in str(control)


def test_nothing_is_told_where_the_budget_is_met_or_missed_for_a_moment_only(caplog):
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        run(Plant(0.1))
        control = KLBudget(0.05, 10.0, 0.05, 10.0)
        for _ in range(PATIENCE - 1):
            control.step(1.0)
    assert not caplog.records


def test_a_model_that_hardly_moves_gets_the_least_lambda():
    _, control = run(Plant(1e-5), low=0.5)
    assert control.value == 0.5 and control.met


def test_after_a_long_time_at_a_bound_it_turns_at_once():
    """The remembered part does not wind up beyond the bound."""
    control = KLBudget(0.05, 2.0, 0.5, 8.0)
    for _ in range(1000):
        control.step(1.0)
    assert control.value == 8.0
    values = [control.step(0.001) for _ in range(60)]
    assert values[25] < 5.5 and values[-1] < 3.0


def test_a_kl_of_0_and_one_that_is_no_number_are_survived():
    control = KLBudget(0.05, 2.0, 0.05, 100.0)
    assert math.isfinite(control.step(0.0)) and control.step(0.0) < 2.0
    before = control.value
    assert control.step(math.nan) == control.step(math.inf) == before
    assert control.steps == 2


def test_the_state_goes_through_json_and_the_rest_of_the_run_is_the_same():
    plant, control = Plant(0.1), KLBudget(0.05, 2.0, 0.05, 100.0)
    kls = [plant(2.0) for _ in range(80)]
    for kl in kls[:40]:
        control.step(kl)
    other = KLBudget(0.05, 9.0, 0.05, 100.0)
    other.restore(json.loads(json.dumps(control.state())))
    assert [control.step(kl) for kl in kls[40:]] == [other.step(kl) for kl in kls[40:]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lwf_kl_budget": 0}, "lwf_kl_budget"),
        ({"lwf_kl_budget": math.nan}, "lwf_kl_budget"),
        ({"lwf_kl_budget": "0.05"}, "lwf_kl_budget"),
        ({"lwf_kl_budget": 0.05, "lwf_lambda_min": 0}, "lwf_lambda_min"),
        ({"lwf_kl_budget": 0.05, "lwf_lambda_max": 1.0}, "lwf_lambda_max"),
        ({"lwf_kl_budget": 0.05, "lwf_lambda": 0.0}, "lwf_lambda"),
        ({"lwf_kl_budget": 0.05, "lwf_lambda_schedule": "linear:0->2"}, "moves lambda"),
        ({"lwf_kl_budget": 0.05, "lwf_temperature_schedule": "linear:2->1"}, "one temperature"),
    ],
)
def test_a_wrong_budget_is_refused_by_name(changes, said):
    from lwf_unsloth.config import LwFConfig

    with pytest.raises(ConfigError, match=said):
        LwFConfig("runs/test", **changes)


# ------------------------------------------------------------------ on the tiny model


@pytest.fixture()
def trained(short_run):
    """Factory: the tiny model after `max_steps` steps with a budget."""

    def train(resume=None, **changes):
        values = {"task": 12, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
        trainer = short_run(**{**values, **changes})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.slow
def test_on_the_tiny_model_the_kl_breaks_the_budget_and_is_brought_back_under_it(trained):
    trainer = trained(max_steps=80, lwf_lambda=1.0, lwf_kl_budget=0.4)
    kls, lambdas = logged(trainer, "kl"), logged(trainer, "lwf_lambda")
    assert max(kls) > 1.3 * 0.4 and sum(kls[-20:]) / 20 < 0.4, kls
    assert lambdas[0] == 1.0 and lambdas[-1] > 1.2


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_lambdas(trained, tmp_path):
    settings = {"lwf_kl_budget": 0.01, "max_steps": 6}
    whole = trained(save_strategy="steps", save_steps=3, **settings)
    again = trained(str(tmp_path / "run" / "checkpoint-3"), **settings)
    assert len(set(logged(whole, "lwf_lambda"))) == 6
    assert logged(again, "lwf_lambda") == pytest.approx(logged(whole, "lwf_lambda"))


@pytest.mark.slow
def test_a_checkpoint_without_the_controllers_state_is_told(trained, tmp_path, caplog):
    trained(save_strategy="steps", save_steps=1, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        trained(str(tmp_path / "run" / "checkpoint-1"), lwf_kl_budget=0.01, max_steps=2)
    assert any("without lwf_kl_budget" in record.getMessage() for record in caplog.records)
