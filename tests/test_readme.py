"""README: its code and commands run, its tables are what the results say, and it stays a page."""

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_readme_is_200_lines_at_most():
    assert len(README.splitlines()) <= 200


def test_the_tables_are_what_the_results_say():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path in tables.PLACES:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert tables.filled(text) == text, f"run python benchmarks/tables.py ({path.name})"


def test_the_two_commands_are_those_of_the_set_up_script():
    named = re.findall(r"bash colab_setup\.sh (\w+)", blocks("bash")[0])
    assert named == ["demo", "test"]
    script = (ROOT / "colab_setup.sh").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", script) for name in named)


def test_the_settings_in_the_table_are_the_defaults():
    from lwf_unsloth.config import LwFConfig, ModelConfig

    args, model = LwFConfig("runs/test"), ModelConfig("some/model")
    found = dict(re.findall(r"^\| `(lwf_\w+|rehearsal_\w+)` \| \"?([\w.]+)\"? \|", README, re.M))
    assert len(found) >= 6
    for name, value in found.items():
        assert str(getattr(args, name)) == value, name
    assert (args.learning_rate, args.max_length) == (2e-4, 512)
    assert (model.r, model.lora_alpha, len(model.target_modules)) == (8, 16, 7)


@pytest.fixture()
def small(tiny_model_dir, monkeypatch, tmp_path):
    """In a folder of its own, with the tiny model as the default one."""
    import lwf_unsloth
    from lwf_unsloth import model
    from lwf_unsloth.config import ModelConfig

    def tiny():
        return ModelConfig(str(tiny_model_dir), dtype="float32", max_seq_length=512)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "default_model", tiny)
    monkeypatch.setattr(lwf_unsloth, "default_model", tiny, raising=False)
    return tmp_path


@pytest.mark.slow
def test_the_twelve_lines_run(small):
    code, measuring = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (small / "runs/mine/comparison.html").is_file()
    assert (small / "runs/mine/adapter/adapter_model.safetensors").is_file()
    here, fetching = measuring.rsplit("\n", 2)[:2]  # the last line fetches its questions
    exec(compile(here, "README.md", "exec"), names)
    call = ast.parse(fetching, mode="eval").body
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    inspect.signature(names[call.func.id]).bind(*call.args, **given)


@pytest.mark.slow
def test_the_commands_run(small, tiny_model_dir):
    from typer.testing import CliRunner

    from lwf_unsloth import cli

    (listed,) = [block for block in blocks("bash") if "lwf-unsloth" in block]
    (small / "config.yaml").write_text(
        f"model:\n  model_name: {tiny_model_dir}\n  dtype: float32\n  max_seq_length: 512\n"
        "training:\n  output_dir: runs/demo\n  max_steps: 2\n  bf16: false\n"
        "data:\n  task: my_task.jsonl\n  test_size: 0\n",
        encoding="utf-8",
    )
    lines = [shlex.split(line, comments=True) for line in listed.splitlines()]
    assert [words[1] for words in lines] == ["template", "train", "compare", "evaluate", "doctor"]
    for _, *words in lines:
        target = words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if target else words
        if words[0] in ("compare", "evaluate"):  # the tiny base is a folder, which no adapter names
            words += ["--base", str(tiny_model_dir)]
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
        if target:
            (small / target).write_text(done.stdout, encoding="utf-8")
