"""Several processes: shares of rehearsal rows, one gradient, one writer, one message.

What needs two processes runs once, by torchrun with gloo on the CPU (distributed_run.py).
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import distributed_run

from lwf_unsloth import ranks
from lwf_unsloth.batches import LwFCollator, token_roles, without_repeats
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.meters import Meter
from lwf_unsloth.rehearsal import RehearsalSampler

pytestmark = pytest.mark.timeout(900)  # a busy machine takes long
ROOT = Path(__file__).resolve().parent.parent
LONGEST = 800
"""Seconds after which processes hang, on the busiest machine."""


# ------------------------------------------------------------ each process's share


@pytest.mark.parametrize("processes, batch, steps", [(2, 1, 1), (2, 1, 4), (2, 4, 2), (8, 2, 1)])
@pytest.mark.parametrize("ratio", [0.06, 0.1, 0.25, 0.5, 0.9])
def test_every_process_has_its_share_within_one_row_in_every_optimizer_batch(
    processes, batch, steps, ratio
):
    of = {"seed": 3, "ranks": processes, "batch": batch, "steps": steps}
    ours, alone = RehearsalSampler(97, 12, ratio, **of), RehearsalSampler(97, 12, ratio, seed=3)
    window = processes * batch * steps
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        alone.set_epoch(epoch)
        order, plain = list(ours), list(alone)
        whole = Counter()
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            assert sorted(rows) == sorted(plain[start : start + window]), "the same optimizer batch"
            for rank in range(processes):
                own = [row for at, row in enumerate(rows) if at // batch % processes == rank]
                found = sum(row >= 97 for row in own)
                assert abs(found - ratio * len(own)) < 1
                whole[rank] += found - ratio * len(own)
        assert max(map(abs, whole.values())) < 2, "roundings even out over the epoch"


def test_one_process_has_the_order_that_it_had():
    of = {"ranks": 1, "batch": 4, "steps": 2}
    assert list(RehearsalSampler(30, 9, 0.25, **of)) == list(RehearsalSampler(30, 9, 0.25))


def test_rows_that_fill_up_a_forward_carry_no_term():
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "is_rehearsal": flag}
        for flag in (False, True, True)
    ]
    batch = LwFCollator(0)(rows)
    assert without_repeats(batch, 3) is batch
    for own, ce, kl in ((1, 3, 0), (2, 3, 3), (0, 0, 0), (-2, 0, 0)):
        counts = token_roles(without_repeats(batch, own), "rehearsal", False, True).counts
        assert counts.tolist() == [ce, 0, 0, kl]
    assert batch["attention_mask"].all(), "the batch itself is left alone"


def test_a_meter_without_rows_still_answers_the_others():
    class Two:
        num_processes, device = 2, torch.device("cpu")
        asked = 0

        def gather(self, sums):
            self.asked += 1
            return torch.cat([sums, torch.tensor([[6.0, 0, 0, 1, 3, 0, 0, 2]]).double()])

    accelerator = Two()
    assert Meter().take(accelerator) == {"task_loss": 2.0, "kl": 0.5, "kl_rehearsal": 0.5}
    assert accelerator.asked == 1


# ------------------------------------------------------------------- the launch


@pytest.fixture()
def launched(monkeypatch):
    """Factory: the environment of one of several processes."""

    def launch(world=2, rank=1, **more):
        values = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, **more}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):
            monkeypatch.setenv(name, "")  # so that it is put back afterwards

    return launch


def test_a_world_size_without_a_launcher_is_no_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks.world() == 1 and ranks.rank() == 0


@pytest.mark.parametrize("name", [*ranks.SHARDED, *ranks.SIZES])
def test_what_splits_the_model_is_refused_before_loading(launched, name, tiny_peft):
    launched(**{name: "2" if name in ranks.SIZES else "true"})
    with pytest.raises(ConfigError, match="splits the model over") as refused:
        tiny_peft()
    assert refused.value.told, "the first process says it"


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_arguments_that_split_the_model_are_refused(settings, name):
    with pytest.raises(ConfigError, match="splits the model over"):
        settings(**{name: "full_shard"})


def test_each_process_loads_on_its_own_device(launched, monkeypatch):
    assert ranks.own_device_map("auto") == "auto", "alone it is as asked"
    launched()
    assert ranks.own_device_map(None) is None
    monkeypatch.setattr(ranks, "on_cuda", lambda: True)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert ranks.own_device_map(None) == {"": "cuda:1"} == ranks.own_device_map({"": 1})
    assert chosen == [1, 1]
    for asked in ("auto", "balanced", {"": 0}, {"": "cuda:0"}):
        with pytest.raises(ConfigError, match="2 processes train together"):
            ranks.own_device_map(asked)


def test_device_map_auto_with_several_processes_is_refused_before_loading(launched, tiny_peft):
    launched()
    with pytest.raises(ConfigError, match="device_map is 'auto'"):
        tiny_peft(device_map="auto")


def test_more_processes_than_gpus_are_refused(launched, monkeypatch):
    launched(world=3, rank=2)
    monkeypatch.setattr(ranks, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="no GPU of its own"):
        ranks.check_launch()


def test_processes_that_would_train_alone_are_refused(launched, make_trainer, settings):
    args = settings()
    launched()
    from lwf_unsloth.prechecks import match_model

    with pytest.raises(ConfigError, match="each would train alone"):
        match_model(args, torch.nn.Linear(1, 1))


def test_several_gpus_without_a_launcher_are_not_used_as_one(make_trainer, settings, caplog):
    args = settings()
    args._n_gpu = 2
    from lwf_unsloth.prechecks import match_model

    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        match_model(args, torch.nn.Linear(1, 1))
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size
    assert "torchrun --nproc_per_node 2" in caplog.text


def test_a_model_on_several_gpus_in_one_process_is_no_word_about_torchrun(settings, caplog):
    from lwf_unsloth.prechecks import match_model

    args, model = settings(), torch.nn.Linear(1, 1)
    args._n_gpu, model.hf_device_map = 2, {"layers.0": 0, "layers.1": 1}
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        match_model(args, model)
    assert args.n_gpu == 1 and "torchrun" not in caplog.text


@pytest.mark.parametrize("cause", ["spread", "uneven"])
def test_processes_that_could_not_keep_step_are_refused(settings, launched, monkeypatch, cause):
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.prechecks import match_model

    args, model = settings(), torch.nn.Linear(1, 1)
    launched()
    monkeypatch.setattr(LwFConfig, "world_size", 2)
    if cause == "spread":
        model.hf_device_map = {"layers.0": 0, "layers.1": 1}
    else:
        args.accelerator_config.even_batches = False
    with pytest.raises(ConfigError, match="2 processes train together"):
        match_model(args, model)


def test_freezing_while_several_processes_train_is_refused():
    from lwf_unsloth.rank_callbacks import SameTrained

    model = torch.nn.Linear(2, 2)
    watch = SameTrained(model)
    watch.on_step_begin(None, None, None)
    model.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="1 tensors were frozen or unfrozen.*bias"):
        watch.on_step_begin(None, None, None)


def test_only_train_runs_on_several_processes(launched, monkeypatch, capsys):
    from lwf_unsloth.cli import main

    launched(rank=0)
    monkeypatch.setattr(sys, "argv", ["lwf-unsloth", "template"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "only `train` runs on several" in capsys.readouterr().err


# --------------------------------------------------------------- two real processes


def torchrun(arguments, folder, **switches):
    """Runs two processes on the CPU; (exit code, output). After LONGEST all of them are ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **switches}
    command = [*launcher, "--master_port", "0", "--standalone", *arguments]
    started = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = started.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        pytest.fail(f"It hangs: {started.communicate()[0][-3000:]}")
    return started.returncode, text


@pytest.fixture(scope="module")
def two(tiny_model_dir, tmp_path_factory):
    """What both processes found, the first one's first."""
    folder = tmp_path_factory.mktemp("two")
    script = str(ROOT / "tests" / "distributed_run.py")
    code, text = torchrun([script, str(tiny_model_dir), str(folder)], folder)
    files = [folder / f"rank-{rank}.json" for rank in (0, 1)]
    assert all(file.is_file() for file in files), text[-4000:]
    ended = {"code": code, "text": text, "through": list(folder.glob("through-*"))}
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [{**one, "ended": ended, "folder": str(folder)} for one in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", distributed_run.SCENARIOS)
def test_two_processes_train_as_one_with_the_batch_of_both(two, name, tiny_model_dir, tmp_path):
    changes = distributed_run.SCENARIOS[name]
    one = distributed_run.scenario(tiny_model_dir, tmp_path, 1, **changes)
    ours = two[0][name]
    assert ours == two[1][name], "loss, lambda, gradients and evaluation are the same in both"
    assert len(ours["grads"]) == len(one["grads"]) == 5
    for found, wanted in zip(ours["log"], one["log"], strict=True):
        assert {**found, "epoch": 0} == pytest.approx({**wanted, "epoch": 0}, rel=1e-4)
    for found, wanted in zip(ours["grads"], one["grads"], strict=True):
        for tensor, values in wanted.items():
            largest = max(map(abs, values))
            assert found[tensor] == pytest.approx(values, rel=1e-4, abs=1e-4 * largest), tensor
    assert ours["eval"] == pytest.approx(one["eval"], rel=1e-5), "7 rows, each counted once"


@pytest.mark.slow
def test_the_share_holds_in_the_trainers_own_batches_and_no_row_comes_twice(two):
    shares = [found["shares"] for found in two]
    for number, batches in enumerate(zip(*shares, strict=True)):
        for batch in batches:
            count = batch["rehearsal"] + len(batch["task"])
            assert abs(batch["rehearsal"] - 0.25 * count) < 1, number
    for epoch in (slice(0, 5), slice(5, 10)):
        batches = [batch for found in shares for batch in found[epoch]]
        rows = Counter(row for batch in batches for row in batch["task"])
        assert len(rows) == 26 and set(rows.values()) == {1}
        assert sum(batch["rehearsal"] for batch in batches) == 9
    first, second = shares[0][0]["task"], shares[0][5]["task"]
    assert first != second, "each epoch has an order of its own"


@pytest.mark.slow
def test_a_resumed_run_of_two_ends_as_the_uninterrupted_one(two):
    for found in two:
        assert found["resumed"]["steps"] == [18, 18] and found["resumed"]["equal"]
    files = two[0]["resumed"]["files"]
    assert "adapter_model.safetensors" in files and "training_args.bin" not in files


@pytest.mark.slow
def test_rehearsal_rows_cache_and_adapter_are_written_once(two):
    first, second = (found["once"] for found in two)
    assert (first["rows"], second["rows"]) == (1, 0) == (first["adapter"], second["adapter"])
    assert first["pool"] == second["pool"] == 4, "the other process has the rows too"
    # A rehearsal row that comes to both processes in one epoch is there twice.
    assert first["distinct"] <= first["cached"] <= first["distinct"] + first["pool"]


@pytest.mark.slow
def test_where_one_process_fails_all_end_with_its_message_and_one_tells_it(two):
    first, second = (found["failures"] for found in two)
    for name, failed in first.items():
        if name in ("late", "afterwards"):
            continue
        others = second[name]
        assert "no rows here" in failed[1] and "no rows here" in others[1], name
        assert failed[2] is False and others[2] in (True, None), name
    assert first["first"][0] == "DataError" and second["first"][0] == "RankError"
    assert second["late"] == ["DataError", "no rows here", False], "it ends without the other"
    assert first["late"][0] == "RankError" and "no rows here" in first["late"][1]
    assert first["afterwards"] == second["afterwards"] == "whole"


@pytest.mark.slow
def test_a_first_process_that_fails_while_training_ends_both(two):
    ended = two[0]["ended"]
    assert ended["code"] != 0 and not ended["through"]
    assert ended["text"].count("OSError: the disk is full") == 1


@pytest.mark.slow
def test_a_wrong_training_file_is_refused_in_every_process_with_one_message(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("data: {taskk: rows.jsonl}\n", encoding="utf-8")
    code, text = torchrun(["-m", "lwf_unsloth", "train", str(file)], tmp_path)
    assert code != 0 and text.count("Did you mean task?") == 1, text


@pytest.mark.slow
def test_a_refusal_is_told_however_late_the_first_process_comes_to_it(tmp_path):
    """It loads a library for longer than the other waits."""
    late = "import os, time\nif os.environ.get('RANK') == '0': time.sleep(5)\n"
    (tmp_path / "sitecustomize.py").write_text(late, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, text = torchrun(["-m", "lwf_unsloth", "template"], tmp_path, PYTHONPATH=path)
    assert code != 0 and text.count("only `train` runs on several") == 1, text


@pytest.mark.slow
def test_the_command_line_trains_on_two_and_tells_it_once(tiny_model_dir, tmp_path):
    rows = "\n".join(json.dumps(row) for row in distributed_run.rows(12, "task"))
    (tmp_path / "task.jsonl").write_text(rows, encoding="utf-8")
    text = f"""
model: {{model_name: "{tiny_model_dir}", dtype: float32, r: 4, max_seq_length: 512}}
training: {{output_dir: run, per_device_train_batch_size: 2, bf16: false, lwf_rows: all}}
data: {{task: task.jsonl, rehearsal: task.jsonl, test_size: 2}}
"""
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    code, said = torchrun(["-m", "lwf_unsloth", "train", "mine.yaml"], tmp_path)
    assert code == 0 and said.count("The adapter: run/adapter") == 1, said[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_table_shows_speed_memory_and_the_same_gradient():
    sys.path.insert(0, str(ROOT))
    from benchmarks import ddp, ddp_table

    about = {"per_rank_batch": 8, "arm": "ours"}
    rows = [
        {**about, "ranks": 1, "tokens_per_second": 1e5, "peak_gib": 3.0},
        {**about, "ranks": 2, "tokens_per_second": 1.9e5, "peak_gib": 3.25},
        {"per_rank_batch": 4, "arm": "gradient_shared", "ranks": 2, "grad_error": 0.0012},
        {"per_rank_batch": 8, "arm": "ours_all", "ranks": 2, "error": "exit code 1"},
    ]
    head, lines = ddp_table.lines({"rows": ddp.with_speedup(rows)})
    assert head == ["batch 8 a GPU", "1 GPU", "2 GPUs"]
    ours = ["100,000 tokens/s, 3.00 GiB", "190,000 tokens/s, × 1.90, 3.25 GiB"]
    assert lines[0] == ["**ours**, default recipe", *ours]
    assert lines[1] == ["**ours**, KL on all rows", "", "exit code 1"]
    assert lines[2][1:] == ["", "1.2e-03"]


@pytest.mark.slow
def test_a_run_of_two_is_resumed_by_one_with_the_same_rows_a_step(two, tiny_model_dir, tmp_path):
    whole = Path(two[0]["folder"]) / "resumed" / "whole"
    run = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 13, "batch": 2}
    one = distributed_run.trainer_of(tiny_model_dir, tmp_path, 1, **run)
    one.train(resume_from_checkpoint=str(whole / "checkpoint-13"))
    ours = {name: p.flatten()[:40].tolist() for name, p in distributed_run.trained(one.model)}
    assert one.state.global_step == 18
    for name, values in two[0]["resumed"]["adapter"].items():
        assert ours[name] == pytest.approx(values, abs=1e-4), name


@pytest.mark.slow
def test_the_benchmark_runs_on_two_in_a_tiny_shape(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ddp", "--smoke", "--out", str(tmp_path)]
    command += ["--arms", "ours", "--folder", str(tmp_path / "model")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / "ddp.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(result), "no place on this machine"
    rows = {(row["ranks"], row["arm"]): row for row in result["rows"]}
    assert rows[2, "ours"]["tokens_per_second"] > 0 and rows[1, "ours"]["speedup"] == 1
    assert rows[2, "gradient_shared"]["grad_error"] < 1e-5
    assert rows[1, "gradient_accumulated"]["grad_error"] < 1e-5
