"""LoRA in phases: what a phase does not train does not move, in the trainer and in its files."""

import functools
import json
import math

import pytest

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.rank_schedule import freeze_phases, plain, rank_phases

GROWING = [(0.0, 1), (0.5, 4)]
HALVES = [(0.0, "mlp"), (0.5, "")]


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("given", [GROWING, [[0, 1], [0.5, 4]], "0:1,0.5:4", " 0 : 1 , .5 : 4, "])
def test_lists_and_texts_say_the_same(given):
    assert plain(rank_phases(given)) == [[0.0, 1], [0.5, 4]]


def test_a_pattern_may_be_a_regular_expression_and_hold_a_colon():
    assert freeze_phases(r"0.25:layers\.[01]\.|(?:up), 0.5:").values == (
        r"layers\.[01]\.|(?:up)",
        "",
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "names no phase"),
        ("", "names no phase"),
        (8, "names no phase"),
        ([(0.0, 4, 8)], "no pair"),
        ([8], "no pair"),
        ("8", "no pair"),
        ([(0.1, 4)], "must begin at 0"),
        ([(0, 4), (1, 8)], "no share of the run"),
        ([(0, 4), (-0.1, 8)], "no share of the run"),
        ([(0, 4), (math.nan, 8)], "no share of the run"),
        ("first:4", "no share of the run"),
        ([(0, 4), (0.5, 8), (0.5, 16)], "does not come after"),
        ([(0, 8), (0.5, 4)], "would throw away"),
        ([(0, 8), (0.5, 8)], "changes nothing"),
        ([(0, 0)], "no rank"),
        ([(0, 4.0)], "no rank"),
        ([(0, "4")], "no rank"),
        ([(0, True)], "no rank"),
        ("0:four", "no rank"),
    ],
)
def test_what_is_no_schedule_of_ranks_is_refused_and_says_why(given, said):
    with pytest.raises(ConfigError, match=rf"rank_schedule is .*{said}.*\(0\.5, 16\)"):
        rank_phases(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([(0.0, 3)], "no text"),
        ([(0.0, "(")], "no regular expression"),
        ([(0.0, "")], "changes nothing"),
        ([(0.0, "mlp"), (0.5, "mlp")], "changes nothing"),
        ([(0.0, "mlp"), (0.5, ""), (0.6, "")], "changes nothing"),
    ],
)
def test_what_freezes_nothing_is_refused(given, said):
    with pytest.raises(ConfigError, match=f"freeze_schedule is .*{said}"):
        freeze_phases(given)


@pytest.mark.parametrize(
    ("given", "total", "first"),
    [
        ([(0, 1), (0.5, 4)], 10, [0, 5]),
        ([(0, 1), (0.5, 4)], 7, [0, 4]),  # 3 of 7 steps are less than half
        ([(0, 1), (0.3, 2), (0.7, 4)], 10, [0, 3, 7]),
        ([(0, 1), (1 / 3, 4)], 6, [0, 2]),
        ([(0, 1), (0.999, 4)], 1000, [0, 999]),
    ],
)
def test_a_phase_begins_with_the_first_step_whose_share_is_reached(given, total, first):
    assert rank_phases(given).steps(total) == first


def test_a_phase_without_a_step_is_refused():
    for given, total in (([(0, 1), (0.9, 4)], 5), ([(0, 1), (0.45, 2), (0.5, 4)], 10)):
        with pytest.raises(ConfigError, match="none of them lies in it"):
            rank_phases(given).steps(total)


def config(**changes):
    from lwf_unsloth.config import LwFConfig

    return LwFConfig("runs/test", **changes)


def test_the_settings_survive_json_and_stand_in_the_card():
    one = config(rank_schedule=GROWING, freeze_schedule="0:mlp,0.5:")
    again = config(**json.loads(json.dumps({"rank_schedule": one.rank_schedule})))
    assert again.rank_schedule == one.rank_schedule == [[0.0, 1], [0.5, 4]]
    assert one.lwf_settings()["freeze_schedule"] == [[0.0, "mlp"], [0.5, ""]]
    assert config().rank_schedule is None
    with pytest.raises(ConfigError, match="rank_schedule"):
        config(rank_schedule=[(0.5, 4)])


# ------------------------------------------------------------------ in the trainer


@pytest.fixture()
def make_trainer(short_run):
    """Factory: a trainer of 4 steps of 2 forwards of 2 rows, r 4."""
    return functools.partial(short_run, **{"gradient_accumulation_steps": 2, "max_steps": 4})


def lora(trainer):
    return {
        name: p.detach().clone()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad and "lora_" in name
    }


def watched(trainer):
    """Trains; the adapter before each step and at the end."""
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(lora(trainer))

    trainer.add_callback(Watch())
    trainer.train()
    return [*seen, lora(trainer)]


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def columns(name, tensor, low, high):
    """Columns of lora_B, rows of lora_A."""
    return tensor[low:high] if "lora_A" in name else tensor[:, low:high]


@pytest.fixture()
def grown(make_trainer):
    """A run of ranks 1, 1, 4, 4, and its adapter before each step and at the end.

    Weight decay would shrink the rows of lora_A, which have no gradient.
    """
    settings = {"lr_scheduler_type": "constant", "adam_epsilon": 1e-30, "weight_decay": 0.1}
    trainer = make_trainer(rank_schedule=GROWING, **settings)
    return trainer, watched(trainer)


def test_columns_wait_for_their_phase_and_begin_as_adam_begins(grown):
    """Adam's settled count of steps would move them by 0.1 / sqrt(0.001) = 3.2 rates, not by 1."""
    trainer, seen = grown
    assert logged(trainer, "lora_rank") == [1, 1, 4, 4]
    for name, first in seen[0].items():
        is_b = "lora_B" in name
        for step in (1, 2):
            kept = columns(name, seen[step][name], 1, 4)
            assert kept.equal(columns(name, first, 1, 4)), (name, step)
            assert not is_b or not kept.any(), (name, step)
        assert columns(name, seen[2][name] - first, 0, 1).any(), f"{name}: the first trains"
        moved = columns(name, seen[4][name] - first, 1, 4)
        assert moved.any(dim=0 if is_b else 1).all(), f"{name}: all train in the end"
        if is_b:
            begun = columns(name, seen[3][name], 1, 4).abs()
            assert begun.max() == pytest.approx(1e-2, rel=1e-3) == float(begun.min()), name
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)


def test_the_logged_norm_is_that_of_what_is_trained(make_trainer):
    """It is what the whole gradient is clipped by."""
    trainer = make_trainer(max_steps=2, rank_schedule=GROWING, max_grad_norm=1e9)
    norms, keep = [], trainer.curriculum.on_pre_optimizer_step

    def look(*args, **kwargs):
        grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        norms.append(math.sqrt(sum(float((grad**2).sum()) for grad in grads.values())))
        waits = [bool(columns(name, grad, 1, 4).any()) for name, grad in grads.items()]
        assert any(waits) == (len(norms) == 2)
        keep(*args, **kwargs)

    trainer.curriculum.on_pre_optimizer_step = look
    trainer.train()
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
def test_a_schedule_of_one_phase_is_the_plain_run_bit_for_bit(make_trainer):
    plain_run, one = make_trainer(), make_trainer(rank_schedule=[(0, 4)])
    for trainer in (plain_run, one):
        trainer.train()
    assert logged(plain_run, "loss") == logged(one, "loss")
    assert logged(one, "lora_rank") == [4] * 4 and not logged(plain_run, "lora_rank")
    assert all(lora(plain_run)[name].equal(p) for name, p in lora(one).items())


def test_frozen_modules_do_not_move_and_their_momentum_waits(make_trainer):
    """In the middle: they have momentum when they freeze, and go on where they were."""
    trainer = make_trainer(freeze_schedule=[(0.25, "mlp"), (0.75, "")], weight_decay=0.1)
    seen = watched(trainer)
    for name in seen[0]:
        steps = [not seen[i][name].equal(seen[i + 1][name]) for i in range(4)]
        if "mlp" in name:
            assert steps == [True, False, False, True], name
        else:
            assert all(steps), name
    n_mlp = sum("mlp" in name for name in seen[0])
    assert logged(trainer, "frozen_tensors") == [0, n_mlp, n_mlp, 0]
    states = trainer.optimizer.state
    at = {float(states[p]["step"]) for n, p in trainer.model.named_parameters() if p in states}
    assert at == {2.0, 4.0}, "a frozen tensor's step is not counted"


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", pytest.param("sgd", marks=pytest.mark.slow)]
)
def test_a_run_that_is_resumed_within_a_phase_is_the_undisturbed_one(make_trainer, tmp_path, optim):
    phases = {"rank_schedule": [(0, 1), (0.25, 3), (0.75, 4)], "freeze_schedule": HALVES}
    settings = {**phases, "max_steps": 8, "weight_decay": 0.1, "optim": optim}
    whole = make_trainer(save_strategy="steps", save_steps=3, **settings)
    whole.train()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(whole, "lora_rank") == [1, 1, 3, 3, 3, 3, 4, 4] == logged(again, "lora_rank")
    assert logged(whole, "loss") == logged(again, "loss")
    assert all(lora(whole)[name].equal(p) for name, p in lora(again).items())


@pytest.mark.slow
def test_a_resume_may_go_up_in_rank_but_not_below_what_is_trained(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=3, rank_schedule=GROWING).train()
    kept = str(tmp_path / "run" / "checkpoint-3")
    lower = make_trainer(rank_schedule=[(0, 1), (0.75, 4)], max_steps=8)
    with pytest.raises(ConfigError, match="trains rank 1 at step 4, but the adapter has weights"):
        lower.train(resume_from_checkpoint=kept)
    plain_run = make_trainer()
    plain_run.train(resume_from_checkpoint=kept)
    assert logged(plain_run, "lora_rank") == [1, 1, 4], "and then the log of a plain run"


def test_the_saved_adapter_is_an_ordinary_one_of_the_last_rank(
    make_trainer, tmp_path, tiny_model_dir
):
    """PEFT alone loads it, with the logits of the trained model, also from within a phase."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lwf_unsloth import load_adapter, save_adapter

    trainer = make_trainer(rank_schedule=[(0, 1), (0.5, 2), (0.75, 4)], max_steps=4)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
    trainer.train()
    saved = save_adapter(trainer.model, trainer.processing_class, tmp_path / "a")
    model, _ = load_adapter(saved, base=tiny_model_dir)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert model.eval()(ids).logits.equal(trainer.model.eval()(ids).logits)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for folder, rank in ((tmp_path / "run" / "checkpoint-3", 2), (tmp_path / "a", 4)):
        loaded = PeftModel.from_pretrained(base, folder)
        trained = {n: p for n, p in loaded.named_parameters() if "lora_B" in n}
        assert trained and all(p.shape[1] == 4 for p in trained.values())
        assert {int(p.any(dim=0).sum()) for p in trained.values()} == {rank}
        loaded.unload()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_schedule": [(0, 1), (0.5, 8)]}, r"ends at rank 8, but the adapter has rank 4.*r=8"),
        ({"freeze_schedule": [(0, "nowhere")]}, "no trained tensor"),
        ({"freeze_schedule": [(0, "lora")]}, "all that is trained"),
        ({"rank_schedule": GROWING, "optim": "lomo"}, "could not be held"),
    ],
)
def test_schedules_that_do_not_fit_the_adapter_are_refused_before_training(
    make_trainer, changes, said
):
    with pytest.raises(ConfigError, match=said):
        make_trainer(**changes)


@pytest.mark.slow
def test_an_adapter_that_is_trained_already_is_refused(make_trainer):
    first = make_trainer()
    first.train()
    second = make_trainer("second", (first.model, first.processing_class), rank_schedule=GROWING)
    with pytest.raises(ConfigError, match="has weights beyond it"):
        second.train()
