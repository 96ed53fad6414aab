"""The loss against a naive fp64 reference written here, and what must not change it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lwf_unsloth import loss_kernels
from lwf_unsloth.losses import Head, lwf_loss, lwf_loss_from_logits

KINDS = ("forward", "reverse", "target_masked")
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LOWEST = -65504.0


class Batch:
    """Random rows: a third without label, half with KL, so that all four kinds of row occur."""

    def __init__(self, seed=0, rows=24, hidden=8, vocab=37, dtype=FP64, spread=1.0, **head):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=FP64).to(dtype)

        self.student = normal(rows, hidden).mul_(spread).requires_grad_()
        self.head = Head(normal(vocab, hidden), **head)
        self.labels = torch.randint(0, vocab, (rows,), generator=draw)
        self.targets = self.labels.clone()
        self.labels[::3] = -100
        self.kl_rows = torch.rand(rows, generator=draw) < 0.5
        self.teacher = normal(rows, hidden).mul_(spread)[self.kl_rows]

    def loss(self, **kwargs):
        given = {"teacher": self.teacher, "kl_rows": self.kl_rows, "targets": self.targets}
        return lwf_loss(self.student, self.labels, self.head, **{**given, **kwargs})

    def gradient(self, scale=1.0, **kwargs):
        self.student.grad = None
        (self.loss(**kwargs).total * scale).backward()
        return self.student.grad.to(FP64)


def logits_of(hidden, head, dtype=FP64):
    """The head's logits, naive; computed in `dtype` up to the bias, in fp32 after it."""
    logits = hidden.to(dtype) @ head.weight.to(dtype).T
    logits = logits if head.bias is None else logits + head.bias.to(dtype)
    logits = logits.to(FP64 if dtype is FP64 else FP32) * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def reference(student, batch, *, dtype=FP64, n_ce=None, n_kl=None, lwf_lambda=1.0, temperature=1.0,
              kl="forward", label_smoothing=0.0):  # fmt: skip
    """Total, sum of CE, sum of T^2 KL, row by row as DESIGN writes them down."""
    z, u = logits_of(student, batch.head, dtype), logits_of(batch.teacher, batch.head, dtype)
    u_of = dict(zip(batch.kl_rows.nonzero()[:, 0].tolist(), u, strict=True))
    ce, divergence = z.sum() * 0, z.sum() * 0
    for i, row in enumerate(z):
        if batch.labels[i] >= 0:
            ce = ce + F.cross_entropy(row, batch.labels[i], label_smoothing=label_smoothing)
        if i in u_of:
            ours, theirs = row / temperature, u_of[i] / temperature
            if kl == "target_masked":
                others = torch.arange(len(row)) != batch.targets[i]
                ours, theirs = ours[others], theirs[others]
            if kl == "reverse":
                ours, theirs = theirs, ours
            term = theirs.softmax(0) * (theirs.log_softmax(0) - ours.log_softmax(0))
            divergence = divergence + temperature**2 * term.sum()
    n_ce = n_ce or (batch.labels >= 0).sum()
    n_kl = n_kl or batch.kl_rows.sum()
    return ce / n_ce + lwf_lambda * divergence / n_kl, ce, divergence


def reference_gradient(batch, dtype=FP64, **kwargs):
    """Gradient of the reference with its logits made in `dtype`, as naive autograd gives it."""
    student = batch.student.detach().to(dtype).requires_grad_()
    reference(student, batch, dtype=dtype, **kwargs)[0].backward()
    return student.grad.to(FP64)


def error(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-2, 2, 37, dtype=FP64)},
    "softcap_and_scale": {"softcap": 3.0, "scale": 0.5},
}


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("temperature", (1.0, 2.5))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_are_the_reference_s(head, kind, temperature, smoothing):
    batch = Batch(**HEADS[head])
    options = {"kl": kind, "temperature": temperature, "label_smoothing": smoothing}
    options |= {"lwf_lambda": 2.0, "n_ce": 50.0, "n_kl": 30.0}
    total, ce, divergence = reference(batch.student, batch, **options)
    loss = batch.loss(**options, chunk_rows=5)
    torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.ce_sum, ce.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.kl_sum, divergence.detach(), rtol=1e-10, atol=0)
    assert error(batch.gradient(**options), reference_gradient(batch, **options)) < 1e-10


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("temperature", (1.0, 2.5))
@pytest.mark.parametrize("kind", KINDS)
def test_full_logits_give_the_numbers_of_the_one_pass(kind, temperature, smoothing):
    batch = Batch(softcap=3.0)
    options = {"kl": kind, "temperature": temperature, "label_smoothing": smoothing}
    options |= {"kl_rows": batch.kl_rows, "targets": batch.targets, "return_rows": True}
    options |= {"groups": torch.arange(24) % 3, "num_groups": 3}
    ours = batch.loss(**options)
    gradient = batch.gradient(**options)
    student = batch.student.detach().requires_grad_()
    z, u = logits_of(student, batch.head), logits_of(batch.teacher, batch.head)
    full = lwf_loss_from_logits(z, batch.labels, teacher_logits=u, **options)
    full.total.backward()
    for name, value in ours._asdict().items():
        torch.testing.assert_close(value, getattr(full, name), rtol=1e-10, atol=1e-12, msg=name)
    assert error(gradient, student.grad) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope_of_the_loss(kind):
    batch = Batch(rows=5, hidden=3, vocab=7, softcap=5.0)

    def total(student):
        options = {"teacher": batch.teacher, "kl_rows": batch.kl_rows, "targets": batch.targets}
        options |= {"kl": kind, "temperature": 1.5, "label_smoothing": 0.1, "chunk_rows": 2}
        return lwf_loss(student, batch.labels, batch.head, **options).total

    assert torch.autograd.gradcheck(total, (batch.student,))


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_rounding_is_no_worse_than_that_of_naive_full_logits(dtype, kind, temperature):
    batch = Batch(rows=64, hidden=32, vocab=300, dtype=dtype, spread=0.3)
    options = {"kl": kind, "temperature": temperature, "lwf_lambda": 2.0}
    truth = reference_gradient(batch, **options)
    naive = error(reference_gradient(batch, dtype, **options), truth)
    # a CPU rounds dh to the head's dtype and once more at the end; fp32 sums differ in their order
    allowance = {FP32: 2e-7}.get(dtype, torch.finfo(dtype).eps / 8)
    assert error(batch.gradient(**options), truth) <= naive + allowance
    exact = reference(batch.student.detach(), batch, **options)[0]
    naive_total = reference(batch.student.detach(), batch, dtype=dtype, **options)[0]
    tolerance = 1.5 * (naive_total - exact).abs() + 1e-5 * exact
    assert (batch.loss(**options).total - exact).abs() <= tolerance


def test_forward_is_teacher_to_student_and_reverse_student_to_teacher():
    teacher, student = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    rows = {"teacher_logits": teacher.log()[None], "labels": torch.tensor([-100])}
    forward = lwf_loss_from_logits(student.log()[None], **rows, kl="forward").kl_sum
    reverse = lwf_loss_from_logits(student.log()[None], **rows, kl="reverse").kl_sum
    torch.testing.assert_close(forward, (teacher * (teacher / student).log()).sum())
    torch.testing.assert_close(reverse, (student * (student / teacher).log()).sum())
    hidden = {"head": Head(torch.eye(2)), "teacher": teacher.log()[None]}
    ours = [
        lwf_loss(student.log()[None], rows["labels"], **hidden, kl=kind).kl_sum for kind in KINDS
    ]
    torch.testing.assert_close(ours[0], forward)
    torch.testing.assert_close(ours[1], reverse)


@pytest.mark.parametrize("temperature", (1.0, 0.05, 3.0))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (FP64, FP32, BF16, FP16))
def test_kl_and_its_gradient_are_exactly_zero_where_student_is_teacher(dtype, kind, temperature):
    batch = Batch(rows=37, vocab=301, dtype=dtype)
    batch.labels[batch.kl_rows] = -100  # so that their gradient is the KL's alone
    for chunk_rows in (None, 7):
        options = {"teacher": batch.student.detach()[batch.kl_rows], "kl": kind}
        options |= {"temperature": temperature, "chunk_rows": chunk_rows}
        assert batch.loss(**options).kl_sum == 0
        gradient = batch.gradient(**options)
        assert (gradient[batch.kl_rows] == 0).all()
        assert (gradient[~batch.kl_rows & (batch.labels >= 0)] != 0).any()


def test_masked_kl_does_not_see_the_gold_token_and_pushes_nothing_there():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(1), dtype=FP64)
    gold, teacher = torch.arange(6), logits.roll(1, 0)
    options = {"kl": "target_masked", "targets": gold, "teacher_logits": teacher}
    nothing = torch.full((6,), -100)
    raised = logits.clone()
    raised[range(6), gold] += 50.0
    raised.requires_grad_()
    loss = lwf_loss_from_logits(raised, nothing, **options)
    loss.total.backward()
    torch.testing.assert_close(loss.kl_sum, lwf_loss_from_logits(logits, nothing, **options).kl_sum)
    assert (raised.grad[range(6), gold] == 0).all()
    eye = Head(torch.eye(11, dtype=FP64))
    one_pass = lwf_loss(raised, nothing, eye, teacher=teacher, kl="target_masked", targets=gold)
    torch.testing.assert_close(one_pass.kl_sum, loss.kl_sum)


def test_masked_kl_is_right_in_fp32_where_the_gold_token_holds_nearly_all():
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 500, generator=draw, dtype=FP64).unbind()
    gold = torch.arange(8)
    student[range(8), gold] += 17.0  # leaves about 2e-4 to the others
    options = {"kl": "target_masked", "targets": gold}
    nothing = torch.full((8,), -100)
    exact = lwf_loss_from_logits(student, nothing, teacher_logits=teacher, **options).kl_sum
    eye = Head(torch.eye(500))
    ours = lwf_loss(student.float(), nothing, eye, teacher=teacher.float(), **options).kl_sum
    torch.testing.assert_close(ours, exact.float(), rtol=2e-6, atol=0)


def test_masked_kl_without_a_gold_token_is_plain_forward_kl():
    batch = Batch()
    unknown = torch.full_like(batch.labels, -100)
    masked = batch.loss(kl="target_masked", targets=unknown).kl_sum
    torch.testing.assert_close(masked, batch.loss(kl="forward").kl_sum)


@pytest.mark.parametrize("chunk_rows", (1, 3, 8, 1000))
def test_the_chunk_size_changes_nothing(chunk_rows):
    batch = Batch(dtype=FP32)
    whole, part = batch.loss(return_rows=True), batch.loss(return_rows=True, chunk_rows=chunk_rows)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a, b)
    whole, part = batch.gradient(), batch.gradient(chunk_rows=chunk_rows)
    torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filling", (0.0, float("nan"), float("inf")))
def test_padding_rows_change_nothing_and_get_no_gradient(filling):
    batch = Batch()
    student = F.pad(batch.student.detach(), (0, 0, 0, 40), value=filling).requires_grad_()
    labels = F.pad(batch.labels, (0, 40), value=-100)
    rows = F.pad(batch.kl_rows, (0, 40))
    loss = lwf_loss(student, labels, batch.head, teacher=batch.teacher, kl_rows=rows)
    loss.total.backward()
    torch.testing.assert_close(loss.total, batch.loss().total)
    torch.testing.assert_close(student.grad[:24], batch.gradient())
    assert (student.grad[24:] == 0).all()


def test_repeating_the_batch_changes_no_loss():
    batch = Batch()
    twice = lwf_loss(
        batch.student.repeat(2, 1), batch.labels.repeat(2), batch.head,
        teacher=batch.teacher.repeat(2, 1), kl_rows=batch.kl_rows.repeat(2),
    )  # fmt: skip
    torch.testing.assert_close(twice.total, batch.loss().total)
    torch.testing.assert_close(twice.kl_sum, 2 * batch.loss().kl_sum)


@pytest.mark.parametrize("parts", (1, 2, 8))
@pytest.mark.parametrize("dtype", (FP64, FP16))
def test_eight_rows_at_once_are_eight_times_one_row(dtype, parts):
    batch = Batch(rows=8, dtype=dtype)
    n_ce, n_kl = (batch.labels >= 0).sum(), batch.kl_rows.sum()
    whole = batch.gradient(n_ce=n_ce, n_kl=n_kl)
    student = batch.student.detach().requires_grad_()
    total, used = 0.0, 0
    for at in torch.arange(8).split(8 // parts):
        k = int(batch.kl_rows[at].sum())
        teacher = batch.teacher[used : used + k] if k else None
        used += k
        loss = lwf_loss(
            student[at], batch.labels[at], batch.head,
            teacher=teacher, kl_rows=batch.kl_rows[at], n_ce=n_ce, n_kl=n_kl,
        )  # fmt: skip
        loss.total.backward()
        total += loss.total.item()
    assert total == pytest.approx(batch.loss().total.item(), rel=1e-3 if dtype is FP16 else 1e-10)
    tolerance = 1e-3 if dtype is FP16 else 1e-10
    torch.testing.assert_close(student.grad.to(FP64), whole, rtol=tolerance, atol=tolerance)


def test_kl_per_token_does_not_depend_on_how_many_tokens_there_are():
    batch = Batch(rows=1)
    values = [
        lwf_loss(
            batch.student.detach().repeat(n, 1), torch.full((n,), -100), batch.head,
            teacher=torch.ones(n, 8, dtype=FP64),
        ).total
        for n in (5, 500)
    ]  # fmt: skip
    torch.testing.assert_close(values[0], values[1])


def test_group_sums_and_row_values_add_up_to_the_sums():
    batch = Batch()
    groups = torch.arange(24) % 4
    loss = batch.loss(groups=groups, num_groups=5, return_rows=True)
    torch.testing.assert_close(loss.kl_group_sums.sum(), loss.kl_sum)
    torch.testing.assert_close(loss.ce_rows.sum(), loss.ce_sum)
    assert loss.kl_group_counts.tolist()[4] == 0
    assert loss.kl_group_counts.sum() == loss.n_kl == batch.kl_rows.sum()
    for group in range(4):
        mine = loss.kl_rows[groups == group].sum()
        torch.testing.assert_close(loss.kl_group_sums[group], mine)
    assert (loss.kl_rows[~batch.kl_rows] == 0).all()
    assert (loss.ce_rows[batch.labels < 0] == 0).all()
    assert loss.n_ce == (batch.labels >= 0).sum()


def test_only_the_total_carries_a_gradient():
    loss = Batch().loss(return_rows=True)
    assert [name for name, value in loss._asdict().items() if value.requires_grad] == ["total"]


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_squared_keeps_the_size_of_the_gradient(kind):
    batch = Batch()
    teacher = batch.student.detach()[batch.kl_rows] + 0.01 * batch.teacher
    batch.labels[:] = -100
    small = {"teacher": teacher, "kl": kind}
    batch.head = batch.head._replace(scale=0.2)  # near uniform, where T alone would shrink it
    norms = [batch.gradient(temperature=t, **small).norm().item() for t in (1.0, 2.0, 4.0, 8.0)]
    assert max(norms) / min(norms) < 2


def test_smoothed_cross_entropy_is_torch_s():
    batch = Batch(dtype=FP32)
    logits = logits_of(batch.student.detach(), batch.head)
    ours = lwf_loss(batch.student, batch.labels, batch.head, label_smoothing=0.2).total
    torch.testing.assert_close(
        ours.to(FP64), F.cross_entropy(logits, batch.labels, label_smoothing=0.2)
    )


@pytest.mark.parametrize("dtype", (FP64, BF16, FP16))
def test_without_any_term_the_loss_is_zero_and_still_hangs_on_the_student(dtype):
    batch = Batch(dtype=dtype)
    loss = lwf_loss(batch.student, torch.full((24,), -100), batch.head)
    assert loss.total == 0 and loss.total.requires_grad
    loss.total.backward()
    assert batch.student.grad.dtype == dtype and (batch.student.grad == 0).all()
    z = logits_of(batch.student, batch.head).detach().requires_grad_()
    full = lwf_loss_from_logits(z, torch.full((24,), -100))
    full.total.backward()
    assert full.total == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("temperature", (1.0, 0.05))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (FP64, FP32, BF16, FP16))
def test_suppressed_tokens_stay_finite(dtype, kind, temperature):
    """-inf on the teacher's side, on the student's, on both, and at a label."""
    batch = Batch(dtype=dtype)
    ours, theirs = torch.zeros(2, 37, dtype=dtype).unbind()
    ours[[3, 5]], theirs[[4, 5]] = -torch.inf, -torch.inf
    batch.labels[1], batch.targets[1] = 3, 3
    batch.head = batch.head._replace(bias=ours)
    options = {"kl": kind, "temperature": temperature, "label_smoothing": 0.1}
    options |= {"teacher_head": batch.head._replace(bias=theirs)}
    loss = batch.loss(**options)
    assert torch.isfinite(torch.stack([loss.total, loss.ce_sum, loss.kl_sum])).all()
    assert torch.isfinite(batch.gradient(**options)).all()
    z = (batch.student.detach().to(FP64) @ batch.head.weight.to(FP64).T + ours).requires_grad_()
    u = batch.teacher.to(FP64) @ batch.head.weight.to(FP64).T + theirs
    del options["teacher_head"]
    full = lwf_loss_from_logits(
        z, batch.labels, teacher_logits=u, kl_rows=batch.kl_rows, targets=batch.targets, **options
    )
    full.total.backward()
    assert torch.isfinite(z.grad).all()
    assert error(loss.kl_sum.to(FP64), full.kl_sum) < (0.2 if dtype in (BF16, FP16) else 1e-4)


def test_a_suppressed_token_counts_as_the_lowest_fp16_logit():
    ours = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=FP64)
    read_as = torch.tensor([[0.0, LOWEST, 1.0]], dtype=FP64)
    rows = {"labels": torch.tensor([1]), "teacher_logits": torch.zeros(1, 3, dtype=FP64)}
    torch.testing.assert_close(
        lwf_loss_from_logits(ours, **rows).total, lwf_loss_from_logits(read_as, **rows).total
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_logits_near_the_end_of_their_range_stay_finite(kind):
    head = Head(torch.eye(4, dtype=FP16) * 60000.0)
    student = torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 1.0]], dtype=FP16, requires_grad=True)
    teacher = student.detach().roll(1, 0)
    labels = torch.tensor([1, 2])
    loss = lwf_loss(student, labels, head, teacher=teacher, kl=kind, temperature=0.05)
    assert torch.isfinite(loss.total)
    z = (student.detach().float() * 60000).requires_grad_()
    full = lwf_loss_from_logits(
        z, labels, teacher_logits=teacher.float() * 60000, kl=kind, temperature=0.05
    )
    full.total.backward()
    torch.testing.assert_close(loss.total, full.total)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("temperature", (1.0, 4.0, 8.0))
@pytest.mark.parametrize("kind", ("forward", "target_masked"))
def test_in_fp16_a_kl_that_moves_a_whole_token_at_a_high_temperature_keeps_its_gradient(
    kind, temperature
):
    """The gradient of such a row is as large as one gets: T to each of the two tokens."""
    head = Head(torch.eye(4, dtype=FP16) * 200.0)
    student = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], requires_grad=True)
    teacher, none = student.detach().roll(1, 0), torch.full((2,), -100)
    options = {"kl": kind, "temperature": temperature, "targets": torch.tensor([3, 3])}
    lwf_loss(student, none, head, teacher=teacher, **options).total.backward()
    z = (student.detach() * 200).requires_grad_()
    lwf_loss_from_logits(z, none, teacher_logits=teacher * 200, **options).total.backward()
    assert z.grad.abs().max() > temperature / 3, "it is that large"
    torch.testing.assert_close(student.grad, z.grad * 200, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("n_ce", "n_kl"), ((17.0, 11.0), (1e6, 1e6), (2e6, 3.0)))
@pytest.mark.parametrize("kind", ("forward", "target_masked"))
def test_a_grad_scaler_of_65536_neither_overflows_nor_loses_the_gradient_in_fp16(kind, n_ce, n_kl):
    batch = Batch(rows=48, hidden=16, vocab=200, dtype=FP16, spread=0.3)
    batch.student = batch.student.detach().float().requires_grad_()  # as under autocast
    options = {"kl": kind, "lwf_lambda": 2.0, "n_ce": n_ce, "n_kl": n_kl, "temperature": 2.0}
    ours = batch.gradient(scale=65536.0, **options) / 65536.0
    assert torch.isfinite(ours).all()
    assert error(ours, reference_gradient(batch, **options)) < 2e-3


@pytest.mark.parametrize("lwf_lambda", (1e-6, 1e6))
def test_a_kl_alone_keeps_its_gradient_in_fp16_however_small_or_large_its_weight(lwf_lambda):
    batch = Batch(rows=48, hidden=16, vocab=200, dtype=FP16, spread=0.3)
    batch.student = batch.student.detach().float().requires_grad_()
    batch.labels[:] = -100
    options = {"lwf_lambda": lwf_lambda, "n_ce": 1.0, "n_kl": 1000.0}
    assert error(batch.gradient(**options), reference_gradient(batch, **options)) < 2e-3


def test_nan_in_a_row_that_counts_is_seen():
    batch = Batch()
    batch.student.data[batch.labels.argmax()] = float("nan")
    assert batch.loss().total.isnan()


@pytest.mark.parametrize("gradient", (True, False))
def test_kl_rows_cost_three_head_products_others_two_and_unused_rows_none(gradient):
    batch = Batch(rows=60, dtype=FP32)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        batch.loss(chunk_rows=7)
    kl = int(batch.kl_rows.sum())
    ce_only = int((~batch.kl_rows & (batch.labels >= 0)).sum())
    assert kl > 0 and 0 < ce_only < 60 - kl
    products = 3 * kl + 2 * ce_only if gradient else 2 * kl + ce_only
    assert counter.get_total_flops() == products * 2 * 37 * 8


def test_nothing_of_rows_times_vocabulary_is_kept_for_backward():
    batch = Batch(rows=64, vocab=500)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        batch.loss()
    assert sum(kept) <= 64 * (8 + 1)


def test_evaluation_gives_the_same_values_without_a_graph():
    batch = Batch()
    with torch.no_grad():
        quiet = batch.loss(return_rows=True)
    assert not quiet.total.requires_grad
    for a, b in zip(quiet, batch.loss(return_rows=True), strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice_gives_the_gradient_twice():
    batch = Batch()
    once = batch.gradient()
    total = batch.loss().total
    batch.student.grad = None
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(batch.student.grad, 2 * once)


def test_nothing_that_the_caller_gave_is_written_to():
    batch = Batch(dtype=FP32, bias=torch.ones(37))
    given = [batch.student, batch.teacher, *batch.head[:2], batch.labels, batch.targets]
    before = [tensor.detach().clone() for tensor in given]
    batch.gradient()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_autocast_around_the_call_changes_nothing():
    batch = Batch(dtype=FP32)
    plain = batch.gradient(temperature=2.0)
    with torch.autocast("cpu", dtype=BF16):
        torch.testing.assert_close(batch.gradient(temperature=2.0), plain, rtol=0, atol=0)


def test_a_teacher_of_another_width_with_the_same_vocabulary_is_taken():
    batch = Batch()
    wide = Head(torch.cat([batch.head.weight, torch.ones(37, 2, dtype=FP64)], 1))
    teacher = F.pad(batch.teacher, (0, 2))
    loss = batch.loss(teacher=teacher, teacher_head=wide)
    torch.testing.assert_close(loss.total, batch.loss().total)


@pytest.mark.parametrize("classes", (1, 36, 40))
def test_a_teacher_of_another_vocabulary_is_refused_with_both_sizes(classes):
    batch = Batch()
    other = Head(torch.zeros(classes, 8, dtype=FP64))
    with pytest.raises(ValueError, match=f"37 classes, the teacher {classes}"):
        batch.loss(teacher_head=other)
    with pytest.raises(ValueError, match=f"37 classes, the teacher {classes}"):
        lwf_loss_from_logits(
            torch.zeros(2, 37), torch.zeros(2).long(), teacher_logits=torch.zeros(2, classes)
        )


REFUSED = {
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "negative temperature": ({"temperature": -1.0}, "temperature is -1.0"),
    "nan temperature": ({"temperature": float("nan")}, "temperature is nan"),
    "direction": ({"kl": "backward"}, "'backward'"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    "lambda": ({"lwf_lambda": -0.5}, "lwf_lambda is -0.5"),
    "teacher rows": ({"teacher": torch.zeros(3, 8, dtype=FP64)}, "the teacher has 3 rows"),
    "no teacher": ({"teacher": None}, "the teacher has 0 rows"),
    "hidden size": ({"teacher": torch.zeros(3, 9, dtype=FP64)}, r"\(3, 9\)"),
    "kl_rows": ({"kl_rows": torch.ones(3, dtype=torch.bool)}, r"kl_rows has shape \(3,\)"),
    "target": ({"targets": torch.full((24,), 37)}, "the id 37, the head has 37 classes"),
    "body": ({"body": "fast"}, "'fast'"),
    "chunk": ({"chunk_rows": 0}, "chunk_rows is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Batch().loss(**options)


@pytest.mark.parametrize("label", (37, -1))
def test_a_label_outside_the_vocabulary_is_refused(label):
    batch = Batch()
    batch.labels[0] = label
    with pytest.raises(ValueError, match=f"the id {label}"):
        batch.loss(targets=None)


def test_a_head_that_is_being_trained_is_refused_for_the_one_pass():
    batch = Batch()
    batch.head.weight.requires_grad_()
    with pytest.raises(ValueError, match="lwf_loss_from_logits"):
        batch.loss()


def test_a_body_that_fails_is_given_up_once_and_eager_takes_over(monkeypatch, caplog):
    def broken():
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(loss_kernels, "_compiler", broken)
    monkeypatch.setattr(loss_kernels, "_broken", set())
    batch = Batch(dtype=FP32)
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        torch.testing.assert_close(batch.gradient(body="compiled"), batch.gradient(body="eager"))
        batch.loss(body="compiled")
    assert [record.message.count("no compiler here") for record in caplog.records] == [1]


def test_the_environment_names_the_body_where_the_caller_does_not(monkeypatch):
    monkeypatch.setenv("LWF_LOSS_BODY", "fast")
    with pytest.raises(ValueError, match="LWF_LOSS_BODY"):
        Batch().loss()
    Batch().loss(body="eager")


@pytest.mark.slow
def test_the_body_compiles_to_one_graph_with_the_same_numbers(monkeypatch):
    graph = torch.compile(loss_kernels.eager_body, backend="eager", fullgraph=True)
    monkeypatch.setattr(loss_kernels, "_compiler", lambda: graph)
    batch = Batch(dtype=FP32, softcap=3.0)
    options = {"label_smoothing": 0.1, "temperature": 2.0, "chunk_rows": 9}
    compiled = batch.gradient(body="compiled", **options)
    assert "compiled" not in loss_kernels._broken
    torch.testing.assert_close(compiled, batch.gradient(**options))


@pytest.mark.gpu
@pytest.mark.parametrize("body", ("triton", "compiled", "eager"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (BF16, FP16))
def test_every_body_on_the_gpu_gives_the_reference_and_exact_zeros(dtype, kind, body):
    batch = Batch(rows=70, hidden=64, vocab=5003, dtype=dtype, spread=0.2, softcap=20.0)
    torch.compiler.reset()  # else the many settings of this file use up the recompile limit
    for temperature, smoothing in ((1.0, 0.0), (2.0, 0.1)):
        options = {"kl": kind, "temperature": temperature, "label_smoothing": smoothing}
        truth = reference_gradient(batch, **options)
        naive = error(reference_gradient(batch, dtype, **options), truth)
        cuda = Batch(rows=70, hidden=64, vocab=5003, dtype=dtype, spread=0.2, softcap=20.0)
        cuda.student = batch.student.detach().cuda().requires_grad_()
        cuda.head = Head(batch.head.weight.cuda(), softcap=20.0)
        for scale in (1.0, 65536.0):
            ours = cuda.gradient(scale=scale, body=body, chunk_rows=32, **options).cpu() / scale
            assert error(ours, truth) <= 1.1 * naive + 1e-3
        same = cuda.student.detach()[cuda.kl_rows.cuda()]
        cuda.labels[:] = -100
        assert cuda.loss(teacher=same, body=body, **options).kl_sum == 0
        assert (cuda.gradient(teacher=same, body=body, **options) == 0).all()
    assert body not in loss_kernels._broken


@pytest.mark.gpu
def test_the_gpu_never_holds_rows_times_vocabulary():
    rows, hidden, vocab = 4096, 256, 256000
    student = torch.randn(rows, hidden, device="cuda", dtype=FP16, requires_grad=True)
    head = Head(torch.randn(vocab, hidden, device="cuda", dtype=FP16) * 0.05)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lwf_loss(student, labels, head, teacher=student.detach()).total.backward()
    assert torch.cuda.max_memory_allocated() - before < rows * vocab * 2 / 3
