"""The notebooks: form, build, and a whole run of each."""

import ast
import importlib.util
import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {
    "01_alpaca_demo": {
        "MODEL": "smollm2-135m-instruct",
        "TASK_ROWS": 40,
        "STEPS": 2,
        "ROWS_A_STEP": 4,
        "MAX_NEW_TOKENS": 16,
    },
    "02_forgetting": {"STEPS": 1, "TASK_ROWS": 4, "ROWS": 4, "ANSWERS": 4, "MAX_NEW_TOKENS": 6},
    "04_evaluate": {"STEPS": 1, "ROWS": 4, "ANSWERS": 4, "MAX_NEW_TOKENS": 6, "SCALES": [0, 1]},
    "05_sweep": {
        "LAMBDAS": [2.0],
        "RATIOS": [0.2],
        "RANKS": [4, 8],
        "STEPS": 2,
        "ROWS": 4,
        "MAX_NEW_TOKENS": 4,
    },
    "03_your_data": {
        "MODEL": "smollm2-135m-instruct",
        "STEPS": 2,
        "ROWS": 20,
        "MAX_NEW_TOKENS": 8,
    },
}
LEFT = {
    "01_alpaca_demo": ("comparison.html", "adapter/adapter_model.safetensors"),
    "02_forgetting": ("recipes.json", "gain_against_forgetting.png", "no_help.json"),
    "04_evaluate": ("scores.json", "dial.json", "forgetting.png", "turned_down/README.md"),
    "03_your_data": ("comparison.html", "adapter/adapter_model.safetensors"),
    "05_sweep": ("trials.jsonl", "sweep.json", "trade_off.png", "trade_off.svg", "best.yaml"),
}
"""What each notebook leaves in its OUTPUT."""
WANDB = """
import os
from types import SimpleNamespace

__version__ = "0.22.0"
run, util, sdk = None, SimpleNamespace(), SimpleNamespace()

def init(*args, **kwargs):
    open(os.environ["WANDB_ASKED"], "w").close()
    raise RuntimeError(f"api_key not configured (no-tty), {input('wandb: Enter your choice: ')}")

login = log = watch = init
"""
"""A wandb that is installed and that nobody is logged in to: using it asks on standard input."""


@pytest.fixture(scope="module")
def builder():
    """notebooks/build.py as a module."""
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_every_source_has_its_notebook():
    assert {path.stem for path in NOTEBOOKS} == {
        path.stem for path in (FOLDER / "src").glob("*.py")
    }
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_what_its_source_says(path, builder):
    built = builder.build(FOLDER / "src" / f"{path.stem}.py", builder.repository())
    assert path.read_text(encoding="utf-8") == built


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_holds_no_outputs_and_no_widget_state(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_an_essay(path):
    """Prose before code, short cells, one parameters cell, no def, class or try."""
    notebook = nbformat.read(path, 4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and notebook.cells[0].cell_type == "markdown"
    for cell in code_cells(path):
        lines = cell.source.splitlines()
        assert len(lines) <= 12, cell.source
        if not any(line.lstrip().startswith("!") for line in lines):
            kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
            assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Try, ast.Lambda}, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_renders_as_html(path):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(path))
    assert "<h1" in html


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_address_fills_badge_and_clone_line_and_nothing_stands_there_without_it(path, builder):
    source = FOLDER / "src" / f"{path.stem}.py"
    with_address = builder.build(source, "https://github.com/someone/lwf_unsloth")
    link = f"github/someone/lwf_unsloth/blob/main/notebooks/{path.name}"
    assert link in with_address
    assert "!git clone --quiet --depth 1 https://github.com/someone/lwf_unsloth" in with_address
    without = builder.build(source, None)
    assert "colab-badge" not in without and "git clone" not in without
    assert "clone here" not in without and "<!-- badge" not in without


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """With small settings, standard input closed, and a wandb that nobody is logged in to."""
    import papermill

    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(WANDB, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("WANDB_ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no history shared with others
    for name in ("CI", "WANDB_DISABLED", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    parameters = {**SMALL[path.stem], "OUTPUT": str(tmp_path / "run")}
    patient = {"start_timeout": 600, "iopub_timeout": 600, "raise_on_iopub_timeout": True}
    done = tmp_path / path.name
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        papermill.execute_notebook(
            path, done, parameters=parameters, kernel_name="python3", **patient
        )
    finally:
        os.chdir(here)
    assert not (tmp_path / "asked").exists()
    outputs = [out for cell in code_cells(done) for out in cell.outputs]
    assert any("<table" in out.get("data", {}).get("text/html", "") for out in outputs)
    for name in LEFT[path.stem]:
        assert (tmp_path / "run" / name).is_file(), name
