"""The one pass: chunks of rows through the head, losses and dh in forward, scaled in backward."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lwf_unsloth.loss_kernels import Terms, Weights, run_body
from lwf_unsloth.loss_rows import Head, Rows, Settings

CUDA_CHUNK_BYTES = 512 * 2**20
"""Most that the logits of a chunk take on a GPU; less where less is free."""
CPU_CHUNK_BYTES = 256 * 2**20
"""The same on a CPU, the fp32 working copies included."""
VOCAB_BLOCK = 16384
"""Classes per product where dh is summed block by block."""


@dataclass(frozen=True)
class Job:
    """All that the pass needs beside the student's hidden states."""

    head: Head
    teacher: Tensor | None
    teacher_head: Head
    rows: Rows
    settings: Settings
    chunk_rows: int | None
    body: str | None
    gradient: bool


class OnePass(torch.autograd.Function):
    """(student (N, H), Job) -> total, cross entropy (K + C,), T^2 KL (K,).

    Only the total is differentiable.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor]:
        """Runs every chunk; keeps dh (K + C, H) in fp32, 1 / n_ce left out, and its rows."""
        with torch.autocast(student.device.type, enabled=False):
            ce, kl, dh = _run_chunks(student, job)
        settings = job.settings
        ctx.mark_non_differentiable(ce, kl)
        ctx.save_for_backward(dh, job.rows.index)
        ctx.like = (student.shape, student.dtype, settings.n_ce)
        return ce.sum() / settings.n_ce + settings.lwf_lambda * kl.sum() / settings.n_kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor, None]:
        """Scales dh in fp32, a GradScaler's factor included, before the cast; other rows get 0."""
        dh, index = ctx.saved_tensors
        shape, dtype, n_ce = ctx.like
        grad = torch.zeros(shape, dtype=dtype, device=dh.device)
        factor = grad_total.to(dh.dtype) / n_ce
        for start in range(0, len(index), 4096):
            part = slice(start, start + 4096)
            grad[index[part]] = (dh[part] * factor).to(dtype)
        return grad, None


def _run_chunks(student: Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the kept rows, KL of the KL rows, and dh (no rows if not asked for)."""
    rows, weight = job.rows, job.head.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    count, kl_count, vocab = len(rows.labels), len(rows.kl), weight.shape[0]
    ce = torch.zeros(count, dtype=dtype, device=student.device)
    kl = torch.zeros(kl_count, dtype=dtype, device=student.device)
    dh = torch.zeros(
        (count if job.gradient else 0, student.shape[1]), dtype=dtype, device=student.device
    )
    most = job.chunk_rows or rows_per_chunk(weight, 2 if kl_count else 1)
    buffers = [torch.empty((min(most, count), vocab), dtype=weight.dtype, device=student.device)]
    if kl_count:
        buffers.append(torch.empty_like(buffers[0][:kl_count]))
    for start, stop in _chunks(0, kl_count, most) + _chunks(kl_count, count, most):
        part = slice(start, stop)
        z = head_logits(student[rows.index[part]], job.head, buffers[0])
        has_kl = start < kl_count
        u = (
            head_logits(job.teacher[part], job.teacher_head, buffers[1])
            if has_kl and job.teacher is not None
            else None
        )
        terms, weights, scale = _plan(job, has_kl)
        ce[part], kl_part = run_body(
            z, u, rows.labels[part], rows.targets[part], weights, terms, job.body
        )
        if has_kl:
            kl[part] = kl_part
        if job.gradient:
            dh[part] = dh_product(z, weight, dtype).div_(scale)
    return ce, kl, dh


def _plan(job: Job, has_kl: bool) -> tuple[Terms, Weights, float]:
    """Terms and weights of a chunk, and the factor that its gradient carries to fill fp16's range.

    The magnitudes of a row's gradient sum to at most 2 (cross entropy) + 2 T kl_ratio (KL, forward
    and masked); reverse has no bound and is given 16 times that. The factor is a power of 2, which
    costs no bit.
    """
    settings, head = job.settings, job.head
    ce = job.rows.kl_rows_have_ce if has_kl else True
    scale = 1.0
    if head.weight.dtype == torch.float16:
        bound = (2.0 if ce else 0.0) + (
            2.0 * settings.temperature * settings.kl_ratio if has_kl else 0.0
        )
        bound = max(
            bound
            * max(abs(head.scale), 1e-6)
            * (16.0 if settings.kl == "reverse" and has_kl else 1.0),
            1e-20,
        )
        top = 15 if product_in_fp32(head.weight.device.type) else 11
        scale = 2.0 ** math.floor(top - math.log2(bound))
    terms = Terms(
        ce=ce,
        kl=settings.kl if has_kl else None,
        gradient=job.gradient,
        unit_temperature=settings.temperature == 1.0,
        label_smoothing=settings.label_smoothing,
        student_shape=(head.scale, head.softcap),
        teacher_shape=(job.teacher_head.scale, job.teacher_head.softcap),
    )
    return terms, Weights(scale, scale * settings.kl_ratio, settings.temperature), scale


def _chunks(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Even chunks of at most `most` rows, so that no short one is left over."""
    count = math.ceil((stop - start) / most)
    size = math.ceil((stop - start) / count) if count else 1
    size = min(most, 8 * math.ceil(size / 8))
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def rows_per_chunk(weight: Tensor, sides: int) -> int:
    """Rows whose logits, of `sides` models, fit the budget.

    On a GPU a quarter of the free memory, CUDA_CHUNK_BYTES at most; on a CPU CPU_CHUNK_BYTES.
    """
    device, per_row = weight.device, weight.shape[0] * weight.element_size() * sides
    if device.type != "cuda":
        return max(1, CPU_CHUNK_BYTES // (per_row + weight.shape[0] * 4 * (2 + 4 * sides)))
    free = (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )
    rows = min(CUDA_CHUNK_BYTES, free // 4) // per_row
    return max(1, rows // 64 * 64 or rows)


def head_logits(hidden: Tensor, head: Head, buffer: Tensor) -> Tensor:
    """Raw logits (M, V) in the buffer's first M rows, computed on the head's device."""
    weight, out = head.weight, buffer[: len(hidden)]
    hidden = hidden.to(weight.device, weight.dtype)
    target = out if weight.device == out.device and weight.dtype == out.dtype else None
    if head.bias is None:
        logits = torch.mm(hidden, weight.t(), out=target)
    else:
        logits = torch.addmm(head.bias.to(weight.dtype), hidden, weight.t(), out=target)
    return logits if target is not None else out.copy_(logits)


def dh_product(dz: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The product dz (M, V) @ weight (V, H) in `dtype`.

    One product where the device gives fp32 from half precision, else summed by blocks of classes.
    """
    if weight.dtype == dtype:
        return torch.mm(dz, weight)
    if product_in_fp32(weight.device.type):
        return torch.mm(dz, weight, out_dtype=dtype)
    total = torch.zeros((len(dz), weight.shape[1]), dtype=dtype, device=dz.device)
    for start in range(0, len(weight), VOCAB_BLOCK):
        part = slice(start, start + VOCAB_BLOCK)
        total += torch.mm(dz[:, part], weight[part])
    return total


@lru_cache
def product_in_fp32(device_type: str) -> bool:
    """Whether torch.mm has an fp32 result for fp16 inputs on this kind of device."""
    try:
        one = torch.ones((16, 16), dtype=torch.float16, device=device_type)
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError, TypeError):
        return False
