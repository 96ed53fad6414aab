"""Which checkpoint can be resumed, what makes one whole, and what it keeps of the teacher.

A checkpoint is whole when its list of files with their hashes is there and right: that list is
written last, after everything else is on the disk, and only then are older checkpoints removed.
"""

import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lwf_unsloth.errors import ConfigError, ModelError, TeacherError
from lwf_unsloth.kept_folders import is_whole, write_manifest
from lwf_unsloth.ranks import from_first, together
from lwf_unsloth.teacher import OwnTeacher, Teacher
from lwf_unsloth.teacher_cache import CachedTeacher

logger = logging.getLogger(__name__)

TEACHER_FILE = "lwf_teacher.json"
TEACHER_TENSORS = "lwf_teacher.safetensors"
RUN_FILE = "lwf_run.json"
"""What run it comes from: see `run_record`."""
WHOLE = "lwf_whole.json"
"""Files of a checkpoint with size and hash; the last that is written."""
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
ARCHIVES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Files of torch.save, which end in a zip's directory: one that was cut off has none."""


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint folder holds whole files of everything a resume needs.

    Its list of files decides. Folders without one come from earlier versions and other tools:
    there the files themselves are looked at.
    """
    from safetensors import SafetensorError, safe_open

    if (folder / WHOLE).is_file():
        return is_whole(folder / WHOLE, NEEDED)
    if (folder / RUN_FILE).is_file():
        return False
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


def latest_checkpoint(output_dir: str | Path, *, quiet: bool = False) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Args:
        output_dir: The run's folder.
        quiet: Do not say which half-written ones are passed over.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if folder.is_dir() and number.isdigit():
            found.append((int(number), folder))
    for _, folder in sorted(found, reverse=True):
        if is_complete(folder):
            return folder
        logger.log(
            logging.DEBUG if quiet else logging.WARNING,
            "%s is not complete (a save was cut off); taking an earlier one.",
            folder.name,
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


def tell_end(folder: Path, step: int) -> None:
    """Says it when a checkpoint was the end of its run, so that a resume has trained nothing.

    Args:
        folder: The checkpoint that was resumed.
        step: The step that the run has come to.
    """
    try:
        before = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if before.get("global_step") == step:
        logger.warning(
            "%s is the end of its run (step %d): nothing was left to train. Raise num_train_epochs "
            "or max_steps to train on, or take another output_dir for a new run.",
            *(folder.name, step),
        )


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


def refuse_pickled_weights(folder: Path) -> None:
    """Refuses a checkpoint whose weights are not safetensors.

    Raises:
        ModelError: It holds none, but pickled ones.
    """
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{str(folder)!r} has no *.safetensors, only {', '.join(pickled[:4])}. Pickled weights "
            "can run any code when they are loaded, so they are refused. Take a checkpoint that "
            "this library wrote, or save its adapter as safetensors where you trust it."
        )


@contextmanager
def data_alone(folder: Path) -> Iterator[None]:
    """Around the reading of a checkpoint's states, which torch takes as numbers and names alone.

    Raises:
        ModelError: A state holds something else; it was not run.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"A state in {str(folder)!r} (optimizer, scheduler, scaler or random numbers) holds "
            "more than numbers: it is damaged, or made to run code when it is loaded. It was not "
            "run. Resume from another checkpoint, or start anew from the adapter in it "
            "(load_adapter)."
        ) from error


@contextmanager
def saving(args: Any, state: Any, folder: Path, wait: Callable[[], Any]) -> Iterator[None]:
    """Around the Trainer's writing of a checkpoint: it is whole in the end, or gone and told.

    Args:
        args: The run's settings; their save_total_limit rests until the new one is whole.
        state: The Trainer's state, which names the best checkpoint, in the end.
        folder: The checkpoint.
        wait: Waits until every process has written.

    Raises:
        ModelError: The disk is full or may not be written; earlier checkpoints stay.
    """
    from safetensors import SafetensorError

    limit, args.save_total_limit = args.save_total_limit, None
    try:
        if args.should_save:
            (folder / WHOLE).unlink(missing_ok=True)
        yield
        wait()
        if args.should_save:
            write_manifest(folder / WHOLE, {"step": folder.name})
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _is_writers(error):
            raise
        raise _not_saved(folder, error) from error
    finally:
        args.save_total_limit = limit
    if args.should_save:
        _prune(folder, limit, state.best_model_checkpoint)


def _is_writers(error: RuntimeError) -> bool:
    """Whether torch.save could not write, which it says as a RuntimeError."""
    words = ("PytorchStreamWriter", "inline_container", "unexpected pos")
    return any(word in str(error) for word in words)


def _not_saved(folder: Path, error: Exception) -> ModelError:
    """What to say when a checkpoint could not be written; its half is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    left = latest_checkpoint(folder.parent, quiet=True)
    stays = f"{left.name} is whole and stays" if left else "there is no earlier one"
    go_on = "resume" if left else "start again"
    return ModelError(
        f"{folder.name} could not be written to {str(folder.parent)!r} ({error}). What was begun "
        f"of it is removed; {stays}. Free space on that disk, or make the folder writable, then "
        f"{go_on}. The model in memory is that of this step: save_adapter(model, tokenizer, "
        "folder) keeps it on another disk."
    )


def _prune(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes half-written checkpoints of ours, then the oldest ones over the limit."""
    from transformers.trainer_utils import rotate_checkpoints

    if limit is None or limit <= 0:
        return
    for folder in newest.parent.glob("checkpoint-*"):
        half = (folder / RUN_FILE).is_file() and not (folder / WHOLE).is_file()
        if half and folder != newest:
            logger.warning("%s is a save that was cut off; it is removed.", folder.name)
            shutil.rmtree(folder, ignore_errors=True)
    rotate_checkpoints(str(newest.parent), limit, best, use_mtime=True)


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
