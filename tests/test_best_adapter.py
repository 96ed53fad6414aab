"""The best adapter of a run: by the rule, saved as any adapter, with its history."""

import json
import logging
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from lwf_unsloth.best_adapter import HISTORY, Reading, is_better
from lwf_unsloth.errors import ConfigError, DataError


def chosen(readings, budget):
    best = None
    for reading in readings:
        if is_better(reading, best, budget):
            best = reading
    return best


def test_the_rule_picks_what_looking_at_all_readings_at_once_would():
    draw = random.Random(0)
    for _ in range(300):
        readings = [
            Reading(step, round(draw.uniform(-1, 3), 1), round(draw.uniform(-0.02, 0.1), 2))
            for step in range(draw.randint(1, 12))
        ]
        within = [r for r in readings if r.forgetting <= 0.02]
        found = chosen(readings, 0.02)
        if within:
            assert found in within and found.gain == max(r.gain for r in within)
        else:
            assert found.forgetting == min(r.forgetting for r in readings)


def test_a_reading_that_is_no_number_is_never_the_best():
    assert not is_better(Reading(1, float("nan"), 0.0), None, 0.02)
    assert not is_better(Reading(1, 9.0, float("inf")), Reading(0, 0.0, 5.0), 0.02)


@pytest.fixture()
def run(tiny_peft, alpaca_rows, tmp_path):
    """Factory: (trainer, callback) on 12 task rows, 6 rehearsal rows."""

    def make(callback=None, **changes):
        from lwf_unsloth.best_adapter import BestAdapter
        from lwf_unsloth.config import LwFConfig
        from lwf_unsloth.trainer import LwFTrainer

        values = {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
            "learning_rate": 2e-2, "warmup_steps": 0, "max_length": 128, "rehearsal_ratio": 0.25,
            "disable_tqdm": True, "save_strategy": "no", "max_steps": 6,
        }  # fmt: skip
        model, tokenizer = tiny_peft()
        best = BestAdapter(
            model,
            tokenizer,
            **{
                "task": alpaca_rows(5),
                "general": alpaca_rows(5, "other"),
                "folder": tmp_path / "best",
                **(callback or {}),
            },
        )
        trainer = LwFTrainer(
            model,
            args=LwFConfig(str(tmp_path / "run"), **{**values, **changes}),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(alpaca_rows(12)),
            rehearsal_dataset=Dataset.from_list(alpaca_rows(6, "keep")),
            callbacks=[best],
        )
        return trainer, best

    return make


@pytest.mark.slow
def test_the_best_of_the_readings_lies_in_the_folder_and_scores_the_same(
    run, tmp_path, alpaca_rows, tiny_model_dir
):
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_adapter
    from lwf_unsloth.scoring import score

    trainer, best = run({"every": 2, "budget": 100.0})
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "best" / HISTORY).open(encoding="utf-8")]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert best.best.gain == max(line["gain"] for line in lines) > 0
    base = ModelConfig(str(tiny_model_dir), dtype="float32", max_seq_length=512)
    model, tokenizer = load_adapter(best.adapter, base=base)
    again = score(model, tokenizer, alpaca_rows(5), batch_size=16)
    saved = next(line for line in lines if line["step"] == best.best.step)
    assert again.nll == pytest.approx(saved["sets"]["task"]["nll"], abs=1e-5)
    assert -again.rise == pytest.approx(saved["gain"], abs=1e-5)
    card = (best.adapter / "README.md").read_text(encoding="utf-8")
    assert "## Best adapter" in card and "forgetting" in card


@pytest.mark.slow
def test_reading_during_the_training_does_not_change_the_training(run):
    with_readings, _ = run({"every": 1})
    with_readings.train()
    without, _ = run({"every": 1000})
    without.train()
    for (name, one), other in zip(
        with_readings.model.named_parameters(), without.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_with_a_budget_that_nothing_meets_the_one_that_forgot_least_is_kept(run, caplog):
    trainer, best = run(
        {"every": 1, "budget": 0.0, "general": {"a": [{"text": "The fox sleeps."}]}}
    )
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        trainer.train()
    assert best.best.forgetting == min(r.forgetting for r in best.readings) > 0
    assert "none was within the budget" in caplog.text and "else the smallest forgetting" in str(
        best
    )


@pytest.mark.slow
def test_the_worst_general_set_and_the_measure_that_was_asked_for_count(run):
    sets = {"a": [{"text": "The fox sleeps."}], "b": [{"text": "12:45 on 3 May 1987"}]}
    for measure, key in (("kl", "kl"), ("nll", "rise")):
        trainer, best = run({"general": sets, "forgetting": measure}, max_steps=2)
        trainer.train()
        (reading,) = best.readings
        assert reading.forgetting == max(reading.sets[name][key] for name in sets)


@pytest.mark.slow
def test_it_reads_at_evaluations_and_checkpoints_once_a_step(run, alpaca_rows):
    trainer, best = run(save_strategy="steps", save_steps=2, max_steps=5)
    trainer.train()
    assert [r.step for r in best.readings] == [2, 4, 5]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_history_and_a_new_run_starts_a_new_one(run, tmp_path):
    trainer, first = run(save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    resumed, best = run(save_strategy="steps", save_steps=2, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert [r.step for r in best.readings] == [2, 4, 6]
    assert best.readings[:2] == first.readings
    assert best.readings[2].sets["general"]["kl"] > 0, "against the start, not the checkpoint"
    assert best.readings[2].gain > best.readings[1].gain / 2
    anew, other = run(max_steps=1)
    anew.train()
    assert [r.step for r in other.readings] == [1]
    assert (tmp_path / "best" / f"{HISTORY}.old").is_file()


@pytest.mark.slow
def test_steps_that_a_resumed_run_takes_again_are_read_again_once(run):
    def make():
        return run({"every": 1, "budget": 100.0}, save_strategy="steps", save_steps=2, max_steps=4)

    whole, uninterrupted = make()
    whole.train()
    whole.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-2")
    assert [r.step for r in uninterrupted.readings] == [1, 2, 3, 4]
    resumed, best = make()
    resumed.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-2")
    lines = (best.folder / HISTORY).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert [r.kept for r in best.readings] == [r.kept for r in uninterrupted.readings]
    assert best.best in best.readings and best.best.kept


@pytest.mark.slow
def test_an_earlier_runs_adapter_does_not_pass_for_that_of_a_run_without_a_reading_yet(run):
    trainer, first = run(max_steps=1)
    trainer.train()
    assert first.adapter.is_dir()
    _, other = run()
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    other.on_train_begin(None, state, None)
    assert not other.adapter.exists() and other.adapter.with_name("adapter.old").is_dir()


@pytest.mark.slow
def test_readings_by_another_measure_are_not_gone_on_with(run):
    trainer, _ = run({"forgetting": "nll"}, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    resumed, best = run(save_strategy="steps", save_steps=2, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert [r.step for r in best.readings] == [4]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"budget": -1}, ConfigError, "budget"),
        ({"budget": float("nan")}, ConfigError, "budget"),
        ({"forgetting": "bleu"}, ConfigError, "must be one of"),
        ({"every": 0}, ConfigError, "every"),
        ({"task": []}, DataError, "hold no rows"),
        ({"general": {"task": [{"text": "x"}]}}, DataError, "different names"),
    ],
)
def test_settings_without_sense_are_refused(tiny_peft, changes, error, said):
    from lwf_unsloth.best_adapter import BestAdapter

    values = {"task": [{"text": "x y"}], "general": [{"text": "y z"}], **changes}
    with pytest.raises(error, match=said):
        BestAdapter(None, None, **values)
