"""The dial: 0 is the base, 1 the adapter as trained, and a chosen scale is an ordinary adapter."""

import json

import pytest
import torch
from conftest import change_adapter

from lwf_unsloth.adapter_dial import (
    DialResult,
    adapter_scale,
    dial,
    scale_adapter,
    set_adapter_scale,
)
from lwf_unsloth.adapters import save_adapter
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.scoring import score

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])


@pytest.fixture()
def trained(tiny_peft):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    return model, tokenizer


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_scale_0_is_the_base_and_scale_1_the_adapter_exactly(trained):
    model, _ = trained
    tuned = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert not torch.equal(base, tuned)
    with scale_adapter(model, 0):
        assert torch.equal(logits(model), base)
    with scale_adapter(model, 1):
        assert torch.equal(logits(model), tuned)
    assert torch.equal(logits(model), tuned)


def test_half_the_scale_is_half_of_the_second_factor(trained):
    model, _ = trained
    with scale_adapter(model, 0.5):
        scaled = logits(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.5)
    assert torch.allclose(logits(model), scaled, atol=1e-5)


def state(model):
    config = model.peft_config["default"]
    scalings = [getattr(module, "scaling", None) for module in model.modules()]
    layers = [dict(one) for one in scalings if isinstance(one, dict)]
    return layers, config.lora_alpha, dict(config.alpha_pattern), str(model.lwf_loaded)


def test_the_scale_is_put_back_also_after_an_error_and_within_another(trained):
    model, _ = trained
    before = state(model)
    with pytest.raises(ZeroDivisionError), scale_adapter(model, 0.3):
        assert adapter_scale(model) == pytest.approx(0.3)
        with scale_adapter(model, 0.0):
            assert adapter_scale(model) == 0
        assert adapter_scale(model) == pytest.approx(0.3)
        raise ZeroDivisionError
    assert state(model) == before
    assert adapter_scale(model) == 1


def test_a_scale_that_is_set_stays_and_is_not_multiplied_twice(trained):
    model, _ = trained
    before = state(model)
    set_adapter_scale(model, 0)
    set_adapter_scale(model, 0.5)
    set_adapter_scale(model, 0.5)
    assert state(model)[1] == 4 and adapter_scale(model) == 0.5
    with scale_adapter(model, 0.75):
        assert state(model)[1] == 6
    assert adapter_scale(model) == 0.5
    set_adapter_scale(model, 1)
    assert state(model) == before


@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_a_chosen_scale_is_saved_as_an_ordinary_adapter(trained, tiny_model_dir, tmp_path, scale):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lwf_unsloth.model import load_adapter

    model, tokenizer = trained
    with scale_adapter(model, scale):
        scaled = logits(model)
        save_adapter(model, tokenizer, tmp_path / "half")
    saved = json.loads((tmp_path / "half" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["lora_alpha"] == pytest.approx(8 * scale)
    again, _ = load_adapter(tmp_path / "half", base=str(tiny_model_dir))
    assert torch.allclose(logits(again), scaled, atol=1e-5)
    assert adapter_scale(again) == 1

    def plain():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()

    save_adapter(model, tokenizer, tmp_path / "whole")
    bare = PeftModel.from_pretrained(plain(), tmp_path / "half")
    whole = PeftModel.from_pretrained(plain(), tmp_path / "whole")
    factors = zip(bare.named_modules(), whole.named_modules(), strict=True)
    pairs = [
        (a.scaling["default"], b.scaling["default"])
        for (_, a), (_, b) in factors
        if isinstance(getattr(a, "scaling", None), dict)
    ]
    assert pairs and all(a == pytest.approx(scale * b) for a, b in pairs)
    with scale_adapter(whole, scale):
        assert torch.allclose(logits(bare), logits(whole), atol=1e-6)


def test_turning_the_dial_down_forgets_less_and_learns_less(trained, alpaca_rows):
    model, tokenizer = trained
    sets = {"task": alpaca_rows(4), "general": alpaca_rows(4, "general")}
    before = state(model)
    result = dial(model, tokenizer, sets, (1, 0, 0.5))
    assert result.scales == (0.0, 0.5, 1.0)
    kl = [one.tuned.value for one in result.measure("general", "kl").values()]
    assert kl[0] == 0 < kl[1] < kl[2]
    base = score(model, tokenizer, sets["general"])
    assert result.scores[0.0]["general"].score.row_nll == base.row_base_nll
    assert result.scores[1.0]["general"].score.row_nll == pytest.approx(base.row_nll)
    assert state(model) == before
    table = str(result)
    assert "scale 0.5" in table and f"{kl[1]:.3f}" in table
    assert "<script" not in result._repr_html_() and "scale 1" in result.to_markdown()


def test_the_choice_is_the_most_gain_within_the_budget(trained, alpaca_rows, tmp_path):
    model, tokenizer = trained
    sets = {"task": alpaca_rows(4), "general": alpaca_rows(4, "general")}
    result = dial(model, tokenizer, sets, (0, 0.5, 1))
    gains = {s: result.scores[s]["task"]["nll"].gain for s in result.scales}
    kl = {s: one.tuned.value for s, one in result.measure("general", "kl").items()}
    assert result.choose(budget=1e9) == max(gains, key=gains.get)
    assert result.choose(budget=0) == 0
    inside = {s: gain for s, gain in gains.items() if kl[s] <= kl[0.5]}
    assert result.choose(budget=kl[0.5]) == max(inside, key=inside.get)
    again = DialResult.from_dict(json.loads(result.save(tmp_path / "d.json").read_text("utf-8")))
    assert str(again) == str(result) and again.scales == result.scales
    with pytest.raises(DataError, match="leak"):
        result.choose(measure="leak")


def test_training_goes_on_at_the_scale_that_is_set(trained):
    model, _ = trained
    set_adapter_scale(model, 0.5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_A" in name]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), True, "half"])
def test_what_is_no_scale_is_refused(trained, scale):
    with pytest.raises(ConfigError, match="scale is"):
        set_adapter_scale(trained[0], scale)


def test_adapters_that_are_more_than_a_factor_are_refused(trained, alpaca_rows):
    model, tokenizer = trained
    model.peft_config["default"].use_dora = True
    with pytest.raises(ModelError, match="DoRA"):
        set_adapter_scale(model, 0.5)
    model.peft_config["default"].use_dora = False
    with pytest.raises(ConfigError, match="adapter_off"):
        dial(model, tokenizer, {"a": alpaca_rows(2)}, base=None)
    with pytest.raises(ConfigError, match="empty"):
        dial(model, tokenizer, {"a": alpaca_rows(2)}, ())
    with pytest.raises(ModelError, match="active adapters"):
        set_adapter_scale(torch.nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("error", [RuntimeError("the disk\nis full"), KeyboardInterrupt()])
def test_scales_that_are_done_are_kept_when_an_error_comes_and_not_measured_again(
    trained, alpaca_rows, monkeypatch, error
):
    from lwf_unsloth import adapter_dial

    model, tokenizer = trained
    sets = {"task": alpaca_rows(2), "general": alpaca_rows(2, "general")}
    measure, asked = adapter_dial.evaluate, []

    def failing(*args, **settings):
        asked.append(settings["label"])
        if settings["label"] == "scale 0.5":
            raise error
        return measure(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_dial, "evaluate", failing)
        part = dial(model, tokenizer, sets, (0, 0.5, 1))
        with pytest.raises(type(error)):
            dial(model, tokenizer, sets, (0.5, 1))
    assert part.scales == (0.0,) and "Stopped at scale 0.5" in part.stopped
    assert part.stopped in str(part) and adapter_scale(model) == 1
    again = DialResult.from_dict(json.loads(json.dumps(part.to_dict())))
    asked.clear()
    monkeypatch.setattr(
        adapter_dial, "evaluate", lambda *a, **k: asked.append(k) or measure(*a, **k)
    )
    whole = dial(model, tokenizer, sets, (0, 0.5, 1), done=again)
    assert whole.scales == (0.0, 0.5, 1.0) and not whole.stopped
    assert [one["label"] for one in asked] == ["scale 0.5", "scale 1"]
    assert whole.scores[0.0].to_dict() == part.scores[0.0].to_dict()
