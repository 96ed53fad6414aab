"""Adapters: saved whole, loaded back onto their own base alone, merged to what they answered."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import lwf_unsloth
from lwf_unsloth.config import ModelConfig
from lwf_unsloth.errors import ConfigError, ModelError

SAMPLES = Path(lwf_unsloth.__file__).parent / "samples"
PROMPT = "The quick brown fox jumps over the lazy dog"


def load(source, **changes):
    from lwf_unsloth.model import load_model

    return load_model(ModelConfig(str(source), **{"dtype": "float32", "r": 4, **changes}))


def train_a_little(model, size=0.05):
    """Moves every LoRA weight, as training would."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += size * torch.randn(weight.shape, generator=generator)


def logits(model, tokenizer):
    import torch

    model.eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory):
    """(folder, logits of the model that was saved into it): trained a little on the 4-bit base."""
    from lwf_unsloth.model import save_adapter
    from lwf_unsloth.templates import PromptTemplate, set_template

    model, tokenizer = load(tiny_model_dir)
    train_a_little(model)
    template = PromptTemplate("mine", "Q: {instruction} {input}\nA:", "Q: {instruction}\nA:")
    set_template(tokenizer, template)
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    card = {
        "rows": {"task": 1234, "rehearsal": 56},
        "settings": {"lwf_lambda": 2.0, "output_dir": str(folder), "token": "hf_" + "x" * 30},
        "note": "a | b <b>bold</b> hf_abcdefghijklmnopqrstuvwxyz",
    }
    assert save_adapter(model, tokenizer, folder, card=card) == folder
    return folder, logits(model, tokenizer)


@pytest.fixture()
def copy(saved, tmp_path):
    """A copy of the saved adapter that a test may spoil."""
    return shutil.copytree(saved[0], tmp_path / "copy")


def reload(folder, base, **options):
    from lwf_unsloth.model import load_adapter

    base = base if base is None or isinstance(base, ModelConfig) else str(base)
    return load_adapter(folder, base=base, **options)


def test_a_reloaded_adapter_gives_the_same_logits(saved, tiny_model_dir):
    model, tokenizer = reload(saved[0], tiny_model_dir)
    assert logits(model, tokenizer).equal(saved[1])


def test_the_recorded_precision_comes_back_without_being_asked_for(saved, tiny_model_dir):
    loaded = reload(saved[0], tiny_model_dir)[0].lwf_loaded
    assert (loaded.dtype, loaded.bits, loaded.lora["r"]) == ("float32", 4, 4)


def test_the_prompt_template_travels_in_the_folder(saved, tiny_model_dir):
    from lwf_unsloth.templates import get_template

    _, tokenizer = reload(saved[0], tiny_model_dir)
    assert get_template(tokenizer).render("why") == "Q: why\nA:"


def test_another_template_than_the_adapters_is_refused_where_it_is_used(
    copy, tiny_model_dir, caplog
):
    from lwf_unsloth.generation import generate
    from lwf_unsloth.model import load_adapter
    from lwf_unsloth.scoring import score
    from lwf_unsloth.templates import PLAIN, get_template, set_template
    from lwf_unsloth.trained_template import train_in

    model, tokenizer = load_adapter(copy, base=str(tiny_model_dir))
    own, rows = get_template(tokenizer), [{"instruction": "Add.", "output": "3"}]
    set_template(tokenizer, PLAIN)
    for use in (lambda: generate(model, tokenizer, "Add."), lambda: score(model, tokenizer, rows)):
        with pytest.raises(ModelError, match=r"trained in the template .*'plain'.*lwf_template\)"):
            use()
    assert len(generate(model, tokenizer, "Add.", adapter=False, max_new_tokens=2)) == 1
    set_template(tokenizer, model.lwf_template)
    assert get_template(tokenizer) == own
    assert len(generate(model, tokenizer, "Add.", max_new_tokens=2)) == 1
    set_template(tokenizer, PLAIN)
    train_in(model, tokenizer)
    assert "this training takes 'plain'" in caplog.text and model.lwf_template == PLAIN
    assert len(generate(model, tokenizer, "Add.", max_new_tokens=2)) == 1


def test_only_the_adapter_is_saved_and_only_as_safetensors(saved):
    names = {path.name for path in saved[0].iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "lwf.json", "README.md"} <= names
    assert "tokenizer.json" in names and not any(name.endswith((".bin", ".pt")) for name in names)
    assert (saved[0] / "adapter_model.safetensors").stat().st_size < 100_000
    assert [path.name for path in saved[0].parent.iterdir()] == ["adapter"]


def test_no_path_and_no_token_is_in_any_saved_file(saved, tiny_model_dir):
    for path in saved[0].iterdir():
        content = path.read_bytes()
        for place in (tiny_model_dir.parent, saved[0].parent):
            assert str(place).encode() not in content, path.name
        assert b"xxxxxxxx" not in content and b"hf_abc" not in content, path.name


def test_the_card_tells_base_settings_counts_and_versions(saved):
    from importlib.metadata import version

    text = (saved[0] / "README.md").read_text()
    assert text.startswith("---\nbase_model: tiny-llama\n")
    for fact in ("| task | 1234 |", "| lwf_lambda | 2 |", "| r | 4 |", version("peft")):
        assert fact in text
    assert "a \\| b &lt;b&gt;bold" in text


def test_plain_peft_loads_it_on_the_same_base(tiny_model_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lwf_unsloth.model import save_adapter

    model, tokenizer = load(tiny_model_dir, load_in_4bit=False)
    train_a_little(model)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    own = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert (logits(plain, own) - logits(model, tokenizer)).abs().max() < 1e-5


def test_an_adapter_saved_by_plain_peft_loads(tiny_model_dir, tmp_path):
    model, tokenizer = load(tiny_model_dir)
    train_a_little(model)
    model.save_pretrained(tmp_path / "checkpoint")
    base = ModelConfig(str(tiny_model_dir), dtype="float32")
    again, own = reload(tmp_path / "checkpoint", base)
    assert logits(again, own).equal(logits(model, tokenizer))
    assert reload(tmp_path / "checkpoint", None)[0].lwf_loaded.base == "tiny-llama"


def test_load_model_takes_an_adapter_to_train_on(saved, tiny_model_dir):
    from lwf_unsloth.model import load_model

    model, tokenizer = load_model(str(tiny_model_dir), adapter=saved[0])
    assert any(p.requires_grad for p in model.parameters())
    assert logits(model, tokenizer).equal(saved[1])


def test_a_plain_peft_adapter_of_another_name_is_refused(copy, tiny_model_dir):
    (copy / "lwf.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/llama-1b-unsloth-bnb-4bit"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="someone/llama-1b.*the base given is 'tiny-llama'"):
        reload(copy, tiny_model_dir)


def test_other_weights_under_the_same_name_and_shape_are_refused(saved, tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_model_dir, tmp_path / "tiny-llama")
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.5 for k, v in tensors.items()}, other / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"trained on 'tiny-llama' \(folder, weights \w+\), the base"
    ):
        reload(saved[0], other)
    model, _ = reload(saved[0], other, check_base=False)
    assert "trained on 'tiny-llama'" in str(model.lwf_loaded)


def test_a_moved_base_is_the_same_base(saved, tiny_model_dir, tmp_path):
    moved = shutil.copytree(tiny_model_dir, tmp_path / "elsewhere")
    model, tokenizer = reload(saved[0], moved)
    assert logits(model, tokenizer).equal(saved[1])


def test_another_precision_is_said(saved, tiny_model_dir):
    base = ModelConfig(str(tiny_model_dir), dtype="float32", load_in_4bit=False)
    model, _ = reload(saved[0], base)
    assert "trained on 4-bit weights and answers a little differently" in str(model.lwf_loaded)


def test_a_checkpoint_on_an_embedded_model_finds_its_base_on_any_machine(copy, monkeypatch):
    from lwf_unsloth.adapters import read_adapter
    from lwf_unsloth.embedded import EMBEDDED

    spec = EMBEDDED["gemma-3-270m"]
    (copy / "lwf.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"/elsewhere/gemma-3-270m-{spec.sha256[:12]}-c1"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(copy)
    assert (adapter.base.name, adapter.base.source) == ("gemma-3-270m", spec.sha256)
    assert adapter.base_config(None).model_name == "gemma-3-270m"


def test_without_a_base_a_folder_is_asked_for_by_name(saved):
    with pytest.raises(ModelError, match="trained on 'tiny-llama'.*base=folder"):
        reload(saved[0], None)


def test_a_folder_from_elsewhere_cannot_switch_remote_code_on(copy, tiny_model_dir):
    from lwf_unsloth.adapters import read_adapter

    record = json.loads((copy / "lwf.json").read_text())
    record["loaded"]["settings"] |= {"device_map": "cuda:7", "token": "x"}
    text = json.dumps(record).replace(": false", ": true")
    assert '"trust_remote_code": true' in text
    (copy / "lwf.json").write_text(text)
    config = read_adapter(copy).base_config(str(tiny_model_dir))
    assert (config.trust_remote_code, config.device_map, config.token) == (False, None, None)
    assert config.dtype == "float32"


def test_a_pickled_adapter_is_refused_and_not_run(copy, tiny_model_dir, tmp_path):
    import pickle

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.touch, ())

    (copy / "adapter_model.safetensors").unlink()
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*refused"):
        reload(copy, tiny_model_dir)
    assert not marker.exists()


def change_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dict(list(t.items())[1:]), "missing base_model"),
        (
            lambda t: {**t, "base_model.model.extra.lora_A.weight": t[min(t)] + 1},
            "unexpected base_model",
        ),
        (lambda t: {k: v[..., :-1].contiguous() for k, v in t.items()}, "has shape"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(copy, tiny_model_dir, change, message):
    change_tensors(copy, change)
    with pytest.raises(ModelError, match=f"don't fit the model: .*{message}"):
        reload(copy, tiny_model_dir)


def test_a_cut_off_adapter_file_is_an_error(copy, tiny_model_dir):
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not whole"):
        reload(copy, tiny_model_dir)


def test_a_folder_without_adapter_is_an_error(tmp_path, tiny_model_dir):
    with pytest.raises(ModelError, match=r"no readable adapter_config\.json"):
        reload(tmp_path, tiny_model_dir)


def test_a_reloaded_adapter_rests_unless_it_is_to_train_on(saved, tiny_model_dir):
    resting, _ = reload(saved[0], tiny_model_dir)
    assert not any(p.requires_grad for p in resting.parameters()) and not resting.training
    model, tokenizer = reload(saved[0], tiny_model_dir, trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in trained}
    import torch

    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(
        not p.detach().equal(before[name]) for name, p in model.named_parameters() if name in before
    )


def test_the_active_one_of_two_adapters_is_saved_at_the_top(tiny_model_dir, tmp_path):
    from peft import LoraConfig

    from lwf_unsloth.model import save_adapter

    model, tokenizer = load(tiny_model_dir)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    save_adapter(model, tokenizer, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not any(path.is_dir() for path in (tmp_path / "adapter").iterdir())


def test_a_failed_save_leaves_the_old_adapter_and_nothing_else(copy, tiny_model_dir):
    from lwf_unsloth.model import save_adapter

    model, _ = load(tiny_model_dir)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    class Broken:
        eos_token, eos_token_id = "</s>", 2

        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(ModelError, match=r"copy' could not be written \(disk full\).*as it was"):
        save_adapter(model, Broken(), copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_save_that_is_interrupted_between_its_two_renames_leaves_the_old_adapter(
    copy, monkeypatch
):
    from lwf_unsloth.replaced_folders import new_folder

    before, rename = {path.name: path.read_bytes() for path in copy.iterdir()}, Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(copy) as new:
        (new / "lwf.json").write_text("{}")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("half", [("old",), ("old", "new")])
def test_a_save_that_was_killed_between_its_two_renames_is_put_in_place(copy, caplog, half):
    from lwf_unsloth.adapters import read_adapter

    scratch = copy.parent / ".copy-abc12345"
    for name in half:
        shutil.copytree(copy, scratch / name)
        (scratch / name / "which").write_text(name)
    shutil.rmtree(copy)
    assert read_adapter(copy).folder == copy
    assert (copy / "which").read_text() == half[-1] and "was cut off" in caplog.text
    old = time.time() - 7200
    for path in (*scratch.rglob("*"), scratch):
        os.utime(path, (old, old))
    (scratch / "new").mkdir()  # of a save that goes on
    read_adapter(copy)
    assert (scratch / "new").exists(), "something in it is younger"
    for path in (scratch / "new", scratch):
        os.utime(path, (old, old))
    read_adapter(copy)
    assert not scratch.exists(), "what a killed save has left goes after an hour"


def test_saving_again_replaces_an_adapter_but_no_other_folder(copy, tiny_model_dir, tmp_path):
    from lwf_unsloth.model import save_adapter

    model, tokenizer = load(tiny_model_dir, target_modules=["q_proj"])
    save_adapter(model, tokenizer, copy)
    assert json.loads((copy / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"chapter1\.tex.*another folder"):
        save_adapter(model, tokenizer, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_model_without_adapter_is_not_saved_as_one(tiny_model_dir, tmp_path, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    from lwf_unsloth.model import save_adapter

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ModelError, match="0 active adapters"):
        save_adapter(model, tiny_tokenizer, tmp_path / "adapter")


@pytest.mark.parametrize("four_bit", [True, False])
def test_a_merged_model_answers_like_base_plus_adapter(tiny_model_dir, tmp_path, four_bit):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lwf_unsloth.model import merge_model

    model, tokenizer = load(tiny_model_dir, load_in_4bit=four_bit)
    train_a_little(model)
    wanted = logits(model, tokenizer)
    folder = merge_model(model, tokenizer, tmp_path / "merged", dtype="float16")
    assert logits(model, tokenizer).equal(wanted), "the model in memory was changed"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any("4bit" in type(m).__name__ for m in plain.modules())
    got = logits(plain, AutoTokenizer.from_pretrained(folder))
    with model.disable_adapter():
        moved = (logits(model, tokenizer) - wanted).abs().mean()
    assert (got - wanted).abs().mean() < 0.02 * moved
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_merged_model_is_16_bit_and_loads_as_a_base(saved, tiny_model_dir, tmp_path):
    from safetensors import safe_open

    from lwf_unsloth.model import merge_model

    model, tokenizer = reload(saved[0], tiny_model_dir)
    folder = merge_model(model, tokenizer, tmp_path / "merged")
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    again, _ = load(folder)
    assert again.lwf_loaded.bits == 4 and again.lwf_loaded.base == "merged"
    for path in folder.iterdir():
        assert str(tiny_model_dir.parent).encode() not in path.read_bytes(), path.name


def test_a_tied_head_stays_tied_in_the_merged_model(tiny_model_dir, tmp_path, tiny_tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from lwf_unsloth.model import merge_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    model, tokenizer = load(tmp_path / "tied")
    train_a_little(model)
    folder = merge_model(model, tokenizer, tmp_path / "merged", dtype="float16")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert (logits(plain, tokenizer) - logits(model, tokenizer)).abs().max() < 0.05


def test_merging_to_four_bits_is_refused(saved, tiny_model_dir, tmp_path):
    from lwf_unsloth.model import merge_model

    model, tokenizer = reload(saved[0], tiny_model_dir)
    with pytest.raises(ConfigError, match="16 bits"):
        merge_model(model, tokenizer, tmp_path / "merged", dtype="nf4")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_merging_keeps_the_tokens_that_the_16_bit_base_would_change(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lwf_unsloth.alpaca import load_alpaca
    from lwf_unsloth.embedded import embedded_model
    from lwf_unsloth.model import merge_model, save_adapter
    from lwf_unsloth.records import prompt_ids

    model, tokenizer = load("smollm2-135m-instruct", r=8)
    train_a_little(model, size=0.01)
    folder = merge_model(model, tokenizer, tmp_path / "merged")
    save_adapter(model, tokenizer, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        embedded_model("smollm2-135m-instruct"), dtype=torch.float32
    )
    others = {
        "merged": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "16-bit base": PeftModel.from_pretrained(base, tmp_path / "adapter"),
    }
    rows = load_alpaca(str(SAMPLES / "general.jsonl"), limit=40, test_size=0.5)["test"]
    prompts = [torch.tensor([prompt_ids(tokenizer, row["instruction"])]) for row in rows]
    assert len(prompts) == 20

    def choices(one):
        one.eval()
        with torch.no_grad():
            return torch.cat([one(ids).logits[0].argmax(-1) for ids in prompts])

    wanted = choices(model)
    kept = {name: (choices(one) == wanted).float().mean().item() for name, one in others.items()}
    print(kept)
    assert kept["merged"] >= 0.98 and kept["merged"] > kept["16-bit base"]
