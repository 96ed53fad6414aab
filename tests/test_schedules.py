"""Lambda and temperature over the run: the law of each form, the refusals, and a resume."""

import functools
import math
from types import SimpleNamespace

import pytest

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.schedules import parse_schedule


def read(text, value=2.0, **changes):
    given = {"name": "lwf_lambda", "default": 2.0, "rest": 0.0}
    return parse_schedule(text, value, **{**given, **changes})


@pytest.mark.parametrize(
    ("text", "at_0", "half", "at_1"),
    [
        ("constant", 2.0, 2.0, 2.0),
        ("linear:0->2", 0.0, 1.0, 2.0),
        ("linear:4->1", 4.0, 2.5, 1.0),
        (" Linear : 0.5 -> 1e-1 ", 0.5, 0.3, 0.1),
        ("cosine:4->0.5", 4.0, 2.25, 0.5),
        ("warmup:0.5", 0.0, 2.0, 2.0),
        ("warm-up:1", 0.0, 1.0, 2.0),
    ],
)
def test_each_form_has_its_value_at_the_beginning_the_middle_and_the_end(text, at_0, half, at_1):
    schedule = read(text)
    assert [schedule(x) for x in (0, 0.5, 1)] == pytest.approx([at_0, half, at_1], abs=1e-12)
    assert schedule(0) == at_0 and schedule(1) == at_1, "the ends are exact"
    assert schedule(-1) == schedule(0) and schedule(7.0) == schedule(1)


def test_a_cosine_starts_and_ends_slowly_and_a_warm_up_ends_in_a_corner():
    cosine, warm = read("cosine:0->1"), read("warmup:0.1")
    assert cosine(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert cosine(0.75) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert warm(0.05) == pytest.approx(1.0) and warm(0.1) == warm(0.11) == 2.0


def test_a_constant_is_the_very_value():
    assert read("constant", 0.1)(0.3) == 0.1 and read("constant").constant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linear",
        "linear:0",
        "linear:0-2",
        "linear:a->b",
        "step:0->2",
        "warmup:",
        "cosine:0->2->4",
    ],
)
def test_what_is_no_schedule_is_refused_with_the_forms(text):
    with pytest.raises(ConfigError, match=r"lwf_lambda_schedule is .*linear:START->END"):
        read(text)


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("linear:-1->2", 2.0, ">= 0"),
        ("linear:1e999->2", 2.0, ">= 0"),
        ("linear:2->2", 2.0, "never moves"),
        ("linear:0->2", 3.0, "would never act"),
        ("warmup:0", 2.0, "0 < share <= 1"),
        ("warmup:10", 2.0, "first tenth"),
        ("warmup:0.1", 0.0, "no effect"),
    ],
)
def test_a_schedule_without_sense_or_effect_is_refused(text, value, said):
    with pytest.raises(ConfigError, match=said):
        read(text, value)


def test_the_setting_may_be_left_out_or_be_one_of_the_ends():
    assert read("linear:0->5")(1) == 5 and read("linear:0->5", 5.0)(1) == 5


def config(**changes):
    from lwf_unsloth.config import LwFConfig

    return LwFConfig("runs/test", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lwf_lambda_schedule": "lin:0->1"}, "lwf_lambda_schedule"),
        ({"lwf_lambda_schedule": 2}, "lwf_lambda_schedule"),
        ({"lwf_temperature_schedule": "linear:2->0"}, "> 0"),
        ({"lwf_temperature_schedule": "warmup:0.1"}, "no effect"),
        ({"lwf_lambda": 0.0, "lwf_lambda_schedule": "linear:0->2"}, "leaves the teacher out"),
        ({"lwf_temperature_schedule": "linear:2->1", "lwf_cache": "topk"}, "one temperature"),
    ],
)
def test_the_config_refuses_a_wrong_schedule_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_temperatures_warm_up_begins_at_1():
    from lwf_unsloth.schedules import schedules_of

    given = config(lwf_temperature=3.0, lwf_temperature_schedule="warmup:0.5")
    assert [schedules_of(given)[1](x) for x in (0, 0.25, 1)] == [1.0, 2.0, 3.0]


# ------------------------------------------------------------------ in the trainer


@pytest.fixture()
def make_trainer(short_run):
    """Factory: a trainer of 6 steps of 2 rows in 6 task and 6 rehearsal rows."""
    return functools.partial(short_run, **{"max_steps": 6, "max_length": 128})


MOVING = {"lwf_lambda_schedule": "linear:0->3", "lwf_temperature_schedule": "cosine:2->1"}


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def test_the_values_of_every_step_are_logged_and_a_resume_in_the_middle_gives_the_same(
    make_trainer, tmp_path
):
    whole = make_trainer(save_strategy="steps", save_steps=3, **MOVING)
    whole.train()
    assert logged(whole, "lwf_lambda") == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    wanted = [1.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6)]
    assert logged(whole, "lwf_temperature") == pytest.approx(wanted)
    again = make_trainer(**MOVING)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name in ("lwf_lambda", "lwf_temperature", "task_loss", "kl"):
        assert logged(again, name) == pytest.approx(logged(whole, name)), name


def test_a_constant_is_not_logged_and_trains_as_without_a_schedule(make_trainer):
    plain, constant = make_trainer(), make_trainer(lwf_lambda_schedule="constant")
    for trainer in (plain, constant):
        trainer.train()
    assert logged(plain, "loss") == logged(constant, "loss")
    assert not logged(plain, "lwf_lambda") and not logged(plain, "lwf_temperature")


def test_lambda_acts_in_the_loss_and_evaluations_keep_one_temperature(make_trainer, monkeypatch):
    trainer = make_trainer(**MOVING)
    trainer.state = SimpleNamespace(global_step=4, max_steps=8)
    asked, call = [], type(trainer.objective).__call__
    record = lambda self, *given: asked.append(given[-2:]) or call(self, *given)  # noqa: E731
    monkeypatch.setattr(type(trainer.objective), "__call__", record)
    rows = [trainer.train_dataset[i] for i in (0, 7)]
    batch = trainer.data_collator(rows)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    assert asked == [(1.5, 1.5), (1.5, 1.0)]
