"""The README.md of a saved adapter: what it was made of and how to load it; no paths, no tokens."""

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from lwf_unsloth.embedded import EMBEDDED
from lwf_unsloth.secret_texts import SECRET_KEYS, without_secrets
from lwf_unsloth.unseen import shown

_PATH = re.compile(r"(?<![\w:/.~])(?:[A-Za-z]:)?(?:[\\/][\w.+ @-]+){2,}[\\/]?")
_PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
"""Names that need no quotes in YAML."""
_SIGNS = re.compile(r"[&<>|`*\[\]$\\#]")
"""What markdown, HTML or a formula would act on."""


def adapter_card(record: Mapping[str, Any], card: Mapping[str, Any], kind: str = "adapter") -> str:
    """The model card as markdown with the hub's front matter.

    Args:
        record: What `lwf.json` holds.
        card: What else to tell: headings and, below them, values, mappings or lists.
        kind: "adapter" or "merged".

    Returns:
        The text.
    """
    base = record["base"]["name"]
    embedded = EMBEDDED.get(base)
    front = ["---", f"base_model: {_yaml(embedded.hub_id if embedded else base)}"]
    if kind == "adapter":
        front += ["library_name: peft", "tags: [lora, unsloth, lwf_unsloth]"]
    else:
        front += ["library_name: transformers", "tags: [unsloth, lwf_unsloth]"]
    front += ["pipeline_tag: text-generation"]
    if embedded:
        front += [f"license: {embedded.licence_id}"]
    loaded = record.get("loaded") or {}
    title = f"# {'Adapter' if kind == 'adapter' else 'Merged model'} for {_text(base)}"
    parts = ["\n".join([*front, "---"]), title, _use(base, record, kind)]
    if embedded and embedded.terms:
        parts.append(embedded.terms)
    if loaded:
        parts.append("## Base and LoRA\n\n" + _block(_base_facts(loaded)))
    for heading, value in card.items():
        if str(heading).lower() not in SECRET_KEYS:
            parts.append(f"## {_text(heading).capitalize()}\n\n{_block(value)}")
    parts.append("## Prompt template\n\n" + _block(record.get("template") or {}))
    parts.append("## Versions\n\n" + _block(record.get("versions") or {}))
    return "\n\n".join(parts) + "\n"


def _use(base: str, record: Mapping[str, Any], kind: str) -> str:
    """How to load it, and on what."""
    eos, base = _code(str(record.get("eos_token"))), _code(base)
    if kind == "merged":
        return (
            "The adapter's weights are added to its base, stored in 16 bits. The adapter was "
            f"trained on {(record.get('loaded') or {}).get('bits', '?')}-bit weights, so a few "
            f"answers may differ. Answers end with {eos}."
        )
    return (
        f"LoRA weights alone; they need the base {base}, in the precision named below (on "
        "another one the answers differ a little).\n\n    from lwf_unsloth import "
        'load_adapter\n    model, tokenizer = load_adapter("this folder")\n\nor, with PEFT '
        'alone, `PeftModel.from_pretrained(base_model, "this folder")`. Answers end with '
        f"{eos}."
    )


def _base_facts(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of `LoadedModel.to_dict` that a reader needs."""
    names = ("bits", "quantization", "dtype", "compute_dtype", "device", "trainable")
    return {**{name: loaded.get(name) for name in names}, **(loaded.get("lora") or {})}


def _block(value: Any) -> str:
    """A mapping as a table, a list as a list, anything else as a line; a mapping of mappings with
    the same keys as a table with these as heads.
    """
    if isinstance(value, Mapping) and (heads := _heads(value)):
        table = [["", *map(_text, heads)]]
        table += [[_text(key), *(_text(row[head]) for head in heads)] for key, row in value.items()]
        top, *body = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in table]
        return "\n".join([top, "|" + "---|" * (len(heads) + 1), *body])
    if isinstance(value, Mapping):
        rows = [(key, one) for key, one in value.items() if str(key).lower() not in SECRET_KEYS]
        lines = [f"| {_text(key)} | {_text(one)} |" for key, one in rows]
        return "\n".join(["| | |", "|---|---|", *lines]) if lines else "(none)"
    if isinstance(value, (list, tuple)):
        return "\n".join(f"- {_text(one)}" for one in value) or "(none)"
    return _text(value)


def _heads(value: Mapping[str, Any]) -> list[str]:
    """The keys that all of several mappings share; empty where they are no such table."""
    rows = list(value.values())
    if len(rows) < 2 or not all(isinstance(row, Mapping) for row in rows):
        return []
    heads = list(rows[0])
    secret = any(str(key).lower() in SECRET_KEYS for key in [*heads, *value])
    return heads if not secret and all(list(row) == heads for row in rows) else []


def _text(value: Any) -> str:
    """A value on one line of a markdown table: paths cut to their last part, secrets left out."""
    if isinstance(value, Mapping):
        inner = [f"{k} {_text(v)}" for k, v in value.items() if str(k).lower() not in SECRET_KEYS]
        return ", ".join(inner)
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(one) for one in value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = _PATH.sub(lambda found: _last(found.group()), without_secrets(text))
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|"}
    text = _SIGNS.sub(lambda one: named.get(one.group(), f"&#{ord(one.group())};"), shown(text))
    return text.replace("\n", " ⏎ ")


def _code(text: str) -> str:
    """Text as inline code, where nothing is markup; its fence is longer than any inside."""
    text = shown(without_secrets(text)).replace("\n", " ⏎ ")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _yaml(text: str) -> str:
    """A name as one YAML value."""
    return text if _PLAIN.fullmatch(text) else json.dumps(shown(text), ensure_ascii=False)


def _last(path: str) -> str:
    """The last part of a path."""
    return PurePosixPath(path.replace("\\", "/")).name
