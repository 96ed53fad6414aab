"""forms: the words that are added, the start that an answer must have, and what is refused."""

import copy

import pytest

from lwf_unsloth.asked import wishes
from lwf_unsloth.comparison import compare
from lwf_unsloth.errors import DataError
from lwf_unsloth.forms import FORMS, Form, shaped
from lwf_unsloth.generation import DEMO_PROMPTS, generate


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("asked", ["Tell me about rivers.", "川について教えてください。"])
def test_the_words_of_a_form_ask_for_it_once_in_the_language_of_the_prompt(name, asked):
    row, _ = shaped({"instruction": asked, "form": name})
    said = row["instruction"]
    assert said.startswith(asked) and len(said) > len(asked) and "form" not in row
    assert (" " in said.removeprefix(asked)) == asked.startswith("Tell")
    kinds = {wish.form for wish in wishes(said)}
    assert ("length" if name == "paragraph" else name) in kinds
    assert shaped({"instruction": said, "form": name})[0]["instruction"] == said


def test_a_prompt_that_asks_for_the_form_already_stays_as_it_stands():
    asked = DEMO_PROMPTS[4]
    row, prefix = shaped({"instruction": asked, "form": "table"})
    assert (row, prefix) == ({"instruction": asked}, "|")
    row, prefix = shaped({"instruction": DEMO_PROMPTS[3], "form": "code"})
    assert (row["instruction"], prefix) == (DEMO_PROMPTS[3], "```python\n")


def test_the_fence_names_the_language_of_the_instruction():
    found = {
        words: shaped({"instruction": f"Sort a list in {words}.", "form": "code"})[1]
        for words in ("Java", "JavaScript", "C++", "SQL", "prose")
    }
    assert found == {
        "Java": "```java\n",
        "JavaScript": "```javascript\n",
        "C++": "```cpp\n",
        "SQL": "```sql\n",
        "prose": "```python\n",
    }


def test_rows_without_a_form_are_left_alone_and_the_callers_row_is_never_changed():
    row = {"instruction": "a", "input": "b", "form": None}
    assert shaped(row) == (row, "") and shaped("text") == ("text", "")
    given = {"instruction": "a", "form": "list"}
    kept = copy.deepcopy(given)
    shaped(given)
    assert given == kept


def test_a_form_of_ones_own_has_its_suffix_and_prefix():
    haiku = Form("haiku", suffix="Answer as a haiku.", prefix="Haiku:")
    assert shaped({"instruction": "Snow?", "form": haiku}) == (
        {"instruction": "Snow? Answer as a haiku."},
        "Haiku:",
    )


@pytest.mark.parametrize("form", ["tabel", 3, ["table"], {"prefix": "|"}])
def test_an_unknown_form_is_refused_with_the_names_there_are(form):
    with pytest.raises(DataError, match="list, table, code, json, paragraph"):
        shaped({"instruction": "a", "form": form})


def test_a_form_that_does_nothing_or_ends_with_a_space_is_refused():
    with pytest.raises(DataError, match="suffix or a prefix"):
        Form("none")
    with pytest.raises(DataError, match="next word's token"):
        Form("table", prefix="| ")
    with pytest.raises(DataError, match="must be text"):
        Form("table", prefix=None)


@pytest.fixture()
def base(tiny_model_dir):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model_dir)


def test_an_answer_begins_with_the_prefix_and_goes_on_as_after_a_trained_response(
    base, tiny_tokenizer
):
    from lwf_unsloth.generation import continue_ids
    from lwf_unsloth.records import encode_row

    settings = {"max_new_tokens": 8}
    asked = {"instruction": "Compare rivers with a table.", "form": "table"}
    made = generate(base, tiny_tokenizer, [asked, "Sleep?"], **settings)
    answer = made[0]
    assert (answer.prompt, answer.prefix) == ("Compare rivers with a table.", "|")
    assert answer.text.startswith("|") and answer.tokens == 9
    row = {"instruction": answer.prompt, "output": "|"}
    start = encode_row(tiny_tokenizer, row, max_length=None).input_ids[:-1]  # less EOS
    ((ids, _),) = continue_ids(base, tiny_tokenizer, [start], [0], made.settings)
    assert answer.text == tiny_tokenizer.decode([start[-1], *ids])
    assert made[1] == generate(base, tiny_tokenizer, "Sleep?", **settings)[0]
    assert made[1].prefix == ""


def test_a_form_is_the_same_alone_and_in_a_batch_and_survives_json(base, tiny_tokenizer):
    rows = [{"instruction": f"Say {name}.", "form": name} for name in FORMS]
    together = generate(base, tiny_tokenizer, iter(rows), max_new_tokens=6)
    alone = [generate(base, tiny_tokenizer, row, max_new_tokens=6)[0] for row in rows]
    assert list(together) == alone
    assert type(together).from_dict(together.to_dict()) == together


def test_answers_with_and_without_a_form_are_not_compared(base, tiny_tokenizer):
    asked = DEMO_PROMPTS[4]
    plain = generate(base, tiny_tokenizer, asked, max_new_tokens=4)
    table = generate(
        base, tiny_tokenizer, {"instruction": asked, "form": "table"}, max_new_tokens=4
    )
    with pytest.raises(DataError, match="forms differ"):
        compare(plain, table)
