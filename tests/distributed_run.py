"""What two processes do together, started once by torchrun for all of test_distributed.

    torchrun --nproc_per_node 2 tests/distributed_run.py MODEL_FOLDER OUT_FOLDER

Each process writes OUT_FOLDER/rank-N.json; then the first one fails in a run. `scenario` alone is
also what one process does. By hand on two GPUs, without torchrun it then tells how far one process
is from the two (MODEL_FOLDER is filled where it is not there):

    python tests/distributed_run.py MODEL_FOLDER OUT_FOLDER
"""

import datetime
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SCENARIOS = {
    "default recipe": {"eval_strategy": "epoch"},
    "all rows, accumulated": {"lwf_rows": "all", "gradient_accumulation_steps": 2, "batch": 2},
    "rehearsal answers too": {"rehearsal_ce": True, "label_smoothing_factor": 0.1},
    "one row a process": {"gradient_accumulation_steps": 4, "batch": 1, "lwf_cache": "hidden"},
    "budget": {"lwf_kl_budget": 0.05},
    "rank that grows": {
        "rank_schedule": "0:2, 0.5:4",
        "freeze_schedule": "0:mlp, 0.3:",
        "gradient_accumulation_steps": 2,
        "batch": 2,
    },
}
"""Name -> settings; `batch` is a process's of two, and twice as much is one process's alone."""
PATIENCE = datetime.timedelta(minutes=10)
"""Of a process that has failed, for the other on a busy machine."""


def rows(count, tag):
    return [
        {
            "instruction": f"{tag}: say what number {i} is.",
            "input": "" if i % 3 else f"number {i}",
            "output": f"Number {i} is the {'even' if i % 2 == 0 else 'odd'} one. " * (1 + i % 3),
        }
        for i in range(count)
    ]


def load(folder):
    from lwf_unsloth.backend import on_cuda
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_model

    dtype = "bfloat16" if on_cuda() else "float32"
    return load_model(ModelConfig(str(folder), dtype=dtype, r=4, lora_alpha=8, max_seq_length=512))


def disturb(model, columns=None):
    """Gives LoRA (its first columns) a random state, so that the KL's gradient is not 0 at once."""
    import torch

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.3)
                p[:, columns or p.shape[1] :] = 0.0


def trainer_of(folder, output, processes, second=None, **changes):
    """26 task rows and 8 rehearsal rows at ratio 0.25 make 35 rows: the last batch is short."""
    from lwf_unsloth.backend import on_cuda
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = load(folder)
    batch = changes.pop("batch", 4) * (2 if processes == 1 else 1)
    rehearsal = changes.pop("rehearsal_dataset", rows(8, "keep"))
    values = {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_length": 256,
        "bf16": on_cuda(),
        "disable_tqdm": True,
        "save_strategy": "no",
        "rehearsal_ratio": 0.25,
    }
    trainer = LwFTrainer(
        model,
        args=LwFConfig(str(output), **{**values, **changes}),
        processing_class=tokenizer,
        train_dataset=rows(26, "task"),
        rehearsal_dataset=rehearsal,
        eval_dataset=rows(7, "held out"),
        teacher=second,
    )
    disturb(trainer.model, 2 if trainer.args.rank_schedule else None)
    return trainer


def scenario(folder, output, processes, **changes):
    """Log, gradient norms by step and tensor, and evaluation of one epoch.

    A second model is the teacher, so that the KL is not 0 while the adapter is disturbed.
    """
    from transformers import TrainerCallback

    trainer = trainer_of(folder, output, processes, load(folder)[0], **changes)
    grads = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            moved = [(n, p.grad) for n, p in trained(model) if p.grad is not None]
            grads.append({n: grad.flatten()[:40].tolist() for n, grad in moved})

    trainer.args.max_grad_norm = 0.0  # clipped gradients would hide a wrong factor
    trainer.add_callback(Gradients())
    trainer.train()
    return {
        "log": [
            {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
            for line in trainer.state.log_history
            if "loss" in line or "eval_loss" in line
        ],
        "grads": grads,
        "adapter": {n: p.flatten()[:40].tolist() for n, p in trained(trainer.model)},
        "eval": {k: v for k, v in trainer.evaluate().items() if k in ("eval_task_loss", "eval_kl")},
    }


def trained(model):
    names = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
    return [(n, p) for n, p in names if p.requires_grad]


# -------------------------------------------------------------------- parts of the run


def shares(folder, output):
    """Rehearsal rows and rows of this process in every optimizer batch of two epochs."""
    trainer = trainer_of(
        folder, output, 2, batch=1, gradient_accumulation_steps=4, num_train_epochs=2
    )
    seen, found = [], trainer.get_batch_samples

    def spy(*args, **kwargs):
        samples, items = found(*args, **kwargs)
        real = [
            (b, i) for b in samples for i in range(len(b["labels"])) if b["attention_mask"][i].any()
        ]
        seen.append(
            {
                "rehearsal": sum(bool(b["is_rehearsal"][i]) for b, i in real),
                "task": [
                    " ".join(map(str, b["input_ids"][i][b["attention_mask"][i].bool()].tolist()))
                    for b, i in real
                    if not b["is_rehearsal"][i]
                ],
            }
        )
        return samples, items

    trainer.get_batch_samples = spy
    trainer.train()
    return seen


def resumed(folder, output):
    """Whether a run of two epochs, resumed within the second, ends as the uninterrupted one."""
    import shutil

    from lwf_unsloth import ranks

    run = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 13, "batch": 2}
    whole = trainer_of(folder, output / "whole", 2, **run)
    whole.train()
    steps = sorted(int(p.name.split("-")[1]) for p in (output / "whole").glob("checkpoint-*"))

    def interrupt():
        shutil.copytree(
            output / "whole" / f"checkpoint-{steps[0]}", output / "cut" / f"checkpoint-{steps[0]}"
        )

    ranks.from_first(interrupt, "copy")
    again = trainer_of(folder, output / "cut", 2, **run)
    again.train(resume_from_checkpoint=True)
    pairs = zip(trained(whole.model), trained(again.model), strict=True)
    return {
        "steps": [whole.state.global_step, again.state.global_step],
        "adapter": {n: p.flatten()[:40].tolist() for n, p in trained(again.model)},
        "equal": all(bool((a == b).all()) for (_, a), (_, b) in pairs),
        "files": sorted(p.name for p in (output / "whole" / f"checkpoint-{steps[0]}").iterdir()),
    }


def written_once(folder, output):
    """How often this process wrote rehearsal rows, cached rows and the adapter."""
    from safetensors import safe_open

    from lwf_unsloth import adapters, ranks, train_data
    from lwf_unsloth.train_file import save_trained
    from lwf_unsloth.written_rows import WrittenReport, WrittenRows

    calls = {"rows": 0, "adapter": 0}
    save = adapters.save_adapter

    def writing(*args, **kwargs):  # the tiny model writes nothing that could be used
        calls["rows"] += 1
        passages = [{"text": f"Passage {i} tells of the river."} for i in range(4)]
        return WrittenRows(passages, WrittenReport("passages"), {})

    def saving(*args, **kwargs):
        calls["adapter"] += 1
        return save(*args, **kwargs)

    train_data.self_rehearsal, adapters.save_adapter = writing, saving
    run = {"rehearsal_dataset": "self", "self_rehearsal_rows": 4, "lwf_rows": "all"}
    trainer = trainer_of(folder, output, 2, num_train_epochs=3, lwf_cache="hidden", batch=2, **run)
    trainer.train()
    time.sleep(ranks.rank())  # whom the first one must not wait for in vain, nor leave behind
    calls["folder"] = save_trained(trainer).name
    with ranks.together("wait"):
        pass
    parts = sorted((output / "teacher_cache").glob("part-*.safetensors"))
    keys = [key for part in parts for key in safe_open(part, "pt").keys()]  # noqa: SIM118
    texts = [row["input_ids"] for row in trainer.rows.dataset]
    distinct = len({tuple(ids) for ids in texts})
    return {**calls, "cached": len(keys), "distinct": distinct, "pool": len(texts) - 26}


def failures(out):
    """What this process meets when itself, the other, or the first one fails."""
    from lwf_unsloth import ranks
    from lwf_unsloth.errors import DataError, LwfError

    def fail(who, kind=DataError):
        if ranks.rank() == who:
            raise kind("no rows here")

    def nested():
        with ranks.together("outer"):
            ranks.from_first(lambda: fail(0), "make it")

    def apart():
        with ranks.together("load the model"):
            fail(1)
            ranks.from_first(lambda: 1, "write rehearsal rows")

    def one(who, kind=DataError):
        with ranks.together("read the data"):
            fail(who, kind)

    usual, ranks.SHORT_WAIT, found = ranks.SHORT_WAIT, PATIENCE, {}
    tries = {
        "first": lambda: one(0),
        "second": lambda: one(1),
        "unknown kind": lambda: one(1, KeyError),
        "nested": nested,
        "before a part of the other": apart,
    }
    for name, act in tries.items():
        try:
            act()
        except (LwfError, KeyError) as error:
            found[name] = [type(error).__name__, str(error), getattr(error, "told", None)]
    ranks.SHORT_WAIT = datetime.timedelta(seconds=0.2)
    gone = out / "gone"
    try:
        with ranks.together("come late"):
            while ranks.rank() == 0 and not gone.exists():  # till the other has ended its part
                time.sleep(0.02)
            fail(1)
    except LwfError as error:
        found["late"] = [type(error).__name__, str(error), error.told]
        gone.touch()
    ranks.SHORT_WAIT = usual
    with ranks.together("go on"):
        long = ranks.from_first(lambda: {"text": "whole" * 10**6}, "make it")["text"]
        found["afterwards"] = "whole" if long == "whole" * 10**6 else long[:20]
    return found


def broken_off(folder, output):
    """A run in which the first process fails: it and the other end, by the launcher."""
    from transformers import TrainerCallback

    from lwf_unsloth import ranks

    class DiskFull(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if ranks.rank() == 0 and state.global_step == 2:
                raise OSError("the disk is full")

    trainer = trainer_of(folder, output, 2)
    trainer.add_callback(DiskFull())
    trainer.train()


def differences(folder, out):
    """Of each scenario: the largest relative difference of one process to the two before."""
    import torch

    two = json.loads((out / "rank-0.json").read_text(encoding="utf-8"))
    for part in ("failures", "resumed", "once"):
        print(part, {k: v for k, v in two[part].items() if k != "adapter"})
    for name, changes in SCENARIOS.items():
        one, both = scenario(folder, out / "one" / name.replace(" ", "-"), 1, **changes), two[name]
        steps = [
            max(
                float((torch.tensor(theirs[n]) - torch.tensor(ours)).norm())
                / max(1e-12, float(torch.tensor(ours).norm()))
                for n, ours in mine.items()
            )
            for mine, theirs in zip(one["grads"], both["grads"], strict=True)
        ]
        print(name, "gradients by step", steps, "evaluation", one["eval"], both["eval"])


def main():
    from lwf_unsloth import ranks

    folder, out = map(Path, sys.argv[1:3])
    if not folder.exists():
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from gpu_shapes import build

        ranks.from_first(lambda: str(build("llama", folder)), "make the model")
    out.mkdir(parents=True, exist_ok=True)
    if ranks.world() == 1:
        return differences(folder, out)
    found = {"failures": failures(out)}
    for name, changes in SCENARIOS.items():
        found[name] = scenario(folder, out / name.replace(" ", "-"), 2, **changes)
    found["shares"] = shares(folder, out / "shares")
    found["resumed"] = resumed(folder, out / "resumed")
    found["once"] = written_once(folder, out / "once")
    (out / f"rank-{ranks.rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    broken_off(folder, out / "broken")
    (out / f"through-{ranks.rank()}").touch()


if __name__ == "__main__":
    main()
