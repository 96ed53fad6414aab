"""ModelConfig and LwFConfig: every knob once, ranges checked, the document's recipe whole."""

import math
import os
import subprocess
import sys

import pytest

from lwf_unsloth.errors import ConfigError


def lwf_config(**values):
    from lwf_unsloth.config import LwFConfig

    return LwFConfig("runs/test", **values)


def test_document_carries_every_setting_of_the_document(tmp_path):
    from lwf_unsloth.config import LwFConfig, ModelConfig

    args = LwFConfig.document(str(tmp_path))
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 8)
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps) == (3, 2e-4, 100)
    assert args.lr_scheduler_type == "linear" and args.weight_decay == 0
    assert args.max_length == 512 and args.lwf_lambda == 0.5 and args.rehearsal_ratio == 0.2
    assert args.lwf_temperature == 1 and args.lwf_rows == "all" and args.lwf_kl == "forward"
    assert args.rehearsal_ce and args.save_strategy == "epoch"
    model = ModelConfig.document()
    assert (model.r, model.lora_alpha, model.lora_dropout) == (8, 16, 0.05)
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert set(model.target_modules) == attention | mlp and model.load_in_4bit
    assert not model.trust_remote_code


def test_our_defaults_are_what_the_readme_says():
    args = lwf_config()
    assert (args.lwf_lambda, args.rehearsal_ratio, args.lwf_temperature) == (2.0, 0.1, 1.0)
    assert (args.learning_rate, args.max_length, args.lwf_rows) == (2e-4, 512, "auto")
    assert not args.rehearsal_ce and args.report_to in ("none", [], ["none"])


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, 1.5, math.nan, math.inf, "0.3", None, True])
def test_a_rehearsal_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ConfigError, match="rehearsal_ratio"):
        lwf_config(rehearsal_ratio=ratio)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.5, 0.999])
def test_a_rehearsal_ratio_from_0_to_below_1_is_taken(ratio):
    assert lwf_config(rehearsal_ratio=ratio).rehearsal_ratio == ratio


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lwf_lambda", -1),
        ("lwf_lambda", math.nan),
        ("lwf_lambda", "2"),
        ("lwf_temperature", 0),
        ("lwf_temperature", -2.0),
        ("lwf_rows", "everything"),
        ("lwf_kl", "jsd"),
        ("train_on", "prompt"),
        ("packing", True),
        ("label_smoothing_factor", 1.0),
        ("self_rehearsal_rows", 0),
        ("self_rehearsal_rows", 1.5),
        ("lwf_stop_at_kl", 0),
        ("lwf_stop_at_kl", "low"),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(name, value):
    with pytest.raises(ConfigError, match=name):
        lwf_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name", " "),
        ("r", 0),
        ("r", 8.0),
        ("max_seq_length", -1),
        ("lora_alpha", True),
        ("lora_dropout", 1.0),
        ("dtype", "half"),
        ("bnb_4bit_quant_type", "int4"),
        ("bias", "some"),
        ("target_modules", "q_proj"),
        ("target_modules", []),
    ],
)
def test_a_model_setting_out_of_range_is_refused_and_named(name, value):
    from lwf_unsloth.config import ModelConfig

    with pytest.raises(ConfigError, match=name):
        ModelConfig(**{"model_name": "some/model", **{name: value}})


def test_a_token_is_neither_shown_nor_stored():
    from lwf_unsloth.config import ModelConfig

    config = ModelConfig("some/model", token="hf_canary")
    assert "hf_canary" not in repr(config) and "hf_canary" not in str(config.to_dict())


def test_exactly_one_precision_is_chosen_and_a_t4_gets_fp16(monkeypatch, tiny_peft):
    """Recent torch answers True to is_bf16_supported on a T4, by emulation."""
    import torch

    from lwf_unsloth import backend, prechecks

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setattr(prechecks, "on_cuda", lambda: True)
    assert not backend.native_bf16()

    class Half(torch.nn.Linear):
        dtype = torch.float16

    args = lwf_config()
    prechecks.match_model(args, Half(2, 2))
    assert (args.fp16, args.bf16) == (True, False)
    asked = lwf_config(bf16=True)
    with pytest.raises(ConfigError, match="fp16=True"):
        prechecks.match_model(asked, Half(2, 2))


@pytest.mark.slow
def test_usage_data_is_off_with_ci_unset():
    code = (
        "import lwf_unsloth.trainer, os, trl, huggingface_hub.constants as c;"
        "assert os.environ['UNSLOTH_DISABLE_STATISTICS'] == '1';"
        "assert c.HF_HUB_DISABLE_TELEMETRY;"
        "own = lwf_unsloth.trainer.LwFTrainer.__dict__['_send_telemetry'];"
        "assert own(None) is None"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "HF_HUB_DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_user_set_in_the_environment_stays(monkeypatch):
    from lwf_unsloth.backend import set_switches

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("UNSLOTH_DISABLE_STATISTICS", raising=False)
    assert "HF_HUB_DISABLE_TELEMETRY" not in set_switches("2.13.0")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"


def test_the_switch_of_a_known_bad_pair_is_set(monkeypatch):
    from lwf_unsloth.backend import set_switches

    monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE", raising=False)
    assert "UNSLOTH_BLOCK_COMPILE" not in set_switches("2.13.0")
    assert set_switches("2.11.0+cu130")["UNSLOTH_BLOCK_COMPILE"] == "0"
    monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE", raising=False)
