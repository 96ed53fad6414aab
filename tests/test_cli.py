"""The command line: quick help, whole files in, plain messages out."""

import json
import subprocess
import sys

import pytest

from lwf_unsloth import cli
from lwf_unsloth.alpaca import load_alpaca
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.train_file import read_train_file


def run(monkeypatch, capsys, *words):
    """(exit code, stdout, stderr) of `lwf-unsloth WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["lwf-unsloth", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_help_lists_every_command_without_loading_torch():
    code = (
        "import sys; sys.argv = ['lwf-unsloth', '--help']\n"
        "from lwf_unsloth.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(str({'torch', 'transformers', 'unsloth'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "set()"
    for name in ("demo", "template", "train", "compare", "evaluate", "doctor"):
        assert f"\n  {name} " in done.stdout


def test_the_template_is_a_file_that_loads(tmp_path):
    words = [sys.executable, "-m", "lwf_unsloth.cli", "template"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    (tmp_path / "my_task.jsonl").write_text(done.stdout)
    assert len(load_alpaca(tmp_path / "my_task.jsonl", test_size=None)["train"]) == 3


def test_an_error_of_ours_is_a_message_without_a_traceback(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "train", tmp_path / "none.yaml")
    assert code == 2
    assert err.startswith("Error: ")
    assert "none.yaml" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch, tmp_path, place):
    words = ["train", str(tmp_path / "none.yaml")]
    words.insert(place, "--debug")
    monkeypatch.setattr(sys, "argv", ["lwf-unsloth", *words])
    with pytest.raises(ConfigError):
        cli.main()


def test_a_wrong_option_is_refused_by_name(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "demo", "--stepps", "3")
    assert code == 2
    assert "--stepps" in err


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- just\n- a list\n", "model, training, data"),
        ("data: {task: a.jsonl}\nmodle: {r: 8}\n", "Did you mean model?"),
        ("data: {task: a.jsonl, rehersal: b.jsonl}\n", "Did you mean rehearsal?"),
        ("model: {r: 8}\n", "data.task"),
        ("data: {task: a, rehearsal: b, rehearsal_text: c}\n", "only one"),
        ("data: {task: [\n", "could not be read as YAML"),
    ],
)
def test_a_wrong_training_file_is_refused_before_any_work(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        read_train_file(write(tmp_path / "run.yaml", text))


def test_a_rate_without_a_dot_is_a_number(tmp_path):
    text = "training: {learning_rate: 2e-4, weight_decay: 1E-2}\ndata: {task: a.jsonl}\n"
    assert read_train_file(write(tmp_path / "run.yaml", text)).training == {
        "learning_rate": 2e-4,
        "weight_decay": 1e-2,
    }


@pytest.mark.parametrize(
    ("section", "said"),
    [("model: {rank: 8}", "model: rank"), ("training: {lwf_lamda: 1}", "Did you mean lwf_lambda")],
)
def test_an_unknown_setting_is_refused_before_the_data_are_read(
    monkeypatch, capsys, tmp_path, section, said
):
    path = write(tmp_path / "run.yaml", f"{section}\ndata: {{task: not-there.jsonl}}\n")
    code, _, err = run(monkeypatch, capsys, "train", path)
    assert code == 2
    assert said in err


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory):
    """Folder of a run that `lwf-unsloth train` made on the tiny model, with its files."""
    folder = tmp_path_factory.mktemp("train")
    rows = [
        {"instruction": f"Say number {i}.", "input": "", "output": f"Number {i}."} for i in range(8)
    ]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "passages.jsonl").write_text(
        '{"text": "The fox jumps."}\n{"text": "A dog sleeps."}\n'
    )
    (folder / "run.yaml").write_text(
        f"model: {{model_name: {tiny_model_dir}, dtype: float32, r: 4, max_seq_length: 256}}\n"
        f"training: {{output_dir: {folder / 'out'}, max_steps: 2, learning_rate: 1e-2,\n"
        "  save_strategy: 'no', disable_tqdm: true, warmup_steps: 0, rehearsal_ratio: 0.3}\n"
        f"data: {{task: {folder / 'task.jsonl'}, test_size: 2, "
        f"rehearsal_text: {folder / 'passages.jsonl'}}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lwf-unsloth", "train", str(folder / "run.yaml")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return folder


def test_train_saves_an_adapter_with_its_settings_in_the_card(trained):
    adapter = trained / "out" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    card = (adapter / "README.md").read_text()
    assert "lwf_lambda" in card
    assert "tiny-llama" in card


def test_evaluate_scores_base_and_adapter_on_named_sets(
    trained, tiny_model_dir, monkeypatch, capsys
):
    (trained / "kept.jsonl").write_text('{"text": "Sleep is important."}\n' * 2)
    code, out, err = run(
        monkeypatch, capsys, "evaluate", trained / "out" / "adapter", trained / "task.jsonl",
        f"passages={trained / 'kept.jsonl'}", "--base", tiny_model_dir,
        "--output", trained / "scores.json", "--answers-limit", 2, "--max-new-tokens", 3,
    )  # fmt: skip
    assert code == 0, err
    assert "KL(base || tuned)" in out and "exact match" in out and "passages" in out
    found = json.loads((trained / "scores.json").read_text())["sets"]
    assert list(found) == ["task", "passages"]
    assert found["task"]["summary"]["nll"]["tuned"]["n"] == 8
    assert found["task"]["summary"]["kl"]["tuned"]["value"] > 0
    assert found["task"]["summary"]["nll"]["change"]["value"] != 0
    assert len(found["task"]["answers"]["tuned"]["answers"]) == 2


def test_evaluate_refuses_two_sets_of_one_name(trained, monkeypatch, capsys):
    again = trained / "task.jsonl"
    code, _, err = run(monkeypatch, capsys, "evaluate", trained / "out" / "adapter", again, again)
    assert code == 2
    assert "Two sets are called 'task'" in err


def test_compare_answers_with_the_adapter_off_and_on(trained, tiny_model_dir, monkeypatch, capsys):
    (trained / "prompts.txt").write_text("Say number 1.\n\nSay number 2.\n")
    code, out, err = run(
        monkeypatch, capsys, "compare", trained / "out" / "adapter",
        "--prompts", trained / "prompts.txt", "--base", tiny_model_dir,
        "--output", trained / "compared", "--max-new-tokens", 3,
    )  # fmt: skip
    assert code == 0, err
    saved = json.loads((trained / "compared" / "comparison.json").read_text())
    assert (saved["before"]["adapter"], saved["after"]["adapter"]) == ("off", "on")
    assert [answer["prompt"] for answer in saved["after"]["answers"]] == [
        "Say number 1.",
        "Say number 2.",
    ]
    assert "Say number 1." in out


def test_compare_refuses_a_folder_without_an_adapter(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "compare", tmp_path)
    assert code == 2
    assert str(tmp_path) in err.replace("\n", "")


def test_prompts_come_from_text_json_and_jsonl(tmp_path):
    row = {"instruction": "Where?", "input": "here"}
    text = write(tmp_path / "a.txt", "Where?\n\nWho?\n")
    assert cli.read_prompt_file(text) == ["Where?", "Who?"]
    assert cli.read_prompt_file(write(tmp_path / "a.jsonl", json.dumps(row) + "\n\n")) == [row]
    assert cli.read_prompt_file(write(tmp_path / "a.json", json.dumps([row, "Who?"]))) == [
        row,
        "Who?",
    ]
    for name, wrong in (("b.jsonl", "{not json"), ("c.txt", " \n"), ("d.json", "7")):
        with pytest.raises(DataError, match=name):
            cli.read_prompt_file(write(tmp_path / name, wrong))
    with pytest.raises(DataError, match="none.txt"):
        cli.read_prompt_file(tmp_path / "none.txt")


def test_doctor_shows_versions_and_device(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "doctor")
    assert code == 0, err
    for name in ("torch", "unsloth", "device"):
        assert f"\n{name} " in out
    assert "No problem found." in out


def test_doctor_names_what_is_not_installed(monkeypatch, capsys):
    from lwf_unsloth import backend

    monkeypatch.setattr(backend, "versions", lambda: dict.fromkeys(backend.PACKAGES, "-"))
    code, _, err = run(monkeypatch, capsys, "doctor")
    assert code == 2
    assert "bitsandbytes" in err
    assert "colab_setup.sh" in err
