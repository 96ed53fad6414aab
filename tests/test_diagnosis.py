"""diagnose(): a written set of answers is told apart, nothing sound is called faulty, and a
comparison shows what was found."""

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.comparison import compare
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.diagnosis import FAULTS, diagnose
from lwf_unsloth.errors import DataError
from lwf_unsloth.generation import DEMO_PROMPTS
from lwf_unsloth.lengths import asked_lengths
from lwf_unsloth.repeats import find_repeat
from lwf_unsloth.samples import sample_path

WRITTEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "diagnosis_answers.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def found_in(row):
    return diagnose(row["text"], row["prompt"], input=row.get("input", ""), stop=row["stop"]).kinds


@pytest.mark.parametrize("half", ["first", "held"])
@pytest.mark.parametrize("kind", FAULTS)
def test_written_answers_are_told_apart_with_precision_and_recall_of_95_percent(half, kind):
    # The rules were made on the first half; the other was run once, when they stood.
    rows = [row for row in WRITTEN if row["half"] == half]
    pairs = Counter((kind in row["faults"], kind in found_in(row)) for row in rows)
    right, extra, missed = pairs[True, True], pairs[False, True], pairs[True, False]
    assert right + missed >= 4, "the set must hold answers with the fault"
    assert right / (right + extra) >= 0.95 and right / (right + missed) >= 0.95


def test_the_written_set_has_both_languages_and_sound_answers_in_each_half():
    counts = Counter((row["half"], row["language"], not row["faults"]) for row in WRITTEN)
    assert len(WRITTEN) >= 120 and set(Counter(row["half"] for row in WRITTEN).values()) == {72}
    assert min(counts.values()) >= 8 and len(counts) == 8
    assert len({(row["prompt"], row["text"]) for row in WRITTEN}) == len(WRITTEN)


@pytest.mark.parametrize("name", ["general", "code_task", "faq_task", "faq_heldout"])
def test_no_answer_of_the_samples_is_called_faulty(name):
    wrong = []
    for line in sample_path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given = row.get("input") or ""
        found = diagnose(row["output"], row["instruction"], input=given, stop="eos")
        wrong += [(row["instruction"], str(found))] * bool(found.faults)
    assert not wrong


SOUND = [
    ("Write a haiku about snow.", "Soft snow on the roof\nthe street has lost its colours\na crow"),
    ("Count to 12.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"),
    ("Write a class schedule for a week.", "Monday: maths. Tuesday: history. Wednesday: sport."),
    ("Describe a room with a table and two chairs.", "The room is bright and quiet."),
    ("The capital of France is", "The capital of France is Paris."),
    ("Fix these two sentences.", "I am here. You are there. We are friends."),
    ("List five words that rhyme with cat.", "hat, bat, rat, mat, sat"),
    ("Give me three ideas.", "1. Paint a wall.\n2. Plant a tree.\n3. Bake bread.\n\nHave fun 🎉"),
    ("Compare A and B in a table.", "Feature\tA\tB\nPrice\t3\t4\nSize\t5\t6"),
    ("Explain what this code does.", "It prints the numbers from 1 to 10."),
    ("Write a dialogue between a user and a bot.", "User: Hi!\nAssistant: Hello."),
    ("Show a Python one-liner.", "`print('it is')`"),
    ("Write a program that reads a JSON file.", "import json\n\nprint(json.load(open('a.json')))"),
    ("彼の表情について書いてください。", "彼は静かに笑っていました。"),
    ("トレーニングプログラムを作ってください。", "月曜は走り、水曜は泳ぎ、金曜は休みます。"),
    ("バーコードを発明したのは誰ですか。", "ウッドランドとシルバーです。"),
    ("英語で「ありがとう」は何と言いますか。", "「Thank you」と言います。"),
    ("Write a story with two characters.", "Tom met Ann at the market. They went home together."),
    ("Explain each of them in two sentences.", "1. Sleep. It helps.\n2. Eat. It feeds.\n3. Walk."),
    ("Add two sentences to the email.", "Dear Ann. I see how hard it was. We will help. Bye."),
    ("Write the multiplication table of 3.", "3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9"),
    ("Draw a table in ASCII.", "+---+---+\n| a | b |\n+---+---+\n| 1 | 2 |\n+---+---+"),
    ("Write a regular expression for digits.", r"^\d+$"),
    ("Make it an HTML table.", "<table>\n<tr>\n<td>3</td>\n</tr>\n</table>"),
    ("Show code in Python.", "```python\nprint(1)\n````\n\nIt prints the number one."),
    (
        "Generate a rap.",
        "Chorus:\nDream it big and dream it loud tonight\nIt is so\n\nI was small\n\n"
        "Chorus:\nDream it big and dream it loud tonight\nIt is so",
    ),
    ("What is U.S. GDP?", "The GDP of the U.S. is large. The GDP of Japan is smaller than that."),
]


@pytest.mark.parametrize(("prompt", "text"), SOUND)
def test_what_only_looks_like_a_fault_is_none(prompt, text):
    assert str(diagnose(text, prompt, stop="eos")) == "no fault"


@pytest.mark.parametrize(
    ("prompt", "given", "text"),
    [
        (
            "Write about the topic.",
            "Video games and board games",
            "Video games and board games are",
        ),
        ("Make it funny.", "He was about to give a speech", "He was about to give a speech on tea"),
        ("Organize the sentences.", "He was a boy. He grew up.", "He was a boy. He grew up."),
    ],
)
def test_an_answer_that_goes_on_from_its_input_is_no_echo(prompt, given, text):
    assert "echo" not in diagnose(text, prompt, input=given, stop="eos").kinds
    assert "echo" in diagnose(f"{given}.", "What is it about?", input=given, stop="eos").kinds


def test_the_span_of_a_repetition_holds_exactly_what_is_repeated():
    text = "Tea is hot. " + "The cat sat on the mat. " * 4 + "The end."
    repeat = find_repeat(text)
    assert (repeat.times, repeat.unit) == (4, "The cat sat on the mat.")
    assert text[repeat.start : repeat.end] == ("The cat sat on the mat. " * 4).strip()
    (fault,) = diagnose(text).faults
    assert fault.span == (repeat.start, repeat.end) and "4 times" in fault.detail


def test_spans_of_markers_and_echo_point_into_the_text():
    text = "Water boils at 100 degrees.\n### Instruction:\nMore"
    (fault,) = [f for f in diagnose(text, "At what heat does water boil?").faults]
    assert text[slice(*fault.span)] == "### Instruction:"
    (fault,) = diagnose("How are you today? Fine.", "How are you today?").faults
    assert (fault.kind, fault.span) == ("echo", (0, 18))


def test_the_missing_form_is_named():
    asked = DEMO_PROMPTS[4]
    (fault,) = diagnose("The GDPs are 27, 18 and 4 trillion dollars.", asked).faults
    assert (fault.kind, fault.form) == ("form", "table")
    assert "table" in fault.detail


@pytest.mark.parametrize(
    ("prompt", "unit", "low", "high"),
    [
        ("Explain it in two sentences.", "sentence", 2, 2),
        ("Write 2-3 sentences.", "sentence", 2, 3),
        ("Use at most 40 words.", "word", 0, 42),
        ("in 100 words or less", "word", 0, 105),
        ("at least 3 paragraphs", "paragraph", 3, 10**9),
        ("百文字以内で書いてください。", "character", 0, 105),
        ("２００字以内で", "character", 0, 210),
        ("二十五文字以内で", "character", 0, 26.25),
        ("三文で説明してください。", "sentence", 3, 3),
    ],
)
def test_lengths_are_read_from_the_prompt(prompt, unit, low, high):
    (found,) = asked_lengths(prompt)
    assert (found.unit, found.low, found.high) == (unit, low, pytest.approx(high))


def test_json_that_was_cut_is_excused_and_json_that_is_wrong_is_not():
    asked = "Give name and age as JSON."
    kinds = [
        diagnose(text, asked, stop="length").kinds - {"cut", "mid_sentence", "mid_code"}
        for text in (
            '{"name": "Tom", "age',
            '```json\n{"name": "Tom",\n',
            '```\n{"name": "Tom",}\n```\n\nIn this example we see',
            '```\n{"name": "Tom"}\n```\n\nIn this example we see',
        )
    ]
    assert kinds == [set(), set(), {"form"}, set()]


def test_a_cut_answer_is_not_blamed_for_being_too_short():
    asked = "Give five tips in at least 100 words."
    text = "1. Walk every day.\n2. Sleep well."
    assert diagnose(text, asked, stop="length").kinds == {"cut"}
    assert diagnose(text, asked, stop="eos").kinds == {"form"}


HARD = {
    "one letter": "x" * 50_000,
    "spaces": " " * 50_000 + "a",
    "quotes": "\"'" * 25_000,
    "brackets": "[{(" * 17_000,
    "pipes": "| a " * 12_500,
    "backticks": "`" * 50_000,
    "points": "a." * 25_000,
    "abbreviations": "a. " * 17_000,
    "numbers": "1. " * 17_000,
    "tags": "<a " * 17_000,
    "assignments": "x = foo(1)\n" * 4_500,
    "words": " ".join(random.Random(1).choices([f"w{i}" for i in range(900)], k=9_000)),
    "japanese": "".join(random.Random(2).choices("あいうえおかきくけこ日本語、。", k=50_000)),
}


@pytest.mark.parametrize("name", HARD)
def test_a_text_five_times_as_long_takes_about_five_times_as_long(name):
    """On the processor's clock, and against the same machine: a square would be 25."""
    asked = "Return JSON with code in a table of 3 sentences in Japanese; give five items."

    def seconds(text):
        started = time.process_time()
        diagnose(text, asked, stop="length")
        return time.process_time() - started

    text = HARD[name]
    tries = ((seconds(text), seconds(text[: len(text) // 5])) for _ in range(5))
    assert any(whole < 12 * part + 0.02 for whole, part in tries)


def test_other_types_and_stops_are_refused():
    with pytest.raises(DataError, match="NoneType"):
        diagnose(None)
    with pytest.raises(DataError, match="'end'"):
        diagnose("text", stop="end")


def side(texts, **changes):
    answers = tuple(
        Answer(DEMO_PROMPTS[4], text, stop, len(text.split()), "") for text, stop in texts
    )
    return Generations(answers, Decoding(), **changes)


TABLE = "| Country | GDP |\n|---|---|\n| Japan | 4.2 |"


def pair():
    loop = "The GDP of Japan is large. " * 5
    before = side([(loop, "length"), ("<script>alert(1)</script> is it. ### Response:", "eos")])
    after = side([(TABLE, "eos"), (TABLE, "eos")], adapter="on", weights="abcdef0123456789")
    return compare(before, after)


def test_counts_and_rates_are_those_of_the_answers():
    before, after = pair().diagnoses
    assert before.counts["repetition"] == before.counts["cut"] == 1
    assert before.counts["form"] == 2 and before.rates["form"] == 1
    assert (before.sound, after.sound, len(after)) == (0, 2, 2)
    assert set(after.counts.values()) == {0}
    assert "asked form missing 2" in repr(before) and "2 of 2" in repr(after)


def test_a_comparison_shows_the_faults_of_each_answer_and_the_change_below():
    made = pair()
    html = made._repr_html_()
    cells = re.findall(r"<td .*?</td>", html, re.S)
    marks = [re.findall(r'lwf-fault">⚠ ([^:<]*)', cell) for cell in cells]
    assert marks == [
        ["repeats itself", "asked form missing"],
        [],
        ["template markers", "asked form missing"],
        [],
    ]
    below = html[html.index('<div class="lwf-s">') :]
    assert "Answers without fault: 0 → 2 of 2" in below and "repeats itself: 1 → 0" in below
    markdown = made.to_markdown()
    assert (
        "| repeats itself | 1 | 0 |" in markdown and "| answers without fault | 0 | 2 |" in markdown
    )
    assert "without fault 0 -> 2 of 2" in str(made)
    values = made.to_dict()["diagnosis"]
    assert values["before"]["counts"]["form"] == 2 and values["after"]["sound"] == 2
    assert type(made).from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_repeated_tag_is_text_in_the_badge_too():
    nasty = "<img src=x onerror=alert(1)> is what it says. " * 4
    made = compare(side([(nasty, "eos")]), side([(nasty, "eos")]))
    html = made._repr_html_()
    assert "lwf-fault" in html and "<img" not in html
    assert "<img" not in made.to_markdown()
