"""Whether a training step fits the memory there is: an estimate by parts, before anything runs.

All sizes are bytes. With N = batch x length tokens, H the hidden width, I the MLP's, Q and K the
widths of queries and of keys, V the vocabulary, L layers, b bytes of a value in the dtype of the
products, the most that is held at once is

    weights + adapter + gradients + optimizer + kept + max(one layer's backward, loss, teacher)

and each part is derived where it is computed below. Against the peaks measured on an H100 for
Gemma-2B's shape in 4 bits (DESIGN: 2.68 GiB at 4 x 512, 4.55 GiB at 16 x 1024) it gives 2.70 and
4.53 GiB.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import on_cuda
from lwf_unsloth.checkup import doctor
from lwf_unsloth.errors import ConfigError, ModelError
from lwf_unsloth.memory import free_memory
from lwf_unsloth.shapes import ModelShape

__all__ = ["Estimate", "Fit", "ModelShape", "doctor", "estimate", "fits", "tell_memory"]

logger = logging.getLogger(__name__)

GIB = 2**30
CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 256 * 2**20}
"""Most that the loss's chunk of logits takes (loss_pass)."""
MARGIN = {"cuda": 0.05, "cpu": 1.5}
"""Share of what comes and goes that the allocator holds beside it: gaps on a GPU. On a CPU glibc
keeps freed blocks: a process grew by 1.9 to 3.6 times the tensors' own peak (4 layers, H 512,
batches of 1 to 8 x 512)."""
REFUSED_ABOVE = 1.5
"""Times the free memory at which a run is refused; below, the estimate might be wrong."""
SHORT = 16
"""Tokens under which a row is no advice."""
LONGEST = 2**17
"""Tokens and rows beyond which no fit is looked for."""


class DoesNotFit(ConfigError):
    """A run that would need far more memory than is free."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step, by part."""

    weights: int
    """The frozen weights."""
    adapter: int
    """What is trained."""
    gradients: int
    optimizer: int
    kept: int
    """Activations that live from the forward to the backward."""
    layer: int
    """While one layer is computed again and its gradient taken."""
    loss: int
    """While the loss is taken."""
    teacher: int
    """During the teacher's forward."""
    margin: float = MARGIN["cuda"]
    """Share of what comes and goes that the allocator holds beside it."""

    @property
    def working(self) -> int:
        """The largest of what is held at different moments."""
        return max(self.layer, self.loss, self.teacher)

    @property
    def peak(self) -> int:
        """Most bytes allocated at once (torch's max_memory_allocated)."""
        return self.weights + self.adapter + self.beside

    @property
    def beside(self) -> int:
        """The peak without what a loaded model holds already."""
        return self.gradients + self.optimizer + self.kept + self.working

    @property
    def needed(self) -> int:
        """Free memory needed with the model loaded, gaps of the allocator included."""
        return self.beside + round(self.margin * (self.kept + self.working))


def estimate(
    shape: ModelShape,
    batch: int,
    length: int,
    *,
    kl_share: float = 1.0,
    optimizer_bytes: int = 8,
    free: int | None = None,
) -> Estimate:
    """Estimates a step from sizes alone.

    Args:
        shape: The model.
        batch: Rows a forward.
        length: Tokens of the longest row.
        kl_share: Share of the rows that carry KL; 0 without a teacher.
        optimizer_bytes: State of a trained value: 8 for AdamW in fp32, 2 in 8 bits.
        free: Free bytes, which bound the loss's chunk to their quarter; None for plenty.

    Returns:
        The parts.
    """
    tokens = batch * length
    return Estimate(
        weights=shape.weight_bytes,
        adapter=shape.trained_bytes,
        gradients=shape.trained_bytes,
        optimizer=shape.trained * optimizer_bytes,
        kept=_kept(shape, tokens),
        layer=_layer(shape, tokens),
        loss=_loss(shape, tokens, kl_share, free),
        teacher=_teacher(shape, tokens, kl_share),
        margin=MARGIN["cuda" if shape.fused else "cpu"],
    )


def _saved_by_layer(shape: ModelShape) -> int:
    """Values a token that one layer's backward needs.

    H-wide: the outputs of both norms and the residual stream between attention and MLP (3). For
    attention queries, its output, and keys and values repeated to the queries' width (4 Q), keys
    and values (2 K). For the MLP gate and up (2 I).
    """
    return 3 * shape.hidden + 4 * shape.queries + 2 * shape.keys + 2 * shape.mlp


def _kept(shape: ModelShape, tokens: int) -> int:
    """Activations from forward to backward.

    "unsloth" moves each layer's input to the CPU, all but the last, and reads them back through two
    buffers on the GPU: 3 H a token. On a CPU, and with True, every layer's input stays: L H.
    Without checkpointing all that every layer's backward needs stays.
    """
    per_token = {
        "unsloth": 3 * shape.hidden,
        "inputs": shape.layers * shape.hidden,
        "everything": shape.layers * (shape.hidden + _saved_by_layer(shape)),
    }[shape.checkpointing]
    return tokens * per_token * shape.itemsize


def _layer(shape: ModelShape, tokens: int) -> int:
    """One layer computed again and taken backward, at its widest: in the MLP.

    What its backward needs (unless that is kept already), the gradient at the MLP's width, written
    over gate and up (I), the layer's output and three gradients of the residual stream (4 H), and
    one weight matrix unpacked from 4 bits. Layers without Unsloth's fused kernels (a CPU's) keep
    the activation and the product as well: 2 I more.
    """
    per_token = 4 * shape.hidden + shape.mlp
    if shape.checkpointing != "everything":
        per_token += _saved_by_layer(shape)
    if not shape.fused:
        per_token += 2 * shape.mlp
    return tokens * per_token * shape.itemsize + shape.unpacked_bytes


def _loss(shape: ModelShape, tokens: int, kl_share: float, free: int | None) -> int:
    """The one pass over chunks of rows, or full logits where the head is not frozen.

    One pass: hidden states and their gradient (2 H b a token), that gradient in fp32 (4 H), the
    teacher's hidden states on rows with KL (H b), and one chunk of logits, of both models if there
    is KL. Full logits: per model the logits, and a fp32 copy, log-softmax and gradient (b + 12) V.
    """
    sides = 2 if kl_share else 1
    if shape.full_logits:
        each = shape.itemsize + 12
        return round(tokens * shape.vocabulary * each * (1 + kl_share)) + shape.unpacked_bytes
    states = tokens * shape.hidden * (2 * shape.itemsize + 4)
    states += round(kl_share * tokens * shape.hidden * shape.itemsize)
    chunk = CHUNK_BYTES["cuda" if shape.fused else "cpu"]
    if free is not None and shape.fused:
        chunk = min(chunk, free // 4)
    copies = 0 if shape.fused else 4 * (2 + 4 * sides)
    whole = tokens * shape.vocabulary * (shape.itemsize * sides + copies)
    return states + min(chunk, whole) + shape.unpacked_bytes


def _teacher(shape: ModelShape, tokens: int, kl_share: float) -> int:
    """A forward without gradients: gate, up and their product (3 I), attention (4 Q + 2 K), the
    residual stream, a norm's output and the student's hidden states (3 H).
    """
    if not kl_share:
        return 0
    per_token = 3 * shape.mlp + 4 * shape.queries + 2 * shape.keys + 3 * shape.hidden
    return round(kl_share * tokens) * per_token * shape.itemsize + shape.unpacked_bytes


@dataclass(frozen=True)
class Fit:
    """An estimate held against the memory there is; `str()` is a table for people."""

    batch: int
    length: int
    estimate: Estimate
    free: int | None
    """Free bytes now, what the allocator holds unused included; None where that is not known."""
    device: str
    longest: int
    """Tokens a row that fit at this batch, 0 if none."""
    largest: int
    """Rows a forward that fit at this length, 0 if none."""

    @property
    def fits(self) -> bool:
        """Whether the step needs no more than is free; True where that is not known."""
        return self.free is None or self.estimate.needed <= self.free

    def __bool__(self) -> bool:
        """`fits`."""
        return self.fits

    def __str__(self) -> str:
        one, free = self.estimate, self.free
        rows = [
            ("weights (loaded)", one.weights),
            ("adapter (loaded)", one.adapter),
            ("gradients", one.gradients),
            ("optimizer", one.optimizer),
            ("kept activations", one.kept),
            ("one layer's backward", one.layer),
            ("the loss", one.loss),
            ("teacher's forward", one.teacher),
            ("gaps", one.needed - one.beside),
        ]
        moments = ("one layer's backward", "the loss", "teacher's forward")
        lines = [
            f"  {name:22}{_gib(size):>10}{'  (at different moments)' if name in moments else ''}"
            for name, size in rows
        ]
        room = "an unknown amount is" if free is None else f"{_gib(free)} are"
        verdict = "fits" if self.fits else "does not fit"
        largest = (
            f"Largest that fits: {_most(self.longest)} tokens at batch {self.batch}, "
            f"batch {_most(self.largest)} at {self.length} tokens."
        )
        if not self.longest and not self.largest:
            largest = f"Not even one token fits at batch {self.batch}, nor one row so long."
        return "\n".join(
            [
                f"Batch {self.batch} x {self.length} tokens {verdict} on {self.device}: it needs "
                f"about {_gib(one.needed)} beside the loaded model, {room} free.",
                *lines,
                largest,
            ]
        )


@checked()
def fits(model: Any, batch: int, length: int, *, args: Any = None, rows: str | None = None) -> Fit:
    """Whether training this model with such batches fits the memory that is free now.

    Args:
        model: From `load_model`.
        batch: Rows a forward.
        length: Tokens of the longest row.
        args: `LwFConfig`, for optimizer and KL; None takes AdamW and KL on all rows.
        rows: Where the KL acts, if `args` leaves it to the data ("auto").

    Returns:
        The estimate, the verdict, and the largest length and batch that fit.

    Raises:
        ConfigError: A batch or length under 1.
        ModelError: A model whose sizes are not known here.
    """
    if batch < 1 or length < 1:
        raise ConfigError(
            f"fits was asked about batch {batch} x {length} tokens; both must be 1 or more."
        )
    shape, free = ModelShape.of_model(model), free_memory()
    share, state = kl_share(args, batch, rows), optimizer_bytes(args)

    def at(rows: int, tokens: int) -> Estimate:
        return estimate(shape, rows, tokens, kl_share=share, optimizer_bytes=state, free=free)

    def enough(rows: int, tokens: int) -> bool:
        return free is None or at(rows, tokens).needed <= free

    return Fit(
        batch,
        length,
        at(batch, length),
        free,
        "the GPU" if on_cuda() else "the CPU",
        _largest(lambda tokens: enough(batch, tokens), shape.positions),
        _largest(lambda rows: enough(rows, length), LONGEST),
    )


def kl_share(args: Any, batch: int, rows: str | None = None) -> float:
    """Share of a batch's rows that carry KL, at its highest.

    Args:
        args: `LwFConfig`, or None for all rows.
        batch: Rows a forward.
        rows: `lwf_rows` with "auto" resolved; None takes the setting, and "auto" for "all".
    """
    if args is None:
        return 1.0
    if args.lwf_lambda == 0:
        return 0.0
    if (rows or args.lwf_rows) != "rehearsal":
        return 1.0
    return min(1.0, math.ceil(batch * args.rehearsal_ratio) / batch)


def optimizer_bytes(args: Any) -> int:
    """Bytes of optimizer state a trained value: two moments in fp32, unless its name says less."""
    name = str(getattr(getattr(args, "optim", ""), "value", getattr(args, "optim", "")))
    if "8bit" in name or "4bit" in name:
        return 2
    if "sgd" in name or "adafactor" in name:
        return 4 if "sgd" in name else 1
    return 4 if "lion" in name else 8


def tell_memory(model: Any, args: Any, dataset: Any, rows: str) -> None:
    """Says it before training when a run would not fit.

    Args:
        model: The student.
        args: The settings.
        dataset: Encoded rows.
        rows: `lwf_rows` with "auto" resolved.

    Raises:
        DoesNotFit: It would need more than 1.5 times the free memory.
    """
    batch, longest = args.per_device_train_batch_size, longest_row(dataset)
    try:
        found = fits(model, batch, longest, args=args, rows=rows)
    except ModelError as error:
        logger.info("Whether the run fits the memory is not known: %s", error)
        return
    if found.free is None or found.fits:
        return
    size = f"per_device_train_batch_size to {found.largest} (raise gradient_accumulation_steps)"
    ways = [size] if found.largest else []
    ways += [f"max_length to {found.longest}"] if found.longest >= SHORT else []
    text = (
        f"A step of {batch} x {longest} tokens would need about {_gib(found.estimate.needed)}, but "
        f"{_gib(found.free)} are free on {found.device}. Lower "
        f"{' or '.join(ways) or 'the size of the model'}, or free memory that another process or "
        "notebook holds. fits(model, batch, length) shows the parts."
    )
    shape = ModelShape.of_model(model)
    if shape.checkpointing == "everything":
        text += ' use_gradient_checkpointing="unsloth" at loading needs far less.'
    if found.estimate.beside > REFUSED_ABOVE * found.free and shape.dense:
        raise DoesNotFit(text)
    logger.warning("%s", text)


def longest_row(dataset: Any) -> int:
    """Tokens of the longest encoded row, read off the table's offsets."""
    import pyarrow.compute as compute

    lengths = compute.list_value_length(dataset.data.column("input_ids"))
    return int(compute.max(lengths).as_py())


def _largest(enough: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `enough` holds, 0 if none does."""
    if enough(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def _gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _most(number: int) -> str:
    return f"{number:,} or more" if number >= LONGEST else f"{number:,}" if number else "none"
