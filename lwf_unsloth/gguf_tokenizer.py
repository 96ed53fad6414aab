"""Rebuilds a model's tokenizer from the tables in its GGUF file.

transformers' own conversion gets both embedded models wrong: SmolLM2 loses its end token and the
rule that every digit stands alone; Gemma falls apart into single letters. The tables hold all that
is needed.
"""

from pathlib import Path
from typing import Any

from lwf_unsloth.backend import prepare
from lwf_unsloth.errors import ModelError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Token types of GGUF (`tokenizer.ggml.token_type`) that the rebuild tells apart."""

SPACE = "\u2581"
"""How SentencePiece writes a space inside a piece."""


def read_tables(gguf: Path) -> dict[str, Any]:
    """Reads the `tokenizer.*` fields of a GGUF file.

    Args:
        gguf: The file.

    Returns:
        Field name without its `tokenizer.ggml.` or `tokenizer.` prefix -> value (lists for tokens,
        scores, token_type and merges).
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    return {
        name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.")
    }


def build_tokenizer(tables: dict[str, Any], *, pad_token: str | None = None) -> Any:
    """Builds a fast tokenizer that gives the ids the model was trained with.

    Special tokens come from the file's own ids. BOS is put in front where the file says so
    (`add_bos_token`), EOS never: who writes the end of a text decides that.

    Args:
        tables: What `read_tables` returned.
        pad_token: An existing token to pad with, where the file's own pad token is its EOS (padding
            and the end of an answer must stay distinct).

    Returns:
        A `PreTrainedTokenizerFast`.

    Raises:
        ModelError: A kind of tokenizer that is not known here, or pad would equal EOS.
    """
    prepare()
    from transformers import PreTrainedTokenizerFast

    kind = tables["model"]
    if kind == "gpt2" and tables.get("pre") == "smollm":
        backend = _byte_level(tables)
    elif kind == "llama":
        backend = _sentencepiece(tables)
    else:
        raise ModelError(
            f"This GGUF file holds a {kind!r} tokenizer ({tables.get('pre')!r}); the rebuild knows "
            "the byte-level BPE of SmolLM2 and the SentencePiece BPE of Gemma. A wrong split ruins "
            "a model without an error, so it stops here: load a safetensors folder instead."
        )
    _add_known_tokens(backend, tables)
    names = _special_names(tables, pad_token)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        add_bos_token=bool(tables.get("add_bos_token", False)),  # its post-processor is saved too
        add_eos_token=False,
        chat_template=tables.get("chat_template"),
        **names,
    )


def _special_names(tables: dict[str, Any], pad_token: str | None) -> dict[str, str]:
    """The special tokens by the file's ids, padding replaced where asked, and checked."""
    tokens: list[str] = tables["tokens"]
    ids = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    names = {name: tokens[tables[key]] for name, key in ids.items() if key in tables}
    if pad_token is not None:
        names["pad_token"] = pad_token
    pad = names.get("pad_token")
    if pad == names["eos_token"] or pad not in tokens:
        raise ModelError(
            f"The pad token {pad!r} is the EOS token or not in the vocabulary; it must be a token "
            "of its own, or the end of an answer can't be told from padding. Name another one."
        )
    return names


def _byte_level(tables: dict[str, Any]) -> Any:
    """SmolLM2: each digit alone, then GPT-2's byte-level BPE with the file's merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tables["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in tables["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tables: dict[str, Any]) -> Any:
    """Gemma: BPE over the text with its spaces marked, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tables["tokens"])}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(tables),
            unk_token=tables["tokens"][tables["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _merges_from_scores(tables: dict[str, Any]) -> list[tuple[str, str]]:
    """The merge list that a SentencePiece BPE model keeps only implicitly.

    SentencePiece joins the neighbours whose joined piece scores highest. A rank per pair says the
    same: every split of every piece into two pieces, ordered by the score of the joined piece.
    """
    tokens: list[str] = tables["tokens"]
    scores: list[float] = tables["scores"]
    known = {t for t, kind in zip(tokens, tables["token_type"], strict=True) if kind == NORMAL}
    ranked = []
    for piece, score in zip(tokens, scores, strict=True):
        if piece not in known:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                ranked.append((-score, left, right))
    ranked.sort(key=lambda entry: entry[0])
    return [(left, right) for _, left, right in ranked]


def _add_known_tokens(backend: Any, tables: dict[str, Any]) -> None:
    """Marks control tokens as special, and user-defined ones as whole, matched before merging."""
    from tokenizers import AddedToken

    tokens, kinds = tables["tokens"], tables["token_type"]
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    whole = [t for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in whole])
