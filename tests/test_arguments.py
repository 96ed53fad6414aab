"""Public functions called with anything: an error of ours that names the argument, or an answer."""

import inspect
from pathlib import Path

import pytest

import lwf_unsloth
from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import ConfigError, DataError, LwfError, ModelError

WRONG = ["abc", None, True, -1, 10**9, 0.5, float("nan"), [], [1, "a"], {"a": 1}, b"x", object()]
ROWS = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}"} for i in range(8)]
UNCHECKED = {
    "compare": "looks at both sides itself",
    "diagnose": "looks at the answer itself",
    "doctor": "takes none",
    "default_model": "takes none",
    "lwf_loss": "tensors, in the innermost loop",
    "sample_path": "looks at the name itself",
}


def test_every_public_function_checks_its_arguments_or_says_why_not():
    names = {
        name
        for name in lwf_unsloth.__all__
        if inspect.isfunction(getattr(lwf_unsloth, name, None))
        and getattr(lwf_unsloth, name).__module__.startswith("lwf_unsloth")
    }
    bare = {name for name in names if not hasattr(getattr(lwf_unsloth, name), "__wrapped__")}
    assert bare == set(UNCHECKED)


def calls() -> list:
    """Every argument of the functions that need no model, with every wrong value."""
    given = {
        "load_alpaca": {"source": ROWS},
        "load_text": {"source": [{"text": f"Passage {i}"} for i in range(4)]},
        "mix_rehearsal": {"task": ROWS, "rehearsal": ROWS, "ratio": 0.2},
        "load_model": {"config": "no/such/folder"},
        "load_adapter": {"folder": "no/such/folder"},
        "set_template": {"tokenizer": None, "template": None},
        "read_sweep_file": {"path": "no/such/file"},
        "run_sweep": {"plan": "no/such/file", "folder": "runs/x"},
        "generate": {"model": None, "tokenizer": None, "prompts": ["x"]},
        "evaluate": {"model": None, "tokenizer": None, "sets": {"a": ROWS}},
        "evaluate_benchmarks": {"model": None, "tokenizer": None, "tasks": ["local_piqa"]},
        "score": {"model": None, "tokenizer": None, "rows": ROWS},
        "dial": {"model": None, "tokenizer": None, "sets": {"a": ROWS}},
        "self_rehearsal": {"model": None, "tokenizer": None},
        "save_adapter": {"model": None, "tokenizer": None, "folder": "runs/x"},
        "merge_model": {"model": None, "tokenizer": None, "folder": "runs/x"},
        "scale_adapter": {"model": None, "scale": 0.5},
        "set_adapter_scale": {"model": None, "scale": 0.5},
        "fits": {"model": None, "batch": 1, "length": 8},
        "advise": {"answers": None},
        "forgetting_report": {},
        "compare_recipes": {"scores": {}},
        "compare": {"before": None, "after": None},
    }
    left_out = {("forgetting_report", "scores"), ("dial", "settings")}
    return [
        pytest.param(function, arguments, name, id=f"{function}-{name}")
        for function, arguments in given.items()
        for name in inspect.signature(getattr(lwf_unsloth, function)).parameters
        if (function, name) not in left_out
    ]


@pytest.mark.parametrize(("function", "given", "name"), calls())
def test_anything_given_to_a_public_function_is_answered_by_us(
    function, given, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for value in WRONG:
        try:
            getattr(lwf_unsloth, function)(**{**given, name: value})
        except LwfError as error:
            assert str(error), (function, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["generate", "score", "evaluate", "dial", "save_adapter"])
def test_on_a_real_model_too_every_wrong_argument_is_answered_by_us(
    function, tiny_peft, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_peft()
    given = {
        "generate": {"prompts": ["x"], "max_new_tokens": 2},
        "score": {"rows": ROWS},
        "evaluate": {"sets": {"a": ROWS}, "max_new_tokens": 2},
        "dial": {"sets": {"a": ROWS}, "scales": (0.5,)},
        "save_adapter": {"folder": tmp_path / "adapter"},
    }[function]
    call = getattr(lwf_unsloth, function)
    refused = 0
    for name in inspect.signature(call).parameters:
        for value in WRONG if name != "settings" else []:
            try:
                call(**{"model": model, "tokenizer": tokenizer, **given, name: value})
            except LwfError as error:
                refused += bool(str(error))
    assert refused > 30


@checked("own")
def made_up(model, rows, count: int, folder: str | Path = "x", *, token: str = "", own: int = 0):
    return model, rows, count, folder, token, own


class Model:
    def named_modules(self):
        return []


def test_the_error_names_function_argument_value_and_what_is_needed():
    with pytest.raises(ConfigError, match=r"made_up: count is '3' \(str\), but it takes a whole"):
        made_up(Model(), ROWS, "3")
    with pytest.raises(ModelError, match="model is 'gemma' .* the model that load_model gives"):
        made_up("gemma", ROWS, 3)
    with pytest.raises(ConfigError, match="null character"):
        made_up(Model(), ROWS, 3, "a\0b")
    with pytest.raises(ConfigError, match="missing a required argument: 'count'. It takes model"):
        made_up(Model(), ROWS)
    with pytest.raises(ConfigError, match="token is not shown") as caught:
        made_up(Model(), ROWS, 3, token=["secret"])
    assert "secret" not in str(caught.value)
    assert made_up(Model(), None, 3, Path("y"), own="left to the function")[3] == Path("y")


def test_wrong_rows_are_an_error_of_the_data():
    with pytest.raises(DataError, match="prompts is 3"):
        lwf_unsloth.generate(Model(), type("T", (), {"eos_token_id": 1})(), 3)
