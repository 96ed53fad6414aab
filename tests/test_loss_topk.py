"""The teacher as its top k: against the merged KL written out in fp64, and under the exact KL."""

import pytest
import torch

from lwf_unsloth.losses import Head, TopK, lwf_loss, lwf_loss_from_logits, top_k

ROWS, WIDTH, VOCAB = 10, 16, 120


def case(dtype=torch.float64, bias=False, softcap=0.0, scale=1.0):
    """Student and teacher states that resemble one another, and a head."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn((VOCAB, WIDTH), generator=draw, dtype=torch.float64)
    student = torch.randn((ROWS, WIDTH), generator=draw, dtype=torch.float64)
    teacher = student + 0.3 * torch.randn((ROWS, WIDTH), generator=draw, dtype=torch.float64)
    head = Head(weight.to(dtype), weight[:, 0].to(dtype) if bias else None, softcap, scale)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), head


def shaped(hidden, head):
    z = hidden.double() @ head.weight.double().T
    z = (z if head.bias is None else z + head.bias.double()) * head.scale
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def merged_kl(z, u, k, temperature):
    """T^2 KL (N,) after the classes outside of the teacher's top k were merged into one."""
    p, q = (torch.softmax(x / temperature, -1) for x in (u, z))
    ids = p.topk(k, -1).indices
    p_top, q_top = p.gather(-1, ids), q.gather(-1, ids)
    p_rest = p.scatter(-1, ids, 0.0).sum(-1)
    q_rest = q.scatter(-1, ids, 0.0).sum(-1)
    kl = (p_top * (p_top / q_top).log()).sum(-1)
    rest = torch.where(p_rest > 0, p_rest * (p_rest / q_rest).log(), 0.0) if k < VOCAB else 0.0
    return (kl + rest) * temperature**2


LABELS = torch.tensor([3, -100, 7, 9, -100, 1, 0, 119, -100, 5])
KL_ROWS = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1, 0]).bool()


@pytest.mark.parametrize("k", [1, 8, VOCAB, 500])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.3])
@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"softcap": 5.0, "scale": 0.7}])
def test_value_and_gradient_are_those_of_the_merged_kl(k, temperature, shape):
    student, teacher, head = case(**shape)
    kept = top_k(shaped(teacher[KL_ROWS], head), k, temperature)
    settings = {
        "kl_rows": KL_ROWS,
        "lwf_lambda": 1.7,
        "temperature": temperature,
        "return_rows": True,
    }
    ours = lwf_loss(student, LABELS, head, teacher=kept, chunk_rows=4, **settings)
    (gradient,) = torch.autograd.grad(ours.total, student)
    z = shaped(student, head)
    plain = lwf_loss_from_logits(z, LABELS, teacher_logits=kept, **settings)
    (from_logits,) = torch.autograd.grad(plain.total, student, retain_graph=True)
    kl = merged_kl(z[KL_ROWS], shaped(teacher[KL_ROWS], head), min(k, VOCAB), temperature)
    ce = torch.nn.functional.cross_entropy(z, LABELS, reduction="sum")
    total = ce / 7 + 1.7 * kl.sum() / 7
    (expected,) = torch.autograd.grad(total, student)
    assert torch.allclose(ours.kl_rows[KL_ROWS], kl, rtol=1e-8, atol=1e-12)
    for loss, grad in ((ours, gradient), (plain, from_logits)):
        assert loss.total.item() == pytest.approx(total.item(), rel=1e-9)
        assert torch.allclose(grad, expected, rtol=1e-7, atol=1e-10)


def test_the_kl_is_0_at_the_teacher_and_never_above_the_exact_one():
    student, teacher, head = case()
    same = lwf_loss(student, LABELS, head, teacher=top_k(shaped(student.detach(), head), 8))
    assert abs(same.kl_sum.item()) < 1e-12
    exact = lwf_loss(student, LABELS, head, teacher=teacher, return_rows=True).kl_rows
    before = torch.zeros_like(exact)
    for k in (1, 4, 16, 64, VOCAB):
        kept = top_k(shaped(teacher, head), k)
        kl = lwf_loss(student, LABELS, head, teacher=kept, return_rows=True).kl_rows
        assert (kl <= exact + 1e-12).all() and (kl >= before - 1e-12).all()
        before = kl
    assert torch.allclose(before, exact, rtol=1e-9)


def test_the_missing_part_is_the_kl_inside_the_rest_times_its_mass():
    student, teacher, head = case()
    z, u = shaped(student.detach(), head), shaped(teacher, head)
    kept = top_k(u, 8)
    got = lwf_loss(student, LABELS, head, teacher=kept, return_rows=True).kl_rows
    exact = lwf_loss(student, LABELS, head, teacher=teacher, return_rows=True).kl_rows
    inside = torch.zeros_like(z, dtype=torch.bool).scatter(-1, kept.ids, True)
    log_q, log_p = (x.masked_fill(inside, -1e9).log_softmax(-1) for x in (z, u))
    missing = kept.tail.exp() * (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(exact - got, missing, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_low_precision_it_is_as_close_as_the_live_teacher(dtype):
    student, teacher, head = case(dtype)
    exact = merged_kl(shaped(student, head), shaped(teacher, head), 32, 1.0).sum().item()
    raw = torch.nn.functional.linear(teacher, head.weight)
    got = lwf_loss(student, LABELS, head, teacher=top_k(raw, 32))
    (grad,) = torch.autograd.grad(got.total, student)
    live = lwf_loss(student, LABELS, head, teacher=teacher)
    wide = Head(head.weight.double())
    full = lwf_loss(student.double(), LABELS, wide, teacher=teacher.double()).kl_sum.item()
    allowed = abs(live.kl_sum.item() - full) + 2e-3 * full
    assert abs(got.kl_sum.item() - exact) <= allowed
    assert grad.isfinite().all()
    same = lwf_loss(
        student,
        LABELS,
        head,
        teacher=top_k(torch.nn.functional.linear(student.detach(), head.weight), 32),
    )
    assert abs(same.kl_sum.item()) < 1e-5  # the stored top k has the logits' own rounding


def test_infinite_logits_and_tiny_temperatures_stay_finite():
    student, _, head = case(torch.float32)
    z = shaped(student, head).float()
    z = z.masked_fill(torch.arange(VOCAB) > 3, -torch.inf)  # the whole rest is impossible
    kept = top_k(z.detach().roll(1, 0), 4, 0.05)
    loss = lwf_loss_from_logits(z, LABELS, teacher_logits=kept, temperature=0.05)
    (grad,) = torch.autograd.grad(loss.total, student)
    assert loss.total.isfinite() and grad.isfinite().all()
    weight = torch.zeros((VOCAB, WIDTH))
    bias = torch.full((VOCAB,), -torch.inf)
    bias[:4] = 0.0
    head = Head(weight, bias)
    loss = lwf_loss(student, LABELS.clamp(max=3), head, teacher=kept, temperature=0.05)
    (grad,) = torch.autograd.grad(loss.total, student)
    assert loss.total.isfinite() and grad.isfinite().all()


def test_the_students_logits_come_back_as_they_were():
    from lwf_unsloth.loss_topk import dense_logits

    z = torch.randn(4, 50).half()
    kept = top_k(torch.randn(4, 50), 5)
    before = z.clone()
    dense_logits(kept, z, (1.0, 0.0))
    assert torch.equal(z, before)


def test_what_the_top_k_cannot_give_is_refused():
    student, teacher, head = case()
    kept = top_k(shaped(teacher, head), 8)
    with pytest.raises(ValueError, match="forward KL alone"):
        lwf_loss(student, LABELS, head, teacher=kept, kl="reverse")
    with pytest.raises(ValueError, match="temperature 1.0, the loss is asked for at 2.0"):
        lwf_loss(student, LABELS, head, teacher=kept, temperature=2.0)
    with pytest.raises(ValueError, match="teacher has 10 rows, kl_rows marks 7"):
        lwf_loss(student, LABELS, head, teacher=kept, kl_rows=KL_ROWS)
    assert isinstance(kept[:3], TopK) and len(kept[:3]) == 3
