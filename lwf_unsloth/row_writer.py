"""The model writes its own rehearsal rows, before it is trained: no data of others is needed.

Rows written by the base model, in the template that is served, keep it as well as gold ones. A
model that answers and stops writes instructions and answers; one that never stops would be held to
not stopping by them, so it writes plain passages.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import tqdm

from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import on_cuda
from lwf_unsloth.cache_parts import digest
from lwf_unsloth.checks import check_count
from lwf_unsloth.codec import Codec, begin_id
from lwf_unsloth.decoding import Decoding, row_seed
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.generation import Prompt, continue_ids, read_prompts
from lwf_unsloth.records import prompts_ids
from lwf_unsloth.rows import prompt_key
from lwf_unsloth.teacher import OwnTeacher, make_teacher
from lwf_unsloth.teacher_identity import teacher_identity
from lwf_unsloth.templates import PromptTemplate, get_template, text_tokenizer
from lwf_unsloth.written_file import save_written, written_before
from lwf_unsloth.written_rows import (
    ASKING,
    OPENINGS,
    PROBES,
    Sieve,
    WrittenReport,
    WrittenRows,
    head_of,
)

logger = logging.getLogger(__name__)

KINDS = ("auto", "answers", "prompts", "passages")
STOPS = 0.25
"""Share of trial answers that must end for a model to count as one that stops."""
SETTINGS = ("temperature", "top_p", "seed", "max_new_tokens")
INSTRUCTION_TOKENS = 64
"""Most tokens of an instruction that the model writes."""
MOST_ROWS = 100_000
TRIES = 4
"""Candidates begun for each row that is wanted, before it is given up."""


@checked()
def self_rehearsal(
    model: Any,
    tokenizer: Any,
    prompts: Prompt | Iterable[Prompt] | None = None,
    *,
    rows: int = 200,
    kind: str = "auto",
    seed: int = 42,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    adapter: bool = False,
    path: str | Path | None = None,
    rewrite: bool = False,
    progress: bool = True,
) -> WrittenRows:
    """Lets the base model write rehearsal rows; the same seed gives the same rows.

    Args:
        model: From `load_model`; left as it was found.
        tokenizer: Its tokenizer, which carries the prompt template.
        prompts: Instructions to answer, texts or rows; None lets the model write them too.
        rows: Rows wanted, 1 or more.
        kind: "answers" to `prompts`; "prompts" and their answers; "passages" of plain text; "auto"
            tries a few prompts and takes passages where less than a quarter of the answers end.
        seed: Of the sampling.
        max_new_tokens: Most tokens of an answer or passage; a row that reaches it is kept, marked
            `whole: false`, and gets no EOS.
        batch_size: Rows at a time; None is 64 on a GPU, 16 on a CPU.
        temperature: Of the sampling, above 0; "answers" may be greedy (0).
        top_p: Share of the probability that is drawn from.
        adapter: True writes with the adapter on: the model as it stands, for a second task.
        path: JSONL file to keep them in; one that is there is taken, if this model wrote it so.
        rewrite: Write a file anew that something else wrote (the old one is kept as `.old`).
        progress: Show a bar.

    Returns:
        The rows, ready as `rehearsal_dataset`, with `.report`.

    Raises:
        ConfigError: A setting out of range, or prompts that would have no effect.
        DataError: Not a row could be kept, or the file at `path` has another origin.
        ModelError: The model is in use by another thread.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p if temperature else 1.0, seed=seed)
    template = get_template(tokenizer)
    _check(rows, kind, prompts, decoding, template)
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise ConfigError(f"batch_size is {batch_size!r}, but must be None or a number from 1.")
    pairs = None if prompts is None else _distinct(read_prompts(prompts))
    origin = {
        **writer_identity(model, tokenizer, adapter),
        "kind": kind,
        "prompts": None if pairs is None else digest(json.dumps(pairs))[:16],
        **{name: getattr(decoding, name) for name in SETTINGS},
    }
    if path is not None and Path(path).exists():
        saved = written_before(path, origin, rows, rewrite=rewrite)
        if saved is not None:
            return saved
    size = batch_size or (64 if on_cuda() else 16)
    writer = _Writer(model, tokenizer, template, decoding, size, adapter)
    result = WrittenRows(*_written(writer, pairs, rows, kind, progress), origin)
    logger.info("%s", result.report)
    if path is not None:
        save_written(result, path)
    return result


def _check(
    rows: int, kind: str, prompts: Any, decoding: Decoding, template: PromptTemplate
) -> None:
    """Raises a ConfigError for settings out of range or without effect."""
    check_count("rows", rows)
    if rows > MOST_ROWS:
        raise ConfigError(
            f"rows is {rows}; a model that writes so many would never end. {MOST_ROWS} at most, "
            "and a few hundred are enough."
        )
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}, but must be one of {KINDS}: nothing else is written.")
    if decoding.greedy and kind != "answers":
        raise ConfigError(
            "temperature is 0: greedy decoding writes the same instruction or passage every time. "
            'Set it above 0 (the seed makes the rows repeatable), or take kind="answers".'
        )
    if kind == "answers" and prompts is None:
        raise ConfigError(
            'kind is "answers" but there are no prompts to answer. Give prompts, or take '
            'kind="prompts", which writes them too.'
        )
    if kind == "prompts" and not head_of(template):
        raise ConfigError(
            f"Nothing in the template {template.name!r} stands before the instruction, so nothing "
            'leads the model to write one. Give prompts, or take kind="passages".'
        )
    if kind in ("prompts", "passages") and prompts is not None:
        raise ConfigError(
            f"kind is {kind!r}, so the prompts given would have no effect. Leave them out, or take "
            'kind="answers".'
        )


def _distinct(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The prompts without repeats; says how many there were."""
    found = {prompt_key({"instruction": one, "input": given}): (one, given) for one, given in pairs}
    if len(found) < len(pairs):
        logger.info(
            "%d of %d prompts are repeats: asked once.", len(pairs) - len(found), len(pairs)
        )
    return list(found.values())


def writer_identity(model: Any, tokenizer: Any, adapter: bool) -> dict[str, Any]:
    """Which weights write, with which tokenizer and template."""
    writer: Any = SimpleNamespace(model=model)
    if hasattr(model, "peft_config"):
        writer = make_teacher(model) if adapter else OwnTeacher(model)
    found: dict[str, Any] = {**teacher_identity(writer, tokenizer, "")}
    del found["dtype"]  # rounding, which the samples of the weights show already
    return found


# ------------------------------------------------------------------------- writing


@dataclass
class _Writer:
    """One model with its settings."""

    model: Any
    tokenizer: Any
    template: PromptTemplate
    decoding: Decoding
    batch_size: int
    adapter: bool

    def __call__(
        self, starts: list[list[int]], first: int, max_new_tokens: int | None = None
    ) -> list[tuple[str, bool]]:
        """Text after each start, and whether the model ended it; `first` numbers the rows."""
        decoding = self.decoding
        if max_new_tokens is not None:
            decoding = replace(
                decoding, max_new_tokens=min(max_new_tokens, decoding.max_new_tokens)
            )
        found = self._continued(starts, first, decoding)
        decode = text_tokenizer(self.tokenizer).decode
        return [
            (decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), ended)
            for ids, ended in found
        ]

    def _continued(
        self, starts: list[list[int]], first: int, decoding: Decoding
    ) -> list[tuple[list[int], bool]]:
        """New ids of each start; where the batch does not fit the device, in halves."""
        seeds = [row_seed(decoding.seed, ids, first + place) for place, ids in enumerate(starts)]
        around = (self.model, self.tokenizer)
        try:
            return continue_ids(*around, starts, seeds, decoding, adapter=self.adapter)
        except torch.OutOfMemoryError:
            half = len(starts) // 2
            if not half:
                raise
        torch.cuda.empty_cache()
        logger.info("%d rows at a time do not fit the memory: %d are written.", 2 * half, half)
        self.batch_size = min(self.batch_size, half)
        parts = (starts[:half], first), (starts[half:], first + half)
        return [row for part in parts for row in self._continued(*part, decoding)]

    def batches(self, count: int) -> list[range]:
        """The numbers 0 to count - 1 in batches."""
        size = self.batch_size
        return [range(at, min(at + size, count)) for at in range(0, count, size)]


def _written(
    writer: _Writer, pairs: list[tuple[str, str]] | None, rows: int, kind: str, progress: bool
) -> tuple[list[dict[str, Any]], WrittenReport]:
    """Chooses the kind, writes, reports."""
    started, note = time.perf_counter(), ""
    if kind == "auto":
        kind, note = _choose(writer, pairs)
    sieve = Sieve(writer.template, _controls(writer.tokenizer))
    with tqdm(total=rows, desc="rehearsal", unit="row", disable=not progress) as bar:

        def enough() -> bool:
            bar.update(min(len(sieve.rows), rows) - bar.n)
            return len(sieve.rows) >= rows

        if kind == "answers":
            _answer(writer, sieve, pairs or [], enough)
        elif kind == "prompts":
            _ask_and_answer(writer, sieve, rows, enough)
        else:
            _passages(writer, sieve, rows, enough)
    report = sieve.report(kind, rows, note)
    report.seconds = round(time.perf_counter() - started, 1)
    _tell_few(report, pairs)
    return sieve.rows[:rows], report


def _choose(writer: _Writer, pairs: list[tuple[str, str]] | None) -> tuple[str, str]:
    """The kind that suits the model, and why in one sentence."""
    name = writer.template.name
    if pairs is None and not head_of(writer.template):
        return "passages", f"Nothing in the template {name!r} leads to an instruction: passages."
    asked = pairs[: len(PROBES)] if pairs else [(probe, "") for probe in PROBES]
    ended = sum(end for _, end in writer(prompts_ids(writer.tokenizer, asked), 0))
    kind, what = "passages", "plain passages"
    if ended >= STOPS * len(asked):
        kind, what = ("answers",) * 2 if pairs else ("prompts", "instructions and answers")
    note = f"{ended} of {len(asked)} trial answers ended by themselves, so {what} are written."
    logger.info("%s", note)
    return kind, note


def _controls(tokenizer: Any) -> list[str]:
    """Texts of the control tokens."""
    inner = text_tokenizer(tokenizer)
    added = getattr(inner, "added_tokens_decoder", {}).values()
    return [*map(str, inner.all_special_tokens), *(t.content for t in added if t.special)]


def _answer(
    writer: _Writer,
    sieve: Sieve,
    pairs: list[tuple[str, str]],
    enough: Callable[[], bool],
    first: int = 0,
) -> None:
    """Answers prompts in their order until there are enough."""
    for batch in writer.batches(len(pairs)):
        asked = [pairs[i] for i in batch]
        starts = prompts_ids(writer.tokenizer, asked)
        for pair, found in zip(asked, writer(starts, first + batch[0]), strict=True):
            sieve.answer(*pair, *found)
        if enough():
            return


def _ask_and_answer(writer: _Writer, sieve: Sieve, rows: int, enough: Callable[[], bool]) -> None:
    """Writes instructions after the template's head, then their answers, a batch at a time."""
    codec, head = Codec(text_tokenizer(writer.tokenizer)), _head_ids(writer)
    begun = [
        (words, head + ids) for words, ids in zip(ASKING, codec.responses(ASKING), strict=True)
    ]
    waiting: list[tuple[str, str]] = []
    answered, limit = 0, TRIES * rows + writer.batch_size
    for batch in writer.batches(limit):
        starts = [begun[number % len(begun)] for number in batch]
        written = writer([ids for _, ids in starts], batch[0], INSTRUCTION_TOKENS)
        for (words, _), (text, ended) in zip(starts, written, strict=True):
            found = sieve.instruction(words + text, ended)
            if found is not None:
                waiting.append((found, ""))
        whole = len(waiting) >= min(writer.batch_size, rows - len(sieve.rows))
        if whole or batch[-1] == limit - 1:
            before = sieve.tried
            _answer(writer, sieve, waiting, enough, answered)
            sieve.leave(len(waiting) - (sieve.tried - before))
            answered, waiting = answered + len(waiting), []
            if enough():
                return


def _head_ids(writer: _Writer) -> list[int]:
    """Ids of a prompt up to the place of the instruction."""
    head = head_of(writer.template)
    led = PromptTemplate("head", head + "{instruction}{input}", head + "{instruction}")
    return Codec(text_tokenizer(writer.tokenizer)).prompts([("", "")], led)[0]


def _begin(tokenizer: Any, number: int) -> list[int]:
    """Where a passage begins: the token that begins a text, else a common first word."""
    inner = text_tokenizer(tokenizer)
    begin = begin_id(inner)
    if begin is not None:
        return [begin]
    return Codec(inner).passages([OPENINGS[number % len(OPENINGS)]])[0]


def _passages(writer: _Writer, sieve: Sieve, rows: int, enough: Callable[[], bool]) -> None:
    """Writes plain text from its beginning."""
    decode = text_tokenizer(writer.tokenizer).decode
    worded = begin_id(text_tokenizer(writer.tokenizer)) is None
    for batch in writer.batches(TRIES * rows + writer.batch_size):
        starts = [_begin(writer.tokenizer, number) for number in batch]
        for start, (text, ended) in zip(starts, writer(starts, batch[0]), strict=True):
            sieve.passage((decode(start) if worded else "") + text, ended)
        if enough():
            return


def _tell_few(report: WrittenReport, pairs: list[tuple[str, str]] | None) -> None:
    """Says it when there are too few rows, or too few that end.

    Raises:
        DataError: There is none.
    """
    reasons = ", ".join(f"{why}: {count}" for why, count in report.dropped.items())
    advice = (
        'Try another temperature, more max_new_tokens or kind="passages", or give rehearsal rows '
        "of your own (load_alpaca, load_text)."
    )
    if not report.kept:
        raise DataError(
            f"None of the {report.tried} rows that the model wrote ({report.kind}) can be used "
            f"({reasons}), so nothing would be rehearsed. {advice}"
        )
    if report.kept < report.asked:
        only = f" from {len(pairs)} prompts" if pairs is not None else ""
        logger.warning(
            "%d of %d rehearsal rows could be had%s, of %d tried (%s). They will be used; %s",
            report.kept,
            report.asked,
            only,
            report.tried,
            reasons or "none dropped",
            "give more prompts for more rows." if pairs is not None else advice,
        )
    if report.kind != "passages" and report.ended < STOPS * report.kept:
        logger.warning(
            "The model ended only %d of %d answers by itself: KL on such rows would keep a model "
            'that learns to stop from stopping. Take kind="passages".',
            report.ended,
            report.kept,
        )
