"""The house's own rules: who imports whom, how long a file is, and what no source may hold."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lwf_unsloth

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lwf_unsloth"

# A file imports only files above it. A new file takes its place here.
ORDER = """
errors checks bars whole_files replaced_folders secret_texts unseen schedules rank_schedule
kl_budget without_effect field_types arguments
backend ranks config
load_report formats rows selection sources templates codec records alpaca
rank_shares rehearsal
loss_terms loss_triton loss_kernels loss_topk loss_rows loss_pass losses switches hidden
gguf_files kept_folders gguf_tokenizer embedded bases model_files loaded model_card
trained_template adapters
merging model
checkup memory shapes preflight out_of_memory
locks teacher cache_parts teacher_identity teacher_cache rank_callbacks
cache_plan
prose repeats endings languages lengths asked forms
decoding answers generation written_rows written_file row_writer
batches checkpoints run_record objective meters measured log_window kl_meter strength curriculum
prechecks precision progress guard train_data
trainer_inputs resuming trainer
markup result_table token_stats scoring intervals leak answer_scores scores
eval_sets evaluation adapter_dial best_adapter
diagnosis facts loss_curve advice comparison
forgetting recipes plots
instruction_checks skill_data harness_lm task_score benchmark_scores harness
train_file sweep_file sweep_result sweep_plot trial trial_process sweep_trials sweep_storage sweep
panel_code panel_work panel_session panel_parts widgets
demo_view demo_data demo cli __main__
""".split()
ABOVE_ALL = {"lwf_unsloth"}  # the lazy __init__: the version may be read from it

BORDERS = {
    "unsloth": {"backend", "model", "adapters"},
    "unsloth_zoo": {"backend", "model", "adapters"},
    "trl": {"config", "trainer"},
    "matplotlib": {"plots", "sweep_plot"},
    "ipywidgets": {"panel_parts", "widgets"},
    "typer": {"cli"},
    "optuna": {"sweep", "sweep_storage"},
    "lm_eval": {"harness_lm", "harness"},
}
LONGEST = 400  # lines; 300 is the aim
PRINTS = {"cli", "demo", "__main__"}


def modules() -> dict[str, ast.Module]:
    """Module name -> its syntax tree, `__init__` left out."""
    return {
        path.stem: ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.glob("*.py"))
        if path.stem != "__init__"
    }


MODULES = modules()


def imported(tree: ast.AST) -> list[str]:
    """Every imported name with its dots resolved, also inside functions and TYPE_CHECKING."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            base = f"lwf_unsloth.{module}".rstrip(".") if node.level else module
            if base == "lwf_unsloth":
                found += [f"{base}.{alias.name}" for alias in node.names]
            else:
                found.append(base)
    return found


def project_imports(tree: ast.AST) -> set[str]:
    parts = [name.split(".") for name in imported(tree)]
    return {p[1] for p in parts if p[0] == "lwf_unsloth" and len(p) > 1 and p[1] in MODULES}


def outside_imports(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)} - sys.stdlib_module_names - ABOVE_ALL


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with the last part of the called name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found.append((node.func.id, node))
            elif isinstance(node.func, ast.Attribute):
                found.append((node.func.attr, node))
    return found


def tracked_files() -> list[Path]:
    """The project's text files: what git tracks, or, in an unpacked archive, what lies there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode or not names:
        skip = {".venv", ".git", "runs", "unsloth_compiled_cache", "__pycache__"}
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and not skip & set(path.relative_to(ROOT).parts)
        ]
    binary = {".png", ".svg", ".jpg", ".gz", ".xz", ".parquet", ".safetensors"}
    bad = "tests/data/bad/"  # files in every encoding but the right one
    return [
        ROOT / n
        for n in names
        if Path(n).suffix not in binary and not n.startswith(bad) and (ROOT / n).is_file()
    ]


def test_every_module_has_its_place_in_the_order() -> None:
    assert set(MODULES) <= set(ORDER), "add the new file to ORDER, below what it imports"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_files_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    wrong = project_imports(MODULES[name]) - above
    assert not wrong, f"{name}.py imports {sorted(wrong)}, which stand below it in the order"


@pytest.mark.parametrize("library", BORDERS)
def test_a_library_stays_behind_its_border(library: str) -> None:
    users = {name for name, tree in MODULES.items() if library in outside_imports(tree)}
    assert users <= BORDERS[library], f"{library} is imported in {sorted(users - BORDERS[library])}"


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[<>=\[ ]", line)[0].lower() for line in lines} | {"triton"}  # by torch
    used = {lib for tree in MODULES.values() for lib in outside_imports(tree)}
    assert {{"yaml": "pyyaml"}.get(lib, lib) for lib in used} <= declared


def test_the_loss_imports_torch_alone() -> None:
    family = {"losses"}
    while True:
        more = family | {n for name in family for n in project_imports(MODULES[name])}
        if more == family:
            break
        family = more
    for name in family:
        assert outside_imports(MODULES[name]) <= {"torch", "triton"}, name
        assert name.startswith("loss"), f"losses.py leans on {name}.py"


@pytest.mark.parametrize("name", MODULES)
def test_a_file_stays_short(name: str) -> None:
    lines = len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{name}.py has {lines} lines: is there a second idea inside?"


def test_there_is_no_drawer_for_everything() -> None:
    assert not {"utils", "util", "helpers", "misc", "common"} & set(MODULES)


@pytest.mark.parametrize("name", sorted(lwf_unsloth._HOME))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lwf_unsloth, name) is not None
    assert name in dir(lwf_unsloth)


def test_no_public_name_is_a_files_name_too() -> None:
    """Importing the file would put the module in the place of the function."""
    assert not set(lwf_unsloth._HOME) & set(MODULES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        _ = lwf_unsloth.load_modell  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names_as_the_lazy_table() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == lwf_unsloth._HOME


HEAVY = "torch transformers trl peft unsloth datasets matplotlib ipywidgets pandas numpy".split()


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after the code."""
    command = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(HEAVY) & set(run.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("import lwf_unsloth; lwf_unsloth.__version__; dir(lwf_unsloth)") == set()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lwf-unsloth', '--help']\n"
        "from lwf_unsloth.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code"
    )
    assert loaded_by(code) == set()


def test_a_sweeps_own_process_loads_nothing_heavy() -> None:
    """Each trial's does, and gives the memory back at its end."""
    assert loaded_by("import lwf_unsloth.sweep, lwf_unsloth.trial") == set()


@pytest.mark.parametrize("name", MODULES)
def test_nothing_waits_for_a_person(name: str) -> None:
    asked = {"input", "getpass", "notebook_login", "interpreter_login", "breakpoint"}
    assert not asked & {called for called, _ in calls(MODULES[name])}


@pytest.mark.parametrize("name", sorted(set(MODULES) - PRINTS))
def test_the_library_logs_and_does_not_print(name: str) -> None:
    prints = [
        node.lineno
        for called, node in calls(MODULES[name])
        if called == "print" and isinstance(node.func, ast.Name)
    ]
    assert not prints, f"{name}.py prints in lines {prints}"


@pytest.mark.parametrize("name", MODULES)
def test_text_files_are_read_and_written_as_utf8(name: str) -> None:
    for called, node in calls(MODULES[name]):
        method = isinstance(node.func, ast.Attribute)
        if called not in ("read_text", "write_text") and (called != "open" or method):
            continue
        modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
        binary = any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes)
        told = any(k.arg == "encoding" for k in node.keywords)
        assert told or binary, f"{name}.py line {node.lineno}: {called} without encoding"


# Put together here, so that this file does not hold what it looks for.
MACHINE = re.compile(
    r"(?<![\w.~-])/(?:" + "wor" + r"k|ro" + r"ot|home/\w+|Users/\w+)/"
    r"|\.\./sha" + "red|" + "|".join(["py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.org"])
)
REMOTE_CODE = re.compile(r"trust_remote_code[\"']?\s*[=:]\s*" + "True")


def test_no_file_names_a_machine_path_or_a_registry_host() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found


def test_no_source_runs_code_from_the_hub_unasked() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix in (".py", ".ipynb", ".sh", ".md")
        and path.parent.name != "tests"
        and REMOTE_CODE.search(path.read_text(encoding="utf-8"))
    ]
    assert not found
