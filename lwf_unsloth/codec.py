"""A tokenizer seen as text to ids and nothing else: it adds no BOS, EOS, space or control token by
itself.

Everything here works on ids without special tokens; BOS and EOS are put where they belong by hand,
so a tokenizer that adds its own (``add_bos_token``, ``add_eos_token``, a post-processor) cannot
double them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from lwf_unsloth.errors import DataError
from lwf_unsloth.templates import PromptTemplate, text_tokenizer

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not learned."""

_ANCHORS = ("\n", ":", ".", "a", "0")  # texts that a continuation is encoded after
_BEGIN_NAME = re.compile(r"bos|begin|start(?!_header)|^<s>$|^\[cls\]$")
_TURN_MARKERS = ("im_start", "start_of_turn", "start_header", "turn")
_PAD_NAMES = ("pad",)
_SPARE_NAMES = ("reserved", "unused", "extra_id")


class Codec:
    """One tokenizer's ids for prompts, responses and passages.

    Attributes:
        bos: the BOS id in a list, or an empty list where the model has none (see `begin_id`).
        eos: the EOS id in a list; an empty list where the tokenizer has none.

    Raises:
        DataError: ``needs_eos`` and the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Any, *, needs_eos: bool = False) -> None:
        self._tokenizer = tokenizer
        if needs_eos:
            _require_eos(tokenizer)
        begin = begin_id(tokenizer)
        self.bos = [] if begin is None else [begin]
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._controls = _control_tokens(tokenizer)
        self._control_ids = set(self._controls.values())
        self._anchors: dict[str, list[int]] = {}

    def prompts(
        self, pairs: Sequence[tuple[str, str]], template: PromptTemplate
    ) -> list[list[int]]:
        """BOS and prompt of each (instruction, input); the template's control tokens stay
        control tokens.
        """
        own_text = template.with_input + template.without_input
        owned = [text for text in self._controls if text in own_text]
        if not owned:
            texts = [template.render(*pair) for pair in pairs]
            return [self.bos + ids for ids in self._plain(texts)]
        pattern = re.compile("|".join(re.escape(t) for t in sorted(owned, key=len, reverse=True)))
        return [self._marked_prompt(template.pieces(*pair), pattern) for pair in pairs]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as the continuation of a prompt, without EOS (also without the text of one)."""
        return self._continued([self._without_eos(text) for text in texts])

    def passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as the start of a sequence, without BOS and EOS (also without the text
        of one).
        """
        return self._plain([self._without_bos(self._without_eos(text)) for text in texts])

    def _marked_prompt(self, pieces: list[tuple[str, bool]], pattern: re.Pattern[str]) -> list[int]:
        """A prompt whose template holds control tokens: those become ids, all else is
        plain text.
        """
        runs, marks = [""], []
        for text, is_data in pieces:
            if is_data:
                runs[-1] += text
                continue
            end = 0
            for match in pattern.finditer(text):
                runs[-1] += text[end : match.start()]
                marks.append(self._controls[match.group()])
                runs.append("")
                end = match.end()
            runs[-1] += text[end:]
        ids = self._plain(runs[:1])[0]
        for mark, run in zip(marks, self._continued(runs[1:]), strict=True):
            ids += [mark, *run]
        return ids if ids[:1] == self.bos else self.bos + ids

    def _without_eos(self, text: str) -> str:
        """The text before the EOS text that ends it, however often that was written."""
        eos = self._tokenizer.eos_token
        while eos and text.rstrip().endswith(eos):
            text = text.rstrip()[: -len(eos)]
        return text

    def _without_bos(self, text: str) -> str:
        """The text after the BOS text that starts it."""
        bos = self._tokenizer.bos_token
        while self.bos and bos and text.startswith(bos):
            text = text[len(bos) :]
        return text

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that start a sequence; no control token among them."""
        encoded = self._encode(texts)
        return [
            self._broken_up(text, start=True) if self._control_ids.intersection(ids) else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in the middle of a sequence, where no tokenizer may put a space in front.

        A SentencePiece-like tokenizer writes "y" at the start of a text as "▁y". So each text is
        encoded after an anchor whose ids are then taken off; where the anchor and the text share a
        token (two newlines), the next anchor is tried.
        """
        found: list[list[int] | None] = [None if text else [] for text in texts]
        for anchor in _ANCHORS:
            open_places = [place for place, ids in enumerate(found) if ids is None]
            if not open_places:
                break
            lead = self._anchor(anchor)
            if not lead:
                continue
            encoded = self._encode([anchor + texts[place] for place in open_places])
            for place, ids in zip(open_places, encoded, strict=True):
                if ids[: len(lead)] == lead:
                    found[place] = ids[len(lead) :]
        done = []
        for text, after in zip(texts, found, strict=True):
            ids = self._encode([text])[0] if after is None else after
            bad = self._control_ids.intersection(ids)
            done.append(self._broken_up(text, start=False) if bad else ids)
        return done

    def _broken_up(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text in which the vocabulary itself matches a control token (Unigram models do).

        The control token's text is cut after its first character and encoded in two; what still
        comes out as a control token (a text of one character) is left out.
        """
        names = sorted(self._controls, key=len, reverse=True)
        pattern = re.compile(
            "|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names)
        )
        ids: list[int] = []
        for part in pattern.split(text):
            if not part:
                continue
            if start and not ids:
                ids += self._encode([part])[0]
                continue
            lead = self._anchor("\n") or self._anchor("a")
            whole = self._encode([("\n" if self._anchor("\n") else "a") + part])[0]
            ids += whole[len(lead) :] if whole[: len(lead)] == lead else self._encode([part])[0]
        return [token for token in ids if token not in self._control_ids]

    def _anchor(self, text: str) -> list[int]:
        if text not in self._anchors:
            self._anchors[text] = self._encode([text])[0]
        return self._anchors[text]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without anything added; the text of control tokens is split like any text."""
        if not texts:
            return []
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        before = getattr(backend, "encode_special_tokens", None)
        try:
            batch = self._tokenizer(
                list(texts),
                add_special_tokens=False,
                split_special_tokens=True,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                verbose=False,
            )
        finally:
            if before is not None:
                backend.encode_special_tokens = before
        return [list(ids) for ids in batch["input_ids"]]


def begin_id(tokenizer: Any) -> int | None:
    """The id that starts every sequence of this model, or None.

    It is the BOS token where the tokenizer puts it in front by itself, or where its name says that
    it begins a text (``<bos>``, ``<s>``, ``<|begin_of_text|>``) even if ``add_bos_token`` is off:
    Gemma and Llama models are lost without it. A BOS that equals EOS, or that opens a chat turn
    (``<|im_start|>``), is left to tokenizers that add it themselves.
    """
    begin: int | None = tokenizer.bos_token_id
    if begin is None:
        return None
    own = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    if own[:1] == [begin]:
        return begin
    if begin == tokenizer.eos_token_id:
        return None
    name = str(tokenizer.bos_token).lower()
    if any(marker in name for marker in _TURN_MARKERS):
        return None
    return begin if _BEGIN_NAME.search(name) else None


def check_tokenizer(tokenizer: Any) -> Any:
    """See that the tokenizer can end and pad a row; returns it.

    Where it has no pad token an existing token is taken, so the embedding never grows: one named
        pad, then a reserved one, then unk, then BOS; the last resort is EOS, which is safe here
        because padding is told from EOS by its place and not by its id. The choice is logged.

    Raises:
        DataError: not a tokenizer, no EOS, or an EOS that is not in the vocabulary.
    """
    inner = text_tokenizer(tokenizer)
    if not hasattr(inner, "eos_token_id"):
        raise DataError(
            f"The tokenizer is a {type(tokenizer).__name__}, but rows are encoded with the one "
            "that load_model gave beside the model, which carries the prompt template. Pass that."
        )
    _require_eos(inner)
    if inner.pad_token is None or inner.pad_token_id is None:
        size = len(inner)
        inner.pad_token = _spare_token(inner)
        if len(inner) != size:
            raise DataError(
                f"Setting the pad token {inner.pad_token!r} grew the vocabulary from {size} to "
                f"{len(inner)}; the model's embedding has no such row. Set tokenizer.pad_token "
                "to a "
                "token that exists."
            )
        logger.warning(
            "The tokenizer has no pad token: %r (id %d), which exists already, is taken.",
            inner.pad_token,
            inner.pad_token_id,
        )
    begin = begin_id(inner)
    own = list(inner("a", add_special_tokens=True, verbose=False)["input_ids"])
    if begin is not None and own[:1] != [begin]:
        logger.warning(
            "The tokenizer does not add its BOS %r by itself; every row gets it here.",
            inner.bos_token,
        )
    return tokenizer


def _require_eos(tokenizer: Any) -> None:
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    unknown = eos_id == tokenizer.unk_token_id and eos != tokenizer.unk_token
    if eos is not None and eos_id is not None and not unknown:
        return
    got = (
        "no EOS token" if eos is None else f"the EOS token {eos!r}, which is not in its vocabulary"
    )
    raise DataError(
        f"The tokenizer has {got}. Every response must end in EOS, or the model never learns to "
        "stop. "
        "Set tokenizer.eos_token to the model's own end token."
    )


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of every special token but unk, which stands for text that has no token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    controls = {token.content: place for place, token in added.items() if token.special}
    for text, place in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        controls[str(text)] = place
    unknown = tokenizer.unk_token
    keeps = unknown in (tokenizer.eos_token, tokenizer.bos_token)
    return {t: place for t, place in controls.items() if t and (t != unknown or keeps)}


def _spare_token(tokenizer: Any) -> str:
    """A token of the vocabulary that can pad: see `check_tokenizer` for the order."""
    vocabulary = tokenizer.get_vocab()
    marked = sorted(
        (text for text in vocabulary if re.fullmatch(r"[<\[].*[>\]]", text)),
        key=vocabulary.__getitem__,
    )
    for names in (_PAD_NAMES, _SPARE_NAMES):
        for text in marked:
            if any(name in text.lower() for name in names) and text != tokenizer.eos_token:
                return str(text)
    for text in (tokenizer.unk_token, tokenizer.bos_token):
        if text is not None and text in vocabulary and text != tokenizer.eos_token:
            return str(text)
    return str(tokenizer.eos_token)
