"""Rehearsal rows that the model writes itself: which are kept, and that they come again."""

import json
import logging
import shutil

import pytest
import torch
from conftest import build_tokenizer

from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.records import ALPACA, PLAIN, PromptTemplate, encode_row, prompt_ids, set_template
from lwf_unsloth.written_file import load_written, save_written
from lwf_unsloth.written_rows import (
    ASKING,
    BROKEN,
    CONTROL,
    ECHO,
    EMPTY,
    MARKER,
    NO_WORDS,
    NOT_ENDED,
    REPEATS,
    TWICE,
    Sieve,
    WrittenReport,
    WrittenRows,
    instruction_in,
    repeats,
    template_markers,
)

ANIMALS = ("fox", "dog", "cat", "owl", "bee", "cow", "hen", "ant", "bat", "elk", "eel", "rat")
VERBS = ("sees", "hears", "likes", "finds")


def lesson(i):
    animal, verb = ANIMALS[i % len(ANIMALS)], VERBS[i // len(ANIMALS) % len(VERBS)]
    other = ANIMALS[(5 * i + 1) % len(ANIMALS)]
    return {
        "instruction": f"Who {verb} the {animal}?",
        "output": f"The {other} {verb} the {animal}.",
    }


@pytest.fixture(scope="module")
def taught_dir(tmp_path_factory):
    """A tiny model that has learned a few questions with answers in the Alpaca template."""
    from lwf_unsloth.backend import prepare

    prepare()
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    folder = tmp_path_factory.mktemp("taught") / "taught-llama"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    rows = [encode_row(tokenizer, lesson(i), max_length=None, train_on="all") for i in range(48)]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for step in range(150):
            some = torch.arange(step % 3 * 16, step % 3 * 16 + 16)
            loss = model(input_ids=ids[some], labels=labels[some]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught(taught_dir):
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_model

    return load_model(
        ModelConfig(
            str(taught_dir), dtype="float32", r=4, lora_alpha=8, max_seq_length=512,
            load_in_4bit=False,
        )
    )  # fmt: skip


@pytest.fixture()
def write(taught):
    from lwf_unsloth.row_writer import self_rehearsal

    def run(*args, **changes):
        values = {"rows": 8, "max_new_tokens": 40, "progress": False}
        return self_rehearsal(*taught, *args, **{**values, **changes})

    return run


# ------------------------------------------------------------------------ the sieve


@pytest.fixture()
def sieve():
    return Sieve(ALPACA, ["<s>", "</s>"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("  \n", EMPTY),
        ("He said </s> and left.", CONTROL),
        ("Yes.\n\n### Instruction:\nNext one", MARKER),
        ("A \ufffd in the middle of it.", BROKEN),
        ("and so on and so on and so on and so on and so on and so on", REPEATS),
        ("同じことを言う。同じことを言う。同じことを言う。同じことを言う。", REPEATS),
    ],
)
def test_an_unusable_answer_is_dropped_under_its_name(sieve, text, why):
    assert not sieve.answer("Tell me something.", "", text, True)
    assert sieve.rows == [] and dict(sieve.dropped) == {why: 1} and sieve.tried == 1


def test_ordinary_answers_are_kept_whole_or_marked_as_cut(sieve):
    assert sieve.answer("Count to three.", "", " 1, 2, 3\n", True)
    assert sieve.answer("Count on.", "", "4, 5, and then \ufffd", False)
    assert [(row["output"], row["whole"]) for row in sieve.rows] == [
        ("1, 2, 3", True),
        ("4, 5, and then", False),
    ]


def test_the_same_row_and_the_same_instruction_count_once_whatever_their_case(sieve):
    assert sieve.answer("Say it.", "", "It is said.", True)
    assert not sieve.answer("say  it.", "", "It is SAID.", True)
    assert not sieve.answer("Say it.", "", "say it.", True)
    assert sieve.dropped == {TWICE: 1, ECHO: 1}
    assert sieve.instruction("Name a colour.\n\n### Response:\nRed", False) == "Name a colour."
    assert sieve.instruction("name a COLOUR.", True) is None


def test_a_passage_needs_some_length_and_words(sieve):
    assert not sieve.passage("Too short.", True)
    assert not sieve.passage("2021-12-31 21-21-22 21.17.16 (18.25) 1519 16017 2021-12-30", False)
    assert sieve.passage("The sea is wide and deep, and ships have crossed it for ages.", True)
    assert dict(sieve.dropped) == {EMPTY: 1, NO_WORDS: 1}


@pytest.mark.parametrize(
    ("written", "ended", "found"),
    [
        ("Name it.\n\n### Response:\nFox", False, ("Name it.", "")),
        ("Name it.\n\n### Input:\nfox\n\n### Response:", True, ("Name it.", "")),
        ("Name it.", True, ("Name it.", "")),
        ("Name it.\n\nIt is a fox and so", False, ("Name it.", "")),
        ("Name it and then go on with", False, ("Name it and then go on with", NOT_ENDED)),
    ],
)
def test_an_instruction_ends_at_the_next_marker_or_where_the_model_stops(written, ended, found):
    assert instruction_in(written, ended, ALPACA) == found


def test_short_marks_of_a_template_count_at_the_start_of_a_line_only():
    template = PromptTemplate("qa", "Q: {instruction}\nI: {input}\nA: ", "Q: {instruction}\nA: ")
    assert template_markers(template) == ["\nQ:", "\nI:", "\nA:"]
    assert instruction_in("Who? VITAMINA: yes\nA: me", False, template) == (
        "Who? VITAMINA: yes",
        "",
    )
    assert template_markers(PLAIN) == []


def test_prose_lists_and_short_texts_do_not_count_as_repeating():
    assert not repeats("no no no")
    assert not repeats(
        "1. red apple\n2. green apple\n3. yellow apple\n4. sour apple\n5. ripe apple"
    )
    assert not repeats("朝食をきちんと食べると、体が目を覚まし、午前中の集中力が続きます。")


# ------------------------------------------------------------------------- the file


def test_a_file_comes_back_as_it_was_written_and_names_what_differs(tmp_path):
    rows = WrittenRows(
        [{"text": "Ein Satz\u2028mit ü.", "whole": False}],
        WrittenReport("passages", 1, 1, 1),
        {"a": 1},
    )
    path = save_written(rows, tmp_path / "deep" / "rows.jsonl")
    again = load_written(path, {"a": 1})
    assert list(again) == list(rows) and again.report.reused
    with pytest.raises(DataError, match="a: 1 there, 2 now"):
        load_written(path, {"a": 2})
    path.write_text('{"text": "other"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="was changed after it was written"):
        load_written(path)
    save_written(rows, path)
    assert "other" in (tmp_path / "deep" / "rows.jsonl.old").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="what wrote it is not known"):
        load_written(tmp_path / "none.jsonl")


@pytest.mark.parametrize("row", [{"instruction": "Go.", "output": "I go"}, {"text": "I go"}])
def test_a_cut_row_gets_no_eos_and_no_label_for_it(tiny_tokenizer, row):
    whole = encode_row(tiny_tokenizer, row, max_length=None)
    cut = encode_row(tiny_tokenizer, {**row, "whole": False}, max_length=None)
    assert whole.input_ids == [*cut.input_ids, tiny_tokenizer.eos_token_id]
    assert cut.cut and not whole.cut and tiny_tokenizer.eos_token_id not in cut.labels


# ---------------------------------------------------------------------- the writing


def test_ids_are_continued_as_generate_continues_a_prompt(taught):
    from lwf_unsloth.decoding import Decoding
    from lwf_unsloth.generation import continue_ids, generate

    model, tokenizer = taught
    asked = [lesson(3)["instruction"], "Who?"]
    starts = [prompt_ids(tokenizer, one) for one in asked]
    found = continue_ids(model, tokenizer, starts, [1, 2], Decoding(24))
    answers = generate(model, tokenizer, asked, max_new_tokens=24)
    assert [tokenizer.decode(ids) for ids, _ in found] == [a.text for a in answers]
    assert [ended for _, ended in found] == [a.stop == "eos" for a in answers]


def test_a_model_that_stops_writes_instructions_and_answers_from_nothing(write, monkeypatch):
    from lwf_unsloth import row_writer

    monkeypatch.setattr(row_writer, "ASKING", ("",))
    rows = write()
    report = rows.report
    assert report.kind == "prompts" and "ended by themselves" in report.note
    assert len(rows) == report.kept == 8 == len({row["instruction"] for row in rows})
    assert report.tried == report.kept + sum(report.dropped.values())
    assert sum(row["instruction"].startswith("Who ") for row in rows) >= 6, "as it was taught"
    assert report.ended == sum(row["whole"] for row in rows) >= 6


def test_first_words_in_turn_make_instructions_differ(write):
    firsts = {row["instruction"].split()[0] for row in write()}
    led = {words.split()[0] for words in ASKING if words}
    assert len(firsts & led) >= 4, "a model that was taught one word only asks in several"


@pytest.mark.slow
def test_the_same_seed_writes_the_same_rows_whatever_the_batch_and_leaves_the_model(write, taught):
    before = {name: p.clone() for name, p in taught[0].named_parameters()}
    state, mode = torch.get_rng_state(), taught[0].training
    first = write(seed=5)
    assert torch.equal(torch.get_rng_state(), state) and taught[0].training == mode
    assert all(torch.equal(before[name], p) for name, p in taught[0].named_parameters())
    assert list(write(seed=5, batch_size=3)) == list(first)
    assert list(write(seed=6)) != list(first)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_written_in_halves_with_the_same_rows(write, monkeypatch):
    from lwf_unsloth import row_writer

    whole, sizes, real = write(), [], row_writer.continue_ids

    def small(model, tokenizer, starts, *rest, **settings):
        if len(starts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(starts))
        return real(model, tokenizer, starts, *rest, **settings)

    monkeypatch.setattr(row_writer, "continue_ids", small)
    assert list(write()) == list(whole) and max(sizes) <= 3


def test_given_prompts_are_answered_once_each_and_too_few_are_told(write, caplog):
    asked = [lesson(i)["instruction"] for i in range(5)]
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        rows = write([*asked, asked[0].upper()], kind="answers")
    assert {row["instruction"] for row in rows} <= {*asked, asked[0].upper()}
    assert "of 8 rehearsal rows could be had from 5 prompts" in caplog.text
    assert "give more prompts" in caplog.text


def test_passages_begin_at_the_beginning_of_a_text(write, taught):
    rows = write(kind="passages", rows=2, max_new_tokens=30)
    assert len(rows) == 1, "the model knows one beginning only, and the repeat is dropped"
    assert rows[0]["text"].startswith("Below is an instruction") or MARKER in rows.report.dropped


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"kind": "poems"}, "must be one of"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": 0.0}, "the same instruction or passage every time"),
        ({"kind": "answers"}, "no prompts to answer"),
        ({"kind": "passages", "prompts": ["Go."]}, "would have no effect"),
    ],
)
def test_settings_without_sense_are_refused(write, changes, said):
    with pytest.raises(ConfigError, match=said):
        write(**changes)


def test_a_template_without_a_beginning_leads_to_no_instruction(write, taught, monkeypatch):
    monkeypatch.setattr(taught[1], "init_kwargs", {**taught[1].init_kwargs})
    set_template(taught[1], PLAIN)
    with pytest.raises(ConfigError, match="stands before the instruction"):
        write(kind="prompts")


def test_a_model_that_never_stops_is_given_passages(taught, write, monkeypatch):
    from lwf_unsloth import row_writer

    def endless(model, tokenizer, starts, seeds, decoding, adapter):
        words = [f"Passage {seed} is about the number {seed % 97}, and goes on." for seed in seeds]
        return [(tokenizer(text, add_special_tokens=False)["input_ids"], False) for text in words]

    monkeypatch.setattr(row_writer, "continue_ids", endless)
    rows = write(rows=3)
    assert rows.report.kind == "passages" and "0 of 8 trial answers" in rows.report.note
    assert [row["whole"] for row in rows] == [False] * 3


def test_when_nothing_can_be_used_the_error_counts_why(taught, write, monkeypatch):
    from lwf_unsloth import row_writer

    monkeypatch.setattr(row_writer, "continue_ids", lambda m, t, s, *_, **__: [([], True)] * len(s))
    with pytest.raises(DataError, match=r"instruction too short: \d+.*rows\s+of your own"):
        write(rows=2)


def test_a_file_of_the_same_model_is_taken_and_another_models_is_refused(write, tmp_path, taught):
    path = tmp_path / "rehearsal.jsonl"
    first = write(rows=4, path=path)
    again = write(rows=3, path=path)
    assert list(again) == list(first)[:3] and again.report.reused
    for report in (first.report, again.report):
        assert report.tried == report.kept + sum(report.dropped.values())
    with pytest.raises(DataError, match="seed: 42 there, 43 now"):
        write(rows=3, path=path, seed=43)
    with pytest.raises(DataError, match="holds 4 self-written rows, but 6"):
        write(rows=6, path=path)
    assert len(write(rows=6, path=path, rewrite=True)) == 6
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6 and json.loads(lines[0]) == first[0]
    with torch.no_grad():
        weight = next(p for n, p in taught[0].named_parameters() if "lora_B" in n)
        weight.fill_(0.5)
    try:
        assert write(rows=3, path=path), "the base is the same, whatever the adapter has learned"
        with pytest.raises(DataError, match="adapter: 'off' there"):
            write(rows=3, path=path, adapter=True)
    finally:
        with torch.no_grad():
            weight.zero_()


# ---------------------------------------------------------------------- in a training


@pytest.fixture()
def trainer_of(taught_dir, tmp_path):
    """Factory: a trainer on 12 task rows with rehearsal_dataset="self", on a model loaded anew."""

    def make(rehearsal="self", disturbed=False, on=None, **changes):
        from lwf_unsloth.config import LwFConfig, ModelConfig
        from lwf_unsloth.model import load_model
        from lwf_unsloth.trainer import LwFTrainer

        size = {"r": 4, "lora_alpha": 8, "max_seq_length": 512}
        model, tokenizer = on or load_model(
            ModelConfig(str(taught_dir), dtype="float32", load_in_4bit=False, **size)
        )
        if disturbed:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.fill_(0.01)
        values = {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
            "rehearsal_ratio": 0.25, "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0,
            "max_length": 128,
        }  # fmt: skip
        args = LwFConfig(str(tmp_path / "run"), **{**values, **changes})
        task = [{"instruction": f"Spell {one}.", "output": " ".join(one)} for one in ANIMALS]
        return LwFTrainer(
            model,
            args=args,
            processing_class=tokenizer,
            train_dataset=task,
            rehearsal_dataset=rehearsal,
        )

    return make


def test_a_trainer_told_self_trains_on_rows_of_its_own_teacher(trainer_of, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        trainer = trainer_of()
    assert "by the model itself" in caplog.text
    file = tmp_path / "run" / "rehearsal.jsonl"
    rows = load_written(file)
    assert len(rows) == trainer.rows.n_rehearsal == 4, "one epoch uses no more: 12 rows at 25 %"
    assert rows.origin["adapter"] == "off"
    trainer.train()
    logged = [line["kl_rehearsal"] for line in trainer.state.log_history if "kl_rehearsal" in line]
    assert logged[0] == pytest.approx(0, abs=1e-6) and logged[-1] > 0
    assert trainer.lwf_rows == "rehearsal"


@pytest.mark.slow
def test_a_resumed_run_rehearses_the_same_rows_and_another_seed_writes_new_ones(
    trainer_of, tmp_path, monkeypatch
):
    from lwf_unsloth import row_writer

    first = trainer_of(save_strategy="epoch")
    first.train()
    with monkeypatch.context() as patch:
        patch.delattr(row_writer, "continue_ids")
        again = trainer_of(save_strategy="epoch")
        again.train(resume_from_checkpoint=True)
    assert again.rows.dataset["input_ids"] == first.rows.dataset["input_ids"]
    other = trainer_of(seed=7)
    assert other.rows.dataset["input_ids"] != first.rows.dataset["input_ids"]
    assert (tmp_path / "run" / "rehearsal.jsonl.old").is_file()


@pytest.mark.slow
def test_a_run_resumed_in_the_same_process_rehearses_what_the_untrained_model_wrote(
    trainer_of, tmp_path, caplog
):
    run = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    whole = trainer_of(**run)
    whole.train()
    file = tmp_path / "run" / "rehearsal.jsonl"
    written = file.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    trained = whole.model, whole.processing_class
    again = trainer_of(on=trained, **run)
    with pytest.raises(ConfigError, match="belong to the run of checkpoint-2.*another output_dir"):
        again.train()
    assert "the model has been trained since" in caplog.text
    assert file.read_bytes() == written and again.rows.dataset[:] == whole.rows.dataset[:]
    expected = {n: p.clone() for n, p in whole.model.named_parameters() if "lora_" in n}
    again.train(resume_from_checkpoint=True)
    for name, parameter in again.model.named_parameters():
        assert name not in expected or torch.equal(parameter, expected[name]), name
    shutil.rmtree(tmp_path / "run")
    new = trainer_of(on=trained, **run)
    assert file.read_bytes() != written, "without a checkpoint the model writes as it is now"
    assert not new.rehearses_for


def test_for_a_second_task_the_trained_adapter_writes(trainer_of, tmp_path):
    trainer = trainer_of(disturbed=True)
    assert trainer.teacher.kind == "snapshot"
    origin = load_written(tmp_path / "run" / "rehearsal.jsonl").origin
    assert origin["adapter"] != "off"


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"self_rehearsal_rows": 2}, 2),
        ({"max_steps": 3}, 3),
        ({"num_train_epochs": 2}, 8),
    ],
)
def test_no_more_rows_are_written_than_the_run_can_use(trainer_of, changes, rows):
    assert trainer_of(**changes).rows.n_rehearsal == rows


def test_at_ratio_0_nothing_is_written(trainer_of, tmp_path):
    assert trainer_of(rehearsal_ratio=0.0).rows.n_rehearsal == 0
    assert not (tmp_path / "run" / "rehearsal.jsonl").exists()


def test_another_text_as_rehearsal_is_refused_with_what_to_do(trainer_of):
    with pytest.raises(DataError, match=r"load_alpaca\(path\)"):
        trainer_of(rehearsal="general.jsonl")
