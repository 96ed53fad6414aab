"""Benchmarks of lm-evaluation-harness on a loaded model, adapter off and on in the same load.

Every item is asked of both models, so that the difference is paired. Tasks named `local_*` need no
hub: their questions come out of a PyPI package (`skill_data`) or were written for this project.
"""

import importlib.metadata
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lwf_unsloth.arguments import checked
from lwf_unsloth.backend import prepare
from lwf_unsloth.benchmark_scores import BenchmarkScores, read_scores
from lwf_unsloth.checks import check_count
from lwf_unsloth.errors import ConfigError, DataError, LwfError, ModelError
from lwf_unsloth.generation import adapter_state, model_name
from lwf_unsloth.instruction_checks import TASKS
from lwf_unsloth.locks import kept_state, model_lock, why_not_base
from lwf_unsloth.teacher import ModelTeacher, OwnTeacher, Teacher
from lwf_unsloth.templates import get_template

logger = logging.getLogger(__name__)

INSTRUCTION_TASKS = ("ifeval", "local_instructions")
"""Tasks whose prompts are instructions to follow: asked in the served template unless told not."""


INSTALL = "pip install 'lm_eval[ifeval]>=0.4.12'"


def local_tasks() -> list[str]:
    """Names of the tasks that need no hub."""
    return sorted(path.stem for path in TASKS.glob("local_*.yaml"))


@checked()
def evaluate_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | str,
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    adapter: bool = True,
    base: Teacher | str | None = "adapter_off",
    apply_template: bool | None = None,
    max_new_tokens: int | None = None,
    task_folder: str | Path | None = None,
) -> BenchmarkScores:
    """Asks tasks of lm-evaluation-harness of the base and the tuned model.

    Args:
        model: From `load_model`, trained or not; left as it was found.
        tokenizer: Its tokenizer, which carries the prompt template.
        tasks: Names of tasks or groups: `local_mmlu`, `local_piqa`, `local_siqa`,
            `local_commonsenseqa`, `local_instructions`; where the hub is reachable also "mmlu",
            "winogrande", "ifeval" and every other of the harness.
        limit: The first so many items of each task (a share below 1); None takes all.
        num_fewshot: Examples in each prompt; None is the task's own number (0 where it has none).
        batch_size: Sequences at a time; for speed and memory, the numbers stay.
        seed: Of the choice of examples, and of the sampling where a task samples.
        adapter: False asks the base alone.
        base: "adapter_off"; a teacher, for an adapter that was trained before; None asks the tuned
            model alone, in half the time.
        apply_template: Whether tasks that want an answer put their prompt into the served
            template; None: those of `INSTRUCTION_TASKS` do.
        max_new_tokens: Most tokens of an answer, where a task's own limit is higher.
        task_folder: A folder of more task files (YAML), which take precedence.

    Returns:
        A score for each metric of each task, with every item's pair.

    Raises:
        ConfigError: A setting out of range, or a task that does not exist.
        DataError: A task's questions are out of reach.
        ImportError: lm_eval is not installed; the message has the command.
        ModelError: The model is in use by another thread, or its adapter cannot be switched off.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(names, limit, num_fewshot, batch_size, max_new_tokens, adapter, base)
    prepare()
    _require_harness()
    with _quiet():
        loaded = _load(names, task_folder)
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        language_model = {
            "batch_size": batch_size,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "templated": {None: INSTRUCTION_TASKS, True: None, False: ()}[apply_template],
        }
        with model_lock(model, "benchmarking"), kept_state(model, tokenizer):
            found = {}
            for side, asked, in_place in _sides(model, adapter, base):
                with in_place:
                    found[side] = _ask(asked, tokenizer, loaded, limit, seed, language_model)
            settings = _settings(model, tokenizer, loaded, found) | {
                "limit": limit,
                "num_fewshot": num_fewshot,
                **language_model,
            }
    return BenchmarkScores(tuple(read_scores(loaded["asked"], found)), settings)


def _check(
    names: list[str],
    limit: Any,
    num_fewshot: Any,
    batch_size: Any,
    max_new_tokens: Any,
    adapter: bool,
    base: Any,
) -> None:
    """Raises a ConfigError for a setting out of range."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"tasks is {names!r}, but must name one task or more; without the hub these are "
            f"there: {', '.join(local_tasks())}."
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value is not None or name == "batch_size":
            check_count(name, value, least)
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if limit is not None and not (number and (0 < limit < 1 or (limit >= 1 and limit % 1 == 0))):
        raise ConfigError(
            f"limit is {limit!r}, but must be a whole number of items, a share between 0 and 1, or "
            "None for all items."
        )
    if isinstance(base, str) and base != "adapter_off":
        raise ConfigError(
            f'base is {base!r}, but must be "adapter_off", a teacher (make_teacher) or None: '
            "nothing else says which model to compare with."
        )
    if not adapter and base is None:
        raise ConfigError(
            "adapter=False asks the base alone and base=None leaves the base out, so nothing is "
            "left to ask. Leave one of them at its default."
        )


def _require_harness() -> None:
    """Raises an ImportError with the command where lm_eval is absent; sends no usage counts."""
    # The datasets library counts every load, of local files too, at a server of its maker.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Benchmarks need lm-evaluation-harness, which could not be imported ({error}). "
            f"Install it: {INSTALL}"
        ) from error
    if not hasattr(lm_eval.tasks.TaskManager, "load"):
        raise ImportError(
            f"lm_eval {importlib.metadata.version('lm_eval')} is installed, but 0.4.12 or newer is "
            f"needed: older ones load tasks in another way. Update it: {INSTALL}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness to errors (what it would say stands in the settings), to no bar a task and
    off Python's random state, and the datasets library, where it was imported before, from counting
    loads at a server.
    """
    import datasets.config
    import lm_eval.api.task

    log = logging.getLogger("lm_eval")
    level, counting = log.level, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    bar, draws = lm_eval.api.task.tqdm, random.getstate()
    log.setLevel(logging.ERROR)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    lm_eval.api.task.tqdm = lambda steps, **_: steps
    try:
        yield
    finally:
        log.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        lm_eval.api.task.tqdm = bar
        random.setstate(draws)


def _load(names: list[str], task_folder: str | Path | None) -> dict[str, Any]:
    """The tasks by name, and which of them each asked-for name (a group, perhaps) stands for."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None and not Path(task_folder).is_dir():
        raise ConfigError(f"task_folder is {str(task_folder)!r}, but there is no such folder.")
    folders = [str(folder) for folder in (TASKS, task_folder) if folder is not None]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading the harness' own takes seconds
        manager = TaskManager(include_path=folders)
    loaded: dict[str, Any] = {"tasks": {}, "asked": {}}
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, 5)
            raise ConfigError(
                f"{name!r} is no task. {'Near it: ' + ', '.join(near) + '. ' if near else ''}"
                f"Without the hub these are there: {', '.join(local_tasks())}; `lm-eval ls tasks` "
                "lists all."
            )
        try:
            tasks = manager.load([name])["tasks"]
        except LwfError:
            raise
        except ImportError as error:
            raise ImportError(
                f"The task {name!r} needs a package that could not be imported ({error}). Install "
                f"the package named there; for IFEval: {INSTALL}"
            ) from error
        except Exception as error:
            raise DataError(
                f"The task {name!r} could not be loaded ({type(error).__name__}: {error}). The "
                "harness takes its questions from the hub: connect to it, or take a task that "
                f"needs none: {', '.join(local_tasks())}."
            ) from error
        loaded["asked"][name] = list(tasks)
        loaded["tasks"] |= tasks
    return loaded


def _set_fewshot(task: Any, number: int | None) -> None:
    """Sets how many examples stand in a prompt; a task that is made for none keeps none."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=(own or 0) if number is None else number)


def _sides(
    model: Any, adapter: bool, base: Teacher | str | None
) -> list[tuple[str, Any, AbstractContextManager[None]]]:
    """Base and tuned: which model, and what puts it in place for a block."""
    sides: list[tuple[str, Any, AbstractContextManager[None]]] = []
    if isinstance(base, str) and adapter_state(model)[0] == "none":
        base = None  # a plain model is no pair
    if isinstance(base, str):
        _check_adapter(model)
        base = OwnTeacher(model)
    if isinstance(base, OwnTeacher):
        sides.append(("base", model, base.in_place()))
    elif isinstance(base, ModelTeacher):
        sides.append(("base", base.model, nullcontext()))
    elif base is not None:
        raise ConfigError(
            f"base is a {type(base).__name__}, but a benchmark needs a model that answers: pass "
            'make_teacher(...), "adapter_off" or None.'
        )
    return [*sides, ("tuned", model, nullcontext())] if adapter or not sides else sides


def _check_adapter(model: Any) -> None:
    """Raises a ModelError where switching the adapter off does not give the base back."""
    if why := why_not_base(model):
        raise ModelError(
            f"The adapter {why}, so switching it off does not give the base model back. Pass a "
            "teacher made before the training (base=make_teacher(model)), or base=None."
        )


def _ask(
    model: Any,
    tokenizer: Any,
    loaded: dict[str, Any],
    limit: int | float | None,
    seed: int,
    language_model: dict[str, Any],
) -> dict[str, Any]:
    """All items of all tasks to one model; the same examples and order each time."""
    from lm_eval.evaluator import evaluate

    from lwf_unsloth.harness_lm import LoadedLM

    asked = LoadedLM(model, tokenizer, **language_model)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    found = dict(evaluate(asked, {"tasks": loaded["tasks"]}, limit=limit, bootstrap_iters=0))
    if asked.cut or asked.shortened:
        logger.warning(
            "The model has %d positions: %d contexts lost their beginning, and %d answers were "
            "given fewer tokens than their task allows.",
            asked.max_length,
            asked.cut,
            asked.shortened,
        )
    return found | {"state": adapter_state(model), "cut": asked.cut, "shortened": asked.shortened}


def _settings(
    model: Any, tokenizer: Any, loaded: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """Which model, weights, template and versions gave the numbers."""
    one = next(iter(found.values()))
    return {
        "model": model_name(model),
        "bits": getattr(getattr(model, "lwf_loaded", None), "bits", None),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "weights": {side: result["state"] for side, result in found.items()},
        "template": get_template(tokenizer).name,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "task_versions": {name: one["versions"].get(name) for name in loaded["tasks"]},
        "fewshot": {name: one["n-shot"].get(name, 0) for name in loaded["tasks"]},
        "cut": {side: result["cut"] for side, result in found.items()},
        "shortened": {side: result["shortened"] for side, result in found.items()},
    }
