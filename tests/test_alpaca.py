"""Loading: every row is kept or dropped under a named reason, whatever the file looks like."""

import csv
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwf_unsloth.alpaca import load_alpaca, load_text, template_jsonl
from lwf_unsloth.errors import ConfigError, DataError, LwfError
from lwf_unsloth.rows import row_key

TWO = [
    {
        "instruction": "Say œuvre — 你好 🦥",
        "input": "two\nlines",
        "output": 'He said "yes", twice.',
    },
    {"instruction": "A", "input": "", "output": "B"},
]


def as_json(rows):
    return json.dumps(rows, ensure_ascii=False)


def as_jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["instruction", "input", "output"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(folder, name, content, encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def rows_of(data):
    """All rows of a load, train first."""
    return data["train"].to_list() + data["test"].to_list()


def load(source, **settings):
    """The rows of a source in their order, nothing held out."""
    return load_alpaca(source, test_size=0, **settings)["train"].to_list()


def balanced(report):
    return report.rows_read == report.kept + sum(map(len, report.dropped.values()))


def distinct(n, tag="row"):
    return [{"instruction": f"{tag} {i}", "input": "", "output": f"answer {i}"} for i in range(n)]


# what a file may look like ----------------------------------------------------------------------


@pytest.mark.parametrize("form", [as_json, as_jsonl, as_csv])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_same_rows_come_out_of_json_jsonl_and_csv_with_and_without_a_byte_order_mark(
    tmp_path, form, encoding
):
    path = write(tmp_path, "data.bin", form(TWO), encoding)
    assert load(path) == TWO
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "data.json", form(TWO), encoding)
    assert load(folder) == TWO, "a folder"
    assert load((tmp_path / "data.bin").read_bytes()) == TWO, "an upload"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.jsonl", as_json(TWO)),
        ("lines.json", as_jsonl(TWO)),
        ("pretty.json", json.dumps(TWO, indent=2)),
        ("pretty_objects.jsonl", "\n".join(json.dumps(row, indent=2) for row in TWO)),
        ("crlf.jsonl", as_jsonl(TWO).replace("\n", "\r\n") + "\r\n\r\n"),
        ("table.json", as_csv(TWO)),
        (
            "semicolons.csv",
            as_csv(TWO)
            .replace("instruction,input,output", "instruction;input;output")
            .replace('🦥,"two\nlines",', '🦥;"two\nlines";')
            .replace("A,,B", "A;;B"),
        ),
        ("no_ending", as_jsonl(TWO).rstrip("\n")),
    ],
)
def test_the_content_decides_the_format_and_not_the_ending(tmp_path, name, content):
    assert load(write(tmp_path, name, content)) == TWO


def test_parquet_datasets_frames_and_lists_give_the_same_rows(tmp_path):
    import pandas as pd

    dataset = Dataset.from_list(TWO)
    dataset.to_parquet(str(tmp_path / "rows.dat"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train=dataset, other=dataset.select([0])).save_to_disk(str(tmp_path / "dict"))
    sources = [
        tmp_path / "rows.dat",
        tmp_path / "saved",
        tmp_path / "dict",
        dataset,
        TWO,
        tuple(TWO),
    ]
    for source in [*sources, pd.DataFrame(TWO), dataset.with_format("numpy")]:
        assert load(source) == TWO
    assert load(tmp_path / "dict", split="other") == TWO[:1]
    with pytest.raises(DataError, match="'train'.*not 'val'"):
        load(DatasetDict(train=dataset), split="val")


def test_a_load_can_be_loaded_again():
    data = load_alpaca(distinct(20))
    assert load(data) == data["train"].to_list()


def test_line_separators_inside_a_json_string_do_not_end_the_line(tmp_path):
    row = {"instruction": "a\u2028b\x85c", "input": "", "output": "d\x0ce"}
    assert load(write(tmp_path, "a.jsonl", as_jsonl([row, row]))) == [row, row]


def test_windows_line_ends_inside_a_field_become_plain_ones(tmp_path):
    row = {"instruction": "a\r\nb", "input": "", "output": "c\rd"}
    for name, content in (("a.json", as_json([row])), ("a.csv", as_csv([row]))):
        assert load(write(tmp_path, name, content))[0]["instruction"] == "a\nb"
        assert load(write(tmp_path, name, content))[0]["output"] == "c\nd"


def test_a_column_that_is_null_for_60000_lines_is_text_in_the_last(tmp_path):
    line = '{"instruction": "q", "input": null, "output": "a"}\n'
    last = '{"instruction": "q", "input": "seen", "output": "a"}\n'
    data = load_alpaca(write(tmp_path, "long.jsonl", line * 60_000 + last), test_size=0)
    assert data["train"][60_000]["input"] == "seen" and data["train"][0]["input"] == ""
    assert data.report.kept == 60_001 and data.report.duplicates == 59_999


def test_a_field_longer_than_the_csv_module_allows_is_read_and_the_limit_is_put_back(tmp_path):
    before = csv.field_size_limit()
    rows = [{"instruction": "q", "input": "", "output": "x" * 300_000}]
    assert load(write(tmp_path, "a.csv", as_csv(rows))) == rows
    assert csv.field_size_limit() == before


def test_text_is_read_as_utf8_whatever_the_locale_says(tmp_path):
    path = write(tmp_path, "a.jsonl", as_jsonl(TWO))
    code = (
        "import sys; from lwf_unsloth.alpaca import load_alpaca; "
        "print(ascii(load_alpaca(sys.argv[1], test_size=0)['train'][0]['instruction']))"
    )
    env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run(
        [sys.executable, "-c", code, path], env=env, capture_output=True, text=True
    )
    assert out.stdout.strip() == ascii(TWO[0]["instruction"]), out.stderr


# what is wrong with a file ----------------------------------------------------------------------

BAD_FILES = {
    "cp1252": (b'[{"instruction": "caf\xe9", "output": "x"}]', "offset 21.*cp1252"),
    "cp1252 after a mark": (b"\xef\xbb\xbfinstruction,output\ncaf\xe9,x\n", "offset 25 "),
    "utf-16 without a mark": (as_json(TWO).encode("utf-16-le"), "UTF-16|not UTF-8"),
    "empty": (b"", "empty"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "empty"),
    "white space": (b" \n\n", "empty"),
    "an empty array": (b"[]", "no rows"),
    "a header alone": (b"instruction,output\n", "no rows.*instruction, output"),
    "a cut array": (b'[{"instruction": "a", "output": "b"},\n {"instr', "line 2"),
    "no json at all": (b"{'instruction': 'a', 'output': 'b'}", "line 1, column 2"),
    "a nesting without end": (b"[" * 100_000, "nested too deeply"),
    "a number": (b"[1, 2]", "missing.*a number"),
    "other names": (b'[{"prompt":"A","completion":"B"}]', "row 1.*'prompt', 'completion'.*Needed"),
    "a glued header": (b'[{"instruction,output":"x"}]', "glued"),
    "a glued csv header": (b'"instruction,output"\nx\n', "glued"),
    "rows under a key": (b'{"data": [{"instruction":"A","output":"B"}]}', "Found.*'data'"),
    "a column twice": (b"instruction,output,output\na,b,c\n", "'output' twice"),
    "an open quote": (b'instruction,output\n"a,b\nc,d\ne,f\n', "CSV.*line"),
    "gzip": (b"\x1f\x8b\x08\x00abc", "gzip"),
    "excel": (b"PK\x03\x04abc", "zip"),
    "a cut parquet": (b"PAR1 and then nothing", "parquet"),
    "passages": (b'{"text": "a passage"}', "load_text"),
    "python": (b"import os\nos.system('touch evil')\n", "missing"),
    "only null outputs": (
        b'[{"instruction":"A","output":null}]',
        "none of 1 rows.*'output' is empty",
    ),
    "sharegpt lists": (
        b'[[{"from":"human","value":"foo"},{"from":"gpt","value":"bar"}]]',
        "ShareGPT",
    ),
    "sharegpt": (
        b'[{"conversations":[{"from":"human","value":"foo"},{"from":"gpt","value":"bar"}]}]',
        "ShareGPT",
    ),
    "chat messages": (b'{"messages": [{"role": "user", "content": "hi"}]}', "ShareGPT or chat"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_by_name_and_reason(tmp_path, name):
    content, reason = BAD_FILES[name]
    path = write(tmp_path, "bad.json", content)
    with pytest.raises(DataError, match=f"(?s)bad.json.*({reason})"):
        load_alpaca(path)


def test_chat_data_in_memory_is_refused_too():
    turns = [{"from": "human", "value": "foo"}, {"from": "gpt", "value": "bar"}]
    for source in ([turns], turns, [{"conversations": turns}]):
        with pytest.raises(DataError, match="ShareGPT"):
            load_alpaca(source)


@pytest.mark.parametrize(
    "source", [[], {}, None, 5, {"instruction": ["a"], "output": ["b"]}, iter([])]
)
def test_what_is_no_source_is_refused_with_the_list_of_sources(source):
    with pytest.raises(DataError, match="needed|at least one|At least one"):
        load_alpaca(source)


@pytest.mark.parametrize(
    "name", ["nowhere.jsonl", "./nowhere", "nowhere", "a/b/c", "x" * 5000, "a\0b", ""]
)
def test_a_path_that_does_not_exist_is_an_error_that_names_it(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(DataError, match="no file|no usable path"):
            load_alpaca(name)
    else:
        with pytest.raises(DataError, match="no data file"):
            load_alpaca(name)


def test_a_missing_file_is_answered_with_the_data_files_beside_it(tmp_path):
    write(tmp_path, "real.jsonl", as_jsonl(TWO))
    with pytest.raises(DataError, match=r"real\.jsonl"):
        load_alpaca(tmp_path / "typo.jsonl")


def test_a_folder_gives_each_data_file_and_leaves_code_alone(tmp_path):
    write(tmp_path, "b.csv", as_csv(distinct(2, "b")))
    write(tmp_path, "a.jsonl", as_jsonl(distinct(3, "a")))
    write(tmp_path, "evil.py", "raise SystemExit('executed')")
    write(tmp_path, ".hidden.json", "not json")
    report = load_alpaca(tmp_path).report
    assert [(s.name.split("/")[1], s.kept) for s in report.sources] == [
        ("a.jsonl", 3),
        ("b.csv", 2),
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty, "evil.py", "raise SystemExit('executed')")
    with pytest.raises(DataError, match=r"no data file.*evil\.py"):
        load_alpaca(empty)


def test_a_hub_id_without_network_is_a_clear_error_within_seconds(monkeypatch):
    import datasets
    import huggingface_hub.constants as hub

    def refuse(*_, **__):
        raise OSError("no network in this test")

    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    before, waits = hub.HF_HUB_OFFLINE, []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(DataError, match="yahma/not-there.*not in reach.*local file"):
        load_alpaca("yahma/not-there")
    assert sum(waits) < 10
    assert (False, before) == (datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE)


def test_a_hub_data_set_comes_through_load_dataset_with_split_and_token(monkeypatch):
    import datasets

    from lwf_unsloth import sources

    seen = {}

    def fake(name, **settings):
        seen.update(settings, name=name)
        return Dataset.from_list(TWO)

    monkeypatch.setattr(sources, "_hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load("yahma/alpaca-cleaned", split="validation", token="t") == TWO
    assert seen == {"name": "yahma/alpaca-cleaned", "split": "validation", "token": "t"}


# what is wrong with a row -----------------------------------------------------------------------


def test_null_input_is_no_input_and_null_or_blank_outputs_are_dropped_by_number(tmp_path):
    rows = [
        {"instruction": "ok", "input": None, "output": "y"},
        {"instruction": "q", "output": None},
        {"instruction": "q", "output": "   "},
        {"instruction": "q"},
        {"instruction": float("nan"), "output": "z"},
    ]
    data = load_alpaca(write(tmp_path, "a.jsonl", as_jsonl(rows)), test_size=0)
    assert data["train"].to_list() == [{"instruction": "ok", "input": "", "output": "y"}]
    assert data.report.dropped == {
        "'output' is empty or null": [2, 3],
        "'output' is missing": [4],
        "'instruction' is empty or null": [5],
    }
    assert "'output' is empty or null: 2 rows (2, 3)" in str(data.report)


def test_missing_values_never_become_the_words_none_nan_or_null(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"instruction": ["a", "b"], "input": [None, "x"], "output": ["c", None]})
    frame.to_parquet(tmp_path / "a.parquet")
    table = "instruction,input,output\na,nan,c\nb,NULL,None\nc,None,\n"
    for source in (frame, tmp_path / "a.parquet", write(tmp_path, "a.csv", table)):
        assert load(source) == [{"instruction": "a", "input": "", "output": "c"}]


def test_numbers_become_text_as_they_are_written(tmp_path):
    text = '[{"instruction": 1234, "output": 456}, {"instruction": "q", "output": 3.50},'
    text += (
        '{"instruction": "q", "output": true}, {"instruction": "q", "output": 1' + "0" * 5000 + "}]"
    )
    data = load_alpaca(write(tmp_path, "a.json", text), test_size=0)
    outputs = [row["output"] for row in data["train"]]
    assert outputs[:3] == ["456", "3.50", "true"] and len(outputs[3]) == 5001
    assert data.report.sources[0].converted == [1, 2, 3, 4]
    assert load([{"instruction": 1, "output": 2.5}])[0] == {
        "instruction": "1",
        "input": "",
        "output": "2.5",
    }


def test_numeric_repeated_csv_rows_stay_two_rows_with_text(tmp_path):
    data = load_alpaca(write(tmp_path, "a.csv", "instruction,output\n1234?,456\n1234?,456\n"))
    assert [row["output"] for row in rows_of(data)] == ["456", "456"]
    assert data.report.duplicates == 1 and "repeats" in str(data.report)


def test_lists_and_objects_are_dropped_with_shard_row_field_and_type(tmp_path):
    write(tmp_path, "1.jsonl", '{"instruction":"a","output":"b"}\n')
    write(
        tmp_path,
        "2.jsonl",
        '{"instruction":["a","b"],"output":3.5,"meta":{"k":1}}\n{"instruction":"a","output":{"x":1}}\n'
        '{"instruction":"c","output":3.5}\n7\n',
    )
    report = load_alpaca(tmp_path).report
    shard = f"{tmp_path.name}/2.jsonl"
    assert report.dropped == {
        f"{shard}: 'instruction' is a list, not text": [1],
        f"{shard}: 'output' is an object, not text": [2],
        f"{shard}: the row is a number, not an object": [4],
    }
    assert balanced(report)


def test_a_damaged_line_is_dropped_by_its_line_number_and_told(tmp_path, caplog):
    text = '{"instruction":"a","output":"b"}\n\n{"instruction":"a","outp\n'
    text += '{"instruction":"c","output":"d"}\n'
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        report = load_alpaca(write(tmp_path, "a.jsonl", text)).report
    assert report.dropped == {"the line is no JSON object": [3]} and report.kept == 2
    assert "the line is no JSON object: 1 row (3)" in caplog.text
    first_bad = '{"instruction":\n{"instruction":"c","output":"d"}\n'
    assert load_alpaca(write(tmp_path, "b.jsonl", first_bad)).report.dropped == {
        "the line is no JSON object": [1]
    }


def test_a_key_that_stands_twice_is_dropped_and_not_overwritten(tmp_path):
    text = '{"instruction":"a","output":"b","output":"c"}\n{"instruction":"d","output":"e"}\n'
    report = load_alpaca(write(tmp_path, "a.jsonl", text)).report
    assert report.dropped == {"the key 'output' stands twice": [1]}


def test_csv_rows_with_too_many_or_few_cells_are_dropped_by_number(tmp_path):
    text = "instruction,input,output\na,b,c\na,b,c,d\nonly\n\ne,f,g\n"
    report = load_alpaca(write(tmp_path, "a.csv", text)).report
    assert report.dropped == {
        "the row has 4 cells, the header 3": [2],
        "the row has 1 cells, the header 3": [3],
    }
    assert report.kept == 2


def test_half_a_surrogate_pair_is_dropped(tmp_path):
    text = '[{"instruction":"\\ud83e","output":"b"},{"instruction":"\\ud83e\\udda5","output":"b"}]'
    data = load_alpaca(write(tmp_path, "a.json", text), test_size=0)
    assert data["train"]["instruction"][:] == ["🦥"] and data.report.rows_read == 2


# columns, limit, shares -------------------------------------------------------------------------


def test_columns_maps_our_fields_to_theirs():
    rows = [{"q": "A", "context": "C", "a": "B", "id": 7}]
    data = load_alpaca(rows, columns={"instruction": "q", "input": "context", "output": "a"})
    assert data["train"].to_list() == [{"instruction": "A", "input": "C", "output": "B"}]
    assert data.report.sources[0].unused == ["id"]
    with pytest.raises(DataError, match="'nope'.*Found.*'q', 'context', 'a', 'id'"):
        load_alpaca(rows, columns={"instruction": "q", "input": "nope", "output": "a"})


@pytest.mark.parametrize(
    "columns",
    [{"q": "instruction"}, {"instruction": 5}, {"input": "output"}, "instruction", {"output": ""}],
)
def test_a_wrong_mapping_is_refused(columns):
    with pytest.raises(ConfigError, match="columns"):
        load_alpaca(TWO, columns=columns)


def test_limit_draws_by_seed_and_counts_what_it_leaves():
    one, same, other = (
        load_alpaca(distinct(100), limit=10, seed=s, test_size=0) for s in (1, 1, 2)
    )
    assert one["train"].to_list() == same["train"].to_list() != other["train"].to_list()
    assert len(one["train"]) == 10
    assert {k: len(v) for k, v in one.report.dropped.items()} == {"beyond the limit or share": 90}


def test_shares_hold_in_train_and_test_without_a_repeated_row():
    data = load_alpaca([distinct(100, "task"), distinct(100, "code")], shares=[0.8, 0.2])
    for half, size in (("train", 113), ("test", 12)):
        tags = [text.split()[0] for text in data[half]["instruction"]]
        assert len(tags) == size and abs(tags.count("task") - 0.8 * size) <= 1
    texts = [row["instruction"] for row in rows_of(data)]
    assert len(set(texts)) == 125 and balanced(data.report)


def test_each_source_gives_its_part_of_the_test_half():
    for seed in range(5):
        data = load_alpaca([distinct(90, "task"), distinct(10, "code")], seed=seed)
        tags = [text.split()[0] for text in data["test"]["instruction"]]
        assert (tags.count("task"), tags.count("code")) == (9, 1)


def test_several_sources_of_several_kinds_are_joined(tmp_path):
    path = write(tmp_path, "a.jsonl", as_jsonl(distinct(3, "file")))
    data = load_alpaca([path, Dataset.from_list(distinct(4, "set")), distinct(5, "list"), path])
    assert [s.kept for s in data.report.sources] == [3, 4, 5, 3]
    assert [s.name for s in data.report.sources][-1] == "a.jsonl (2)"
    assert data.report.rows_read == 15 and data.report.duplicates == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"shares": [0.5, 0.5]},
        {"shares": [0.7]},
        {"shares": [-1.0]},
        {"shares": "1"},
        {"shares": [float("nan")]},
        {"limit": 0},
        {"limit": 2.0},
        {"limit": True},
        {"test_size": 1.0},
        {"test_size": -1},
        {"test_size": "0.1"},
        {"test_size": float("nan")},
        {"test_size": True},
        {"test_size": 2},
        {"seed": "a"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        load_alpaca(TWO, **settings)


# the split --------------------------------------------------------------------------------------


def test_the_split_holds_out_the_share_or_number_asked_for():
    assert [len(load_alpaca(distinct(100))[half]) for half in ("train", "test")] == [90, 10]
    assert len(load_alpaca(distinct(100), test_size=7)["test"]) == 7
    assert len(load_alpaca(distinct(100), test_size=None)["test"]) == 0
    small = load_alpaca(distinct(2))
    assert len(small["test"]) == 0 and "test half is empty" in str(small.report)
    assert small["test"].column_names == ["instruction", "input", "output"]


def test_no_prompt_is_in_train_and_test_across_case_spaces_and_sources():
    rows = distinct(80)
    twins = [{**row, "instruction": "  " + row["instruction"].upper() + "\n"} for row in rows[:40]]
    data = load_alpaca([rows, twins, rows[:20]], test_size=0.3)
    halves = [{row_key(row)[:2] for row in data[half]} for half in ("train", "test")]
    assert halves[1] and not halves[0] & halves[1]
    assert data.report.duplicates == 60


def test_rows_that_all_ask_the_same_are_split_by_their_answers():
    rows = [{"instruction": "Write a poem.", "output": f"Poem {i % 10}"} for i in range(20)]
    data = load_alpaca(rows, test_size=0.2)
    train, test = ({row["output"] for row in data[half]} for half in ("train", "test"))
    assert len(data["test"]) == 4 and not train & test


def test_twenty_copies_of_one_row_stay_in_train_and_the_report_says_so():
    data = load_alpaca([*distinct(1)] * 20)
    assert len(data["train"]) == 20 and "2 test rows were asked for" in str(data.report)


def test_the_same_seed_gives_the_same_split_in_every_process():
    code = (
        "from lwf_unsloth.alpaca import load_alpaca; print(load_alpaca([{'instruction': str(i), "
        "'output': 'x'} for i in range(50)], seed=3)['test']['instruction'][:])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    rows = [{"instruction": str(i), "output": "x"} for i in range(50)]
    here, other = (load_alpaca(rows, seed=seed)["test"]["instruction"][:] for seed in (3, 4))
    assert out.stdout.strip() == str(here) != str(other), out.stderr


# plain passages ---------------------------------------------------------------------------------


def test_a_text_file_gives_its_paragraphs(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffFirst line\r\nwrapped.\r\n \r\n\r\n[2] Second.\r\n")
    assert load_text(path, test_size=0)["train"]["text"][:] == [
        "First line\nwrapped.",
        "[2] Second.",
    ]


def test_a_text_file_of_long_lines_gives_its_lines(tmp_path):
    lines = [f"{i} " + "word " * 60 for i in range(3)]
    data = load_text(write(tmp_path, "a.txt", "\n".join(lines)), test_size=0)
    assert data["train"]["text"][:] == lines


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "two, too"}\n'),
        ("a.txt", '{"text": "one"}\n{"text": "two, too"}\n'),
        ("a.json", '["one", "two, too"]'),
        ("a.csv", 'id,text\n1,one\n2,"two, too"\n'),
        ("a.txt", 'text\none\n"two, too"\n'),
    ],
)
def test_passages_come_out_of_every_format(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert load_text(path, test_size=0)["train"]["text"][:] == ["one", "two, too"]


def test_passages_may_stand_in_another_column_and_blank_ones_are_dropped():
    data = load_text([{"body": "a"}, {"body": None}, {"body": 7}], column="body", test_size=0)
    assert data["train"]["text"][:] == ["a", "7"]
    assert data.report.dropped == {"'body' is empty or null": [2]}
    with pytest.raises(DataError, match="load_alpaca"):
        load_text(TWO)
    with pytest.raises(DataError, match=r"'body'.*column="):
        load_text([{"body": "a"}])


def test_long_passages_are_split_on_one_side_without_losing_a_word():
    texts = [" ".join(f"w{i}x{k}." for k in range(200)) for i in range(20)]
    data = load_text([{"text": text} for text in texts], max_chars=100, test_size=0.2)
    rows = rows_of(data)
    assert all(0 < len(row["text"]) <= 100 and row["whole"] is False for row in rows)
    assert " ".join(row["text"] for row in rows).split() and {
        word for row in rows for word in row["text"].split()
    } == {word for text in texts for word in text.split()}
    sides = [{row["text"].split("x")[0] for row in data[half]} for half in ("train", "test")]
    assert len(sides[1]) == 4 and not sides[0] & sides[1]
    assert sorted(data.report.cut) == list(range(1, 21)) and data.report.kept == 20
    short = load_text([{"text": "short"}], max_chars=100)
    assert short["train"].to_list() == [{"text": "short", "whole": True}]


# the template for a file of one's own -------------------------------------------------------------


def test_the_jsonl_template_is_loaded_as_it_is(tmp_path):
    data = load_alpaca(write(tmp_path, "my_task.jsonl", template_jsonl()), test_size=0)
    assert data.report.kept == data.report.rows_read == 3 and not data.report.dropped
    assert any(row["input"] for row in data["train"])


# everything at once -----------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["instruction", "input", "output", "text"], VALUES)
    )
    | VALUES,
    max_size=6,
)
FEW = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(rows=ROWS, form=st.sampled_from(["json", "jsonl", "list"]), loader=st.sampled_from([0, 1]))
def test_rows_in_are_rows_kept_and_rows_dropped_or_the_error_is_ours(tmp_path, rows, form, loader):
    if form == "list":
        source = rows
    else:
        text = json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows))
        source = write(tmp_path, "fuzz", text)
    try:
        data = (load_alpaca, load_text)[loader](source, test_size=0.5)
    except LwfError as error:
        assert str(error)
        return
    report = data.report
    assert balanced(report) and report.kept == len(data["train"]) + len(data["test"]) > 0
    assert report.rows_read == len(rows) or loader
    assert all(isinstance(v, str) for row in rows_of(data) for v in row.values())


@FEW
@given(content=st.binary(max_size=60), loader=st.sampled_from([load_alpaca, load_text]))
def test_any_bytes_are_rows_or_one_of_our_errors(tmp_path, content, loader):
    try:
        assert balanced(loader(write(tmp_path, "fuzz.json", content)).report)
    except LwfError as error:
        assert "fuzz.json" in str(error)


def test_a_row_that_its_writer_cut_stays_marked_and_its_answer_gets_no_eos(tmp_path):
    rows = [
        {"instruction": f"Say {i}.", "output": f"It is {i}.", "whole": i % 2 == 0} for i in range(4)
    ]
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_alpaca(path, test_size=0)["train"]
    assert {row["instruction"]: row["whole"] for row in loaded} == {
        row["instruction"]: row["whole"] for row in rows
    }
    texts = [{"text": f"Passage {i} of some words.", "whole": False} for i in range(2)]
    assert list(load_text(texts, test_size=0)["train"]["whole"]) == [False, False]
    assert "whole" not in load_alpaca([rows[0]], test_size=0)["train"].column_names


def test_what_makes_an_answer_right_stays_with_its_row_and_is_no_column_where_no_row_has_it():
    rows = [{"instruction": f"Question {i}?", "output": f"It is {i}."} for i in range(12)]
    named = [{**row, "answer_contains": str(i)} for i, row in enumerate(rows)]
    data = load_alpaca(named, test_size=4)
    assert not data.report.sources[0].unused
    for row in [*data["train"], *data["test"]]:
        assert row["output"] == f"It is {row['answer_contains']}."
    assert load_alpaca(rows)["train"].column_names == ["instruction", "input", "output"]
    mixed = load_alpaca([rows, [{"instruction": "Else?", "output": "x", "answer_contains": "x"}]])
    assert set(mixed["train"]["answer_contains"]) <= {"", "x"}
