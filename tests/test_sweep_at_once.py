"""Sweeps that run at once, or after one another in one folder: nothing is mixed or lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
from test_sweep import GRID, LONGEST, plan_of, ran, running, start, swept, until
from test_sweep import place as place  # fixtures
from test_sweep import postgres as postgres
from test_two_processes import at_once

from lwf_unsloth import trial_process
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.trial_process import is_gone, this_worker

optuna = pytest.importorskip("optuna")
ONE = GRID.replace("[0.5, 1, 2]", "[1]").replace("[4, 8]", "[4]")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
    pytest.mark.timeout(900),  # a busy machine takes long
]


@pytest.fixture()
def trials(place, monkeypatch):
    """Trials that end at once, in this process, instead of the stand-in's; a list of their settings
    (`before` is called at the start of each)."""
    found = SimpleNamespace(ran=[], check_seconds=0.0, before=lambda folder: None)

    def run(command, folder, job, stop=None):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        if "corners" in job:
            time.sleep(found.check_seconds)
            return {"state": "complete"}
        found.before(folder)
        found.ran.append(job["params"])
        if job["base"]["training"].get("dies_at") == job["params"]["lwf_lambda"]:
            return {"state": "failed", "reason": "something broke"}
        return {"state": "complete", "gain": 1.0, "forgetting": 0.1}

    monkeypatch.setattr("lwf_unsloth.sweep.run_process", run)
    return found


def sweep_of(place, text=ONE):
    """A sweep of the folder that `swept` uses, to take its steps one by one."""
    from lwf_unsloth.sweep import _Sweep

    url = f"sqlite:///{place / 'out' / 'study.db'}"
    (place / "out" / "trials").mkdir(parents=True, exist_ok=True)
    command = (sys.executable, str(place / "stand_in.py"))
    return _Sweep(plan_of(place, text), place / "out", url, command)


def test_two_studies_in_one_folder_are_refused_before_one_writes_over_the_others_trials(
    place, trials
):
    swept(place, ONE)
    job = (place / "out" / "trials" / "trial-0000" / "job.json").read_bytes()
    other = ONE.replace("max_steps: 2", "max_steps: 3")
    with pytest.raises(ConfigError, match="trials of the sweep 'grid' .* this one is 'other'"):
        swept(place, f"name: other\n{other}")
    with pytest.raises(ConfigError, match="storage: the file study.db.*storage: a database"):
        swept(place, ONE, storage="postgresql+psycopg://user@127.0.0.1:1/none")
    assert (place / "out" / "trials" / "trial-0000" / "job.json").read_bytes() == job
    assert len(swept(place, ONE).of("complete")) == 1 == len(trials.ran)


@pytest.mark.parametrize("text", ["", "[]", "null", '"a"', '{"study": "grid"}', "\xff"])
def test_a_damaged_claim_of_the_folder_is_in_no_ones_way(tmp_path, text):
    from lwf_unsloth.sweep_storage import CLAIM, claim, refuse_other

    (tmp_path / CLAIM).write_bytes(text.encode("latin-1"))
    refuse_other(tmp_path, "grid", "sqlite:///study.db")
    (tmp_path / CLAIM).unlink()
    claim(tmp_path, "grid", "sqlite:///study.db")
    refuse_other(tmp_path, "grid", "sqlite:///study.db")
    with pytest.raises(ConfigError, match="another output folder"):
        refuse_other(tmp_path, "other", "sqlite:///study.db")


@pytest.mark.slow
def test_two_sweeps_of_one_name_that_begin_at_the_same_moment_are_not_mixed(place, trials):
    from lwf_unsloth.sweep import run_sweep

    plans = [plan_of(place, ONE), plan_of(place, ONE.replace("max_steps: 2", "max_steps: 3"))]
    command = (sys.executable, str(place / "stand_in.py"))
    trials.check_seconds = 2.0

    def run(plan):
        try:
            return run_sweep(plan, output=place / "out", command=command)
        except ConfigError as error:
            return str(error)

    first, second = sorted(at_once(*(lambda p=p: run(p) for p in plans)), key=str)
    assert "holds another sweep" in str(second) and len(first.of("complete")) == 1
    assert len(trials.ran) == 1


@pytest.mark.slow
def test_a_result_that_an_older_study_left_in_the_folder_is_not_taken_for_the_trials(place, trials):
    """Its database was removed, its folders were not; the new trial's worker died at once."""
    sweep = sweep_of(place)
    sweep.begin()
    trial = sweep.study().ask()
    trial.set_user_attr("owner", {**this_worker(), "pid": 2**22 + 1})
    old = place / "out" / "trials" / "trial-0000"
    old.mkdir()
    (old / "job.json").write_text(json.dumps({"owner": {**this_worker(), "pid": 2**22 + 2}}))
    result = {"state": "complete", "gain": 5.0, "forgetting": 0.5}
    (old / "result.json").write_text(json.dumps(result))
    assert [one.gain for one in swept(place, ONE).of("complete")] == [1.0]


@pytest.mark.slow
def test_a_trial_that_was_closed_by_another_machine_meanwhile_runs_again(place, trials, caplog):
    """As where this machine slept: it had given no sign of life."""
    closed = []

    def close(folder):
        if folder.name == "trial-0000":
            study = sweep_of(place).study()
            closed.append(study._storage.set_trial_state_values(1, optuna.trial.TrialState.FAIL))

    trials.before = close
    found = swept(place, ONE)
    assert closed == [True] and [one.number for one in found.of("complete")] == [1]
    assert "no sign of life" in caplog.text and not found.of("failed")


@pytest.mark.slow
def test_a_sweep_runs_points_that_a_larger_grid_has_queued_meanwhile(place, trials):
    sweep_of(place, ONE.replace("[1]", "[1, 3, 0.25]")).begin()
    found = swept(place, ONE)
    assert {one.params["lwf_lambda"] for one in found.of("complete")} == {0.25, 1, 3}


@pytest.mark.slow
def test_what_failed_is_not_run_again_because_two_sweeps_had_queued_it(place, trials):
    text = ONE.replace("{max_steps: 2}", "{max_steps: 2, dies_at: 1}")
    first, second = sweep_of(place, text), sweep_of(place, text)
    first.begin()
    study, slots = second.study(), second.plan.slots()
    for slot, params in slots.items():  # the other one had looked at the same moment
        study.enqueue_trial(params, user_attrs={"slot": slot, "after": -1})
    assert len(swept(place, text).of("failed")) == 1 == len(trials.ran)
    second._requeue(study, again=True)
    for slot, params in slots.items():
        study.enqueue_trial(params, user_attrs={"slot": slot, "after": 0})
    assert len(swept(place, text).of("failed")) == 1 and len(trials.ran) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_sweep_goes_on_with_the_trials_of_one_that_is_killed_beside_it(place, request, shared):
    storage = request.getfixturevalue("postgres") if shared else None
    (place / "gate").mkdir()
    killed, other = (start(place, GRID, workers=2, storage=storage) for _ in range(2))
    until(lambda: len(ran(place, "begun")) == 4, other)  # all four workers wait for a trial
    killed.kill()
    killed.wait()
    until(lambda: len(running(place)) == 3, other)  # the other and its two trials
    shutil.rmtree(place / "gate")
    assert other.wait(timeout=LONGEST) == 0
    found = swept(place, GRID, storage=storage)
    assert len(found.of("complete")) == 6 == len(set(ran(place))) and not found.of("failed")
    assert len(ran(place)) == 6 == len(ran(place, "begun")) - 2, "and those of the killed one anew"
    assert len((place / "out" / "trials.jsonl").read_text().splitlines()) == 6


# ------------------------------------------------------------------ whether a worker is still there


def trial_by(owner=None, begun=None):
    attrs = {} if owner is None else {"owner": owner}
    begun = begun or datetime.now()
    return SimpleNamespace(user_attrs=attrs, datetime_start=begun, _trial_id=id(attrs))


def test_a_living_worker_is_there_whatever_the_clock_says_and_a_dead_one_is_not(monkeypatch):
    import psutil

    moved = psutil.boot_time() + 3600
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: moved)
    monkeypatch.setattr(psutil._pslinux, "BOOT_TIME", moved, raising=False)
    child = subprocess.Popen(["sleep", "60"])
    try:
        begun = trial_process._begun(child.pid)
        assert not is_gone(trial_by({**this_worker(), "pid": child.pid, "begun": begun}))
        code = "import json, lwf_unsloth.trial_process as t; print(json.dumps(t._begun({})))"
        seen = subprocess.check_output([sys.executable, "-c", code.format(child.pid)])
        assert json.loads(seen) == begun
    finally:
        child.kill()
    gone = trial_by({**this_worker(), "pid": child.pid, "begun": begun})
    end = time.monotonic() + 20
    while not is_gone(gone) and time.monotonic() < end:
        time.sleep(0.01)
    assert is_gone(gone), "it has ended, though nobody has waited for it"
    child.wait()
    assert is_gone(gone) and is_gone(trial_by({**this_worker(), "begun": begun - 1e6}))


def test_a_machine_of_the_same_name_or_another_container_is_another_machine(monkeypatch):
    owner = {**this_worker(), "pid": 2**22 + 1}
    assert is_gone(trial_by(owner))
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "pid:[1]")
        trial_process._machine.cache_clear()
        there = this_worker()["host"]
    trial_process._machine.cache_clear()
    assert there.split()[0] == this_worker()["host"].split()[0]
    assert not is_gone(trial_by({**owner, "host": there}))


def test_a_trial_that_names_no_worker_yet_is_judged_by_the_own_clock(monkeypatch):
    """That of a machine in another time zone says that it began hours ago."""
    trial = trial_by(begun=datetime.now() - timedelta(hours=9))
    assert not is_gone(trial)
    now = time.monotonic()
    monkeypatch.setattr(trial_process.time, "monotonic", lambda: now + trial_process.UNCLAIMED + 1)
    assert is_gone(trial) and not is_gone(trial_by())
