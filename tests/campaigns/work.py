"""What the campaigns run in processes of their own: a tiny training, a sweep, a conversion.

`python -m tests.campaigns.work KIND FOLDER` does one, or goes on with it. With
LWF_KILL_AT="N NEEDLE" the process ends itself by SIGKILL at its N-th operation (open to write,
rename, remove, fsync) on a path that holds NEEDLE; with LWF_COUNT="NEEDLE|NEEDLE" it writes how
many there were.
"""

import json
import os
import signal
import sys
from pathlib import Path

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fsync")
STEPS = 40


class Tripwire:
    """Counts operations on paths that hold a needle; at the N-th the process is gone."""

    def __init__(self, needle, at=None):
        self.needle, self.at, self.count = needle, at, 0
        sync = os.fsync

        def fsync(handle):
            self.saw("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        os.fsync = fsync
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if event not in OPERATIONS or not arguments:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE):
            return
        self.saw(event, arguments[0])

    def saw(self, event, path):
        if self.needle not in str(path):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def model_dir(folder):
    """Folder of the tests' tiny random Llama, made once."""
    from lwf_unsloth.backend import prepare

    prepare()
    import torch
    from conftest import build_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder / "tiny-llama"
    if (target / "whole").exists():
        return target
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **heads, **ids)
    ).save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "whole").touch()
    return target


def rows(count, tag):
    return [
        {"instruction": f"{tag}: say what number {i} is.", "output": f"Number {i}. " * (1 + i % 3)}
        for i in range(count)
    ]


def trainer_of(folder, **changes):
    """A trainer on the tiny model, with dropout, cache, log lines over 3 steps."""
    from lwf_unsloth.config import LwFConfig, ModelConfig
    from lwf_unsloth.model import load_model
    from lwf_unsloth.trainer import LwFTrainer

    size = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "max_seq_length": 256}
    model, tokenizer = load_model(ModelConfig(str(model_dir(folder)), dtype="float32", **size))
    values = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 128,
        "learning_rate": 1e-2, "rehearsal_ratio": 0.25, "bf16": False, "disable_tqdm": True,
        "max_steps": STEPS, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "lwf_cache": "hidden",
    }  # fmt: skip
    return LwFTrainer(
        model,
        args=LwFConfig(str(folder / "run"), **{**values, **changes}),
        processing_class=tokenizer,
        train_dataset=rows(36, "task"),
        rehearsal_dataset=rows(12, "keep"),
    )


def train(folder):
    """Trains, or goes on; leaves the adapter, saved twice, and what was logged."""
    from lwf_unsloth.adapters import save_adapter

    trainer = trainer_of(folder)
    (folder / "begun").touch()
    trainer.train(resume_from_checkpoint=True)
    for _ in range(2):
        save_adapter(trainer.model, trainer.processing_class, folder / "saved" / "adapter")
    kept = ("loss", "task_loss", "kl", "kl_rehearsal", "learning_rate", "step")
    log = [
        {key: line[key] for key in kept if key in line}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    (folder / "log.json").write_text(json.dumps(log))


def sweep(folder):
    """A grid of 6 stand-in trials."""
    from lwf_unsloth.sweep import run_sweep
    from lwf_unsloth.sweep_file import read_sweep_file
    from tests.test_sweep import GRID, STAND_IN

    (folder / "stand_in.py").write_text(STAND_IN)
    text = GRID.replace("max_steps: 2", "max_steps: 2, seconds: 0.5")
    (folder / "grid.yaml").write_text(text)
    plan = read_sweep_file(folder / "grid.yaml")
    (folder / "begun").touch()
    command = (sys.executable, str(folder / "stand_in.py"))
    found = run_sweep(plan, workers=2, output=folder / "sweep", command=command)
    points = sorted(
        [sorted(one.params.items()), one.gain, one.forgetting]
        for one in found.trials
        if one.state == "complete"
    )
    (folder / "points.json").write_text(json.dumps(points))


def convert(folder):
    """The embedded model's conversion, its weights a stand-in; the rest is the real code."""
    from dataclasses import replace

    from lwf_unsloth import embedded

    os.environ["LWF_UNSLOTH_CACHE"] = str(folder / "cache")

    def fetch(parts, wanted, title, scratch):
        (scratch / "joined.gguf").write_bytes(b"g" * 10**6)
        return scratch / "joined.gguf"

    def stand_in(gguf, out, spec):
        for number in range(4):
            with (out / f"part{number}.safetensors").open("wb") as file:
                for block in range(20):
                    file.write(bytes([number, block]) * 10**5)
        (out / "config.json").write_text("{}")

    spec = replace(embedded.EMBEDDED["smollm2-135m-instruct"], documents=())
    embedded.EMBEDDED["smollm2-135m-instruct"] = spec
    embedded.fetch_gguf, embedded._convert = fetch, stand_in
    (folder / "begun").touch()
    place = embedded.embedded_model("smollm2-135m-instruct")
    (folder / "place").write_text(str(place))


def main():
    kind, folder = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    folder.mkdir(parents=True, exist_ok=True)
    if os.environ.get("LWF_KILL_AT"):
        at, needle = os.environ["LWF_KILL_AT"].split(" ", 1)
        Tripwire(needle, int(at))
    needles = [needle for needle in os.environ.get("LWF_COUNT", "").split("|") if needle]
    wires = {needle: Tripwire(needle) for needle in needles}
    {"train": train, "sweep": sweep, "convert": convert}[kind](folder)
    (folder / "count").write_text(json.dumps({one: wire.count for one, wire in wires.items()}))


if __name__ == "__main__":
    main()
