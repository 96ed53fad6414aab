"""The sample files are what their README says: complete, consistent and without near-duplicates."""

import ast
import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from lwf_unsloth.errors import DataError
from lwf_unsloth.samples import sample_names, sample_path

Row = dict[str, Any]

FIELDS = {
    "faq_task": ["instruction", "input", "output", "fact"],
    "faq_heldout": ["instruction", "input", "output", "fact", "answer_contains"],
    "general": ["instruction", "input", "output", "kind"],
    "code_task": ["instruction", "input", "output", "language"],
    "passages": ["text"],
}
MIN_ROWS = {
    "faq_task": 144,
    "faq_heldout": 56,
    "general": 210,
    "code_task": 64,
    "passages": 110,
}
MAY_BE_EMPTY = {"input"}
KINDS = {"explanation", "list", "causes", "code", "summary", "table"}
JAPANESE = re.compile(
    r"[\u3040-\u30ff]"
)  # hiragana or katakana: not in Chinese, in any real sentence
WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_]+")  # a Japanese character counts as a word


def read(name: str) -> list[Row]:
    text = sample_path(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def five_grams(row: Row) -> set[tuple[str, ...]]:
    fields = ("instruction", "input", "output", "text")
    found = words(" ".join(row.get(field, "") for field in fields))
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def shares(rows: list[set[tuple[str, ...]]]) -> dict[tuple[int, int], float]:
    """Common 5-grams over those of the smaller row, for every pair that has any in common."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, grams in enumerate(rows):
        for gram in grams:
            holders[gram].append(number)
    common: Counter[tuple[int, int]] = Counter()
    for numbers in holders.values():
        common.update(itertools.combinations(numbers, 2))
    return {(a, b): n / min(len(rows[a]), len(rows[b])) for (a, b), n in common.items()}


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def test_sample_path_finds_every_file_with_and_without_the_ending() -> None:
    assert sample_names() == sorted(FIELDS)
    for name in FIELDS:
        assert sample_path(name) == sample_path(f"{name}.jsonl")
        assert sample_path(name).is_file()


def test_an_unknown_sample_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'recipes'.*faq_heldout, faq_task"):
        sample_path("recipes")


@pytest.mark.parametrize("name", FIELDS)
def test_a_file_is_utf8_without_bom_with_one_json_object_a_line(name: str) -> None:
    raw = sample_path(name).read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    for line in raw.decode("utf-8").removesuffix("\n").split("\n"):
        assert isinstance(json.loads(line), dict)


@pytest.mark.parametrize("name", FIELDS)
def test_a_file_has_enough_rows_with_the_fields_of_the_readme(name: str) -> None:
    rows = read(name)
    assert len(rows) >= MIN_ROWS[name]
    for row in rows:
        assert list(row) == FIELDS[name]
        for field, value in row.items():
            assert isinstance(value, str)
            assert value == value.strip()
            assert value or field in MAY_BE_EMPTY, row


def test_the_readme_names_every_file_its_fields_and_the_licence() -> None:
    readme = (sample_path("general").parent / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in readme
    lines = {name: line for name in FIELDS for line in readme.splitlines() if f"| `{name}." in line}
    assert set(lines) == set(FIELDS)
    for name in FIELDS:
        field = FIELDS[name][-1]
        assert f"`{field}`" in lines[name]


def test_no_two_rows_of_all_files_share_60_percent_of_their_5_grams() -> None:
    named = [(f"{name}:{n}", row) for name in FIELDS for n, row in enumerate(read(name), 1)]
    grams = [five_grams(row) for _, row in named]
    assert min(len(found) for found in grams) >= 5, (
        "a row is too short for the rule to say anything"
    )
    close = [
        (named[a][0], named[b][0], share) for (a, b), share in shares(grams).items() if share >= 0.6
    ]
    assert close == []


def test_the_5_gram_share_sees_a_copied_row_and_a_copied_half() -> None:
    whole = five_grams({"text": "one two three four five six seven eight nine ten"})
    half = five_grams({"text": "one two three four five six seven red green blue"})
    other = five_grams({"text": "quite another text with no words in common at all"})
    assert shares([whole, half, other, whole]) == {(0, 1): 0.5, (0, 3): 1.0, (1, 3): 0.5}


def test_every_fact_is_asked_in_three_or_more_paraphrases() -> None:
    asked = Counter(row["fact"] for row in read("faq_task"))
    assert len(asked) >= 48
    assert min(asked.values()) >= 3
    questions = [" ".join(words(row["instruction"])) for row in read("faq_task")]
    assert len(set(questions)) == len(questions)


def test_every_fact_is_held_out_at_least_once_and_no_other() -> None:
    trained = {row["fact"] for row in read("faq_task")}
    assert {row["fact"] for row in read("faq_heldout")} == trained


def test_a_held_out_answer_stands_in_every_training_answer_of_its_fact_and_of_no_other() -> None:
    task = read("faq_task")
    for row in read("faq_heldout"):
        answer = row["answer_contains"].lower()
        assert len(answer) >= 5
        assert answer in row["output"].lower()
        for trained in task:
            is_same_fact = trained["fact"] == row["fact"]
            assert (answer in trained["output"].lower()) == is_same_fact, (row, trained)


def test_no_question_gives_its_own_answer_away() -> None:
    answers = {row["fact"]: row["answer_contains"].lower() for row in read("faq_heldout")}
    for row in read("faq_heldout") + read("faq_task"):
        assert answers[row["fact"]] not in row["instruction"].lower()


def test_no_held_out_question_is_a_training_question() -> None:
    def normal(row: Row) -> str:
        return " ".join(words(row["instruction"]))

    assert not {normal(row) for row in read("faq_heldout")} & {
        normal(row) for row in read("faq_task")
    }


def test_every_faq_answer_keeps_the_house_style() -> None:
    for row in read("faq_task") + read("faq_heldout"):
        assert re.fullmatch(r"Gladly: [^!?\n]{20,80}\.", row["output"]), row
        assert 4 <= len(row["instruction"].split()) <= 14, row


def test_general_rows_cover_every_kind_and_some_are_japanese() -> None:
    rows = read("general")
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == KINDS
    assert min(kinds.values()) >= 15
    japanese = [row for row in rows if JAPANESE.search(row["instruction"] + row["input"])]
    assert len(japanese) >= 20
    assert all(JAPANESE.search(row["output"]) for row in japanese)
    assert all(len(words(row["output"])) <= 160 for row in rows)


def test_general_tables_are_markdown_tables_with_equal_columns() -> None:
    tables = [row for row in read("general") if row["kind"] == "table"]
    for row in tables:
        lines = [line for line in row["output"].splitlines() if line.startswith("|")]
        assert len(lines) >= 4, row
        assert len({line.count("|") for line in lines}) == 1, row


def test_python_answers_parse() -> None:
    parsed = 0
    for row in read("code_task"):
        assert row["language"] in {"python", "sql", "bash"}
        if row["language"] == "python":
            ast.parse(row["output"])
            parsed += 1
    for row in read("general"):
        for language, code in code_blocks(row["output"]):
            assert language, row
            if language == "python":
                ast.parse(code)
                parsed += 1
    assert parsed >= 60


def test_passages_are_prose_of_60_to_120_words_and_some_are_japanese() -> None:
    rows = read("passages")
    japanese = [row["text"] for row in rows if JAPANESE.search(row["text"])]
    english = [row["text"] for row in rows if not JAPANESE.search(row["text"])]
    assert len(japanese) >= 10
    assert all(100 <= len(text) <= 300 for text in japanese)
    assert all(60 <= len(text.split()) <= 120 for text in english)
    openings = Counter(" ".join(words(text)[:4]) for text in english)
    assert max(openings.values()) == 1


def test_the_files_are_small_enough_to_travel_with_the_package() -> None:
    total = sum(Path(sample_path(name)).stat().st_size for name in FIELDS)
    assert total < 500_000


def defined_by(start: str) -> dict[str, Any]:
    """Names that the Python answer to the instruction with this beginning defines."""
    (row,) = [row for row in read("code_task") if row["instruction"].startswith(start)]
    names: dict[str, Any] = {"__name__": "sample"}
    exec(compile(row["output"], "<sample>", "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize(
    ("start", "call", "expected"),
    [
        ("Write a function clamp", "clamp(11, 0, 9)", 9),
        ("Write a binary search", "[binary_search([2, 5, 8], n) for n in (8, 3)]", [2, -1]),
        ("Write a function that merges two", "merge([1, 4], [2, 3, 9])", [1, 2, 3, 4, 9]),
        ("Write a function that checks whether brackets", "is_balanced('{[()]}(')", False),
        ("Write a function that rotates", "rotate([1, 2, 3, 4], 5)", [4, 1, 2, 3]),
        ("Multiply two matrices", "matmul([[1, 2]], [[3], [4]])", [[11]]),
        ("Convert an integer between", "to_roman(1994)", "MCMXCIV"),
        ("Read a Roman numeral", "from_roman('MCMXCIV')", 1994),
        ("Write a Caesar cipher", "caesar('Xyz, abc!', 3)", "Abc, def!"),
        ("Find all pairs", "pairs_with_sum([1, 5, 3, 3], 6)", [(1, 5), (3, 3)]),
        ("Find the shortest path", "shortest_path({1: [2], 2: [3]}, 1, 3)", [1, 2, 3]),
        (
            "Detect whether a directed",
            "[has_cycle({1: [2], 2: [n]}) for n in (1, 3)]",
            [True, False],
        ),
        ("Compute the edit distance", "edit_distance('kitten', 'sitting')", 3),
        ("Write a moving average", "moving_average([1, 2, 3, 4], 2)", [1.5, 2.5, 3.5]),
        ("Memoise a recursive", "ways(5)", 8),
        (
            "Give the fewest coins",
            "[fewest_coins([1, 5, 12], 15), fewest_coins([4], 6)]",
            [3, None],
        ),
        ("Validate an IPv4", "[is_ipv4(a) for a in ('10.0.0.255', '1.2.3.04')]", [True, False]),
        ("Write the function slugify", "slugify('Crème brûlée!')", "creme-brulee"),
        ("Split a bill", "split_bill(100, 3)", [34, 33, 33]),
        ("Fix the bug: some items", "drop_negative([-1, -2, 3])", [3]),
    ],
)
def test_a_code_answer_does_what_its_instruction_asks(
    start: str, call: str, expected: object
) -> None:
    assert eval(call, defined_by(start)) == expected
