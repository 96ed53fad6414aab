"""The document's script as it stands, for step_cost: a process without Unsloth, which patches
transformers.

    python -m benchmarks._document_script FOLDER OUT.json B4xT512:1.0 ...

Two 4-bit models, PEFT's LoRA with dropout 0.05, checkpointing, fp16 autocast with a GradScaler;
full logits of both in fp32, labels not shifted, KLDivLoss(batchmean) over batch x length x
vocabulary, 0.5 of it added. `labelled` 0.5 masks labels of the first half; its KL knows no mask.
"""

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._clock import CUDA, clock

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 5


class Script:
    """Both models, the optimizer and the loss scale."""

    def __init__(self, folder: str) -> None:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        self.base = load(folder).eval().requires_grad_(False)
        student = prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=True)
        lora = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(student, lora)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4)
        self.scaler = torch.amp.GradScaler("cuda", enabled=CUDA)
        self.device = next(self.model.parameters()).device

    def step(self, ids: Tensor, labels: Tensor) -> None:
        """One optimizer step."""
        mask = torch.ones_like(ids)
        with torch.autocast(self.device.type, torch.float16, enabled=CUDA):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            with torch.no_grad():
                target = self.base(input_ids=ids, attention_mask=mask).logits
        logits, target = logits.float(), target.float()
        task = nn.CrossEntropyLoss()(logits.view(-1, logits.shape[-1]), labels.view(-1))
        distill = nn.KLDivLoss(reduction="batchmean")(
            torch.log_softmax(logits, -1), torch.softmax(target, -1)
        )
        self.scaler.scale(task + 0.5 * distill).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def load(folder: str) -> Any:
    """The base in 4 bits; whole where there is no GPU, to see that the script runs."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not CUDA:
        return AutoModelForCausalLM.from_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float16, device_map={"": 0}
    )


def measure(script: Script, size: str) -> dict[str, Any]:
    """Peak and times of a few steps at "B4xT512:1.0"."""
    shape, labelled = size.split(":")
    batch, length = map(int, shape.removeprefix("B").split("xT"))
    vocab = int(script.base.config.vocab_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(8, vocab, (batch, length), generator=draw).to(script.device)
    labels = ids.clone()
    labels[:, : length - round(length * float(labelled))] = -100
    script.step(ids, labels)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = [clock(lambda: script.step(ids, labels)) for _ in range(STEPS)]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 3) if CUDA else None
    median = statistics.median(times)
    return {
        "peak_gib": peak,
        "ms_median": round(median, 2),
        "ms_min": round(min(times), 2),
        "ms_per_task_row": round(median / batch, 3),
        "rounds": STEPS,
    }


def main() -> None:
    folder, out, *sizes = sys.argv[1:]
    script = Script(folder)
    found: dict[str, Any] = {}
    for size in sizes:
        try:
            found[size] = measure(script, size)
        except torch.OutOfMemoryError as error:
            found[size] = {"error": "out of memory"}
            error.__traceback__ = None
        script.optimizer.zero_grad()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
