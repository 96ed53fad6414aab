"""The KL meter: its figures are those of the log, its words those of the levels, it stops."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset

from lwf_unsloth.kl_meter import WINDOW, KLMeter


def event(step=1, history=()):
    """Arguments of a callback: args, state, control."""
    state = SimpleNamespace(
        global_step=step, max_steps=99, log_history=list(history), is_world_process_zero=True
    )
    return None, state, SimpleNamespace(should_training_stop=False, should_save=False)


def fed(values, name="kl_rehearsal", **settings):
    meter = KLMeter(**settings)
    for step, value in enumerate(values, 1):
        meter.on_log(*event(step), logs={name: value})
    return meter


def test_smoothed_is_the_mean_of_the_last_ten_and_max_is_of_all():
    meter = fed([9.0, *[0.01 * i for i in range(1, 13)]])
    assert meter.smoothed("kl_rehearsal") == pytest.approx(sum(0.01 * i for i in range(3, 13)) / 10)
    assert meter.last("kl_rehearsal") == 0.12 and meter.max("kl_rehearsal") == 9.0
    found = meter.to_dict()
    assert found["kl_rehearsal"]["step"] == 13 and found["window"] == WINDOW
    assert "kl_task" not in found


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        (0.0, "at most 1.5 %"),
        (0.0199, "at most 1.5 %"),
        (0.03, "between .02 and .04"),
        (0.05, "10 to 22 %"),
        (0.3, "plain fine-tuning"),
    ],
)
def test_the_verdict_names_the_level_and_where_it_was_measured(kl, said):
    text = fed([kl]).verdict()
    assert said in text and "on the two small models measured" in text and "held-out" in text


def test_the_verdict_claims_nothing_where_nothing_was_measured():
    assert KLMeter().verdict() == "No KL has been measured yet."
    assert (
        "with lwf_kl='reverse' no level is known"
        in fed([0.01], unknown="lwf_kl='reverse'").verdict()
    )
    task = fed([0.5], name="kl_task").verdict()
    assert "what was learned, not what was forgotten" in task and "leak" not in task


def test_rehearsal_decides_where_there_is_some():
    meter = fed([0.5], name="kl_task")
    assert meter.term == "kl_task"
    meter.on_log(*event(2), logs={"kl_task": 0.6, "kl_rehearsal": 0.01})
    assert meter.term == "kl_rehearsal"
    text = str(meter)
    assert "kl_task: 0.5500 (mean of the last 10), last 0.6000, largest 0.6000, step 2" in text
    assert text.splitlines()[0].startswith("kl_rehearsal")


def test_it_shows_itself_in_a_notebook_with_everything_escaped():
    text = fed([0.01], unknown="<b>")._repr_html_()
    assert "<td>0.0100</td>" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert KLMeter()._repr_html_() == "<p>No KL has been measured yet.</p>"


def test_the_run_ends_when_ten_values_are_above_on_average_and_not_before(caplog):
    meter, ends = KLMeter(stop_at=0.1), []
    for step in range(1, WINDOW + 3):
        args, state, control = event(step)
        meter.on_log(args, state, control, logs={"kl_rehearsal": 0.11, "kl_task": 0.0})
        ends.append((control.should_training_stop, control.should_save))
    assert ends[WINDOW - 2] == (False, False) and ends[WINDOW - 1] == (True, True)
    assert f"Ended at step {WINDOW} of 99" in meter.stopped and meter.stopped in str(meter)
    assert caplog.text.count("lwf_stop_at_kl=0.1") == 1


def test_one_value_far_above_does_not_end_it_and_a_low_mean_never_does():
    assert not fed([0.0] * 9 + [0.99], stop_at=0.1).stopped
    assert not fed([0.1] * 40, stop_at=0.1).stopped
    assert fed([0.0] * 9 + [1.01], stop_at=0.1).stopped


def test_a_value_that_is_no_number_is_left_out():
    meter = fed([0.01, float("nan"), 0.03])
    assert meter.smoothed("kl_rehearsal") == pytest.approx(0.02)


def test_a_resumed_run_goes_on_with_the_values_of_its_log():
    history = [{"kl_rehearsal": 0.2, "step": i} for i in range(1, WINDOW)] + [{"eval_kl": 1.0}]
    meter = KLMeter(stop_at=0.1)
    meter.on_train_begin(*event(9, history))
    meter.on_log(*event(10), logs={"kl_rehearsal": 0.2})
    assert "Ended at step 10" in meter.stopped
    meter.on_train_begin(*event(0))
    assert not meter.stopped and not meter.term, "a new run starts empty"


# ------------------------------------------------------------------------- in a training


@pytest.fixture()
def make_trainer(tiny_peft, alpaca_rows, tmp_path):
    def make(**changes):
        from lwf_unsloth.config import LwFConfig
        from lwf_unsloth.trainer import LwFTrainer

        values = {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
            "learning_rate": 2e-2, "warmup_steps": 0, "max_length": 128, "rehearsal_ratio": 0.25,
            "disable_tqdm": True, "save_strategy": "no", "max_steps": 16,
        }  # fmt: skip
        model, tokenizer = tiny_peft()
        return LwFTrainer(
            model,
            args=LwFConfig(str(tmp_path / "run"), **{**values, **changes}),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(alpaca_rows(12)),
            rehearsal_dataset=Dataset.from_list(alpaca_rows(6, "keep")),
        )

    return make


@pytest.mark.slow
def test_training_past_the_limit_ends_with_a_checkpoint_and_says_so(make_trainer, tmp_path, caplog):
    trainer = make_trainer(lwf_stop_at_kl=1e-6)
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        trainer.train()
    assert trainer.state.global_step == WINDOW
    assert (tmp_path / "run" / f"checkpoint-{WINDOW}" / "adapter_model.safetensors").is_file()
    assert "above lwf_stop_at_kl=1e-06" in caplog.text
    logged = [e["kl_rehearsal"] for e in trainer.state.log_history if "kl_rehearsal" in e]
    assert trainer.kl_meter.last("kl_rehearsal") == logged[-1]
    assert trainer.kl_meter.max("kl_rehearsal") == max(logged)


@pytest.mark.parametrize("rehearsal", [True, False])
def test_task_rows_do_not_end_a_run_whose_rehearsal_rows_come_late(rehearsal):
    rows = Dataset.from_dict({"is_rehearsal": [False, rehearsal]})
    meter = KLMeter(stop_at=0.1)
    meter.on_train_begin(*event(0), train_dataloader=SimpleNamespace(dataset=rows))
    for step in range(1, WINDOW + 3):
        meter.on_log(*event(step), logs={"kl_task": 0.5})
    assert bool(meter.stopped) is not rehearsal


def test_the_trainer_lets_the_meter_know_of_its_rehearsal_rows(make_trainer):
    trainer = make_trainer(lwf_stop_at_kl=1e-6, max_steps=2)
    trainer.train()
    assert trainer.kl_meter._awaits == "kl_rehearsal"


@pytest.mark.slow
def test_a_run_resumed_after_its_stop_goes_on_only_with_a_higher_limit(make_trainer):
    make_trainer(lwf_stop_at_kl=1e-6).train()
    again = make_trainer(lwf_stop_at_kl=1e-6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == WINDOW + 1
    raised = make_trainer(lwf_stop_at_kl=1e6)
    raised.train(resume_from_checkpoint=True)
    assert raised.state.global_step == 16
    assert len(raised.kl_meter.values["kl_rehearsal"]) == 16, "the earlier values are there too"


def test_a_limit_that_is_not_reached_changes_nothing(make_trainer):
    trainer = make_trainer(lwf_stop_at_kl=1e6, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and not trainer.kl_meter.stopped
