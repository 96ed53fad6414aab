"""A teacher whose targets are kept on disk: computed when a row first comes, read from then on.

The teacher never changes during a run, so neither do its targets. With "hidden" the final hidden
states of a row's tokens are kept, in the head's dtype: what the live teacher gives the loss, up to
the rounding of another batch's shapes. With "topk" each token keeps its k most probable classes
and the mass of the rest (see `loss_topk`), at one temperature.

Only training reads and fills the cache. Evaluation asks the live teacher, so its KL is exact.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwf_unsloth.cache_parts import PartStore, Row, digest, mark_of
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.loss_kernels import shape_logits
from lwf_unsloth.losses import Head, TopK, top_k
from lwf_unsloth.ranks import together
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher
from lwf_unsloth.teacher_identity import teacher_identity

logger = logging.getLogger(__name__)

NAMES = {"hidden": ("hidden",), "topk": ("ids", "log_probs", "tail")}
"""Tensors of a row: (L, H) | (L, k) int32, (L, k) fp32, (L,) fp32."""
LOGIT_ROWS = 512
"""Tokens whose logits exist at once while a top k is taken."""


@dataclass(frozen=True)
class Wanted:
    """The rows of a batch whose targets the loss needs."""

    ids: Tensor
    """(R, T) on the device."""
    lengths: list[int]
    """Tokens of each row; the rest is padding."""
    keys: list[str]
    """Each row's name in the cache."""
    places: list[Tensor]
    """Each row's positions with KL, on the CPU, ascending."""


@dataclass(frozen=True)
class _Late:
    """Targets on their way to the CPU."""

    event: Any
    block: Row
    width: int
    keys: list[str]
    lengths: list[int]


class CachedTeacher:
    """A `Teacher` (hidden and logits are the live one's), and `targets` from the cache."""

    def __init__(
        self,
        teacher: OwnTeacher | ModelTeacher,
        mode: str,
        folder: Path,
        tokenizer: Any,
        *,
        products: str,
        k: int = 64,
        temperature: float = 1.0,
        rank: int = 0,
    ) -> None:
        """Wraps a teacher; files are opened at the first batch.

        Args:
            teacher: The live teacher.
            mode: "hidden" or "topk".
            folder: Where the files are.
            tokenizer: The one that encoded the rows, with its template.
            products: Dtype of the products.
            k: Classes kept with "topk".
            temperature: That of the loss; with "topk" the only one that can be asked for.
            rank: This process among those that train.
        """
        self.teacher, self.mode, self.folder = teacher, mode, folder
        self.head: Head | None = teacher.head
        self.k, self.temperature, self.rank = k, temperature, rank
        self._about = (tokenizer, products)
        self._store: PartStore | None = None
        self._mark = ""
        self._late: list[_Late] = []
        self._rest = [0.0, 0.0]  # mass outside of the top k, and tokens, of what was kept anew

    @property
    def kind(self) -> str:
        """The live teacher's."""
        return self.teacher.kind

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final hidden states (B, T, H) by the live teacher."""
        return self.teacher.hidden(input_ids, attention_mask)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Full logits (B, T, V) by the live teacher."""
        return self.teacher.logits(input_ids, attention_mask)

    def __str__(self) -> str:
        """One sentence for the user."""
        what = "hidden states" if self.mode == "hidden" else f"{self.k} most probable tokens"
        return f"{self.teacher} Its {what} are kept in {self.folder} after a row's first pass."

    def identity(self) -> dict[str, str]:
        """What the targets depend on, the teacher as it is now."""
        tokenizer, products = self._about
        what = "hidden" if self.mode == "hidden" else f"top {self.k} at T {self.temperature:g}"
        return {**teacher_identity(self.teacher, tokenizer, products), "targets": what}

    @property
    def store(self) -> PartStore:
        """The files, opened at first use: a resumed run has its teacher by then."""
        if self._store is None:
            names = NAMES[self.mode]
            self._store = PartStore(self.folder, self.identity(), names, self.rank)
            self._mark = mark_of(self._store.identity)
        return self._store

    def close(self) -> None:
        """Writes what is in memory and lets go of the files; the next use opens them anew."""
        if self._store is not None:
            self._harvest()
            self._store.close()
            self._store = None
        mass, tokens = self._rest
        if tokens:
            logger.info(
                "Teacher cache: the %d most probable tokens hold %.2f %% of the teacher's "
                "probability (mean of %d tokens, T %g). The KL counts the other %.2g %% as one "
                "class, so it is at most the exact KL.",
                *(self.k, 100 - 100 * mass / tokens, tokens, self.temperature),
                100 * mass / tokens,
            )
            self._rest = [0.0, 0.0]

    def flush(self) -> None:
        """Writes what is in memory: a run that is resumed from here on reads what this one read."""
        if self._store is not None:
            self._harvest()
            self._store.flush()

    def share(self) -> None:
        """Writes what is in memory; when all processes have, each knows the others' rows."""
        with together("write the teacher cache"):
            self.flush()
        if self._store is not None:
            self._store.look()

    # ------------------------------------------------------------------ a batch

    def wanted(self, ids: Tensor, lengths: list[int], tokens: Tensor) -> Wanted:
        """Names the rows of a batch; before the forwards, since it waits for the device.

        Args:
            ids: (R, T) the rows with KL, right-padded.
            lengths: Tokens of each.
            tokens: (K,) their tokens with KL, counted through (R, T), ascending.
        """
        _ = self.store  # for the mark
        rows, width = ids.cpu(), ids.shape[1]
        tokens = tokens.cpu()
        counts = torch.bincount(tokens // width, minlength=len(rows)).tolist()
        keys = [
            digest(self._mark, row[:length].to(torch.int32).numpy().tobytes())
            for row, length in zip(rows, lengths, strict=True)
        ]
        return Wanted(ids, lengths, keys, list((tokens % width).split(counts)))

    def targets(self, wanted: Wanted, temperature: float, from_logits: bool) -> Tensor | TopK:
        """The teacher's targets of the K tokens with KL, from disk, and from a forward on what is
        not there.

        Args:
            wanted: What `wanted` gave.
            temperature: The loss's T at this step.
            from_logits: Whether the teacher has no head that could be used.

        Returns:
            (K, H) hidden states in the head's dtype, or the `TopK` of the tokens, on the device.

        Raises:
            ConfigError: With "topk", another temperature than the kept one.
        """
        if self.mode == "topk" and temperature != self.temperature:
            raise ConfigError(
                f"The temperature is {temperature:g} at this step, but the teacher cache keeps "
                f'the top k at {self.temperature:g}: take lwf_cache="hidden", which serves every '
                "temperature, or leave the temperature constant."
            )
        self._harvest()
        found = [self.store.get(key) for key in wanted.keys]
        missing = [i for i, row in enumerate(found) if row is None]
        fresh = self._compute(wanted, missing, from_logits) if missing else None
        whole = _joined(self._read(wanted, found), fresh, wanted, set(missing))
        if self.mode == "hidden":
            return whole["hidden"]
        return TopK(whole["ids"].long(), whole["log_probs"], whole["tail"], self.temperature)

    def _read(self, wanted: Wanted, found: list[Row | None]) -> Row | None:
        """The tokens with KL of the rows that were found, on the device; None where none was."""
        rows = [(row, at) for row, at in zip(found, wanted.places, strict=True) if row is not None]
        if not rows:
            return None
        device = wanted.ids.device
        return {
            name: _to_device([_select(row[name], at) for row, at in rows], device)
            for name in NAMES[self.mode]
        }

    def _compute(self, wanted: Wanted, missing: list[int], from_logits: bool) -> Row:
        """The live teacher's targets of the tokens with KL of some rows, which it also keeps."""
        lengths = [wanted.lengths[i] for i in missing]
        width = max(lengths)
        ids = wanted.ids
        if len(missing) < len(ids):
            ids = ids[torch.tensor(missing, device=ids.device)]
        block = self._block(ids[:, :width], from_logits)
        self._keep(block, width, [wanted.keys[i] for i in missing], lengths)
        at = torch.cat([n * width + wanted.places[i] for n, i in enumerate(missing)])
        return {name: part.index_select(0, at.to(ids.device)) for name, part in block.items()}

    def _block(self, ids: Tensor, from_logits: bool) -> Row:
        """What is kept of every token of rows (R, T): tensors of R x T rows."""
        if from_logits:
            logits = self.teacher.logits(ids, None).flatten(0, 1)
            parts = [self._top_k(part) for part in logits.split(LOGIT_ROWS)]
        else:
            head = self.teacher.head
            assert head is not None
            states = self.teacher.hidden(ids, None).flatten(0, 1)
            if self.mode == "hidden":
                return {"hidden": states.to(head.weight.dtype)}
            parts = [self._top_k(_head_logits(part, head)) for part in states.split(LOGIT_ROWS)]
        return {name: torch.cat([part[name] for part in parts]) for name in NAMES["topk"]}

    def _top_k(self, logits: Tensor) -> Row:
        found = top_k(logits, self.k, self.temperature)
        return {
            "ids": found.ids.int(),
            "log_probs": found.log_probs.float(),
            "tail": found.tail.float(),
        }

    def _keep(self, block: Row, width: int, keys: list[str], lengths: list[int]) -> None:
        """Sends targets to the CPU without waiting for them; `_harvest` adds them to the files."""
        if not self.store.writes:
            return
        event = None
        if next(iter(block.values())).is_cuda:
            block = {name: _pinned_copy(tensor) for name, tensor in block.items()}
            event = torch.cuda.Event()
            event.record()
        self._late.append(_Late(event, block, width, keys, lengths))
        if event is None:
            self._harvest()

    def _harvest(self) -> None:
        """Adds the targets that have arrived since to the files."""
        late, self._late = self._late, []
        for part in late:
            if part.event is not None:
                part.event.synchronize()
            rows: dict[str, Row] = {}
            for n, (key, length) in enumerate(zip(part.keys, part.lengths, strict=True)):
                own = slice(n * part.width, n * part.width + length)
                if self.mode == "topk":
                    self._rest[0] += float(part.block["tail"][own].double().exp().sum())
                    self._rest[1] += length
                rows[key] = {name: t[own].clone() for name, t in part.block.items()}
            self.store.add_all(rows)


def _select(tensor: Tensor, places: Tensor) -> Tensor:
    """Rows of a tensor; a view where they follow one another, as they mostly do."""
    first, last = int(places[0]), int(places[-1])
    return tensor[first : last + 1] if last - first + 1 == len(places) else tensor[places]


def _to_device(parts: list[Tensor], device: torch.device) -> Tensor:
    """Tensors on the CPU, one after the other, on the device; a GPU does not wait for the copy."""
    if device.type != "cuda":
        return torch.cat(parts).to(device)
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    together = torch.empty(shape, dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(parts, out=together).to(device, non_blocking=True)


def _pinned_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that a GPU fills in its own time."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _joined(read: Row | None, fresh: Row | None, wanted: Wanted, missing: set[int]) -> Row:
    """Targets from both sources in the order of the batch's rows."""
    if read is None or fresh is None:
        only = read if fresh is None else fresh
        assert only is not None
        return only
    whole = {}
    for name in read:
        counts: tuple[list[int], list[int]] = ([], [])
        for i, at in enumerate(wanted.places):
            counts[i in missing].append(len(at))
        parts = (iter(read[name].split(counts[0])), iter(fresh[name].split(counts[1])))
        whole[name] = torch.cat([next(parts[i in missing]) for i in range(len(wanted.places))])
    return whole


def _head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits (M, V) as the loss sees them: rounded to the head's dtype before scale and softcap."""
    raw = nn.functional.linear(
        hidden.to(head.weight.device, head.weight.dtype), head.weight, head.bias
    )
    return shape_logits(raw.float(), head.scale, head.softcap)
