"""Which checkpoint can be resumed, and what a checkpoint keeps of the teacher."""

import json
import logging
from pathlib import Path

from torch import Tensor

from lwf_unsloth.teacher import OwnTeacher, Teacher
from lwf_unsloth.teacher_cache import CachedTeacher

logger = logging.getLogger(__name__)

TEACHER_FILE = "lwf_teacher.json"
TEACHER_TENSORS = "lwf_teacher.safetensors"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint folder holds whole files of everything a resume needs."""
    from safetensors import SafetensorError, safe_open

    if any(not (folder / name).is_file() for name in NEEDED):
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
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
    """Gives a same-weights teacher back the state it had when the interrupted run began."""
    teacher, path = _live(teacher), folder / TEACHER_FILE
    if not isinstance(teacher, OwnTeacher) or not path.is_file():
        return
    kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    snapshot: dict[str, Tensor] | None = None
    if kind == "snapshot":
        from safetensors.torch import load_file

        snapshot = load_file(folder / TEACHER_TENSORS)
    teacher.snapshot = snapshot


def _live(teacher: Teacher | None) -> Teacher | None:
    """The teacher behind a cache, which keeps files of its own."""
    return teacher.teacher if isinstance(teacher, CachedTeacher) else teacher
