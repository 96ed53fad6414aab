"""A whole run with secrets all around it: python tests/closed_run.py FOLDER.

Train, resume, save, load, compare, report, sweep, and what goes wrong; everything it writes lies in
FOLDER or on its standard output, where `test_security.py` looks for the secrets.
"""

import logging
import os
import sys
import traceback
from pathlib import Path

import conftest

HOOK = """
import os, sys

def note(event, args):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    where = args[1] if event == "socket.connect" else args[0]
    if isinstance(where, (str, bytes)) and event == "socket.connect":
        return  # a file of this machine
    with open(os.environ["LWF_ASKED"], "a") as file:
        file.write(f"{event} {where!r} in {sys.argv[:2]}\\n")

sys.addaudithook(note)
"""
"""A sitecustomize for every process of the run: each look for another machine is written down."""

MODEL = {"dtype": "float32", "r": 4, "lora_alpha": 8, "max_seq_length": 256}
TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "save_steps": 1,
    "save_strategy": "steps",
    "max_length": 256,
    "bf16": False,
    "rehearsal_ratio": 0.25,
}


def rows(tag: str, count: int = 12) -> list[dict[str, str]]:
    """Distinct Alpaca rows."""
    return [
        {"instruction": f"{tag}: say number {i}.", "input": "", "output": f"Number {i}. " * 3}
        for i in range(count)
    ]


def fails(doing: str, work) -> None:
    """What goes wrong is shown with its whole traceback."""
    try:
        work()
    except Exception:
        print(f"== {doing}")
        traceback.print_exc()
    else:
        raise AssertionError(f"{doing} went well")


def tiny_model(folder: Path) -> str:
    """A random two-layer model with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = conftest.build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_and_compare(out: Path, name: str, token: str) -> None:
    """Train, resume, save, load, compare, measure; settings shown at every step."""
    from datasets import Dataset

    from lwf_unsloth import (
        LwFConfig,
        LwFTrainer,
        ModelConfig,
        compare,
        evaluate,
        forgetting_report,
        generate,
        load_adapter,
        load_model,
        save_adapter,
    )

    task, keep = Dataset.from_list(rows("task")), Dataset.from_list(rows("keep", 6))
    config = ModelConfig(name, token=token, **MODEL)
    args = LwFConfig(str(out / "run"), hub_token=token, lwf_cache="topk", **TRAINING)
    print(config, repr(args), args.to_json_string(), args.lwf_settings())
    for resume in (None, str(out / "run" / "checkpoint-1")):
        model, tokenizer = load_model(config)
        given = {"processing_class": tokenizer, "train_dataset": task, "rehearsal_dataset": keep}
        trainer = LwFTrainer(model, args=args, **given)
        trainer.train(resume_from_checkpoint=resume)
    card = {"settings": args.to_dict(), "token": token, "note": f"made with {token}"}
    save_adapter(model, tokenizer, out / "adapter", card=card)
    model, tokenizer = load_adapter(out / "adapter", base=config)
    print(model.lwf_loaded, model.lwf_loaded.to_dict())
    asked = {"max_new_tokens": 4}
    before = generate(model, tokenizer, rows("ask", 2), adapter=False, label="base", **asked)
    result = compare(before, generate(model, tokenizer, rows("ask", 2), **asked))
    result.save(out / "comparison")
    print(result, result._repr_html_())
    sets = {"task": task, "keep": keep}
    scores = evaluate(model, tokenizer, sets, task="task", answers=False)
    scores.save(out / "scores.json")
    report = forgetting_report(scores)
    report.save(out / "report.json")
    print(report, report._repr_html_())


def sweep(out: Path, name: str) -> Path:
    """A sweep of one trial; its file."""
    import json

    import yaml

    from lwf_unsloth.sweep import run_sweep
    from lwf_unsloth.sweep_file import read_sweep_file

    for kind in ("task", "keep"):
        lines = "".join(json.dumps(row) + "\n" for row in rows(kind, 20))
        (out / f"{kind}.jsonl").write_text(lines)
    sections = {
        "model": {"model_name": name, **MODEL},
        "training": {**TRAINING, "max_steps": 1},
        "data": {"task": str(out / "task.jsonl"), "rehearsal": str(out / "keep.jsonl")},
        "grid": {"lwf_lambda": [1.0]},
        "evaluate": {"general": str(out / "keep.jsonl"), "limit": 4},
    }
    file = out / "sweep.yaml"
    file.write_text(yaml.safe_dump(sections))
    result = run_sweep(read_sweep_file(file), output=out / "sweep")
    print(result, result.best_config())
    assert len(result.of("complete")) == 1, result
    return file


def main() -> None:
    """The whole run."""
    out, token, password = Path(sys.argv[1]), os.environ["HF_TOKEN"], os.environ["CANARY_PASSWORD"]
    from lwf_unsloth import ModelConfig, load_alpaca, load_model
    from lwf_unsloth.sweep import run_sweep
    from lwf_unsloth.sweep_file import read_sweep_file

    logging.basicConfig(level=logging.DEBUG)
    name = tiny_model(out / "tiny")
    train_and_compare(out, name, token)
    file = sweep(out, name)
    assert not Path(os.environ["LWF_ASKED"]).exists(), Path(os.environ["LWF_ASKED"]).read_text()
    url = f"postgresql+psycopg://user:{password}@127.0.0.1:1/none"
    plan = read_sweep_file(file)
    for storage in (url, url.replace(":1/", ":port/"), url.replace("psycopg", "none")):
        fails(
            "a database that is not there",
            lambda storage=storage: run_sweep(plan, output=out / "sweep2", storage=storage),
        )
    fails("no such model", lambda: load_model(ModelConfig("a/none", token=token)))
    fails("no such data", lambda: load_alpaca("a/none", token=token))
    fails("a broken base", lambda: load_model(ModelConfig(str(out / "run"), token=token)))


if __name__ == "__main__":
    main()
