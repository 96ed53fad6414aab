"""Builds notebooks/NN_name.ipynb from notebooks/src/NN_name.py (jupytext py:percent, the truth).

    python notebooks/build.py           writes the notebooks
    python notebooks/build.py --check   fails where one is not what its source says

The repository's address is one setting, `Repository` under [project.urls] in pyproject.toml. Where
it is set, the build puts a Colab badge and a clone line in; where it is not, neither is there and
the notebooks work from a folder or an uploaded archive.
"""

import argparse
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
BADGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})\n\n"
BADGE_LINE = "<!-- badge -->\n"
CLONE = "# clone here\n"


def repository(pyproject: Path = HERE.parent / "pyproject.toml") -> str | None:
    """The repository's address, None where it is not set."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    return urls.get("Repository")


def build(source: Path, address: str | None) -> str:
    """The notebook's JSON.

    Args:
        source: The py:percent file.
        address: The repository's address, or None.
    """
    text = source.read_text(encoding="utf-8")
    badge = clone = ""
    if address:
        path = f"{address.rstrip('/').removeprefix('https://github.com/')}/blob/main"
        link = f"https://colab.research.google.com/github/{path}/notebooks/{source.stem}.ipynb"
        badge = "# " + BADGE.format(link=link).strip() + "\n#\n"
        clone = f"    # !git clone --quiet --depth 1 {address}\n"
    text = text.replace("# " + BADGE_LINE, badge).replace("    " + CLONE, clone)
    notebook = jupytext.reads(text, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem[:2]}-{number:02d}"
        if cell.cell_type == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook.metadata = {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> int:
    """Builds or checks every notebook; the number that differ is the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    wrong = 0
    for source in sorted((HERE / "src").glob("*.py")):
        target = HERE / f"{source.stem}.ipynb"
        built = build(source, repository())
        if not check:
            target.write_text(built, encoding="utf-8")
            print(f"built {target.name}")
        elif not target.is_file() or target.read_text(encoding="utf-8") != built:
            wrong += 1
            print(f"{target.name} is not what {source.name} says: run python notebooks/build.py")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
