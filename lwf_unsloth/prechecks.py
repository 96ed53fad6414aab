"""What is settled or told before the first step: precision, rows, warm-up, a teacher that never
stops.
"""

import logging
import warnings
from typing import Any

import torch
from torch import nn

from lwf_unsloth import ranks
from lwf_unsloth.backend import native_bf16, on_cuda
from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.losses import Head
from lwf_unsloth.teacher import Teacher

logger = logging.getLogger(__name__)

STOP_CHECK_ROWS = 16
"""Rehearsal rows looked at to see whether the teacher stops."""


def check_trainable(model: Any) -> None:
    """Refuses a model on which nothing would be learned.

    Raises:
        ModelError: Not a loaded model, or no parameter requires a gradient.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model is a {type(model).__name__}, but must be a loaded model with an adapter: the "
            "teacher and the memory check look into it. Take load_model(...)[0]."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "Nothing is trainable: no parameter requires a gradient, so training would change "
            "nothing. Load the "
            "model with load_model, or a saved adapter with load_adapter(folder, trainable=True)."
        )


def match_model(args: LwFConfig, model: nn.Module) -> None:
    """Makes precision, checkpointing and length those of the loaded model; changes `args`, the
    trainer's own copy.

    Raises:
        ConfigError: bf16 on a card that emulates it.
    """
    _match_processes(args, model)
    dtype = getattr(model, "dtype", torch.float32)
    if not args._precision_given:
        args.fp16 = on_cuda() and dtype == torch.float16
        args.bf16 = native_bf16() and not args.fp16 and (on_cuda() or dtype == torch.bfloat16)
        # TrainingArguments settled this before the model was known; it is what the Trainer reads.
        args.mixed_precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    elif on_cuda() and args.bf16 and not native_bf16():
        raise ConfigError(
            "bf16 was asked for, but this card computes it only by emulation (a T4 does): set "
            "fp16=True, or leave "
            "both out and the right one is taken."
        )
    _match_checkpointing(args, model)
    limit = getattr(model, "max_seq_length", None)
    if limit and args.max_length is None:
        logger.info("max_length is None: rows are cut at the model's %d tokens.", limit)
        args.max_length = limit
    if limit and args.max_length and args.max_length > limit:
        logger.warning(
            "max_length is %d, but the model was loaded for %d tokens, and on a GPU Unsloth looks "
            "no further: rows are cut at %d. Load with ModelConfig(max_seq_length=%d) for longer "
            "ones.",
            args.max_length,
            limit,
            limit,
            args.max_length,
        )
        args.max_length = limit


def _match_processes(args: LwFConfig, model: nn.Module) -> None:
    """One GPU a process, and DDP for several processes as the loss needs it.

    Raises:
        ConfigError: Several processes that do not know of each other, or could not keep step.
    """
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if args.n_gpu > 1 and not spread:
        logger.warning(
            "%d GPUs are visible and one is used: a process trains on one. To use all, start with "
            "`torchrun --nproc_per_node %d -m lwf_unsloth train FILE` (or `accelerate launch`).",
            args.n_gpu,
            args.n_gpu,
        )
    if args.n_gpu > 1:  # else the Trainer would take DataParallel
        args._n_gpu = 1
    if args.world_size != ranks.world():
        raise ConfigError(
            f"{ranks.world()} processes were started together, but the training arguments know of "
            f"{args.world_size}: each would train alone and write over the others' files. Make the "
            "LwFConfig after the start, on devices of one kind, and leave use_cpu and ddp_backend "
            "as they are."
        )
    if args.world_size == 1:
        return
    if spread or not args.accelerator_config.even_batches:
        what = "The model is spread over several devices" if spread else "even_batches is off"
        raise ConfigError(
            f"{what}, and {ranks.world()} processes train together: they would take each other's "
            "memory, or wait for steps that another does not take. Leave device_map and "
            "even_batches as they are (rows that fill up a batch are not counted), or start one "
            "process."
        )
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every LoRA weight is in every loss
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # no buffer changes
        said = "`broadcast_buffers` is deprecated"  # there is no other setting for it yet
        warnings.filterwarnings("ignore", message=said, category=FutureWarning)


def _match_checkpointing(args: LwFConfig, model: nn.Module) -> None:
    """Takes checkpointing as the model was loaded, in the form that Unsloth's own settings pin.

    On CUDA the state of the modules tells nothing: after a trainer was made, or answers, the model
    is in decoding mode, where it is off.
    """
    asked = getattr(model, "_unsloth_gradient_checkpointing", None)
    if asked is None:
        asked = getattr(model, "is_gradient_checkpointing", args.gradient_checkpointing)
    args.gradient_checkpointing = bool(asked)
    if args.gradient_checkpointing and on_cuda():
        given = args.gradient_checkpointing_kwargs or {}
        args.gradient_checkpointing_kwargs = {"use_reentrant": True, **given}


def restore_precision(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Gives trained tensors their dtype back.

    TRL casts the adapters of a 4-bit model to bf16, where a rate of 2e-4 loses most small updates
    and a T4 has no arithmetic; Unsloth's CUDA path leaves them in fp32, and so does this on every
    device.
    """
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name].to(parameter.device)


def resolve_rows(args: LwFConfig, rehearsal: Any) -> str:
    """Where the KL acts: "none", or one of `lwf_rows` without "auto".

    Raises:
        ConfigError: Settings that leave the rehearsal rows, or the KL, without effect.
    """
    has_rehearsal = rehearsal is not None and args.rehearsal_ratio > 0
    if args.lwf_lambda == 0:
        if has_rehearsal and not args.rehearsal_ce:
            raise ConfigError(
                "lwf_lambda is 0 and rehearsal_ce is off, so the rehearsal rows would have no "
                "effect at all. Set "
                "lwf_lambda above 0 (KL), or rehearsal_ce=True, or leave rehearsal_dataset out."
            )
        return "rehearsal" if has_rehearsal else "none"
    if args.lwf_rows == "rehearsal" and not has_rehearsal:
        raise ConfigError(
            'lwf_rows is "rehearsal" but there are no rehearsal rows, so the KL would act nowhere. '
            "Give rehearsal_dataset with rehearsal_ratio above 0, or take lwf_rows='all'."
        )
    if args.lwf_rows == "auto":
        return "rehearsal" if has_rehearsal else "all"
    return args.lwf_rows


def warn_warmup(warmup: int, steps: int) -> None:
    """Says it when the learning rate would hardly arrive."""
    if steps > 0 and warmup * 2 > steps:
        logger.warning(
            "Warm-up takes %d of the run's %d steps: the learning rate hardly arrives. Set "
            "warmup_steps to %d or "
            "fewer (or a share such as 0.05), or train longer.",
            warmup,
            steps,
            max(1, steps // 10),
        )


def stop_probability(
    teacher: Teacher, head: Head | None, rows: list[dict[str, Any]], eos_id: int, device: Any
) -> float | None:
    """Mean probability the teacher gives to EOS where the answers of encoded rows end.

    Args:
        teacher: The teacher.
        head: Its output head, or None to take logits.
        rows: Encoded rows; those whose last label is not EOS are passed over.
        eos_id: The tokenizer's EOS.
        device: Where the forward runs.

    Returns:
        The mean over at most `STOP_CHECK_ROWS` rows, None where no row ends in EOS.
    """
    found = []
    whole = [row for row in rows if row["labels"] and row["labels"][-1] == eos_id]
    for row in whole[:STOP_CHECK_ROWS]:
        ids = torch.tensor([row["input_ids"]], device=device)
        mask = torch.ones_like(ids)
        if head is None:
            logits = teacher.logits(ids, mask)[0, -2].float()
        else:
            logits = head_logits(head, teacher.hidden(ids, mask)[0, -2])
        found.append(torch.softmax(logits, -1)[eos_id].item())
    return sum(found) / len(found) if found else None


def head_logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) in fp32 of hidden states (..., H)."""
    logits = (
        nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
        * head.scale
    )
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def warn_stopping(probability: float | None, task_stops: bool) -> None:
    """Says it when the KL on these rehearsal prompts would keep the model from learning to stop."""
    if probability is None or not task_stops or probability >= 0.05:
        return
    logger.warning(
        "The teacher hardly ever stops on the rehearsal prompts (probability of EOS where an "
        "answer ends: %.3f), "
        "while the task rows teach stopping in the same template: the KL would work against it. "
        "Take plain text "
        "passages as rehearsal (load_text), which keep what a base model knows.",
        probability,
    )
