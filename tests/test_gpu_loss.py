"""The one-pass loss on CUDA, by every body, against a plain fp64 reference."""

import math

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import torch.nn.functional as F  # noqa: E402

from lwf_unsloth.losses import Head, lwf_loss  # noqa: E402

ROWS, HIDDEN, VOCAB = 48, 64, 1031


def inputs(dtype, seed=0):
    """(student, teacher, head weight, labels, kl rows): 30 rows have CE, 24 KL, 12 both."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=draw) * scale).to("cuda", dtype)

    weight = normal(VOCAB, HIDDEN, scale=0.3)
    student, teacher = normal(ROWS, HIDDEN), normal(ROWS, HIDDEN)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=draw).cuda()
    labels[30:] = -100
    kl_rows = torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    kl_rows[18:42] = True
    return student, teacher[kl_rows], weight, labels, kl_rows


def reference(student, teacher, weight, labels, kl_rows, kind, temperature, lam):
    """(total, gradient) in fp64, written as the formula stands."""
    h = student.double().requires_grad_()
    z, u = h @ weight.double().T, teacher.double() @ weight.double().T
    ce = F.cross_entropy(z[labels >= 0], labels[labels >= 0], reduction="sum")
    z = z[kl_rows]
    if kind == "target_masked":
        gold = labels[kl_rows]
        drop = torch.arange(VOCAB, device="cuda") == gold[:, None]
        z, u = z.masked_fill(drop, -1e30), u.masked_fill(drop, -1e30)
    q, p = (z / temperature).log_softmax(-1), (u / temperature).log_softmax(-1)
    kl = ((q.exp() * (q - p)) if kind == "reverse" else (p.exp() * (p - q))).sum()
    total = ce / 30 + lam * temperature**2 * kl / 24
    total.backward()
    return total.item(), h.grad


ERRORS = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("kind", ["forward", "reverse", "target_masked"])
@pytest.mark.parametrize("dtype", list(ERRORS), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_loss_and_gradient_are_those_of_the_fp64_formula(body, dtype, kind):
    _compare(body, dtype, kind, temperature=1.0)
    _compare(body, dtype, kind, temperature=2.0)


@pytest.mark.parametrize("kind", ["forward", "reverse", "target_masked"])
def test_the_compiled_body_gives_the_same(kind):
    _compare("compiled", torch.float16, kind, temperature=1.0)


def _compare(body, dtype, kind, temperature):
    from lwf_unsloth import loss_kernels

    student, teacher, weight, labels, kl_rows = inputs(dtype)
    given = student.clone().requires_grad_()
    loss = lwf_loss(
        given,
        labels,
        Head(weight),
        teacher=teacher,
        kl_rows=kl_rows,
        lwf_lambda=2.0,
        temperature=temperature,
        kl=kind,
        body=body,
        chunk_rows=16,
    )
    loss.total.backward()
    total, gradient = reference(
        student, teacher, weight, labels, kl_rows, kind, temperature, lam=2.0
    )
    assert not loss_kernels._broken, "a body that fails hands over to eager torch"
    assert loss.total.item() == pytest.approx(total, rel=ERRORS[dtype])
    apart = (given.grad.double() - gradient).norm() / gradient.norm()
    assert apart < ERRORS[dtype]


def test_equal_hidden_states_have_a_kl_of_exactly_0_in_every_body():
    student, _, weight, labels, kl_rows = inputs(torch.float16)
    for body in ("eager", "triton", "compiled"):
        loss = lwf_loss(
            student, labels, Head(weight), teacher=student[kl_rows], kl_rows=kl_rows, body=body
        )
        assert loss.kl_sum.item() == 0.0, body


def test_the_gradient_survives_a_loss_scale_of_65536_in_fp16():
    student, teacher, weight, labels, kl_rows = inputs(torch.float16)
    found = []
    for scale in (1.0, 65536.0):
        given = student.float().requires_grad_()
        loss = lwf_loss(given, labels, Head(weight), teacher=teacher, kl_rows=kl_rows)
        (loss.total * scale).backward()
        found.append(given.grad / scale)
    assert torch.isfinite(found[1]).all()
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_a_vocabulary_of_256000_is_never_held_whole():
    """2048 rows of fp16 logits would take 1000 MiB; the pass keeps to its chunks."""
    weight = torch.randn(256000, 256, device="cuda", dtype=torch.float16) * 0.05
    student = torch.randn(2048, 256, device="cuda", dtype=torch.float16).requires_grad_()
    teacher = torch.randn(2048, 256, device="cuda", dtype=torch.float16)
    labels = torch.randint(0, 256000, (2048,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lwf_loss(student, labels, Head(weight), teacher=teacher, chunk_rows=128).total.backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    assert peak < 400 and math.isfinite(student.grad.float().sum())
