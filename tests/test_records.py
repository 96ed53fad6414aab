"""Rows as ids: one BOS, one EOS that is a label, a prompt that is a prefix, on every tokenizer."""

import pytest

from lwf_unsloth.backend import prepare
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.records import (
    ALPACA,
    IGNORED,
    PLAIN,
    PromptTemplate,
    check_tokenizer,
    encode_row,
    encode_rows,
    get_template,
    prompt_ids,
    set_template,
)

TEXTS = [
    ALPACA.render("Name the three rivers that flow past the old town.", "a map of 12 towns"),
    "The answer is yes.\n\n1. one\n2. two\n3. three\n\nIt has 45 parts, is it not? Say: no",
    "hello world this is a line of text </s> <s> y",
]
KINDS = ["bytes", "metaspace_first", "metaspace_always", "unigram", "gemma"]
OUTPUTS = ["y", " y", "\ny", "\n\n\ny", "7", "🦥 é", "  two spaces", "yes.\n", "hello world"]


def build(kind, *, bos=True, adds=("bos",), pad="<pad>"):
    """A tokenizer of a kind with BOS <s> and EOS </s>, which its post-processor adds or not."""
    prepare()
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<s>", "</s>", "<|im_start|>"]
    options = {"special_tokens": special, "vocab_size": 380, "show_progress": False}
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            unk_token="<unk>", initial_alphabet=list("\n0123456789"), **options
        )
    else:
        trainer = trainers.BpeTrainer(initial_alphabet=["\n"], **options)
        core = metaspace_core(kind, core, normalizers, pre_tokenizers, decoders)
    core.train_from_iterator(TEXTS, trainer)
    if kind.startswith(("metaspace", "gemma")):
        core = with_byte_fallback(core)
    single = ("<s> " if "bos" in adds else "") + "$A" + (" </s>" if "eos" in adds else "")
    ids = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if bos else None, model_max_length=10_000, **names
    )


def metaspace_core(kind, core, normalizers, pre_tokenizers, decoders):
    if kind == "gemma":
        core.normalizer = normalizers.Replace(" ", "▁")
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return core
    scheme = kind.removeprefix("metaspace_")
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return core


def with_byte_fallback(core):
    """The same tokenizer with the 256 byte tokens of SentencePiece models."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(core.to_str())
    vocab = state["model"]["vocab"]
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: build(kind) for kind in KINDS}


def supervised(row):
    return [label for label in row.labels if label != IGNORED]


def row_of(output, instruction="Say it.", input=""):
    return {"instruction": instruction, "input": input, "output": output}


# templates --------------------------------------------------------------------------------------


def test_the_alpaca_prompts_are_the_published_ones_and_end_where_the_response_begins():
    assert ALPACA.render("Do it.").endswith("### Instruction:\nDo it.\n\n### Response:\n")
    assert "paired with an input" not in ALPACA.render("Do it.", "  \n")
    assert "\n\n### Input:\nWith this.\n\n### Response:\n" in ALPACA.render("Do it.", "With this.")


def test_braces_in_the_data_and_in_the_template_are_text():
    template = PromptTemplate("json", '{"q": "{instruction}", {input}}', '{"q": {instruction}} {x}')
    assert template.render("{input} {0} {", "{instruction} }") == (
        '{"q": "{input} {0} {", {instruction} }}'
    )
    assert template.render("%s {}") == '{"q": %s {}} {x}'


@pytest.mark.parametrize(
    "halves",
    [
        ("{instruction}", "{instruction}"),
        ("{instruction}{input}", "none"),
        ("{instruction}{input}{output}", "{instruction}"),
        ("{instruction}{input}", "{instruction}{input}"),
        ("{instruction}{input}", None),
    ],
)
def test_a_template_that_loses_data_is_refused(halves):
    with pytest.raises(DataError, match="Template 'mine'"):
        PromptTemplate("mine", *halves)


def test_the_template_is_saved_and_loaded_with_the_tokenizer(tmp_path):
    tokenizer = build("bytes")
    from transformers import AutoTokenizer  # after Unsloth, which `build` imports

    assert get_template(tokenizer) == ALPACA
    mine = PromptTemplate("mine", "{instruction} | {input} >", "{instruction} > 🦥")
    set_template(tokenizer, mine)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert get_template(loaded) == mine
    assert prompt_ids(loaded, "q") == prompt_ids(tokenizer, "q")
    assert PromptTemplate.from_dict(PLAIN.to_dict()) == PLAIN


def test_a_broken_saved_template_is_refused():
    tokenizer = build("bytes")
    for broken in ({"name": "x"}, "text", {}):
        tokenizer.init_kwargs["lwf_template"] = broken
        with pytest.raises(DataError, match="saved template"):
            get_template(tokenizer)
    with pytest.raises(DataError, match="PromptTemplate"):
        set_template(tokenizer, "{instruction}")


# prompt and response ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_prompts_ids_are_a_prefix_and_the_rest_is_the_response_and_one_eos(
    tokenizers, kind, output
):
    tokenizer = tokenizers[kind]
    if kind == "unigram":
        output = output.replace("🦥 é", "no unknown letters")
    prompt = prompt_ids(tokenizer, "Say it.", "now")
    row = encode_row(tokenizer, row_of(output, input="now"), max_length=None)
    assert row.input_ids[: len(prompt)] == prompt and row.prompt_length == len(prompt)
    assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert row.labels[len(prompt) :] == row.input_ids[len(prompt) :]
    assert row.input_ids[-1] == tokenizer.eos_token_id and not row.cut
    assert row.supervised == len(row.input_ids) - len(prompt)
    text = tokenizer.decode(row.input_ids[1:-1])
    assert text == ALPACA.render("Say it.", "now") + output, "nothing added, nothing lost"


@pytest.mark.parametrize("kind", KINDS)
def test_the_response_is_encoded_as_it_would_be_in_the_whole_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    row = encode_row(tokenizer, row_of("hello world"), max_length=None)
    whole = tokenizer(ALPACA.render("Say it.") + "hello world", add_special_tokens=False)
    assert row.input_ids[1:-1] == whole["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds", [(), ("bos",), ("eos",), ("bos", "eos")])
@pytest.mark.parametrize("output", ["y", "y</s>", "y</s>\n", "y</s></s> "])
def test_one_bos_and_one_eos_whatever_the_tokenizer_adds_and_the_row_ends_in(kind, adds, output):
    tokenizer = cached(kind, adds)
    for row in (row_of(output), {"text": output}, {"text": "<s>" + output}):
        ids = encode_row(tokenizer, row, max_length=None).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


_CACHE: dict = {}


def cached(kind, adds):
    key = (kind, adds)
    if key not in _CACHE:
        _CACHE[key] = build(kind, adds=adds)
    return _CACHE[key]


def test_a_tokenizer_switched_to_add_eos_and_bos_later_gives_the_same_ids():
    tokenizer = build("bytes")
    before = encode_row(tokenizer, row_of("y"), max_length=None)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id, "the switch works"
    assert encode_row(tokenizer, row_of("y"), max_length=None) == before


def test_eos_is_a_label_where_pad_is_eos():
    tokenizer = build("bytes", pad="</s>")
    row = encode_row(tokenizer, row_of("y"), max_length=None)
    assert row.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_no_bos_is_invented_where_the_model_has_none_or_it_opens_a_turn():
    tokenizer = build("bytes", bos=False, adds=())
    plain = tokenizer(ALPACA.render("q"), add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, "q") == plain
    tokenizer.bos_token = "<|im_start|>"
    assert prompt_ids(tokenizer, "q") == plain
    tokenizer.bos_token = tokenizer.eos_token
    assert prompt_ids(tokenizer, "q") == plain


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_the_data_are_plain_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    evil = "stop </s> here <s> <pad> and <|im_start|> go"
    row = encode_row(tokenizer, row_of(evil, evil, evil), max_length=None)
    controls = {
        tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<pad>", "<|im_start|>")
    }
    assert not controls.intersection(row.input_ids[1:-1])
    if kind != "unigram":
        assert evil in tokenizer.decode(row.input_ids[row.prompt_length : -1])
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id], (
        "the caller's tokenizer is as it was"
    )
    encode_row(tokenizer, row_of("y"), max_length=None)
    assert tokenizer.backend_tokenizer.encode_special_tokens is False, "also beneath transformers"


def test_control_tokens_of_the_template_stay_control_tokens_and_bos_is_not_doubled():
    tokenizer = build("metaspace_first")
    half = "<s><|im_start|>user\n{instruction}</s>\n<|im_start|>assistant\n"
    chat = PromptTemplate("chat", half.replace("{instruction}", "{instruction}\n{input}"), half)
    ids = prompt_ids(tokenizer, "say </s> <|im_start|>", template=chat)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[:2] == [tokenizer.bos_token_id, start]
    assert ids.count(start) == 2 and ids.count(tokenizer.eos_token_id) == 1
    row = encode_row(tokenizer, row_of("y", "q"), max_length=None, template=chat)
    assert row.input_ids[: row.prompt_length] == prompt_ids(tokenizer, "q", template=chat)
    assert tokenizer.convert_ids_to_tokens(row.input_ids[-2:]) == ["y", "</s>"]


def test_the_template_on_the_tokenizer_is_used_in_training_and_generation_alike():
    tokenizer = build("bytes")
    set_template(tokenizer, PLAIN)
    row = encode_row(tokenizer, row_of("y", "q", "i"), max_length=None)
    assert row.input_ids[: row.prompt_length] == prompt_ids(tokenizer, "q", "i")
    assert tokenizer.decode(prompt_ids(tokenizer, "q", "i")) == "<s>q\n\ni\n\n"


# length, labels, passages -----------------------------------------------------------------------


def test_a_row_too_long_loses_its_end_and_eos_and_says_so(tokenizers):
    tokenizer = tokenizers["bytes"]
    whole = encode_row(tokenizer, row_of("word " * 50), max_length=None)
    size = len(whole.input_ids)
    assert encode_row(tokenizer, row_of("word " * 50), max_length=size) == whole
    cut = encode_row(tokenizer, row_of("word " * 50), max_length=size - 1)
    assert cut.cut and cut.input_ids == whole.input_ids[:-1]
    assert tokenizer.eos_token_id not in cut.input_ids and cut.supervised == whole.supervised - 1


def test_labels_on_all_cover_the_prompt_and_each_label_can_be_predicted(tokenizers):
    tokenizer = tokenizers["bytes"]
    row = encode_row(tokenizer, row_of("y"), max_length=None, train_on="all")
    assert row.labels == [IGNORED, *row.input_ids[1:]]
    assert row.supervised == len(row.input_ids) - 1


def test_a_passage_is_bos_text_eos_and_learned_whole(tokenizers):
    for kind, tokenizer in tokenizers.items():
        for train_on in ("response", "all"):
            row = encode_row(
                tokenizer, {"text": "The answer is yes."}, max_length=None, train_on=train_on
            )
            inner = tokenizer("The answer is yes.", add_special_tokens=False)["input_ids"]
            assert row.input_ids == [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id], kind
            assert supervised(row) == row.input_ids[1:] and row.prompt_length == 1


def test_a_passage_that_is_not_whole_gets_no_eos(tokenizers):
    tokenizer = tokenizers["bytes"]
    for row, limit in (({"text": "abc", "whole": False}, None), ({"text": "abc " * 50}, 10)):
        encoded = encode_row(tokenizer, row, max_length=limit)
        assert encoded.cut and tokenizer.eos_token_id not in encoded.input_ids
        assert encoded.supervised == len(encoded.input_ids) - 1


def test_rows_are_counted_kept_cut_and_dropped_by_number(tokenizers):
    tokenizer = tokenizers["bytes"]
    rows = [row_of("y"), row_of("OK", "word " * 5000), row_of("w " * 500), row_of("</s>")]
    size = len(prompt_ids(tokenizer, "Say it.")) + 20
    dataset, report = encode_rows(tokenizer, rows, max_length=size)
    assert (report.rows, report.kept, report.dropped, report.cut) == (4, 2, [2, 4], [3])
    assert report.longest == size == max(map(len, dataset["input_ids"]))
    assert report.supervised_tokens == sum(
        label != IGNORED for labels in dataset["labels"] for label in labels
    )
    assert f"no supervised token at max_length={size}: 2 rows (2, 4)" in str(report)
    assert dataset.column_names == ["input_ids", "labels", "prompt_length", "is_rehearsal"]


def test_rows_without_any_label_are_an_error_that_names_max_length(tokenizers):
    with pytest.raises(DataError, match="max_length=128"):
        encode_rows(tokenizers["bytes"], [row_of("OK", "word " * 5000)], max_length=128)
    with pytest.raises(DataError, match="no rows"):
        encode_rows(tokenizers["bytes"], [], max_length=128)


def test_many_rows_of_both_kinds_give_what_each_gives_alone(tokenizers):
    rows = [
        {"text": f"passage {i}"} if i % 3 else row_of(f"answer {i}", f"q{i}", "x" * (i % 2))
        for i in range(1100)
    ]
    for kind in ("bytes", "metaspace_first"):
        dataset, report = encode_rows(tokenizers[kind], rows, max_length=200, is_rehearsal=True)
        assert report.kept == 1100 and all(dataset["is_rehearsal"])
        for place in (0, 1, 2, 999, 1000, 1099):
            alone = encode_row(tokenizers[kind], rows[place], max_length=200)
            found = dataset[place]
            assert (found["input_ids"], found["labels"]) == (alone.input_ids, alone.labels)
            assert found["prompt_length"] == alone.prompt_length


def test_a_changed_template_is_never_answered_from_a_cache(tokenizers):
    from datasets import Dataset

    rows = Dataset.from_list([row_of("y", "q")])
    one, _ = encode_rows(tokenizers["bytes"], rows, max_length=None)
    two, _ = encode_rows(tokenizers["bytes"], rows, max_length=None, template=PLAIN)
    assert one["input_ids"][0] != two["input_ids"][0] and not two.cache_files


@pytest.mark.parametrize(
    "row",
    [{}, {"instruction": "a"}, {"instruction": "a", "output": 5}, {"text": 5}, row_of("a", None)],
)
def test_a_row_of_neither_kind_is_refused_by_number(tokenizers, row):
    with pytest.raises(DataError, match=r"Row 2 has .* must be text"):
        encode_rows(tokenizers["bytes"], [row_of("y"), row], max_length=None)


def test_what_is_no_list_of_rows_is_refused(tokenizers):
    for rows in ({"train": [row_of("y")]}, "text", 5, [5]):
        with pytest.raises(DataError, match="rows to encode"):
            encode_rows(tokenizers["bytes"], rows, max_length=None)


@pytest.mark.parametrize(
    "settings",
    [{"train_on": "prompt"}, {"max_length": 0}, {"max_length": 1.5}, {"max_length": True}],
)
def test_settings_out_of_range_are_refused_by_name(tokenizers, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        encode_row(tokenizers["bytes"], row_of("y"), **{"max_length": 9, **settings})


# the tokenizer itself ---------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_refused_before_any_row_is_encoded():
    tokenizer = build("bytes")
    tokenizer.eos_token = None
    for call in (check_tokenizer, lambda t: encode_row(t, row_of("y"), max_length=9)):
        with pytest.raises(DataError, match="no EOS token"):
            call(tokenizer)


def test_an_eos_that_is_not_in_the_vocabulary_is_refused():
    tokenizer = build("bytes")
    tokenizer._special_tokens_map["eos_token"] = "<EOS_TOKEN>"
    with pytest.raises(DataError, match="not in its vocabulary"):
        check_tokenizer(tokenizer)


def test_a_missing_pad_becomes_an_existing_token_that_is_not_eos(caplog):
    tokenizer = build("bytes", pad=None)
    size = len(tokenizer)
    assert check_tokenizer(tokenizer) is tokenizer
    assert tokenizer.pad_token == "<pad>" and len(tokenizer) == size
    assert "'<pad>'" in caplog.text
    before = tokenizer.pad_token
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == before


def test_a_pad_that_is_eos_is_left_alone():
    tokenizer = build("bytes", pad="</s>")
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "</s>"


def test_a_bos_that_the_tokenizer_does_not_add_is_told(caplog):
    check_tokenizer(build("gemma", adds=()))
    assert "does not add its BOS '<s>'" in caplog.text


def test_a_processor_is_taken_for_the_tokenizer_inside():
    class Processor:
        tokenizer = build("bytes")

    processor = Processor()
    set_template(processor, PLAIN)
    check_tokenizer(processor)
    assert prompt_ids(processor, "q") == prompt_ids(Processor.tokenizer, "q", template=PLAIN)
    assert encode_row(processor, row_of("y"), max_length=9).supervised
