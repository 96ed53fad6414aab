"""A sweep: an Optuna study of training runs, each in a process of its own, that can be interrupted.

Every trial that is wanted has a place ("slot") in the study from the beginning, waiting. A worker
takes a waiting trial, which the storage lets happen once only, also between machines. A trial whose
worker is gone (its process on this machine, its heartbeat on others) is closed, and its slot waits
again; so a sweep that was killed goes on with what is unfinished, and nothing is run twice to the
end. Optuna's GridSampler is not used: it may give one point to two workers (its documentation).
"""

import functools
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from lwf_unsloth.arguments import checked
from lwf_unsloth.checks import check_count
from lwf_unsloth.errors import ConfigError, LwfError
from lwf_unsloth.sweep_file import SweepPlan
from lwf_unsloth.sweep_result import COMPLETE, SKIPPED, SweepResult, write_lines
from lwf_unsloth.sweep_storage import (
    OBJECTIVES,
    claim,
    note,
    open_storage,
    quiet,
    refuse_other,
    storage_url,
    told,
)
from lwf_unsloth.sweep_trials import (
    covers,
    failed_slots,
    is_second,
    last_ended,
    newest,
    settings,
    states,
)
from lwf_unsloth.trial_process import (
    Stopped,
    gpu_bytes,
    is_gone,
    own_result,
    run_process,
    this_worker,
)
from lwf_unsloth.whole_files import alone_in

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "lwf_unsloth.trial")
POLL = 1.0
"""Seconds between two looks at trials of other workers."""
LINES = "trials.jsonl"


class TrialFailed(LwfError):
    """A trial ended without a result; the message is the reason."""


@checked()
def run_sweep(
    plan: SweepPlan,
    *,
    workers: int = 1,
    output: str | Path = "runs/sweep",
    storage: str | None = None,
    retry_failed: bool = False,
    command: Sequence[str] = COMMAND,
) -> SweepResult:
    """Runs what is unfinished of a sweep; of a grid that has got more values, what is new in it.

    Args:
        plan: From `read_sweep_file`.
        workers: Trials at a time on this machine.
        output: Folder of the trials, of `trials.jsonl` and of the study.
        storage: A database URL that several machines share ("postgresql+psycopg://..."); None
            takes the file study.db in `output`.
        retry_failed: Whether trials that failed in an earlier call are run again, once.
        command: What runs a trial; the folder with its job is added.

    Returns:
        All ended trials, those of earlier calls too.

    An interrupt (Ctrl-C, or the notebook's stop button) ends the trials that run; the next call
    runs them again, and keeps what has ended.

    Raises:
        ConfigError: Settings that cannot be run, a study of this name with another plan, or a
            folder that holds the trials of another study.
        DiskError: The folder's disk is full, or it may not be written; what has ended is kept.
    """
    check_count("workers", workers)
    folder = Path(output).resolve()
    with told(folder):
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        running = _Sweep(plan, folder, storage_url(storage, folder), tuple(command))
        running.begin(retry_failed)
        threads = [
            threading.Thread(target=running.work, args=(n,), daemon=True) for n in range(workers)
        ]
        with tqdm(total=len(plan.slots()), desc="sweep", unit="trial") as running.bar:
            running.show()
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            finally:  # an interrupt ends the trials too; the next call begins them again
                running.stop.set()
                for thread in threads:
                    thread.join()
        if running.errors:
            raise running.errors[0]
        return running.write()


@checked()
def read_sweep(plan: SweepPlan, output: str | Path, storage: str | None = None) -> SweepResult:
    """The ended trials of a sweep so far, also while it runs, without running any.

    Args:
        plan: From `read_sweep_file`.
        output: The sweep's folder.
        storage: The database that it was given, if any.
    """
    folder = Path(output).resolve()
    return _Sweep(plan, folder, storage_url(storage, folder), COMMAND).result()


@dataclass
class _Sweep:
    """The study and the workers of this process."""

    plan: SweepPlan
    folder: Path
    url: str = field(repr=False)
    command: tuple[str, ...]
    errors: list[BaseException] = field(default_factory=list)
    taking: threading.Lock = field(default_factory=threading.Lock)
    """Held from the look for a waiting trial until it is taken."""
    writing: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when no worker is to go on."""
    bar: Any = None

    def study(self, seed: int = 0) -> Any:
        """The study, made if it is not there."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        grid = self.plan.trials is None
        choose = optuna.samplers.RandomSampler if grid else optuna.samplers.TPESampler
        return optuna.create_study(
            storage=open_storage(self.url),
            study_name=self.plan.name,
            directions=["maximize", "minimize"],
            sampler=choose(seed=self.plan.seed + seed),
            load_if_exists=True,
        )

    def begin(self, retry_failed: bool = False) -> None:
        """Refuses another plan's study, tries the settings, and queues what is wanted."""
        whose = self.folder, self.plan.name, self.url
        with alone_in(self.folder):  # of sweeps that begin at once one tries the settings
            refuse_other(*whose)
            study = self.study()
            if not self._is_ours(study):
                self._check()
            if not self._is_ours(study):  # nor has it become another's on another machine
                study.set_user_attr("digest", self.plan.digest)
                study.set_user_attr("objectives", [self.plan.evaluate[k] for k in OBJECTIVES])
                with quiet():  # optuna-dashboard shows them on its axes
                    study.set_metric_names(list(OBJECTIVES))
            claim(*whose)
        self._requeue(study, again=retry_failed)

    def _is_ours(self, study: Any) -> bool:
        """Whether the study holds this sweep; not so where it holds none.

        Raises:
            ConfigError: It holds another one.
        """
        there = study.user_attrs.get("digest")
        if there not in (None, self.plan.digest):
            raise ConfigError(
                f"The study {self.plan.name!r} holds another sweep (other settings, data or "
                "evaluation), and its trials cannot be compared with these. Give another output "
                f"folder and, where the storage is shared, another `name` in {self.plan.path}."
            )
        return there is not None

    def _check(self) -> None:
        """Looks at all settings in a process of its own: libraries and GPU stay out of this one.

        Its folder stays, with the log, where they cannot be run. The caller holds the sweep's.
        """
        job = {**self._job(), "corners": list(self.plan.corners())}
        place = self.folder / "trials" / "check"
        result = run_process(self.command, place, job)
        if result["state"] == COMPLETE:
            shutil.rmtree(place, ignore_errors=True)
        else:
            raise ConfigError(f"{self.plan.path} cannot be run. {result.get('reason')}")

    def _job(self) -> dict[str, Any]:
        plan = self.plan
        return {"path": str(plan.path), "base": plan.base, "evaluate": plan.evaluate}

    # ------------------------------------------------------------------ the queue

    def _requeue(self, study: Any, again: bool = False) -> None:
        """Closes trials whose worker is gone, and gives every slot without a trial a waiting one;
        with `again` also those whose trial failed.

        Two machines may do so at once: of two trials of a slot the later one steps back.
        """
        import optuna

        with quiet():
            optuna.storages.fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and is_gone(trial):
                self._close(study, trial)
        trials = study.get_trials(deepcopy=False)
        covered = {one.user_attrs.get("slot") for one in trials if covers(one)}
        if again:
            covered -= failed_slots(study)
        last = last_ended(study)
        for slot, params in self.plan.slots().items():
            if slot not in covered:
                marks = {"slot": slot, "after": last.get(slot, -1), "digest": self.plan.digest}
                study.enqueue_trial(params, user_attrs=marks)

    def _close(self, study: Any, trial: Any) -> None:
        """Ends a trial whose worker is gone: by its result, where it had come so far."""
        import optuna

        result = own_result(self._place(trial.number), trial.user_attrs.get("owner")) or {}
        try:
            if result.get("state") == COMPLETE and trial.user_attrs.get("slot") is not None:
                note(optuna.trial.Trial(study, trial._trial_id), result)
                study.tell(trial.number, [float(result[key]) for key in OBJECTIVES])
            else:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, RuntimeError, optuna.exceptions.OptunaError):
            logger.debug("Trial %d was closed by another worker.", trial.number)

    def work(self, number: int) -> None:
        """One worker: takes waiting trials until every slot has ended."""
        try:
            study = self.study(seed=number + os.getpid())
            while not self.errors and not self.stop.is_set() and self._one(study):
                pass
        except Stopped:
            logger.debug("Worker %d was interrupted.", number)
        except BaseException as error:
            self.errors.append(error)

    def _one(self, study: Any) -> bool:
        """Runs a trial, or waits for those of others; whether there may be more to do."""
        taken = _Hold(self.taking)
        with taken:
            if states(study) & {"WAITING"}:
                self._is_ours(study)
                self._take(study, taken)
                self.write()
                return True
            self._requeue(study)
        left = states(study) & {"WAITING", "RUNNING"}
        if left:
            time.sleep(POLL)
        return bool(left)

    # ------------------------------------------------------------------ one trial

    def _take(self, study: Any, taken: "_Hold") -> None:
        """Runs a waiting trial. One that was taken for gone meanwhile (a machine that slept gives
        no sign of life) is closed already, and its slot runs anew.
        """
        import optuna

        run = functools.partial(self._objective, study=study, taken=taken)
        try:
            study.optimize(run, n_trials=1, catch=(TrialFailed,))
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
            closed = isinstance(error, RuntimeError) or str(error).startswith("Cannot tell a ")
            if not closed:
                raise
            logger.warning(
                "A trial of this worker had given no sign of life and was closed by another one; "
                "its result is left out, and its settings are run again."
            )

    def _place(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / f"trial-{number:04d}"

    def _step_back(self, trial: Any) -> NoReturn:
        """Ends a trial that no slot needs; it counts nowhere."""
        import optuna

        trial.set_user_attr("duplicate", True)
        raise optuna.TrialPruned("Another worker has this slot.")

    def _objective(self, trial: Any, study: Any, taken: "_Hold") -> tuple[float, float]:
        """Runs the process of a trial; its result goes into the study."""
        import optuna

        trial.set_user_attr("owner", this_worker())
        marks = trial.user_attrs
        if marks.get("slot") is None or marks.get("digest") not in (None, self.plan.digest):
            # Another process took the waiting trial first, and Optuna made a new one; or it is of
            # another sweep, which began the study at the same moment on another machine.
            self._step_back(trial)
        params = settings(trial, self.plan.space, grid=self.plan.trials is None)
        trial.set_user_attr("params", params)
        taken.release()
        if is_second(trial, study):
            self._step_back(trial)
        begun = time.monotonic()
        job = {**self._job(), "params": params, "owner": marks["owner"]}
        result = run_process(self.command, self._place(trial.number), job, self.stop)
        result["seconds"] = round(time.monotonic() - begun, 1)
        result["gpu_bytes_after"] = gpu_bytes()
        note(trial, result)
        if result["state"] == SKIPPED:
            raise optuna.TrialPruned(result["reason"])
        if result["state"] != COMPLETE:
            raise TrialFailed(str(result.get("reason")))
        values = [math.nan if result[key] is None else float(result[key]) for key in OBJECTIVES]
        if not all(map(math.isfinite, values)):
            reason = f"gain and forgetting are {values}, which cannot be compared."
            trial.set_user_attr("reason", reason)
            raise TrialFailed(reason)
        return values[0], values[1]

    # ------------------------------------------------------------------ what it gave

    def result(self) -> SweepResult:
        """The ended trials of the study."""
        return SweepResult(self.plan.name, tuple(newest(self.study())))

    def write(self) -> SweepResult:
        """Writes `trials.jsonl` anew, from the study, which is never behind it; the trials."""
        with self.writing, alone_in(self.folder):  # the later writer has seen more
            found = self.show()
            write_lines(self.folder / LINES, found.trials)
        return found

    def show(self) -> SweepResult:
        """Moves the bar to the trials that have ended, and gives them."""
        found = self.result()
        if self.bar is not None:
            self.bar.update(len(found.trials) - self.bar.n)
        return found


class _Hold:
    """A lock that is held from `with` on, and given back at its end or earlier."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock, self.held = lock, False

    def __enter__(self) -> None:
        self.held = self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives it back, once."""
        if self.held:
            self.held = False
            self.lock.release()
