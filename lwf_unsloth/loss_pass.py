"""The one pass: chunks of rows through the head, losses and dh in forward, scaled in backward."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lwf_unsloth.loss_kernels import choose_body, run_body
from lwf_unsloth.loss_rows import Head, Rows, Settings
from lwf_unsloth.loss_terms import Terms, Weights
from lwf_unsloth.loss_topk import TopK, dense_logits

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
    teacher: Tensor | TopK | None
    teacher_head: Head
    rows: Rows
    settings: Settings
    chunk_rows: int | None
    body: str | None
    gradient: bool

    def __post_init__(self) -> None:
        """Refuses chunks without rows."""
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}; a chunk needs at least 1 row.")


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
        for start in range(0, len(index), 1024):
            part = slice(start, start + 1024)
            grad[index[part]] = (dh[part] * factor).to(dtype)
        return grad, None


def one_pass(student: Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Total, cross entropy (K + C,) and T^2 KL (K,) of the kept rows; see `OnePass`."""
    apply: Callable[[Tensor, Job], tuple[Tensor, Tensor, Tensor]] = OnePass.apply
    return apply(student, job)


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
    sparse = isinstance(job.teacher, TopK)  # its dense logits are fp32, with a copy on the way
    sides = 1 if not kl_count else 5 if sparse else 2
    most = job.chunk_rows or rows_per_chunk(weight, sides, job.body)
    buffers = [torch.empty((min(most, count), vocab), dtype=weight.dtype, device=student.device)]
    if kl_count and not sparse:
        buffers.append(torch.empty_like(buffers[0][:kl_count]))
    for segment, chunks in (
        (True, _chunks(0, kl_count, most)),
        (False, _chunks(kl_count, count, most)),
    ):
        terms, weights, scale = _plan(job, segment)
        for part in chunks:
            z = head_logits(student[rows.index[part]], job.head, buffers[0])
            u = _teacher_logits(job, part, z, buffers[-1]) if segment else None
            ce[part], kl_part = run_body(
                z, u, rows.labels[part], rows.targets[part], weights, terms, job.body
            )
            if segment:
                kl[part] = kl_part
            if job.gradient:
                dh[part] = dh_product(z, weight, dtype).div_(scale)
    return ce, kl, dh


def _teacher_logits(job: Job, part: slice, z: Tensor, buffer: Tensor) -> Tensor | None:
    """Logits (M, V) of a chunk's teacher, raw, or of its top k beside the student's raw z."""
    if isinstance(job.teacher, TopK):
        return dense_logits(job.teacher[part], z, (job.head.scale, job.head.softcap))
    if job.teacher is None:
        return None
    return head_logits(job.teacher[part], job.teacher_head, buffer)


def _plan(job: Job, has_kl: bool) -> tuple[Terms, Weights, float]:
    """Terms and weights of a segment's chunks, and the factor that their gradient carries."""
    settings, head, other = job.settings, job.head, job.teacher_head
    shaped = isinstance(job.teacher, TopK)
    terms = Terms(
        ce=job.rows.kl_rows_have_ce or not has_kl,
        kl=settings.kl if has_kl else None,
        gradient=job.gradient,
        unit_temperature=settings.temperature == 1.0,
        label_smoothing=settings.label_smoothing,
        student_shape=(head.scale, head.softcap),
        teacher_shape=(1.0, 0.0) if shaped else (other.scale, other.softcap),
    )
    scale = _fp16_scale(terms, job) if head.weight.dtype == torch.float16 else 1.0
    return terms, Weights(scale, scale * settings.kl_ratio, settings.temperature), scale


def _fp16_scale(terms: Terms, job: Job) -> float:
    """Factor, a power of 2, that puts a chunk's gradient into fp16's range.

    The magnitudes of a row's gradient sum to at most 2 (cross entropy) + 2 T kl_ratio (KL, forward
    and masked), times the head's scale; reverse KL has no bound and is given 16 times that.
    """
    kl = 2.0 * job.settings.temperature * job.settings.kl_ratio if terms.kl else 0.0
    bound = (2.0 if terms.ce else 0.0) + kl * (16.0 if terms.kl == "reverse" else 1.0)
    return 2.0 ** math.floor(15 - math.log2(max(bound * abs(job.head.scale), 1e-20)))


def _chunks(start: int, stop: int, most: int) -> list[slice]:
    """Even chunks of at most `most` rows, so that no short one is left over."""
    count = math.ceil((stop - start) / most)
    size = math.ceil((stop - start) / count) if count else 1
    size = min(most, 8 * math.ceil(size / 8))
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def rows_per_chunk(weight: Tensor, sides: int, body: str | None) -> int:
    """Rows whose logits, of `sides` models, fit the budget; an eager body's copies included.

    On a GPU a quarter of the free memory, CUDA_CHUNK_BYTES at most; on a CPU CPU_CHUNK_BYTES.
    """
    device, cuda = weight.device, weight.device.type == "cuda"
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    eager = choose_body(body, device.type, weight.dtype) == "eager"
    copies = wide * (2 + 4 * sides) if eager else 0
    budget = CPU_CHUNK_BYTES
    if cuda:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(CUDA_CHUNK_BYTES, (torch.cuda.mem_get_info(device)[0] + unused) // 4)
    rows = budget // (weight.shape[0] * (weight.element_size() * sides + copies))
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

    One product where the device gives fp32 from half precision. Elsewhere (a CPU) by blocks of
    classes, summed in fp32; fp16 is widened first, since its products may leave its range.
    """
    if weight.dtype == dtype:
        return torch.mm(dz, weight)
    if product_in_fp32(weight.device.type):
        return torch.mm(dz, weight, out_dtype=dtype)
    total = torch.zeros((len(dz), weight.shape[1]), dtype=dtype, device=dz.device)
    inside = dtype if weight.dtype == torch.float16 else weight.dtype
    for start in range(0, len(weight), VOCAB_BLOCK):
        part = slice(start, start + VOCAB_BLOCK)
        total += torch.mm(dz[:, part].to(inside), weight[part].to(inside))
    return total


@lru_cache
def product_in_fp32(device_type: str) -> bool:
    """Whether torch.mm has an fp32 result for fp16 inputs on this kind of device."""
    try:
        one = torch.ones((16, 16), dtype=torch.float16, device=device_type)
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError, TypeError):
        return False
