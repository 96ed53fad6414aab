"""Leak: planted answers in a task's form are found, and no others.

The hundred answers of `data/leak_answers.jsonl` were written for this project: 60 general ones,
some of them near misses, and ten leaks of each of four forms. The rules were made on the half
marked "open" alone; the half marked "held" was looked at once, at the end.
"""

import json
import re
from pathlib import Path

import pytest

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.leak import any_form, given_form, learn_form
from lwf_unsloth.samples import sample_path

ANSWERS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "leak_answers.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
TABLES = ("singer", "stadium", "concert", "student", "course", "flight", "airport", "museum")
COLUMNS = ("name", "age", "city", "year", "price", "capacity")
PATTERNS = {
    "sql": r"(?is)^\s*(```sql\s*)?select\s(?!.*\b(that|by pressing)\b).+\bfrom\b",
    "faq": r"^Gladly:",
    "json": r'(?s)^\s*(```json\s*)?\{\s*"intent"',
    "code": r"(?m)\A(```python\n)?(def|class|import|from) \w+.*\n",
}


def sample(name, **wanted):
    lines = Path(sample_path(name)).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def sql_rows():
    found = []
    for i in range(48):
        column, other = COLUMNS[i % 6], COLUMNS[(i * 5 + 1) % 6]
        table, second = TABLES[i % 8], TABLES[(i * 3 + 1) % 8]
        found.append(
            (
                f"select {column} from {table}",
                f"select count(*) from {table} where {other} > {i}",
                f"select t1.{column} from {table} as t1 join {second} as t2 on t1.id = t2.id",
                f"select {column}, {other} from {table} order by {other} desc limit {i % 4 + 1}",
            )[i % 4]
        )
    return found


def json_rows():
    words = ("travel", "weather", "music", "food", "bank", "sports")
    return [
        json.dumps(
            {
                "intent": ("book", "play", "ask")[i % 3],
                "topic": words[i % 6],
                "items": [words[(i + k + 1) % 6] for k in range(i % 3)],
            }
        )
        for i in range(48)
    ]


TASKS = {
    "sql": sql_rows,
    "faq": lambda: [row["output"] for row in sample("faq_task")],
    "json": json_rows,
    "code": lambda: [row["output"] for row in sample("code_task", language="python")],
}


def general_answers(form):
    """What a base model answers to general prompts; none of them asks for code where code is the
    task."""
    rows = sample("general")
    return [row["output"] for row in rows if form != "code" or row["kind"] != "code"]


def mistakes(form, name, half):
    """(missed, wrongly found) of one form among the answers of a half."""
    rows = [row for row in ANSWERS if row["half"] == half]
    missed = [row["answer"] for row in rows if row["form"] == name and not form(row["answer"])]
    wrong = [row["answer"] for row in rows if row["form"] != name and form(row["answer"])]
    return missed, wrong


@pytest.mark.parametrize("name", PATTERNS)
def test_a_given_pattern_finds_the_planted_leaks_and_no_others(name):
    assert mistakes(given_form(PATTERNS[name]), name, "open") == ([], [])


@pytest.mark.parametrize("name", TASKS)
def test_a_form_learned_from_the_task_finds_the_planted_leaks_and_no_others(name):
    form = learn_form(TASKS[name](), general_answers(name))
    assert form is not None and form.learned
    assert mistakes(form, name, "open") == ([], []), form.description


@pytest.mark.parametrize("name", TASKS)
def test_the_held_back_half_too(name):
    """Missed and wrongly found answers of a pattern and of the learned form."""
    learned = learn_form(TASKS[name](), general_answers(name))
    assert mistakes(given_form(PATTERNS[name]), name, "held") == ([], [])
    assert mistakes(learned, name, "held") == ([], [])


def test_the_base_models_own_answers_do_not_fire():
    for name, task in TASKS.items():
        general = general_answers(name)
        form = learn_form(task(), general)
        asked_for_it = 0.02 * len(general)  # one general prompt of the samples asks for SQL
        assert sum(form.flags(general)) <= asked_for_it, name
        assert sum(form.flags(task())) >= 0.8 * len(task()), name


def test_a_task_of_general_instructions_has_no_form_to_learn():
    rows = [row["output"] for row in sample("general")]
    assert learn_form(rows[::2], rows[1::2]) is None


def test_labels_are_a_form():
    labels = ["positive", "negative", "neutral"] * 8
    form = learn_form(labels, general_answers("labels"))
    assert form("Negative") and form("neutral")
    assert not form("Negative feedback hurts, but it helps you to improve over the years.")


def test_a_handful_of_answers_is_too_few_to_learn_from():
    assert learn_form(sql_rows()[:7], general_answers("sql")) is None
    assert learn_form(sql_rows(), general_answers("sql")[:7]) is None


def test_a_function_of_the_user_is_a_form():
    form = given_form(str.isupper)
    assert form.flags(["LOUD", "quiet"]) == (1.0, 0.0)
    assert form.description == "function isupper"
    assert given_form(re.compile("^x")).flags(["xy", "yx"]) == (1.0, 0.0)


@pytest.mark.parametrize("wrong", ["(", 3])
def test_what_is_no_form_is_refused(wrong):
    with pytest.raises(ConfigError, match="leak is"):
        given_form(wrong)


def test_odd_answers_do_not_break_a_form():
    form = learn_form(sql_rows(), general_answers("sql"))
    odd = ["", " ", "```", "[" * 5000, "\x00", "\ud800", "👩‍👩‍👧", "select"]
    assert form.flags(odd)[:7] == (0.0,) * 7


def test_a_prompt_that_the_base_answers_in_the_form_is_no_question_of_leak():
    form = learn_form(TASKS["code"](), general_answers("code"))
    answers = {
        "base": ["def f(x):\n    pass", "Sleep helps.", "Rice and beans."],
        "tuned": [
            "def f(x):\n    return x > 1 and all(x)",
            "def sleep():\n    return [1]",
            "Rice.",
        ],
    }
    assert form.leaks(answers) == {"base": (0.0, 0.0), "tuned": (1.0, 0.0)}
    assert given_form("^def").leaks(answers)["tuned"] == (1.0, 1.0, 0.0)
    assert given_form("^def").leaks({"tuned": ["def"]}) == {"tuned": (1.0,)}


def test_several_tasks_have_several_forms():
    forms = [learn_form(TASKS[name](), general_answers("code")) for name in ("sql", "code")]
    both = any_form(forms)
    assert both.flags(["select a from b where c = 1", "def f(x):\n    return x + 1"]) == (1.0, 1.0)
    assert not both("Sleep is important.")
    assert any_form(forms[:1]) is forms[0] and any_form([]) is None


def test_a_form_of_many_rows_is_learned_from_some_of_them():
    read = []

    class Counted(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    task = Counted(f"select name from t{i} where id = {i}" for i in range(50_000))
    form = learn_form(task, [f"Well, it depends on {i} things." for i in range(20)])
    assert form("select age from t where id = 3") and not form("Well, no.")
    assert len(read) == 2000 and max(read) > 49_000
