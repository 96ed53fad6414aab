"""What SECURITY.md promises: text stays text, files stay data, secrets stay where they are."""

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lwf_unsloth"
CODE = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
UGLY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[x](javascript:alert(1))",
    "![x](http://a.example/b.png)",
    "a`b` c",
    "x\nlicense: evil\n---\n# h",
    "a|b\n| c |",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "abc\rdef\x00",
    "\u202eabc",
    "[red]x[/red]",
    "$x_{1}$ \\(y\\)",
)
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


class Evil:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


# what the sources hold --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODE)
def test_no_module_runs_text_as_code(name: str) -> None:
    banned = {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "yaml.unsafe_load"}
    banned |= {"torch.load", "pickle.load", "marshal.loads", "yaml.full_load", "tempfile.mktemp"}
    for called, node in calls(CODE[name]):
        assert called not in banned, f"line {node.lineno}: {called}"
        for argument in node.keywords:
            value = getattr(argument.value, "value", None)
            assert not (argument.arg == "shell" and value), f"line {node.lineno}: shell"
            assert not (argument.arg == "trust_remote_code" and value is True), node.lineno


def test_yaml_is_read_by_the_safe_loader_alone() -> None:
    loads = [
        (name, ast.unparse(node))
        for name, tree in CODE.items()
        for called, node in calls(tree)
        if called.startswith("yaml.") and "load" in called
    ]
    assert [name for name, _ in loads] == ["train_file"]
    assert "class Loader(yaml.SafeLoader)" in (PACKAGE / "train_file.py").read_text()


def test_pickles_are_read_in_no_module_but_between_the_processes_of_one_run() -> None:
    readers = {
        name for name, tree in CODE.items() for called, _ in calls(tree) if called == "pickle.loads"
    }
    assert readers <= {"ranks"}


def test_a_training_file_cannot_name_code(tmp_path: Path) -> None:
    from lwf_unsloth.errors import ConfigError
    from lwf_unsloth.train_file import read_train_file

    mark, file = tmp_path / "mark", tmp_path / "t.yaml"
    for tag in (
        f"!!python/object/apply:os.system ['touch {mark}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ):
        file.write_text(f"data:\n  task: {tag}\n")
        with pytest.raises(ConfigError, match="could not be read as YAML"):
            read_train_file(file)
    assert not mark.exists()


# text stays text --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", UGLY)
def test_nothing_of_a_model_card_is_markup(text: str) -> None:
    import yaml

    from lwf_unsloth.model_card import adapter_card

    record = {
        "base": {"name": text},
        "loaded": {"bits": 4, "device": text},
        "template": {"prompt": text},
        "eos_token": text,
        "versions": {"a": text},
    }
    rows = {"a": {"x": text}, "b": {"x": text}}
    card = adapter_card(record, {text: text, "rows": rows, "list": [text]})
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"base_model", "library_name", "tags", "pipeline_tag"}
    outside = re.sub(r"(`+)(?:(?!\1).)+\1", "", body)  # inline code shows what it holds
    for sign in ("<script", "<img", "[x]", "![", "$x", "\n# h", "\n| c |"):
        assert sign not in outside, sign
    assert not COMMANDS.search(card)


@pytest.mark.parametrize("text", UGLY)
def test_a_terminal_gets_no_command_from_an_answer(text: str) -> None:
    from rich.console import Console

    from lwf_unsloth.answers import Answer
    from lwf_unsloth.demo_view import DemoView, answer_table

    answer = Answer(prompt=text, input="", text=text, stop="eos", tokens=3)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=200)
    console.print(answer_table([(answer, answer)], text, text))
    DemoView(console, 1).say(text)
    lines = out.getvalue().replace("\x1b[2m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not COMMANDS.search(lines)
    assert "[red]" in lines or "[red]" not in text


def test_a_log_line_of_the_command_line_is_plain_and_holds_no_secret(monkeypatch) -> None:
    from lwf_unsloth.unseen import PlainFormatter

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    text = f"row \x1b[31m \x9b2J {'0123456789abcdef' * 2} http://u:password1@h/db"
    record = logging.LogRecord("x", logging.WARNING, "", 1, text, None, None)
    line = PlainFormatter("%(message)s").format(record)
    assert line == "row [ESC][31m [U+009B]2J (left out) http://u:(left out)@h/db"


@pytest.mark.parametrize("text", UGLY)
def test_a_label_of_a_figure_is_text(text: str) -> None:
    from matplotlib.cbook import is_math_text

    from lwf_unsloth.plots import _short

    assert not is_math_text(_short(text))
    assert not COMMANDS.search(_short(text))


# files stay data --------------------------------------------------------------------------------


def test_an_adapters_folder_cannot_ask_for_its_own_code(
    tiny_peft, tiny_model_dir, tmp_path, monkeypatch
) -> None:
    from lwf_unsloth.errors import LwfError
    from lwf_unsloth.model import load_adapter, save_adapter

    model, tokenizer = tiny_peft()
    folder, mark = save_adapter(model, tokenizer, tmp_path / "a"), tmp_path / "mark"
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "T"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises((LwfError, ValueError)):
        load_adapter(folder, base=str(tiny_model_dir))
    assert not mark.exists()


@pytest.mark.parametrize("name", ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
def test_a_state_that_would_run_code_is_refused_at_a_resume(name: str, tmp_path) -> None:
    import torch

    from lwf_unsloth.checkpoints import data_alone
    from lwf_unsloth.errors import ModelError

    mark = tmp_path / "mark"
    torch.save(Evil(mark), tmp_path / name)
    with pytest.raises(ModelError, match="was not run"), data_alone(tmp_path):
        torch.load(tmp_path / name, weights_only=True)
    assert not mark.exists()


@pytest.mark.slow
def test_a_poisoned_checkpoint_is_refused_whichever_file_it_is_in(make_trainer, tmp_path) -> None:
    import torch

    from lwf_unsloth.errors import ModelError

    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(**steps)
    trainer.train()
    whole = Path(trainer.args.output_dir) / "checkpoint-1"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        mark, folder = tmp_path / "mark", tmp_path / name / whole.name
        shutil.copytree(whole, folder)
        torch.save(Evil(mark), folder / name)
        if name.endswith(".bin"):
            (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ModelError, match="run any code|was not run"):
            make_trainer(**steps).train(resume_from_checkpoint=str(folder))
        assert not mark.exists(), name


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt"))
def test_a_base_in_pickles_alone_is_refused_unread(name: str, tmp_path) -> None:
    from lwf_unsloth.errors import ModelError
    from lwf_unsloth.model_files import check_folder

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(ModelError, match="run any code"):
        check_folder(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ("evil.py", "rows.pkl", "rows.pt"))
def test_a_folder_with_a_loading_script_or_a_pickle_is_no_data(name: str, tmp_path) -> None:
    from lwf_unsloth.alpaca import load_alpaca
    from lwf_unsloth.errors import DataError

    mark, folder = tmp_path / "mark", tmp_path / "data"
    folder.mkdir()
    made = pickle.dumps(Evil(mark)) if name != "evil.py" else f"open({str(mark)!r}, 'w')".encode()
    (folder / name).write_bytes(made)
    for source in (folder, folder / name):
        with pytest.raises(DataError):
            load_alpaca(source)
    assert not mark.exists()


def test_a_parquet_file_that_unpacks_to_more_than_memory_is_refused(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lwf_unsloth.alpaca import load_alpaca
    from lwf_unsloth.errors import DataError

    one = pa.array(["x" * 1_000_000])
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), one)
    pq.write_table(pa.table({"instruction": text, "output": text}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1_000_000
    with pytest.raises(DataError, match="unpacks to more than 2 GiB"):
        load_alpaca(tmp_path / "bomb.parquet")


def test_counting_what_parquet_unpacks_to_takes_every_type() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lwf_unsloth.formats import read_bytes

    kinds = {
        "a": [["x"], None],
        "b": [1, 2],
        "c": [{"d": 1}] * 2,
        "e": [b"x", None],
        "f": [None] * 2,
    }
    kinds |= {
        "g": pa.array(["x", "y"]).dictionary_encode(),
        "h": pa.array(["x", None], pa.large_string()),
    }
    made = io.BytesIO()
    pq.write_table(pa.table(kinds), made)
    for names in (list(kinds), ["g"], ["a"], ["h", "b"]):
        rows = read_bytes(made.getvalue(), "rows.parquet", expected=names).rows
        assert [sorted(row.value) for row in rows] == [sorted(names)] * 2


def test_a_file_larger_than_the_limit_is_not_read(tmp_path) -> None:
    from lwf_unsloth.alpaca import load_alpaca
    from lwf_unsloth.errors import DataError

    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    with pytest.raises(DataError, match="has more than 2 GiB"):
        load_alpaca(tmp_path / "rows.jsonl")


def test_a_base_that_brings_code_does_not_run_it(tiny_model_dir, tmp_path) -> None:
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.errors import ModelError
    from lwf_unsloth.model import load_model

    folder, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    with pytest.raises(ModelError, match="custom code"):
        load_model(ModelConfig(str(folder), dtype="float32"))
    assert not mark.exists()


def test_every_pin_has_its_hash() -> None:
    root = PACKAGE.parent
    setup = (root / "colab_setup.sh").read_text()
    pins = set(re.findall(r"(?m)(?:^|(?<= ))([\w.-]+==[\w.+]+)(?= |$)", setup))
    lines = (root / "requirements-hashes.txt").read_text().splitlines()
    hashed = [line.split(" --hash=sha256:") for line in lines if not line.startswith("#")]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in hashed)
    names = [pin.removesuffix("+cpu") for pin, _ in hashed]
    wanted, found = ({re.sub("[-_.]+", "-", one).lower() for one in side} for side in (pins, names))
    assert len(found) > 190 and wanted - {"package==version"} == found


# nothing leaves its folder ----------------------------------------------------------------------


def test_only_what_a_killed_save_left_is_removed_beside_an_adapter(tmp_path) -> None:
    from lwf_unsloth.replaced_folders import recover

    theirs = (".venv-old", ".a-b-x1y2z3w4", ".a-backup22", ".cache-12345678")
    for name in theirs:
        (tmp_path / name / "keep").mkdir(parents=True)
    (tmp_path / ".a-abcdefgh" / "new").mkdir(parents=True)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    for target in ("venv", "a", "*", "[ab]", "cache"):
        recover(tmp_path / target)
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)


def test_an_upload_is_kept_below_its_folder_whatever_its_name(tmp_path) -> None:
    from lwf_unsloth.panel_session import keep_upload

    folder = tmp_path / "in" / "uploads"
    for name in ("../../evil", "/etc/x", "..", "", "a\0b", "C:\\x\\y", "n" * 400, "CON", "näme 🦥"):
        path = keep_upload(name, b"x", folder)
        assert path.resolve().parent == folder.resolve(), name
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("theirs")
    (folder / "link").symlink_to(elsewhere)
    keep_upload("link", b"x", folder)
    assert elsewhere.read_text() == "theirs"


# secrets ----------------------------------------------------------------------------------------


def test_a_token_is_in_no_form_of_a_config() -> None:
    from lwf_unsloth.config import LwFConfig, ModelConfig

    config, model = LwFConfig("x", hub_token="CANARY", bf16=False), ModelConfig("x", token="CANARY")
    forms = (repr(config), str(config), config.to_dict(), config.to_json_string())
    for form in (*forms, config.lwf_settings(), repr(model), model.to_dict()):
        assert "CANARY" not in str(form)


@pytest.mark.parametrize("line", ("model: {token: CANARY}", "training: {hub_token: CANARY}", ""))
def test_a_sweep_keeps_no_token_since_it_takes_none(line: str, tmp_path) -> None:
    from lwf_unsloth.errors import ConfigError
    from lwf_unsloth.sweep_file import read_sweep_file

    grid = "model.token: [CANARY]" if not line else "lwf_lambda: [1, 2]"
    text = f"data: {{task: a.jsonl}}\ngrid: {{{grid}}}\nevaluate: {{general: b.jsonl}}\n{line}\n"
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match="HF_TOKEN") as refusal:
        read_sweep_file(tmp_path / "s.yaml")
    assert "CANARY" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    (
        "postgresql+psycopg://user:CANARYpw@127.0.0.1:1/none",
        "postgresql+psycopg://user:CANARY/pw@127.0.0.1:1/none",
        "postgresql+psycopg://user:CANARY@pw@127.0.0.1:port/none",
        "postgresql+none://user:CANARYpw@127.0.0.1/none",
        "user:CANARYpw",
    ),
)
def test_a_storage_that_is_not_there_is_told_without_its_password(url, monkeypatch) -> None:
    from lwf_unsloth import sweep_storage
    from lwf_unsloth.errors import ConfigError

    monkeypatch.setattr(sweep_storage, "TRIES", 1)
    with pytest.raises(ConfigError, match="cannot be opened") as refusal:
        sweep_storage.open_storage(url)
    shown = "".join(traceback.format_exception(refusal.value))
    assert "CANARY" not in shown and refusal.value.__suppress_context__


@pytest.mark.slow
def test_a_whole_run_shows_no_secret_and_asks_no_other_machine(tmp_path) -> None:
    """Train, resume, compare, report, sweep and errors, in a network namespace without a way out;
    where none can be made, by the sockets that Python opens alone."""
    import closed_run

    out, hook, asked = (tmp_path / name for name in ("out", "hook", "asked"))
    out.mkdir()
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(closed_run.HOOK)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {
        "HF_TOKEN": "hf_CANARYtoken0000000000000000001",
        "HUGGING_FACE_HUB_TOKEN": "hf_CANARYhub000000000000000000002",
        "WANDB_API_KEY": "CANARYwandb0000000000000000000003",
        "CANARY_PASSWORD": "CANARYpw4",
        "HF_HOME": str(tmp_path / "home"),
        "LWF_ASKED": str(asked),
        "PYTHONPATH": os.pathsep.join((str(hook), str(Path(__file__).parent))),
    }
    closed = shutil.which("unshare") and not subprocess.run(["unshare", "-rn", "true"]).returncode
    command = [*(["unshare", "-rn"] if closed else []), sys.executable, closed_run.__file__]
    given = {"env": environment, "cwd": out, "capture_output": True}
    done = subprocess.run([*command, str(out)], **given)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stdout.count(b"== ") == 6 and b"Traceback" in done.stderr
    assert set(re.findall(r"'(\S+)'", asked.read_text())) >= {"huggingface.co"}, "the hook listens"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"study.db", "trials.jsonl", "trainer_state.json"} <= {path.name for path in written}
    for name, content in (
        ("output", done.stdout + done.stderr),
        *((p, p.read_bytes()) for p in written),
    ):
        assert b"CANARY" not in content, name
