"""Stands in for pip in the set-up tests: notes each call, "installs" by writing metadata folders.

`tests/test_setup.py` copies this file into an empty environment as `pip/__main__.py`. What
FAKE_PIP_FAIL names cannot be installed; a package named by FAKE_PIP_CONFLICT must not be held.
"""

import json
import os
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
BIN = Path(sys.executable).parent


def add(name: str, version: str) -> None:
    """Write the metadata of an installed package, in place of any other version's."""
    stem = re.sub(r"[-_.]+", "_", name).lower()
    for old in SITE.glob(f"{stem}-*.dist-info"):
        shutil.rmtree(old)
    folder = SITE / f"{stem}-{version}.dist-info"
    folder.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if name == "unsloth":
        text += "Requires-Dist: transformers<=5.17.0\nRequires-Dist: torch<2.15.0\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


def add_project(source: Path, editable: bool) -> None:
    """The project itself: by a .pth file, or as a copy."""
    add("lwf_unsloth", "0.1.0")
    if editable:
        (SITE / "project.pth").write_text(f"{source}\n", encoding="utf-8")
    else:
        shutil.copytree(source / "lwf_unsloth", SITE / "lwf_unsloth", dirs_exist_ok=True)
    script = BIN / "lwf-unsloth"
    script.write_text('#!/bin/sh\necho "demo ran with: $*"\n', encoding="utf-8")
    script.chmod(0o755)


def main() -> None:
    """Do what `pip install` was asked for."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["install"]:
        print("pip 0.0 (a stand-in)")
        return
    wanted, constraints, options = [], [], iter(arguments[1:])
    editable = "--editable" in arguments
    for option in options:
        if option == "-r":
            wanted += Path(next(options)).read_text(encoding="utf-8").split()
        elif option == "-c":
            constraints = Path(next(options)).read_text(encoding="utf-8").split()
        elif option in ("--timeout", "--retries", "--index-url", "--progress-bar"):
            next(options)
        elif not option.startswith("-"):
            wanted.append(option)
    call = {"arguments": arguments, "wanted": wanted, "constraints": constraints}
    with Path(os.environ["FAKE_PIP_LOG"]).open("a", encoding="utf-8") as log:
        log.write(json.dumps(call) + "\n")
    bad = os.environ.get("FAKE_PIP_FAIL")
    if bad and any(bad in word for word in [*arguments, *wanted]):
        if "FAKE_PIP_KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(f"ERROR: No matching distribution found for {bad}")
    held = os.environ.get("FAKE_PIP_CONFLICT")
    if held and any(pin.startswith(f"{held}==") for pin in constraints):
        sys.exit(f"ERROR: Cannot install datasets: the user requested (constraint) {held}")
    for word in wanted:
        if "==" in word:
            add(*word.split("=="))
            if word.startswith("pytest=="):
                code = "import sys; print('tests ran with:', *sys.argv[1:]); sys.exit(7)"
                (SITE / "pytest.py").write_text(code, encoding="utf-8")
        else:
            add_project(Path(word), editable)


if __name__ == "__main__":
    main()
