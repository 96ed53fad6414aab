"""The teacher cache: the same loss, no forward for rows seen before, and files that can be
trusted."""

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from datasets import Dataset

from lwf_unsloth.cache_parts import PartStore
from lwf_unsloth.errors import ConfigError

# ------------------------------------------------------------------ the files


def row(n, length=3):
    return {"hidden": torch.arange(length * 4, dtype=torch.float32).reshape(length, 4) + 100 * n}


def filled(folder, rows=130, rank=0, **identity):
    store = PartStore(folder, {"model": "a", **identity}, ("hidden",), rank)
    for n in range(rows):
        store.add(f"key{n}-{rank}", row(n))
    store.close()
    return store


def reopened(folder, rank=0, **identity):
    return PartStore(folder, {"model": "a", **identity}, ("hidden",), rank)


def parts(folder):
    return sorted(folder.glob("part-*.safetensors"))


def test_rows_come_back_as_they_were_and_parts_hold_64(tmp_path):
    filled(tmp_path)
    store = reopened(tmp_path)
    assert len(store) == 130 and len(parts(tmp_path)) == 3
    for n in (0, 63, 64, 129):
        assert torch.equal(store.get(f"key{n}-0")["hidden"], row(n)["hidden"])
    assert store.get("another") is None


def test_rows_can_be_read_before_they_are_on_disk(tmp_path):
    store = reopened(tmp_path)
    store.add("one", row(1))
    assert "one" in store and not parts(tmp_path)
    assert torch.equal(store.get("one")["hidden"], row(1)["hidden"])


def test_large_rows_close_a_part_early(tmp_path, monkeypatch):
    monkeypatch.setattr("lwf_unsloth.cache_parts.PART_BYTES", 100)
    filled(tmp_path, rows=6)  # 48 bytes a row: 3 reach 100
    assert len(parts(tmp_path)) == 2


def test_rows_that_were_computed_together_are_in_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr("lwf_unsloth.cache_parts.PART_ROWS", 2)
    store = reopened(tmp_path)
    for first in (0, 3):
        store.add_all({f"key{n}": row(n) for n in range(first, first + 3)})
    store.add_all({"key5": row(0)})
    store.flush()
    assert len(parts(tmp_path)) == 2 and len(store) == 6
    assert torch.equal(store.get("key5")["hidden"], row(5)["hidden"]), "the known row stays"


CRASH = """
import os, sys, torch
from pathlib import Path
import lwf_unsloth.cache_parts as cache_parts
store = cache_parts.PartStore(Path(sys.argv[1]), {"model": "a"}, ("hidden",))
row = lambda n: {"hidden": torch.full((3, 4), float(n))}
for n in range(64):
    store.add(f"key{n}-0", row(n))
store.flush()
kill_at, renames = int(sys.argv[2]), [0]
rename = os.replace
def replace(old, new):
    if renames[0] == kill_at:
        os._exit(9)
    renames[0] += 1
    rename(old, new)
os.replace = replace
for n in range(64, 128):
    store.add(f"key{n}-0", row(n))
store.flush()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [0, 1], ids=["before the part's", "before the manifest's"])
def test_a_kill_between_write_and_rename_leaves_whole_parts_alone(tmp_path, kill_at, caplog):
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), str(kill_at)])
    assert done.returncode == 9
    assert list(tmp_path.glob("*.tmp"))
    store = reopened(tmp_path)
    assert not caplog.records  # nothing damaged
    assert not list(tmp_path.glob("*.tmp"))
    assert len(store) == 64 and len(parts(tmp_path)) == 1
    for n in range(64):
        assert torch.equal(store.get(f"key{n}-0")["hidden"], torch.full((3, 4), float(n)))
    for n in range(64, 128):
        store.add(f"key{n}-0", row(n))
    store.close()
    assert len(reopened(tmp_path)) == 128


def test_a_truncated_part_is_refused_by_name_and_its_rows_are_refilled(tmp_path, caplog):
    filled(tmp_path)
    bad = parts(tmp_path)[1]
    bad.write_bytes(bad.read_bytes()[:-10])
    store = reopened(tmp_path)
    assert f"{bad.name} of the teacher cache is damaged" in caplog.text
    assert len(store) == 66 and store.get("key64-0") is None and store.get("key0-0") is not None
    for n in range(130):
        store.add(f"key{n}-0", row(n))
    store.close()
    caplog.clear()
    again = reopened(tmp_path)
    assert len(again) == 130 and not caplog.records
    assert torch.equal(again.get("key64-0")["hidden"], row(64)["hidden"])


@pytest.mark.parametrize("place", [-3, 20], ids=["in a tensor", "in the header"])
def test_a_flipped_bit_is_found_at_the_first_use_and_told_by_name(tmp_path, caplog, place):
    filled(tmp_path)
    bad = parts(tmp_path)[0]
    content = bytearray(bad.read_bytes())
    content[place] ^= 4
    bad.write_bytes(content)
    store = reopened(tmp_path)
    assert all(store.get(f"key{n}-0") is None for n in range(64))
    assert caplog.text.count(f"{bad.name} of the teacher cache is damaged") == 1
    assert torch.equal(store.get("key64-0")["hidden"], row(64)["hidden"])


def test_a_missing_part_and_an_unreadable_manifest_are_told(tmp_path, caplog):
    filled(tmp_path)
    gone = parts(tmp_path)[2]
    gone.unlink()
    assert len(reopened(tmp_path)) == 128
    assert f"{gone.name} of the teacher cache is damaged (missing)" in caplog.text
    next(tmp_path.glob("manifest-*")).write_text("{", encoding="utf-8")
    store = reopened(tmp_path)
    assert len(store) == 0 and "manifest-" in caplog.text and "unreadable" in caplog.text


def test_a_manifest_cannot_point_outside_of_its_folder(tmp_path, caplog):
    folder = tmp_path / "cache"
    filled(folder)
    manifest = next(folder.glob("manifest-*"))
    listed = json.loads(manifest.read_text())
    listed["parts"]["../part.safetensors"] = {"bytes": 1, "sha256": ""}
    manifest.write_text(json.dumps(listed))
    assert len(reopened(folder)) == 0 and "another format" in caplog.text


def test_parts_made_for_something_else_are_stale_by_name_and_kept(tmp_path, caplog):
    filled(tmp_path, template="alpaca 1a")
    old = parts(tmp_path)
    store = reopened(tmp_path, template="plain 2b")
    assert len(store) == 0
    assert old[0].name in caplog.text
    assert "another template (alpaca 1a, now plain 2b)" in caplog.text
    store.add("new", row(1))
    store.close()
    assert len(reopened(tmp_path, template="plain 2b")) == 1
    assert len(reopened(tmp_path, template="alpaca 1a")) == 130


def test_ranks_write_files_of_their_own_and_read_all(tmp_path, monkeypatch):
    monkeypatch.setattr("lwf_unsloth.cache_parts.REFRESH_SECONDS", 0.0)
    first, second = reopened(tmp_path, 0), reopened(tmp_path, 1)
    first.add("from 0", row(0))
    second.add("from 1", row(1))
    first.flush()
    second.flush()
    assert sorted(p.name.split("-")[2] for p in parts(tmp_path)) == ["r0", "r1"]
    assert torch.equal(first.get("from 1")["hidden"], row(1)["hidden"])
    assert torch.equal(second.get("from 0")["hidden"], row(0)["hidden"])


def test_a_second_process_reads_and_does_not_write(tmp_path, caplog):
    holder = reopened(tmp_path)
    holder.add("a", row(1))
    holder.flush()
    other = reopened(tmp_path)
    assert "only reads" in caplog.text
    assert torch.equal(other.get("a")["hidden"], row(1)["hidden"])
    other.add("b", row(2))
    other.close()
    assert len(parts(tmp_path)) == 1
    holder.close()
    assert reopened(tmp_path).writes


def test_a_cache_that_is_removed_while_runs_use_it_is_computed_and_ends_no_run(tmp_path, caplog):
    """Another session deletes the folder to have its space."""
    writer = reopened(tmp_path / "cache")
    writer.add("a", row(1))
    writer.flush()
    reader = reopened(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    for store in (writer, reader):
        assert store.get("a") is None and "computed again" in caplog.text
        caplog.clear()
        store.add("a", row(1))
    writer.close()
    assert "grows no further" in caplog.text


def test_a_full_disk_ends_the_growing_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(path, data):
        raise OSError(28, "No space left on device")

    store = reopened(tmp_path)
    monkeypatch.setattr("lwf_unsloth.cache_parts.write_whole", full)
    for n in range(70):
        store.add(f"key{n}", row(n))
    store.close()
    assert "grows no further" in caplog.text and "No space left" in caplog.text
    assert caplog.text.count("grows no further") == 1


def test_a_file_system_that_syncs_no_directory_is_no_full_disk(tmp_path, monkeypatch, caplog):
    sync = os.fsync

    def files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr("os.fsync", files_only)
    filled(tmp_path)
    assert len(reopened(tmp_path)) == 130 and not caplog.records


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="lwf_cache_dir"):
        reopened(tmp_path / "file" / "cache")


# ---------------------------------------------------------------- the training


@pytest.fixture()
def make_trainer(tiny_peft, alpaca_rows, tmp_path):
    """Factory: a trainer on 8 task and 4 rehearsal rows, 2 epochs, float32; `run` names its
    folder."""

    def make(model=None, tokenizer=None, run="run", teacher=None, eval_dataset=None, **changes):
        from lwf_unsloth.config import LwFConfig
        from lwf_unsloth.trainer import LwFTrainer

        if model is None:
            model, tokenizer = tiny_peft()
        values = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_length": 256,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "rehearsal_ratio": 0.33,
            "lwf_rows": "all",
            **changes,
        }
        return LwFTrainer(
            model,
            args=LwFConfig(str(tmp_path / run), **values),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(alpaca_rows(8)),
            rehearsal_dataset=Dataset.from_list(alpaca_rows(4, "keep")),
            eval_dataset=eval_dataset,
            teacher=teacher,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def kls(trainer):
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def count_rows(monkeypatch):
    """Rows of each live teacher forward, in order."""
    from lwf_unsloth.teacher import OwnTeacher

    seen = []
    for name in ("hidden", "logits"):
        own = getattr(OwnTeacher, name)

        def counted(self, ids, mask, own=own):
            seen.append(len(ids))
            return own(self, ids, mask)

        monkeypatch.setattr(OwnTeacher, name, counted)
    return seen


def disturb(model, seed=7):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.5)


@pytest.mark.parametrize("rows", ["all", "rehearsal", "response"])
def test_hidden_gives_the_losses_and_the_adapter_of_the_live_teacher(make_trainer, rows):
    live = make_trainer(run="live", lwf_rows=rows)
    live.train()
    cached = make_trainer(lwf_rows=rows, lwf_cache="hidden")
    cached.train()
    assert len(losses(live)) == 6
    assert losses(cached) == pytest.approx(losses(live), rel=1e-6)
    assert kls(cached) == pytest.approx(kls(live), rel=1e-5, abs=1e-9)
    for name, value in trained(live.model).items():
        other = trained(cached.model)[name]
        assert torch.allclose(other, value, rtol=1e-6, atol=1e-6 * value.abs().max()), name


def test_every_row_has_one_teacher_forward_and_none_from_epoch_2_on(make_trainer, monkeypatch):
    trainer = make_trainer(lwf_cache="hidden", lwf_rows="all")
    seen = count_rows(monkeypatch)
    trainer.train()
    assert sum(seen) == 12  # 8 task rows, 4 rehearsal rows; 24 came
    assert len(seen) == 3  # the micro-batches of epoch 1
    files = trainer.teacher.folder
    assert files.parent.name == "run" and len(parts(files)) == 1


def test_a_batch_that_is_partly_cached_forwards_the_missing_rows_alone(make_trainer, monkeypatch):
    trainer = make_trainer(lwf_cache="hidden")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 9, 2, 11)])
    other = trainer.data_collator([trainer.train_dataset[i] for i in (9, 3, 11, 5)])
    model = trainer.model.train()
    disturb(model)
    expected = [trainer.compute_loss(model, b).item() for b in (batch, other)]
    trainer.teacher.close()
    for path in parts(trainer.teacher.folder):
        path.unlink()
    seen = count_rows(monkeypatch)
    found = [trainer.compute_loss(model, b).item() for b in (batch, other, batch, other)]
    assert seen == [4, 2]
    assert found == pytest.approx(expected * 2, rel=1e-6)


def test_evaluation_asks_the_live_teacher_and_leaves_the_cache_alone(make_trainer, alpaca_rows):
    trainer = make_trainer(
        lwf_cache="topk", lwf_cache_k=4, eval_dataset=Dataset.from_list(alpaca_rows(5, "held"))
    )
    exact = make_trainer(run="live", eval_dataset=Dataset.from_list(alpaca_rows(5, "held")))
    disturb(trainer.model)
    disturb(exact.model)
    found = trainer.evaluate()["eval_kl"]
    assert found > 0.01 and found == pytest.approx(exact.evaluate()["eval_kl"], rel=1e-6)
    assert not trainer.teacher.folder.exists()


def test_the_caches_teacher_is_told_and_its_size_before_it_starts(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        trainer = make_trainer(lwf_cache="hidden")
    rows = trainer.train_dataset["input_ids"]
    tokens = sum(map(len, rows)) / len(rows)
    told = next(m for m in caplog.messages if m.startswith("Teacher cache (hidden)"))
    size = 12 * tokens * 64 * 4
    assert f"12 rows x {tokens:.0f} tokens x 256 bytes" in told
    assert f"about {size / 2**20:.1f} MiB" in told or f"about {size / 2**10:.1f} KiB" in told
    assert str(trainer.teacher.folder) in told
    assert any("kept in" in m for m in caplog.messages)
    trainer.train()
    written = sum(p.stat().st_size for p in parts(trainer.teacher.folder))
    assert size < written < 1.05 * size


def test_a_disk_that_is_too_small_is_an_error_before_training(make_trainer, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 5000))
    with pytest.raises(ConfigError, match="4.9 KiB free") as error:
        make_trainer(lwf_cache="hidden")
    assert "lwf_cache_dir" in str(error.value) and "topk" in str(error.value)


def test_what_is_there_counts_as_room(make_trainer, monkeypatch):
    make_trainer(lwf_cache="hidden").train()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 5000))
    make_trainer(lwf_cache="hidden")


def test_a_single_epoch_is_told_that_it_fills_and_does_not_read(make_trainer, caplog):
    make_trainer(lwf_cache="hidden", num_train_epochs=1)
    assert "comes only once" in caplog.text
    caplog.clear()
    make_trainer(lwf_cache="hidden", lwf_rows="rehearsal", num_train_epochs=2)
    assert "comes only once" not in caplog.text


def test_a_second_run_on_the_same_model_makes_no_forward(make_trainer, monkeypatch, tmp_path):
    shared = str(tmp_path / "shared")
    first = make_trainer(run="a", lwf_cache="hidden", lwf_cache_dir=shared)
    first.train()
    second = make_trainer(run="b", lwf_cache="hidden", lwf_cache_dir=shared)
    seen = count_rows(monkeypatch)
    second.train()
    assert seen == []
    assert losses(second) == pytest.approx(losses(first), rel=1e-6)


@pytest.mark.slow
def test_a_resumed_run_uses_what_the_interrupted_one_wrote(make_trainer, monkeypatch):
    found = []
    for cache in ("off", "hidden"):
        run = {"run": cache, "lwf_cache": cache, "save_strategy": "steps", "save_steps": 4}
        make_trainer(max_steps=4, **run).train()
        resumed = make_trainer(**run)
        seen = count_rows(monkeypatch)
        resumed.train(resume_from_checkpoint=True)
        found.append(losses(resumed)[-2:])
    assert seen == []  # the first epoch's 3 steps saw every row
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.slow
def test_a_snapshot_teacher_is_cached_and_another_adapter_is_stale(
    make_trainer, tiny_peft, monkeypatch, caplog
):
    model, tokenizer = tiny_peft()
    disturb(model)
    trainer = make_trainer(model, tokenizer, lwf_cache="hidden")
    assert trainer.teacher.kind == "snapshot"
    seen = count_rows(monkeypatch)
    trainer.train()
    assert sum(seen) == 12 and kls(trainer)[0] == 0.0 and kls(trainer)[-1] > 0
    model, tokenizer = tiny_peft()
    disturb(model)
    again = make_trainer(model, tokenizer, lwf_cache="hidden")
    seen.clear()
    again.train()
    assert seen == []  # the same adapter, loaded again
    assert "stale" not in caplog.text
    model, tokenizer = tiny_peft()
    disturb(model, seed=8)
    third = make_trainer(model, tokenizer, lwf_cache="hidden")
    seen.clear()
    third.train()
    assert sum(seen) == 12
    assert "stale" in caplog.text and "another adapter" in caplog.text


def test_another_template_tokenizer_model_or_scale_is_stale(make_trainer, tiny_peft, caplog):
    from lwf_unsloth.records import PromptTemplate, set_template

    model, tokenizer = tiny_peft()
    trainer = make_trainer(model, tokenizer, lwf_cache="hidden")
    base = trainer.teacher.identity()
    assert base == trainer.teacher.identity()

    def changed(trainer):
        now = trainer.teacher.identity()
        return {name for name in base if now.get(name) != base[name]}

    disturb(trainer.model)
    assert changed(trainer) == set()  # the teacher is the base, whatever is being trained
    set_template(tokenizer, PromptTemplate("own", "{instruction} {input}:", "{instruction}:"))
    assert changed(trainer) == {"template"}
    model, tokenizer = tiny_peft()
    tokenizer.add_tokens(["<new>"])
    assert "tokenizer" in changed(make_trainer(model, tokenizer, lwf_cache="hidden"))
    model, tokenizer = tiny_peft(load_in_4bit=False)
    assert {"model", "weights"} <= changed(make_trainer(model, tokenizer, lwf_cache="hidden"))
    model, tokenizer = tiny_peft()
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 0.5
    assert changed(make_trainer(model, tokenizer, lwf_cache="hidden")) == {"weights"}
    assert changed(make_trainer(lwf_cache="topk")) == {"targets"}
    models = []
    for alpha in (8, 16):
        model, tokenizer = tiny_peft(lora_alpha=alpha)
        disturb(model)
        models.append(make_trainer(model, tokenizer, lwf_cache="hidden").teacher.identity())
    assert models[0]["adapter"] != models[1]["adapter"]  # the same tensors, applied otherwise


def test_a_frozen_part_of_the_adapter_and_a_turned_down_scale_are_another_teacher(tiny_peft):
    from lwf_unsloth.teacher import make_teacher
    from lwf_unsloth.teacher_identity import teacher_identity

    def identity(seed, scale=1.0, second=False):
        """Of a model whose first layer's adapter is trained and frozen, the second's untouched."""
        model, tokenizer = tiny_peft()
        draw = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if ".layers.0." in name:
                p.requires_grad_(False)
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=draw))
        for module in model.modules():
            if hasattr(module, "active_adapters") and "scaling" in vars(module):
                module.scaling = {name: value * scale for name, value in module.scaling.items()}
        student = tiny_peft()[0] if second else model
        return teacher_identity(make_teacher(student, model if second else None), tokenizer, "-")

    for second in (False, True):
        first = identity(1, second=second)
        assert first == identity(1, second=second)
        assert first["weights"] != identity(2, second=second)["weights"]
        assert first["adapter"] != identity(1, scale=0.5, second=second)["adapter"]


@pytest.mark.slow
def test_the_identity_is_the_same_in_another_process(make_trainer, tiny_model_dir, tmp_path):
    trainer = make_trainer(lwf_cache="hidden")
    code = f"""
from lwf_unsloth.config import ModelConfig
from lwf_unsloth.model import load_model
from lwf_unsloth.teacher import make_teacher
from lwf_unsloth.teacher_identity import teacher_identity
model, tokenizer = load_model(ModelConfig({str(tiny_model_dir)!r}, dtype="float32", r=4,
    lora_alpha=8, max_seq_length=512))
import json; print("ID" + json.dumps(teacher_identity(make_teacher(model), tokenizer, "as loaded")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ID"))
    ours = trainer.teacher.identity()
    ours.pop("targets")
    assert json.loads(line[2:]) == ours


@pytest.mark.slow
def test_a_second_models_targets_are_cached_too(make_trainer, tiny_peft):
    other, _ = tiny_peft()
    disturb(other)
    live = make_trainer(run="live", teacher=other)
    live.train()
    other, _ = tiny_peft()
    disturb(other)
    cached = make_trainer(lwf_cache="hidden", teacher=other)
    cached.train()
    assert kls(live)[0] > 0.01
    assert losses(cached) == pytest.approx(losses(live), rel=1e-6)


# ------------------------------------------------------------------------ topk


def test_topk_trains_close_to_the_live_teacher_and_starts_at_0(make_trainer, monkeypatch):
    live = make_trainer(run="live")
    live.train()
    cached = make_trainer(lwf_cache="topk")
    seen = count_rows(monkeypatch)
    cached.train()
    assert sum(seen) == 12
    assert abs(kls(cached)[0]) < 1e-6
    assert kls(cached)[-1] == pytest.approx(kls(live)[-1], rel=0.2)
    assert losses(cached) == pytest.approx(losses(live), rel=0.05)


def test_topks_error_on_the_tiny_model_is_below_and_as_large_as_the_rest_allows(make_trainer):
    exact = make_trainer(run="live")
    disturb(exact.model)
    batch = exact.data_collator([exact.train_dataset[i] for i in range(6)])

    def kl(trainer):
        model = trainer.model.train()
        disturb(model)
        trainer.compute_loss(model, batch)
        return trainer._meters["train"].take()["kl"]

    whole = kl(exact)
    found = [kl(make_trainer(run=f"k{k}", lwf_cache="topk", lwf_cache_k=k)) for k in (8, 64, 400)]
    assert found == sorted(found)  # more classes, less is left out
    assert all(value <= whole * (1 + 1e-5) for value in found)
    assert found[1] > 0.75 * whole  # random weights: the flattest teacher there is
    assert found[2] == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_a_run_that_fills_topk_says_how_much_of_the_teacher_the_rest_is(make_trainer, caplog):
    trainer = make_trainer(lwf_cache="topk", lwf_cache_k=64)
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        trainer.train()
    (said,) = [r.getMessage() for r in caplog.records if "tokens hold" in r.getMessage()]
    share = float(said.split("hold ")[1].split(" %")[0])
    live = trainer.teacher.teacher
    masses = []
    for row in trainer.rows.dataset:
        ids = torch.tensor([row["input_ids"]])
        probabilities = live.logits(ids, None)[0].detach().float().softmax(-1)
        masses.append(probabilities.topk(64).values.sum(-1))
    every = torch.cat(masses)
    assert every.min() * 100 <= share <= every.max() * 100 and 0 < share < 100
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        make_trainer(lwf_cache="topk", lwf_cache_k=64).train()
    assert not [r for r in caplog.records if "most probable tokens hold" in r.getMessage()]


@pytest.mark.slow
def test_topk_serves_full_logits_and_hidden_refuses_them(make_trainer, monkeypatch):
    one_pass = make_trainer(lwf_cache="topk")
    one_pass.train()
    monkeypatch.setattr("lwf_unsloth.objective.head_matches", lambda *_: False)
    with pytest.raises(ConfigError, match="topk"):
        make_trainer(run="b", lwf_cache="hidden")
    full = make_trainer(run="b", lwf_cache="topk")
    assert full.objective.full_logits
    full.train()
    assert losses(full) == pytest.approx(losses(one_pass), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["reverse", "target_masked"])
def test_topk_with_another_direction_is_refused_and_hidden_serves_it(make_trainer, kl):
    with pytest.raises(ConfigError, match=f"{kl}.*hidden"):
        make_trainer(lwf_cache="topk", lwf_kl=kl)
    live = make_trainer(run="live", lwf_kl=kl)
    live.train()
    cached = make_trainer(lwf_cache="hidden", lwf_kl=kl)
    cached.train()
    assert losses(cached) == pytest.approx(losses(live), rel=1e-6)


@pytest.mark.slow
def test_topk_at_another_temperature_is_stale_and_a_changing_one_is_refused(
    make_trainer, monkeypatch, caplog
):
    make_trainer(lwf_cache="topk", lwf_temperature=2.0).train()
    trainer = make_trainer(lwf_cache="topk", lwf_temperature=1.0)
    seen = count_rows(monkeypatch)
    trainer.train()
    assert sum(seen) == 12
    assert "another targets (top 64 at T 2, now top 64 at T 1)" in caplog.text
    trainer.args.lwf_temperature = 1.5
    with pytest.raises(ConfigError, match="hidden"):
        trainer.train()


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"lwf_cache": "disk"}, "lwf_cache"),
        ({"lwf_cache": True}, "lwf_cache"),
        ({"lwf_cache": "topk", "lwf_cache_k": 0}, "lwf_cache_k"),
        ({"lwf_cache": "topk", "lwf_cache_k": 2.5}, "lwf_cache_k"),
    ],
)
def test_settings_out_of_range_are_refused(changes, name, tmp_path):
    from lwf_unsloth.config import LwFConfig

    with pytest.raises(ConfigError, match=name):
        LwFConfig(str(tmp_path), bf16=False, **changes)


def test_the_cards_settings_name_no_folder(tmp_path):
    from lwf_unsloth.config import LwFConfig

    settings = LwFConfig(str(tmp_path), bf16=False, lwf_cache_dir=str(tmp_path)).lwf_settings()
    assert settings["lwf_cache"] == "off"
    assert str(tmp_path) not in json.dumps(settings)


@pytest.mark.gpu
@pytest.mark.parametrize("kind, dtype", [("gemma", "float16"), ("llama", "bfloat16")])
@pytest.mark.parametrize("mode", ["hidden", "topk"])
def test_on_cuda_epoch_2_makes_no_teacher_forward_and_trains_alike(
    tmp_path, monkeypatch, kind, dtype, mode
):
    import gpu_shapes

    folder = gpu_shapes.build(kind, tmp_path / "model")
    found = []
    for cache in ("off", mode):
        model, tokenizer = gpu_shapes.load(folder, dtype=dtype)
        trainer = gpu_shapes.make_trainer(
            model, tokenizer, tmp_path / cache, num_train_epochs=2, lwf_rows="all", lwf_cache=cache
        )
        seen = count_rows(monkeypatch)
        trainer.train()
        found.append((losses(trainer), kls(trainer)))
    assert sum(seen) == len({tuple(ids) for ids in trainer.train_dataset["input_ids"]})
    assert found[1][1][0] < 1e-4
    assert found[1][0] == pytest.approx(found[0][0], rel=0.05 if mode == "topk" else 5e-3)
