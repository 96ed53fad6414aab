"""The forgetting benchmark's files: forgetting.json, and beside it what each test row gave.

Rows are written as they are finished, behind a file lock, so that several processes can share the
work and a killed one loses only the adapter that it was at. `forgetting_items.json` has the values
of every test row, which paired intervals are made of, as strings: they are many.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from benchmarks._forgetting_arms import Job, Row, key_of
from benchmarks._results import RESULTS, sourced, write_result
from lwf_unsloth.whole_files import write_whole_text

NAME, ITEMS = "forgetting", "forgetting_items"
MILLI = 1000
"""Nats are kept in thousandths, as whole numbers."""


def packed(values: Sequence[float]) -> str:
    """Nats of each row as one string."""
    return " ".join(str(round(MILLI * value)) for value in values)


def unpacked(text: str) -> list[float]:
    """What `packed` packed."""
    return [int(one) / MILLI for one in text.split()]


def read_items(folder: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Model and key -> name of a measure -> its values; empty where there is no file."""
    path = folder / f"{ITEMS}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _alive(pid: int) -> bool:
    """Whether a process still works; one that has ended may wait for its parent."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class Store:
    """Results of one model in the shared files."""

    def __init__(
        self, folder: Path, scratch: Path, model: str, data: str, settings: dict[str, Any]
    ) -> None:
        """Opens the files; those in benchmarks/results are where an empty folder begins.

        Args:
            folder: Of the result files.
            scratch: A folder of this run alone, the same for all its processes.
            model: The rows' model.
            data: Hash of the data: rows of other data, steps or rank are measured anew.
            settings: What the run was asked for; `steps` and `rank` among them.
        """
        self.folder, self.scratch, self.model, self.settings = folder, scratch, model, settings
        self.like = {"data": data, "steps": settings["steps"], "rank": settings["rank"]}
        self.lock = FileLock(scratch / "lock")
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, wanted: Callable[[list[Row]], list[Job]]) -> tuple[Job | None, bool]:
        """The next job that is neither done nor another process's, and claims it.

        Args:
            wanted: Rows of the model -> jobs, the most wanted first.

        Returns:
            The job, or None; and whether other processes are still at work, after which there may
            be more.
        """
        with self.lock:
            rows = self.rows()
            done = {key_of(row) for row in rows if not row.get("error")}
            claims = [path.read_text().split("|") for path in self.scratch.glob("claim-*")]
            finished = {path.read_text().split("|")[0] for path in self.scratch.glob("end-*")}
            claimed = {key for key, _ in claims}
            for job in wanted(rows):
                if job.key not in done | claimed:
                    self._mark("claim", job)
                    return job, True
        return None, any(key not in finished and _alive(int(pid)) for key, pid in claims)

    def _mark(self, kind: str, job: Job) -> None:
        (self.scratch / f"{kind}-{job.key.replace(' ', '_')}").write_text(
            f"{job.key}|{os.getpid()}"
        )

    def rows(self) -> list[Row]:
        """This model's rows with the same data, steps and rank."""
        return [row for row in self._content()["rows"] if self._mine(row)]

    def _mine(self, row: Row) -> bool:
        same = all(row.get(name) == value for name, value in self.like.items())
        return same and row["model"] == self.model

    def _content(self) -> dict[str, Any]:
        for folder in (self.folder, RESULTS):
            path = folder / f"{NAME}.json"
            if path.is_file():
                return dict(json.loads(path.read_text(encoding="utf-8")))
        return {"meta": {}, "rows": []}

    def add(self, rows: Sequence[Row], items: dict[str, dict[str, str]]) -> None:
        """Writes a job's rows in the place of earlier ones with the same key."""
        with self.lock:
            before = self._content()
            known = read_items(
                self.folder if (self.folder / f"{ITEMS}.json").is_file() else RESULTS
            )
            new = [{"model": self.model, **row, **self.like} for row in rows]
            keys = {key_of(row) for row in new}
            kept = [
                row
                for row in before["rows"]
                if row["model"] != self.model or (self._mine(row) and key_of(row) not in keys)
            ]
            run = self.scratch / "since"
            if not run.exists():  # the first of this run: what is there is an earlier one's
                run.touch()
                kept = sourced({**before, "rows": kept})
            known |= {f"{self.model} {key}": one for key, one in items.items()}
            write_whole_text(self.folder / f"{ITEMS}.json", json.dumps(known, indent=0) + "\n")
            write_result(NAME, [*kept, *new], self.settings, self.settings["seeds"], self.folder)

    def end(self, job: Job) -> None:
        """Says that a job's rows are written, or that it gave none."""
        self._mark("end", job)
