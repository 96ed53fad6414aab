"""Two processes or two sessions in one folder: each continues, waits or is told; nothing is mixed.

Threads stand for processes where what keeps them apart (locks of open files, renames) does not tell
one from the other.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lwf_unsloth.errors import ModelError

LORA = {"peft_type": "LORA", "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"}


def at_once(*tasks):
    """Runs them from the same moment on; their results, or the first error."""
    both = threading.Barrier(len(tasks))

    def begin(task):
        both.wait(timeout=30)
        return task()

    with ThreadPoolExecutor(len(tasks)) as threads:
        return [one.result() for one in [threads.submit(begin, task) for task in tasks]]


# ------------------------------------------------------------------ adapters and written rows


def save_small(folder, rank):
    """An adapter's folder whose files tell which save they are of."""
    from lwf_unsloth.replaced_folders import RECORD, new_folder

    with new_folder(folder) as new:
        config = {**LORA, "r": rank, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
        (new / "adapter_config.json").write_text(json.dumps(config))
        (new / "adapter_model.safetensors").write_bytes(b"x" * rank)
        (new / RECORD).write_text(json.dumps({"base": {"name": "b", "kind": "hub"}, "r": rank}))


def test_adapters_that_are_saved_and_read_at_once_in_one_folder_are_each_whole(tmp_path):
    from lwf_unsloth.adapters import read_adapter

    place = tmp_path / "adapter"
    save_small(place, 1)

    def save(first):
        for rank in range(first, first + 20):
            save_small(place, rank)

    def read():
        for _ in range(100):
            found = read_adapter(place)
            assert found.lora["r"] == found.record["r"] == found.stamp[0]

    at_once(lambda: save(1), lambda: save(101), read)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_told(tiny_peft, tmp_path):
    from lwf_unsloth.adapters import fill_adapter, read_adapter, save_adapter

    model, tokenizer = tiny_peft()
    save_adapter(model, tokenizer, tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter")
    fill_adapter(model, found, trainable=True)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match="replaced while it was being loaded"):
        fill_adapter(model, found, trainable=True)


def test_rows_that_are_written_and_read_at_once_in_one_file_are_those_of_one_writer(tmp_path):
    from lwf_unsloth.written_file import load_written, save_written
    from lwf_unsloth.written_rows import WrittenReport, WrittenRows

    path = tmp_path / "rows.jsonl"

    def write(name):
        for _ in range(10):
            rows = [{"instruction": name, "output": "x" * 5000, "whole": True}]
            save_written(WrittenRows(rows, WrittenReport("answers", 1), {"by": name}), path)

    def read():
        for _ in range(80):
            found = load_written(path)
            assert found[0]["instruction"] == found.origin["by"]

    write("first")
    at_once(lambda: write("first"), lambda: write("second"), read)
    names = {"rows.jsonl", "rows.jsonl.old", "rows.jsonl.origin.json"}
    assert {one.name for one in tmp_path.iterdir()} <= names
