"""Which checkpoint can be resumed, and what a checkpoint keeps of the teacher."""

import json
import logging
import zipfile
from pathlib import Path

from torch import Tensor

from lwf_unsloth.errors import ConfigError, TeacherError
from lwf_unsloth.ranks import from_first, together
from lwf_unsloth.teacher import OwnTeacher, Teacher
from lwf_unsloth.teacher_cache import CachedTeacher

logger = logging.getLogger(__name__)

TEACHER_FILE = "lwf_teacher.json"
TEACHER_TENSORS = "lwf_teacher.safetensors"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
ARCHIVES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Files of torch.save, which end in a zip's directory: one that was cut off has none."""


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint folder holds whole files of everything a resume needs."""
    from safetensors import SafetensorError, safe_open

    if any(not (folder / name).is_file() for name in NEEDED):
        return False
    archives = [path for pattern in ARCHIVES for path in folder.glob(pattern)]
    if not all(map(zipfile.is_zipfile, archives)):
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if _kind(folder) == "snapshot" and not (folder / TEACHER_TENSORS).is_file():
            return False
        weights = list(folder.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        return bool(weights)
    except (OSError, ValueError, SafetensorError):
        return False


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; says which half-written ones it passed
    over.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if folder.is_dir() and number.isdigit():
            found.append((int(number), folder))
    for _, folder in sorted(found, reverse=True):
        if is_complete(folder):
            return folder
        logger.warning(
            "%s is not complete (a save was cut off); taking an earlier one.", folder.name
        )
    return None


def common_checkpoint(output_dir: str | Path) -> Path | None:
    """`latest_checkpoint`, the same one in every process of a run on several.

    Raises:
        ConfigError: The first process found one that another cannot see.
    """
    found = from_first(lambda: latest_checkpoint(output_dir), "look for a checkpoint")
    with together("read the checkpoint"):
        if found is not None and not found.is_dir():
            raise ConfigError(
                f"{found} is there for the first process and not for this one: they would train "
                "on different adapters. Put output_dir on a disk that all machines share, or copy "
                "the checkpoint to each."
            )
    return found


def tell_missing(folder: Path) -> None:
    """Says which state a checkpoint lacks, for a resume that was told to take it all the same."""
    if not folder.is_dir():
        return
    lacks = {
        "optimizer.pt": "AdamW starts without its moments",
        "scheduler.pt": "the learning rate starts anew",
        "rng_state*.pth": "dropout draws other numbers",
    }
    missing = [f"{name} ({why})" for name, why in lacks.items() if not any(folder.glob(name))]
    if missing:
        logger.warning(
            "%s lacks %s: the run will not be the uninterrupted one.",
            folder.name,
            ", ".join(missing),
        )


def save_teacher(teacher: Teacher | None, folder: Path) -> None:
    """Writes what a resume needs to have the same teacher again."""
    teacher = _live(teacher)
    if teacher is None:
        return
    from safetensors.torch import save_file

    (folder / TEACHER_FILE).write_text(json.dumps({"kind": teacher.kind}), encoding="utf-8")
    if isinstance(teacher, OwnTeacher) and teacher.snapshot is not None:
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in teacher.snapshot.items()
        }
        save_file(tensors, folder / TEACHER_TENSORS)


def load_teacher(teacher: Teacher | None, folder: Path) -> None:
    """Gives a same-weights teacher back the state it had when the interrupted run began.

    Raises:
        TeacherError: The interrupted run had a second model as teacher and this one has none, or
            the other way round.
    """
    teacher, kind = _live(teacher), _kind(folder)
    if teacher is None or kind is None:
        return
    if (kind == "model") != (teacher.kind == "model"):
        had, now = ("a second model", "none") if kind == "model" else ("none", "a second model")
        raise TeacherError(
            f"{folder.name} comes from a run with {had} as teacher, this run has {now}: the rest "
            "of it would keep what another model knew. Make the trainer with the same `teacher` as "
            "before, or start a new run in another output_dir."
        )
    if not isinstance(teacher, OwnTeacher):
        return
    snapshot: dict[str, Tensor] | None = None
    if kind == "snapshot":
        from safetensors.torch import load_file

        snapshot = load_file(folder / TEACHER_TENSORS)
    teacher.snapshot = snapshot


def _kind(folder: Path) -> str | None:
    """Kind of the teacher that a checkpoint came from, None where it does not say.

    Raises:
        ValueError: The file that says it was cut off.
    """
    path = folder / TEACHER_FILE
    if not path.is_file():
        return None
    kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    return None if kind is None else str(kind)


def _live(teacher: Teacher | None) -> Teacher | None:
    """The teacher behind a cache, which keeps files of its own."""
    return teacher.teacher if isinstance(teacher, CachedTeacher) else teacher
