"""Memory told before training, held against what was measured; and the doctor's report."""

import importlib.metadata
import logging
import re
import types
from dataclasses import replace

import pytest

from lwf_unsloth import backend, checkup
from lwf_unsloth.checkup import doctor, examine, out_of_range, switches
from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.preflight import Estimate, estimate, fits, longest_row, tell_memory
from lwf_unsloth.shapes import ModelShape

GIB = 2**30

# Gemma-2B's shape; a transformers configuration is this and more.
GEMMA_2B = types.SimpleNamespace(
    vocab_size=256000,
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)

# ---------------------------------------------------------------- the estimate


@pytest.mark.parametrize(
    "batch, length, kl_share, full_logits, measured",
    [
        (4, 512, 0.0, False, 2.68),  # plain Unsloth SFT
        (4, 512, 1.0, False, 2.68),
        (16, 1024, 0.0, False, 4.55),
        (16, 1024, 1.0, False, 4.55),
        (4, 512, 1.0, True, 15.84),
    ],
)
def test_the_estimate_is_within_15_percent_of_the_peaks_measured_on_an_h100(
    batch, length, kl_share, full_logits, measured
):
    shape = replace(ModelShape.of_config(GEMMA_2B), full_logits=full_logits)
    found = estimate(shape, batch, length, kl_share=kl_share).peak / GIB
    assert found == pytest.approx(measured, rel=0.15)


def test_the_static_parts_are_counted_exactly():
    found = estimate(ModelShape.of_config(GEMMA_2B), 1, 16)
    linear = 18 * (2048 * 2048 * 2 + 2048 * 256 * 2 + 3 * 2048 * 16384)
    embedding = 256000 * 2048 * 2
    assert found.weights == pytest.approx(linear * (0.5 + 1 / 64 + 4 / 64 / 256) + embedding)
    lora = 18 * 8 * (2 * 4096 + 2 * 2304 + 3 * 18432)
    assert found.adapter == found.gradients == 4 * lora
    assert found.optimizer == 8 * lora


def test_it_grows_with_rows_and_tokens_and_by_tokens_alone():
    shape = ModelShape.of_config(GEMMA_2B)
    needed = [estimate(shape, b, t).needed for b, t in ((1, 256), (2, 256), (2, 512), (8, 512))]
    assert needed == sorted(needed) and len(set(needed)) == 4
    assert estimate(shape, 4, 512) == estimate(shape, 2, 1024)


@pytest.mark.parametrize("batch, length", [(4, 512), (16, 1024)])
def test_checkpointing_by_offloading_needs_least_and_none_most(batch, length):
    peaks = [
        estimate(ModelShape.of_config(GEMMA_2B, checkpointing=way), batch, length).peak
        for way in ("unsloth", "inputs", "everything")
    ]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3


def test_settings_change_the_parts_they_should():
    shape = ModelShape.of_config(GEMMA_2B)
    whole = estimate(shape, 4, 512)
    plain = estimate(shape, 4, 512, kl_share=0.0)
    assert plain.teacher == 0 and plain.layer == whole.layer and plain.loss < whole.loss
    assert estimate(shape, 4, 512, optimizer_bytes=2).optimizer * 4 == whole.optimizer
    assert estimate(ModelShape.of_config(GEMMA_2B, r=16), 4, 512).adapter == 2 * whole.adapter
    attention = ModelShape.of_config(GEMMA_2B, target_modules=("q_proj", "v_proj"))
    assert attention.trained < shape.trained / 5
    sixteen = ModelShape.of_config(GEMMA_2B, bits=16)
    assert sixteen.weight_bytes > 3 * (shape.weight_bytes - 256000 * 2048 * 2)
    assert sixteen.unpacked_bytes == 0
    tight = estimate(shape, 4, 512, free=GIB)  # the loss takes smaller chunks
    assert tight.loss < whole.loss


def test_a_loaded_model_is_counted_as_its_tensors_are(tiny_peft):
    model, _ = tiny_peft()
    shape = ModelShape.of_model(model)
    assert (shape.layers, shape.hidden, shape.mlp, shape.queries, shape.keys) == (
        2,
        64,
        128,
        64,
        32,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (shape.trained, shape.trained_bytes) == (trained, 4 * trained)
    assert shape.itemsize == 4 and not shape.fused and not shape.full_logits
    assert shape.checkpointing == "inputs"  # on a CPU nothing is moved away
    model_config = model.get_base_model().config
    made = ModelShape.of_config(model_config, itemsize=4, r=4, checkpointing="inputs", fused=False)
    assert shape.trained == made.trained
    # Each 4-bit weight brings tables of 1 KiB, which are much beside weights of 4 KiB.
    assert shape.weight_bytes == pytest.approx(made.weight_bytes + 14 * 1088, rel=0.1)
    model, _ = tiny_peft(use_gradient_checkpointing=False)
    assert ModelShape.of_model(model).checkpointing == "everything"


def test_the_tensors_of_a_step_on_a_cpu_peak_near_the_estimate(tiny_peft, tmp_path, alpaca_rows):
    from torch.profiler import ProfilerActivity, profile

    trainer = make_trainer(tiny_peft, tmp_path, alpaca_rows(32), per_device_train_batch_size=32)
    batch = trainer.data_collator(list(trainer.train_dataset))
    model = trainer.model.train()
    trainer.compute_loss(model, batch).backward()  # gradients are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        trainer.compute_loss(model, batch).backward()
    events = watched.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    guess = estimate(ModelShape.of_model(model), *batch["input_ids"].shape)
    assert guess.kept + guess.working == pytest.approx(peak, rel=0.4)


# -------------------------------------------------------------------- the fit


def test_a_fit_names_the_largest_length_and_batch_and_they_are_the_largest(tiny_peft, monkeypatch):
    model, _ = tiny_peft()
    shape = ModelShape.of_model(model)
    room = estimate(shape, 4, 200).needed
    monkeypatch.setattr("lwf_unsloth.preflight.free_memory", lambda: room)
    found = fits(model, 4, 200)
    assert found and found.fits and found.longest == 200 and found.largest == 4
    assert not fits(model, 4, 201) and not fits(model, 5, 200).fits
    text = str(fits(model, 8, 200))
    assert text.startswith("Batch 8 x 200 tokens does not fit on the CPU: it needs about ")
    assert "Largest that fits: 100 tokens at batch 8, batch 4 at 200 tokens." in text
    for part in ("weights", "adapter", "gradients", "optimizer", "activations", "loss", "teacher"):
        assert part in text


def test_what_cannot_fit_and_what_is_not_known_is_said(tiny_peft, monkeypatch):
    model, _ = tiny_peft()
    monkeypatch.setattr("lwf_unsloth.preflight.free_memory", lambda: 1000)
    none = fits(model, 1, 1)
    assert (none.longest, none.largest, none.fits) == (0, 0, False)
    assert "Not even one token" in str(none)
    monkeypatch.setattr("lwf_unsloth.preflight.free_memory", lambda: None)
    assert fits(model, 10, 10).fits and "unknown amount" in str(fits(model, 10, 10))
    with pytest.raises(ConfigError, match="1 or more"):
        fits(model, 0, 10)


def test_a_length_is_not_promised_beyond_the_models_positions(tiny_peft, monkeypatch):
    monkeypatch.setattr("lwf_unsloth.preflight.free_memory", lambda: 2**50)
    assert fits(tiny_peft()[0], 1, 16).longest == 512


def test_the_memory_of_this_machine_is_read():
    from lwf_unsloth.memory import free_memory

    assert 2**20 < free_memory() < 2**50


def test_a_containers_limit_bounds_the_memory(tmp_path):
    from lwf_unsloth.memory import _container_room

    assert _container_room(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert _container_room(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_room(tmp_path) is None


# --------------------------------------------------------------- the training


def make_trainer(tiny_peft, folder, rows, rehearsal=None, **changes):
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    values = {"bf16": False, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    return LwFTrainer(
        model,
        args=LwFConfig(str(folder), **{**values, **changes}),
        processing_class=tokenizer,
        train_dataset=rows,
        rehearsal_dataset=rehearsal,
    )


def test_a_run_that_would_not_fit_is_told_with_what_to_lower(
    tiny_peft, tmp_path, alpaca_rows, monkeypatch, caplog
):
    trainer = make_trainer(tiny_peft, tmp_path, alpaca_rows(4))
    assert "would need" not in caplog.text
    longest = max(map(len, trainer.train_dataset["input_ids"]))
    shape = ModelShape.of_model(trainer.model)
    needed = estimate(shape, 2, longest)
    monkeypatch.setattr("lwf_unsloth.preflight.free_memory", lambda: int(needed.needed * 0.9))
    make_trainer(tiny_peft, tmp_path, alpaca_rows(4))
    assert f"A step of 2 x {longest} tokens would need about" in caplog.text
    assert "per_device_train_batch_size to 1" in caplog.text and "max_length to" in caplog.text
    monkeypatch.setattr("lwf_unsloth.preflight.free_memory", lambda: int(needed.beside / 1.6))
    with pytest.raises(ConfigError, match="Lower"):
        make_trainer(tiny_peft, tmp_path, alpaca_rows(4))


def test_the_rows_that_carry_kl_decide_the_teachers_share(tmp_path):
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.preflight import kl_share

    args = LwFConfig(str(tmp_path), bf16=False, rehearsal_ratio=0.2)
    assert kl_share(None, 4) == kl_share(args, 4) == kl_share(args, 4, "all") == 1.0
    assert kl_share(args, 4, "rehearsal") == 0.25 and kl_share(args, 16, "rehearsal") == 0.25
    args.lwf_lambda = 0.0
    assert kl_share(args, 4) == 0.0


def test_the_optimizer_decides_the_size_of_its_state(tmp_path):
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.preflight import optimizer_bytes

    assert optimizer_bytes(None) == optimizer_bytes(LwFConfig(str(tmp_path), bf16=False)) == 8
    for name, size in (("adamw_8bit", 2), ("paged_adamw_8bit", 2), ("sgd", 4), ("lion_32bit", 4)):
        assert optimizer_bytes(types.SimpleNamespace(optim=name)) == size


def test_a_model_of_unknown_sizes_is_left_alone(monkeypatch, caplog, tmp_path):
    from datasets import Dataset

    from lwf_unsloth.config import LwFConfig

    state_space = types.SimpleNamespace(hidden_size=64, num_hidden_layers=2, vocab_size=10)
    with pytest.raises(ModelError, match="not known here"):
        ModelShape.of_config(state_space)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}])
    assert longest_row(rows) == 3
    monkeypatch.setattr(ModelShape, "of_model", lambda model: ModelShape.of_config(state_space))
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        tell_memory(None, LwFConfig(str(tmp_path), bf16=False), rows, "all")
    assert "is not known" in caplog.text


def test_the_estimates_total_is_its_parts():
    one = Estimate(1, 2, 4, 8, 100, 300, 200, 50)
    assert one.working == 300 and one.beside == 412 and one.peak == 415
    assert one.needed == 412 + 20


# ------------------------------------------------------------------ the doctor


@pytest.fixture()
def only_these_switches(monkeypatch):
    """A clean environment but for what the test sets."""
    for name in switches():
        monkeypatch.delenv(name)


def test_the_report_names_versions_device_memory_disk_and_hub(monkeypatch):
    monkeypatch.setattr("lwf_unsloth.model_files.hub_in_reach", lambda seconds: False)
    text = doctor()
    for name in (*backend.PACKAGES, "Python", "device", "memory", "bf16", "hub cache", "hub"):
        assert re.search(rf"^{name} +\S", text, re.MULTILINE), name
    assert importlib.metadata.version("torch") in text
    assert "GiB free" in text and "not in reach" in text
    assert text.splitlines()[-1] == "No problem found."


def test_switches_are_shown_and_secrets_are_not(monkeypatch, only_these_switches):
    secrets = {
        "HF_TOKEN": "hf_veryprivate",
        "WANDB_API_KEY": "0123veryprivate",
        "HUGGINGFACE_HUB_TOKEN": "hf_veryprivate",
        "HF_ENDPOINT": "https://me:veryprivate@mirror.example/hub",
    }
    shown = {"UNSLOTH_BLOCK_COMPILE": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for name, value in {**secrets, **shown, "UNRELATED": "x", "HFX": "y"}.items():
        monkeypatch.setenv(name, value)
    text = doctor(hub=False)
    assert "veryprivate" not in text
    found = switches()
    assert found["HF_TOKEN"] == found["WANDB_API_KEY"] == "set"
    assert found["HF_ENDPOINT"] == "https://...@mirror.example/hub"
    assert {name: found[name] for name in shown} == shown
    assert "UNRELATED" not in text and "HFX" not in text


def test_the_report_holds_no_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "alice" / "hf"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    text = doctor(hub=False)
    assert "alice" not in text and "~/hf" in text


def versions_with(monkeypatch, **changes):
    """Makes the doctor see other versions; None is not installed."""
    real = importlib.metadata.version

    def version(name):
        if name in changes:
            if changes[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return changes[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_pair_known_to_fail_is_named_and_its_switch_checked(monkeypatch, only_these_switches):
    versions_with(monkeypatch, torch="2.11.1")
    found = examine(hub=False)
    assert any("torch 2.11" in note and "UNSLOTH_BLOCK_COMPILE=0" in note for note in found.notes)
    assert not found.problems
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "1")
    assert any("here UNSLOTH_BLOCK_COMPILE=1" in p for p in examine(hub=False).problems)
    versions_with(monkeypatch, torch="2.12.0")
    assert not examine(hub=False).notes


def test_the_package_kernels_is_a_problem(monkeypatch):
    versions_with(monkeypatch, kernels="0.9")
    problems = examine(hub=False).problems
    assert any("pip uninstall kernels" in problem for problem in problems)


@pytest.mark.parametrize("name, version", [("torch", "9.1.0"), ("transformers", "99.0")])
def test_versions_that_unsloth_does_not_take_are_problems(monkeypatch, name, version):
    assert out_of_range() == []
    versions_with(monkeypatch, **{name: version})
    (problem,) = out_of_range()
    assert problem.startswith(f"{name} {version} is outside of what unsloth")
    assert "pip install" in problem


def test_what_is_not_installed_is_a_problem_and_the_report_still_comes(monkeypatch):
    versions_with(monkeypatch, trl=None, unsloth=None)
    text = doctor()
    assert "Problem: Not installed: unsloth, trl." in text and "colab_setup.sh" in text


def test_a_full_disk_is_a_problem(monkeypatch):
    room = types.SimpleNamespace(total=GIB, used=GIB, free=GIB // 2)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: room)
    problems = examine(hub=False).problems
    assert len(problems) == 2 and "Only 0.5 GiB are free" in problems[0]


class FakeT4:
    """What torch.cuda says on a T4, bf16 "supported" by emulation included."""

    def __init__(self, monkeypatch):
        import torch

        card = types.SimpleNamespace(name="Tesla T4", major=7, minor=5)
        answers = {
            "is_available": True,
            "device_count": 1,
            "get_device_properties": card,
            "get_device_capability": (7, 5),
            "mem_get_info": (14 * GIB, 15 * GIB),
            "is_bf16_supported": True,
            "get_device_name": "Tesla T4",
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
        monkeypatch.delenv("UNSLOTH_FORCE_CPU", raising=False)


def test_a_t4_is_said_to_emulate_bf16(monkeypatch):
    FakeT4(monkeypatch)
    text = doctor(hub=False)
    assert "Tesla T4, capability 7.5, 14.0 of 15.0 GiB free" in text
    assert re.search(r"^bf16 +emulated only", text, re.MULTILINE)
