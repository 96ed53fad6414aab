"""A teacher given as its k most probable classes and the mass of the rest, and the KL to it.

With p the teacher's distribution at temperature T, q the student's, K the teacher's top k classes,
and p_rest, q_rest the masses outside of K:

    KL_i = T^2 [ sum_(j in K) p_j (log p_j - log q_j) + p_rest (log p_rest - log q_rest) ]

This is the KL after the classes outside of K were merged into one, so by the data-processing
inequality it is never above the exact KL (Cover & Thomas, Elements of Information Theory, 2.8).
What is missing is T^2 p_rest KL(p(. | rest) || q(. | rest)): how the student shares out the mass
outside of the teacher's top k is left free.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lwf_unsloth.loss_kernels import raise_to_floor, shape_logits
from lwf_unsloth.loss_terms import FLOOR


@dataclass(frozen=True)
class TopK:
    """The teacher's distributions of N rows at one temperature."""

    ids: Tensor
    """(N, k) integer classes, each row's distinct."""
    log_probs: Tensor
    """(N, k) log softmax(logits / T) at `ids`, fp32."""
    tail: Tensor
    """(N,) log of the mass of all other classes, FLOOR or above, fp32."""
    temperature: float = 1.0

    def __len__(self) -> int:
        """N."""
        return len(self.tail)

    def __getitem__(self, rows: slice | Tensor) -> "TopK":
        """Some of the rows."""
        return TopK(self.ids[rows], self.log_probs[rows], self.tail[rows], self.temperature)

    def to(self, device: torch.device) -> "TopK":
        """The same on another device."""
        return TopK(
            self.ids.to(device), self.log_probs.to(device), self.tail.to(device), self.temperature
        )


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """What is kept of a teacher.

    Args:
        logits: (N, V) the teacher's own, scale and softcap applied.
        k: Classes to keep, 1 or more; more than V are V.
        temperature: T > 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = torch.log_softmax(raise_to_floor(logits) / temperature, -1)
    values, ids = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    tail = log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1).clamp(min=FLOOR)
    return TopK(ids, values, tail, temperature)


def check_top_k(teacher: TopK, kl: str, temperature: float) -> None:
    """Refuses a loss that the kept part of the teacher can't give.

    Raises:
        ValueError: Another direction than "forward", or another temperature.
    """
    if kl != "forward":
        raise ValueError(
            f"kl is {kl!r}, but a teacher's top k gives the forward KL alone: the other directions "
            "weigh classes by what the top k leaves out."
        )
    if teacher.temperature != temperature:
        raise ValueError(
            f"the top k was taken at temperature {teacher.temperature}, the loss is asked for at "
            f"{temperature}: take it again at that temperature."
        )


def dense_logits(teacher: TopK, z: Tensor, shape: tuple[float, float]) -> Tensor:
    """Teacher logits (M, V) whose KL to the student is the top k's, with the same gradient.

    The teacher's rest is shared out as the student's is: u_j / T = log p_rest + log q_j - log
    q_rest. Then the sum over all classes is the merged KL, and T (q - p) its gradient in z.

    Args:
        teacher: The rows' top k.
        z: (M, V) the student's raw logits; overwritten for a moment.
        shape: (scale, softcap) of the student's head.

    Returns:
        (M, V) in fp32 (fp64 for fp64 logits): scale, softcap and temperature are inside.
    """
    dtype, temperature = torch.promote_types(z.dtype, torch.float32), teacher.temperature
    ids = teacher.ids.long()
    # FLOOR, not -inf: a row whose other logits are all -inf would become NaN.
    if shape == (1.0, 0.0) and temperature == 1.0:
        kept = z.gather(-1, ids)
        u = torch.log_softmax(z.scatter_(-1, ids, FLOOR), -1, dtype=dtype)
        z.scatter_(-1, ids, kept)
    else:
        logits = shape_logits(z.to(dtype, copy=True), *shape).div_(temperature)
        u = torch.log_softmax(logits.scatter_(-1, ids, FLOOR), -1)
    u += teacher.tail[:, None].to(dtype)
    u.scatter_(-1, ids, teacher.log_probs.to(dtype))
    return u if temperature == 1.0 else u.mul_(temperature)


def top_k_kl(z: Tensor, teacher: TopK) -> Tensor:
    """T^2 KL (K,) of the student's logits (K, V), -inf raised to FLOOR; differentiable in z.

    Summed as p (log p - log q) - p + q, so that no term is negative.
    """
    ids, log_p = teacher.ids.long(), teacher.log_probs.to(z.dtype)
    log_q = torch.log_softmax(z / teacher.temperature, -1)
    found = log_q.gather(-1, ids)
    kl = (log_p.exp() * (log_p - found) - log_p.exp() + found.exp()).sum(-1)
    if ids.shape[-1] < z.shape[-1]:
        tail = teacher.tail.to(z.dtype)
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
        kl = kl + tail.exp() * (tail - rest) - tail.exp() + rest.exp()
    return kl * teacher.temperature**2
