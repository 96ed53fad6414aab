"""The loss body as one Triton kernel: a program per row reads the logits twice and writes once.

The first read takes the softmax statistics lane by lane, the second one gives losses and gradient,
which is written over the student's logits. Reverse KL needs its value before its gradient and reads
once more. Imported by `loss_kernels.run_body` only where Triton is there.
"""

# Kernels are read as source by Triton, which gives their arguments types of its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwf_unsloth.loss_terms import FLOOR, Terms, Weights

BLOCK = 4096
"""Classes that a program reads at once."""
WARPS = 16
_MODES = {None: 0, "forward": 1, "reverse": 2, "target_masked": 3}
_LOW = tl.constexpr(FLOOR)
_TOP_FP16 = tl.constexpr(-FLOOR)


@triton.jit
def _logits(raw, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Raw head output -> fp32 logits: scale, softcap, and the floor; NaN stays NaN."""
    x = raw.to(tl.float32)
    if SCALE != 1.0:
        x = x * SCALE
    if CAP != 0.0:
        x = CAP * (1.0 - 2.0 / (tl.exp(x * (2.0 / CAP)) + 1.0))  # tanh; exp overflows to the limit
    return tl.where(x <= _LOW, _LOW, x)


@triton.jit
def _online(top, total, x, active):
    """One step of a lane's running maximum and sum of exponentials, with one exponential."""
    step = tl.exp(-tl.abs(x - top))
    higher = x > top
    added = tl.where(higher, total * step + 1.0, total + step)
    return tl.where(active & higher, x, top), tl.where(active, added, total)


@triton.jit
def _log_sum(top, total):
    """Logarithm of the sum of exponentials over all lanes."""
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _rows_kernel(
    z_ptr,
    u_ptr,
    label_ptr,
    target_ptr,
    ce_ptr,
    kl_ptr,
    vocab,
    z_stride,
    u_stride,
    inverse_t,
    ce_weight,
    kl_weight,
    smoothing,
    MODE: tl.constexpr,
    CE: tl.constexpr,
    GRADIENT: tl.constexpr,
    UNIT_T: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z_SCALE: tl.constexpr,
    Z_CAP: tl.constexpr,
    U_SCALE: tl.constexpr,
    U_CAP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    u_row = u_ptr + row * u_stride
    label = tl.load(label_ptr + row)
    target = tl.load(target_ptr + row)
    lanes = tl.arange(0, BLOCK)
    OWN_CE: tl.constexpr = CE and (MODE == 0 or MODE == 3 or not UNIT_T)  # CE has its own softmax

    gold = 0.0
    if CE:
        gold = _logits(tl.load(z_row + tl.maximum(label, 0)), Z_SCALE, Z_CAP)
    zero = tl.zeros((BLOCK,), dtype=tl.float32)
    c_top, c_sum, total = zero - 1e38, zero, zero
    q_top, q_sum, p_top, p_sum = zero - 1e38, zero, zero - 1e38, zero
    for start in range(0, vocab, BLOCK):
        columns = start + lanes
        inside = columns < vocab
        z = _logits(tl.load(z_row + columns, mask=inside, other=0.0), Z_SCALE, Z_CAP)
        if CE and SMOOTH:
            total += tl.where(inside, z, 0.0)
        if OWN_CE:
            c_top, c_sum = _online(c_top, c_sum, z, inside)
        if MODE != 0:
            u = _logits(tl.load(u_row + columns, mask=inside, other=0.0), U_SCALE, U_CAP)
            if MODE == 3:
                inside = inside & (columns != target)
            if not UNIT_T:
                z = z * inverse_t
                u = u * inverse_t
            q_top, q_sum = _online(q_top, q_sum, z, inside)
            p_top, p_sum = _online(p_top, p_sum, u, inside)

    q_norm, p_norm, c_norm = 0.0, 0.0, 0.0
    if MODE != 0:
        q_norm = _log_sum(q_top, q_sum)
        p_norm = _log_sum(p_top, p_sum)
    if CE:
        c_norm = _log_sum(c_top, c_sum) if OWN_CE else q_norm
        loss = c_norm - gold
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * (c_norm - tl.sum(total, 0) / vocab)
        tl.store(ce_ptr + row, tl.where(label >= 0, loss, 0.0))

    reverse_kl = 0.0
    if MODE == 2:
        sums = zero
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            inside = columns < vocab
            z = _logits(tl.load(z_row + columns, mask=inside, other=0.0), Z_SCALE, Z_CAP)
            u = _logits(tl.load(u_row + columns, mask=inside, other=0.0), U_SCALE, U_CAP)
            log_q = z * inverse_t - q_norm
            log_p = u * inverse_t - p_norm
            q = tl.exp(log_q)
            sums += tl.where(inside, q * (log_q - log_p) - q + tl.exp(log_p), 0.0)
        reverse_kl = tl.sum(sums, 0)
        tl.store(kl_ptr + row, reverse_kl / (inverse_t * inverse_t))

    if GRADIENT or MODE == 1 or MODE == 3:
        own_weight = tl.where(label >= 0, ce_weight, 0.0)
        sums = zero
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            inside = columns < vocab
            z = _logits(tl.load(z_row + columns, mask=inside, other=0.0), Z_SCALE, Z_CAP)
            grad = zero
            if OWN_CE:
                grad = own_weight * tl.exp(z - c_norm)
            if MODE != 0:
                u = _logits(tl.load(u_row + columns, mask=inside, other=0.0), U_SCALE, U_CAP)
                log_q = z * inverse_t - q_norm
                log_p = u * inverse_t - p_norm
                q = tl.exp(log_q)
                p = tl.exp(log_p)
                if CE and not OWN_CE:
                    grad = own_weight * q
                if MODE == 2:
                    grad += kl_weight * (q * (log_q - log_p - reverse_kl))
                else:
                    kept = inside
                    if MODE == 3:
                        kept = inside & (columns != target)
                    sums += tl.where(kept, p * (log_p - log_q) - p + q, 0.0)
                    grad += tl.where(kept, kl_weight * (q - p), 0.0)
            if GRADIENT:
                if CE:
                    if SMOOTH:
                        grad -= own_weight * (smoothing / vocab)
                        grad -= tl.where(columns == label, own_weight * (1.0 - smoothing), 0.0)
                    else:
                        grad -= tl.where(columns == label, own_weight, 0.0)
                grad = tl.where(z <= _LOW, 0.0, grad)
                if Z_CAP != 0.0:
                    grad = grad * (1.0 - (z / Z_CAP) * (z / Z_CAP))
                if Z_SCALE != 1.0:
                    grad = grad * Z_SCALE
                if HALF:
                    grad = tl.where(grad > _TOP_FP16, _TOP_FP16, grad)
                    grad = tl.where(grad < _LOW, _LOW, grad)
                tl.store(z_row + columns, grad.to(z_ptr.dtype.element_ty), mask=inside)
        if MODE == 1 or MODE == 3:
            tl.store(kl_ptr + row, tl.sum(sums, 0) / (inverse_t * inverse_t))


def triton_body(
    z: Tensor, u: Tensor | None, labels: Tensor, targets: Tensor, weights: Weights, terms: Terms
) -> tuple[Tensor, Tensor]:
    """`loss_kernels.eager_body` for fp16, bf16 or fp32 logits whose rows are contiguous."""
    rows, vocab = z.shape
    ce = torch.zeros(rows, dtype=torch.float32, device=z.device)
    kl = torch.zeros_like(ce)
    teacher = z if u is None else u
    block = min(BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(z):
        _rows_kernel[(rows,)](
            z,
            teacher,
            labels.contiguous(),
            targets.contiguous(),
            ce,
            kl,
            vocab,
            z.stride(0),
            teacher.stride(0),
            1.0 / weights.temperature,
            weights.ce,
            weights.kl * weights.temperature,
            terms.label_smoothing,
            MODE=0 if u is None else _MODES[terms.kl],
            CE=terms.ce,
            GRADIENT=terms.gradient,
            UNIT_T=terms.unit_temperature,
            SMOOTH=terms.label_smoothing > 0,
            Z_SCALE=terms.student_shape[0],
            Z_CAP=terms.student_shape[1],
            U_SCALE=terms.teacher_shape[0],
            U_CAP=terms.teacher_shape[1],
            HALF=z.dtype == torch.float16,
            BLOCK=block,
            num_warps=WARPS if block == BLOCK else 4,
        )
    return ce, kl
