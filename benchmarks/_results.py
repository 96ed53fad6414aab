"""How every benchmark writes its result: {"meta": {...}, "rows": [...]} in benchmarks/results."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def commit() -> str:
    """The commit that is measured: LWF_COMMIT, else git's, with "-dirty" where files differ."""
    if given := os.environ.get("LWF_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "lwf_unsloth")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def meta(settings: dict[str, Any], seed: int | list[int]) -> dict[str, Any]:
    """What a number is worth nothing without: card, versions, commit, date, command, settings."""
    from lwf_unsloth.backend import device_name, versions

    installed = versions()
    names = ("torch", "unsloth", "transformers", "trl")
    script = Path(sys.argv[0]).stem
    return {
        "card": device_name(),
        **{name: installed.get(name, "-") for name in names},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", f"benchmarks.{script}", *_shown(sys.argv[1:])]),
        "settings": settings,
        "seed": seed,
    }


def _shown(arguments: list[str]) -> list[str]:
    """Without the options that only name a place on this machine."""
    places = {i for i, word in enumerate(arguments) if word in ("--out", "--folder")}
    return [word for i, word in enumerate(arguments) if not {i, i - 1} & places]


def write_result(
    name: str,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    seed: int | list[int] = 0,
    folder: Path | str | None = None,
) -> Path:
    """Writes NAME.json whole, so that an interrupted run leaves the rows that it had.

    Args:
        name: File name without suffix.
        rows: Flat records; one that could not run has "error" instead of figures.
        settings: What the run was asked for.
        seed: Seed or seeds.
        folder: Where to; default benchmarks/results.

    Returns:
        The file's path.
    """
    folder = Path(folder or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"meta": meta(settings, seed), "rows": rows}, indent=1, ensure_ascii=False)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    return path


def sourced(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result's rows, each with the commit, date and card that it was measured with."""
    of = {key: result["meta"].get(key) for key in ("commit", "date", "card")}
    return [{**of, **row} for row in result["rows"]]


def earlier_rows(
    name: str, keys: tuple[str, ...], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of the committed result that were not measured again, each with its commit and date.

    Args:
        name: File name without suffix.
        keys: What tells rows apart.
        rows: The rows measured now.

    Returns:
        The earlier rows, in their order.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    now = {tuple(row.get(key) for key in keys) for row in rows}
    before = sourced(json.loads(path.read_text(encoding="utf-8")))
    return [row for row in before if tuple(row.get(key) for key in keys) not in now]
