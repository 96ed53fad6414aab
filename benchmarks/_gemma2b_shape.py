"""Gemma-2B's shape pre-quantised to 4 bits: in cost what the hub's repository is, made where the
hub is out of reach.

    python -m benchmarks._gemma2b_shape FOLDER
"""

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._shape import GEMMA_2B, TINY, make_folder


def prequantised(folder: Path, tiny: bool = False) -> Path:
    """Random weights saved in the form of the hub's -bnb-4bit repositories.

    Args:
        folder: Where to; a folder already filled is kept.
        tiny: A tiny shape, to see that it runs.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if (folder / "config.json").is_file():
        return folder
    plain = make_folder(None, tiny)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    device = 0 if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float16, device_map={"": device}
    )
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def rows(count: int, length: int, labelled: float = 1.0, seed: int = 0, tiny: bool = False) -> Any:
    """Encoded rows of random tokens over the whole vocabulary.

    Args:
        count: Rows.
        length: Tokens a row.
        labelled: Share of a row's tokens that are labels, its last ones.
        seed: Of the tokens.
        tiny: Tokens of the tiny shape.

    Returns:
        A Dataset with input_ids, labels and prompt_length, as LwFTrainer takes it.
    """
    import torch
    from datasets import Dataset

    draw = torch.Generator().manual_seed(seed)
    prompt = round(length * (1 - labelled))
    vocabulary = (TINY if tiny else GEMMA_2B)["vocab_size"]
    found = []
    for ids in torch.randint(4, vocabulary, (count, length), generator=draw).tolist():
        labels = [-100] * prompt + ids[prompt:]
        found.append({"input_ids": ids, "labels": labels, "prompt_length": prompt})
    return Dataset.from_list(found)


if __name__ == "__main__":
    started = time.perf_counter()
    made = prequantised(Path(sys.argv[1]))
    size = sum(path.stat().st_size for path in made.iterdir()) / 2**30
    print(f"{made}: {size:.2f} GiB in {time.perf_counter() - started:.0f} s")
