"""A loaded model as lm-evaluation-harness sees one: log-likelihoods and answers, in memory.

Log-likelihoods go through final hidden states and the head of the scored tokens alone, by the
kernels that `score` uses, so that Unsloth's fast paths (which hand out no logits unless asked) and
a vocabulary of 256,000 are no matter. Answers come from the same decoding as `generate`. Imported
only where lm_eval is installed.
"""

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lwf_unsloth.bars import batch_bar
from lwf_unsloth.batches import LwFCollator
from lwf_unsloth.codec import begin_id
from lwf_unsloth.decoding import Decoding, row_seed
from lwf_unsloth.generation import context_limits, continue_ids
from lwf_unsloth.hidden import model_hidden, model_logits
from lwf_unsloth.locks import kept_state
from lwf_unsloth.objective import Objective, probe_tokens
from lwf_unsloth.records import prompt_ids
from lwf_unsloth.scoring import scoring_mode
from lwf_unsloth.templates import text_tokenizer
from lwf_unsloth.token_stats import token_stats

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Length of an answer where a task sets none, as lm-evaluation-harness has it."""

Pair = tuple[Any, list[int], list[int]]
"""What was asked, ids of the context, ids of the continuation."""


class LoadedLM(TemplateLM):  # type: ignore[misc,unused-ignore]
    """The model as it stands (adapter on or off is the caller's), left as it was found."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        seed: int = 0,
        templated: Collection[str] | None = (),
        max_new_tokens: int | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: The model, PEFT or not.
            tokenizer: Its tokenizer, which carries the prompt template.
            batch_size: Sequences at a time.
            seed: Of the sampling, for tasks that sample.
            templated: Tasks whose prompts are put into the served template; None: all that want an
                answer.
            max_new_tokens: Most tokens of an answer, where the task's own limit is higher.
        """
        super().__init__()
        self.model = model
        self.tokenizer = text_tokenizer(tokenizer)
        self.batch_size = batch_size
        self.cut = 0
        """Contexts that lost their beginning, for want of positions."""
        self.shortened = 0
        """Answers that were given fewer tokens than their task allows."""
        self._served = tokenizer
        self._seed = seed
        self._templated = templated
        self._max_new_tokens = max_new_tokens
        self._begin = begin_id(self.tokenizer)
        self._objective: Objective | None = None
        self._device = model.get_input_embeddings().weight.device

    @property
    def eot_token_id(self) -> int:
        """The terminator."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name."""
        return str(self.tokenizer.name_or_path)

    @property
    def max_length(self) -> int:
        """Positions the model has and was loaded for."""
        return min([n for n in context_limits(self.model) if n is not None and n > 0], default=2048)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, with BOS exactly once where the model begins with one."""
        ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        if self._begin is None or add_special_tokens is False or ids[:1] == [self._begin]:
            return ids
        return [self._begin, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihood (nats) of continuations of contexts, and whether each is the greedy one.

        The bar is that of the forwards.
        """
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihood (nats) of whole texts, in windows of the model's length."""
        owners, pairs = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                owners.append(number)
                pairs.append((None, context, continuation))
        sums = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[owner] += nats
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether it is the greedy one.

        Continuations of one context that differ in their last token alone (the letters of a
        multiple choice) share one forward.
        """
        shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_asked, context, continuation) in enumerate(requests):
            whole = context + continuation
            self.cut += len(whole) > self.max_length + 1
            shared[tuple(whole[-(self.max_length + 1) : -1])].append(number)
        inputs = sorted(shared, key=len, reverse=True)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with kept_state(self.model, self._served), scoring_mode(self.model):
            for at in batch_bar(range(0, len(inputs), self.batch_size), "loglikelihood"):
                batch = inputs[at : at + self.batch_size]
                owners = [shared[ids] for ids in batch]
                answers = [[requests[number][2] for number in row] for row in owners]
                for row, sums in zip(owners, self._sums(batch, answers), strict=True):
                    for number, value in zip(row, sums, strict=True):
                        found[number] = value
        return found

    def _sums(
        self, inputs: Sequence[tuple[int, ...]], answers: Sequence[Sequence[list[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """One forward: for each input (without its last token) the value of each continuation."""
        collate = LwFCollator(self.tokenizer.pad_token_id or 0)
        rows = [{"input_ids": list(ids), "labels": list(ids)} for ids in inputs]
        batch = {name: tensor.to(self._device) for name, tensor in collate(rows).items()}
        if self._objective is None:
            self._objective = Objective.of(self.model, None, probe_tokens(rows[0], self._device))
        full = self._objective.full_logits
        forward = model_logits if full else model_hidden
        states = forward(self.model, batch["input_ids"], batch["attention_mask"])  # (B, T, H or V)
        where, labels, owner = _places(inputs, answers, self._device)
        stats = token_stats(
            states[where[0], where[1]], labels, None if full else self._objective.head
        ).tuned
        size = sum(map(len, answers))
        zeros = torch.zeros(size, dtype=torch.float64, device=stats.nll.device)
        owner = owner.to(stats.nll.device)
        nats = zeros.index_add(0, owner, -stats.nll.double()).tolist()
        wrong = zeros.index_add(0, owner, 1 - stats.correct.double()).tolist()
        values = iter([(value, miss == 0) for value, miss in zip(nats, wrong, strict=True)])
        return [[next(values) for _ in row] for row in answers]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the task's stop texts."""
        groups: dict[Decoding, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[self._decoding(request.args[1])].append(number)
        texts = [""] * len(requests)
        for decoding, numbers in groups.items():
            prompts = {number: self._prompt(requests[number], decoding) for number in numbers}
            order = sorted(numbers, key=lambda number: -len(prompts[number]))
            for at in batch_bar(range(0, len(order), self.batch_size), "generate"):
                batch = order[at : at + self.batch_size]
                starts = [prompts[number] for number in batch]
                seeds = [row_seed(self._seed, ids, 0) for ids in starts]
                answers = continue_ids(self.model, self._served, starts, seeds, decoding)
                for number, (ids, _) in zip(batch, answers, strict=True):
                    texts[number] = _until(self._text(ids), requests[number].args[1].get("until"))
        return texts

    def _decoding(self, given: dict[str, Any]) -> Decoding:
        """The settings of an answer from a task's generation_kwargs."""
        wanted = int(given.get("max_gen_toks") or given.get("max_new_tokens") or MAX_NEW_TOKENS)
        if self._max_new_tokens is not None:
            wanted = min(wanted, self._max_new_tokens)
        new = min(wanted, max(1, self.max_length // 2))
        self.shortened += new < wanted
        temperature = float(given.get("temperature") or 0.0)
        if not given.get("do_sample", temperature > 0) or temperature == 0:
            return Decoding(new)
        return Decoding(new, temperature, float(given.get("top_p") or 1.0), seed=self._seed)

    def _prompt(self, request: Any, decoding: Decoding) -> list[int]:
        """Ids of a context: in the served template for instructions, else as the task wrote it."""
        context = request.args[0]
        if self._templated is None or request.task_name in self._templated:
            ids = prompt_ids(self._served, context)
        else:
            ids = self.tok_encode(context)
        room = self.max_length - decoding.max_new_tokens
        self.cut += len(ids) > room
        return ids[-room:]

    def _text(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _places(
    inputs: Sequence[tuple[int, ...]], answers: Sequence[Sequence[list[int]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the scored tokens are predicted: (2, N) row and position, (N,) ids, (N,) owner."""
    rows: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    owner = 0
    for row, (ids, continuations) in enumerate(zip(inputs, answers, strict=True)):
        for continuation in continuations:
            kept = continuation[-len(ids) :]  # what a window of the model's length can hold
            rows += [row] * len(kept)
            positions += range(len(ids) - len(kept), len(ids))
            labels += kept
            owners += [owner] * len(kept)
            owner += 1
    where = torch.tensor([rows, positions], dtype=torch.long, device=device)
    return (
        where,
        torch.tensor(labels, dtype=torch.long, device=device),
        torch.tensor(owners, dtype=torch.long, device=device),
    )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop text."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text
