"""Loading: in memory is what was asked for, or it is said; what can't be loaded says why."""

import json
import shutil

import pytest

from lwf_unsloth.config import ModelConfig
from lwf_unsloth.errors import ConfigError, ModelError

HIDDEN, KV, WIDE = 64, 32, 128  # the tiny model's widths


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    """One loaded tiny model, for tests that only look at it."""
    from lwf_unsloth.model import load_model

    return load_model(ModelConfig(str(tiny_model_dir), dtype="float32", r=4, lora_alpha=8))


@pytest.fixture()
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model's folder that a test may spoil."""
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


@pytest.fixture()
def no_hub(monkeypatch):
    """A hub that refuses connections at once."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def load(source, **changes):
    from lwf_unsloth.model import load_model

    return load_model(ModelConfig(str(source), **{"dtype": "float32", **changes}))


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_the_sentence_says_what_the_modules_hold(tiny):
    from bitsandbytes.nn import Linear4bit

    model, _ = tiny
    loaded = model.lwf_loaded
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14 == loaded.quantized_layers
    assert (loaded.bits, loaded.quantization) == (4, "nf4, double quantisation")
    assert (loaded.dtype, loaded.compute_dtype) == ("float32", "float32")
    assert str(loaded).startswith(
        "tiny-llama: 4-bit weights (nf4, double quantisation) in 14 of 14"
    )
    assert loaded.differences == ()


def test_parameters_are_counted_as_weights_not_as_packed_bytes(tiny):
    model, tokenizer = tiny
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * WIDE + 2 * HIDDEN
    assert model.lwf_loaded.parameters == 2 * layer + HIDDEN + 2 * len(tokenizer) * HIDDEN


def test_lora_is_exactly_as_configured_and_alone_trains(tiny):
    model, _ = tiny
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.bias) == (
        4,
        8,
        0.0,
        "none",
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert model.lwf_loaded.trainable == sum(
        4 * (a + b)
        for a, b in [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN)] * 2
        + [(HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN)] * 2
    )


def test_every_lora_setting_reaches_peft(tiny_model_dir):
    model, _ = load(
        tiny_model_dir,
        r=3,
        lora_alpha=5,
        lora_dropout=0.25,
        bias="lora_only",
        target_modules=["q_proj", "down_proj"],
        use_gradient_checkpointing=False,
    )
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 5, 0.25)
    assert adapter.bias == "lora_only" and set(adapter.target_modules) == {"q_proj", "down_proj"}
    assert not model.is_gradient_checkpointing


def test_the_seed_decides_the_initial_values(tiny_model_dir):
    def first(seed):
        model, _ = load(tiny_model_dir, random_state=seed, target_modules=["q_proj"])
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    assert first(1).equal(first(1)) and not first(1).equal(first(2))


def test_a_name_alone_is_enough(tiny_model_dir):
    from lwf_unsloth.model import load_model

    model, _ = load_model(str(tiny_model_dir))
    assert model.lwf_loaded.lora["r"] == 8 and model.lwf_loaded.bits == 4


def test_no_machine_path_leaves_with_the_report(tiny, tiny_model_dir):
    text = json.dumps(tiny[0].lwf_loaded.to_dict())
    assert str(tiny_model_dir.parent) not in text and "tiny-llama" in text


def test_sixteen_or_more_bits_on_request(tiny_model_dir):
    model, _ = load(tiny_model_dir, load_in_4bit=False)
    assert model.lwf_loaded.bits == 32 and model.lwf_loaded.quantized_layers == 0
    assert "32-bit weights (float32)" in str(model.lwf_loaded)


def test_an_unknown_target_is_an_error_that_lists_those_there(tiny_model_dir):
    with pytest.raises(ModelError, match=r"\['c_attn'\].*down_proj, gate_proj, k_proj, o_proj"):
        load(tiny_model_dir, target_modules=["q_proj", "c_attn"])


def test_an_embedding_is_no_target(tiny_model_dir):
    with pytest.raises(ModelError, match="lm_head.*train it whole"):
        load(tiny_model_dir, target_modules=["q_proj", "lm_head"])


def test_a_model_in_which_nothing_would_train_is_an_error(tiny_model_dir):
    from lwf_unsloth.loaded import note_adapter

    model, _ = load(tiny_model_dir)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="No weight of the model would train"):
        note_adapter(model, model.lwf_loaded)


@pytest.mark.parametrize("name", ["quantised", "quantised-bnb-4bit"])
def test_a_prequantised_folder_stays_4_bit_and_it_is_said(tiny, tmp_path, name):
    model, tokenizer = load_plain_4bit(tiny)
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    again, _ = load(tmp_path / name, load_in_4bit=False)
    assert again.lwf_loaded.bits == 4 and again.lwf_loaded.base == name
    assert "load_in_4bit=False was asked for, but the files hold 4-bit" in str(again.lwf_loaded)
    with_other, _ = load(tmp_path / name, bnb_4bit_quant_type="fp4")
    assert "fp4, double quantisation was asked for" in str(with_other.lwf_loaded)


def load_plain_4bit(tiny):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny[0].lwf_loaded.settings["model_name"], quantization_config=quantization
    )
    return model, tiny[1]


def test_a_dtype_that_the_device_changes_is_said(tiny_model_dir):
    model, _ = load(tiny_model_dir, dtype="float16")
    assert "dtype float16 was asked for, but this device got" in str(model.lwf_loaded)


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_compute_dtype": "bfloat16"},
    ],
)
def test_a_quantisation_setting_that_the_cpu_ignores_is_an_error(tiny_model_dir, changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}.*would be ignored"):
        load(tiny_model_dir, **changes)


@pytest.fixture()
def arguments(tmp_path, monkeypatch):
    """What would reach `from_pretrained` on a card with or without bf16 in hardware."""
    from lwf_unsloth import model
    from lwf_unsloth.model_files import ModelFiles

    def build(native_bf16=True, **changes):
        monkeypatch.setattr(model, "on_cuda", lambda: True)
        monkeypatch.setattr(model, "native_bf16", lambda: native_bf16)
        return model._arguments(ModelConfig("someone/x", **changes), ModelFiles("someone/x", "hub"))

    return build


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_card_without_bf16_gets_fp16_whatever_torch_claims(arguments, dtype):
    import torch

    assert arguments(native_bf16=False, dtype=dtype)["dtype"] is torch.float16
    assert arguments(native_bf16=False, dtype="float32")["dtype"] is torch.float32


def test_a_card_with_bf16_gets_what_was_asked_for(arguments):
    import torch

    assert arguments(dtype=None)["dtype"] is None
    assert arguments(dtype="bfloat16")["dtype"] is torch.bfloat16


def test_on_a_gpu_only_changed_quantisation_settings_are_passed(arguments):
    import torch

    assert "quantization_config" not in arguments()
    assert "quantization_config" not in arguments(bnb_4bit_quant_type="fp4", load_in_4bit=False)
    changed = arguments(bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float16")
    quantization = changed["quantization_config"]
    assert quantization.bnb_4bit_quant_type == "fp4" and quantization.load_in_4bit
    assert quantization.bnb_4bit_compute_dtype is torch.float16
    assert "lm_head" in quantization.llm_int8_skip_modules


def test_only_safetensors_no_code_and_the_users_own_placement(arguments):
    usual = arguments(device_map={"": 1}, revision="v2", token="t", max_seq_length=77)
    assert usual["use_safetensors"] is True and usual["trust_remote_code"] is False
    assert usual["device_map"] == {"": 1} and usual["revision"] == "v2" and usual["token"] == "t"
    assert usual["max_seq_length"] == 77 and "device_map" not in arguments()


def test_pickled_weights_are_refused_and_not_run(folder, tmp_path):
    import pickle

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.touch, ())

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin.*run any code"):
        load(folder)
    assert not marker.exists()


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_json(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder)
    assert not marker.exists() and ModelConfig(str(folder)).trust_remote_code is False


def test_an_adapter_folder_is_told_from_a_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter.*load_adapter"):
        load(folder)


def test_a_folder_without_config_says_what_it_holds(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json.*model\.safetensors"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(folder)


def test_a_cut_off_file_is_an_error(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_rows_is_an_error(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=f"{rows + 2} tokens, but the model only {rows}"):
        load(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "what is this"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match="no folder, no embedded model and no hub id"):
        load(name)


def test_without_the_hub_a_hub_id_fails_fast_and_says_what_to_do(no_hub, monkeypatch, tmp_path):
    import time

    from huggingface_hub import constants

    waits = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ModelError, match="smollm2-135m-instruct.*HF_HUB_OFFLINE=1"):
        load("unsloth/gemma-2b-bnb-4bit")
    assert sum(waits) < 10


def test_the_most_similar_embedded_name_comes_first(no_hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="gemma-3-270m, smollm2"):
        load("gemma3-270m")


def test_a_cached_hub_model_loads_without_the_hub(no_hub, monkeypatch, tmp_path, tiny_model_dir):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model_dir, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    model, _ = load("someone/tiny")
    identity = model.lwf_loaded.identity
    assert (identity.name, identity.kind) == ("someone/tiny", "hub") and identity.fingerprint


def test_without_a_gpu_the_default_is_the_embedded_model():
    from lwf_unsloth.backend import on_cuda
    from lwf_unsloth.model import default_model

    if not on_cuda():
        assert default_model().model_name == "smollm2-135m-instruct"


def test_the_fingerprint_sees_other_weights_but_not_another_place_or_sharding(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from lwf_unsloth.bases import fingerprint

    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "sharded").mkdir()
    save_file({n: tensors[n] for n in names[:5]}, tmp_path / "sharded" / "a.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "sharded" / "b.safetensors")
    assert fingerprint(tmp_path / "sharded") == before
    changed = {name: tensor * (1.01 if name == names[3] else 1) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors")
    assert fingerprint(folder) != before
