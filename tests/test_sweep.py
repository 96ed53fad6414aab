"""A sweep: what is tried, that nothing is lost or run twice, and what two real trials give.

The tests of the queue run a stand-in for the training, in processes as real as the training's.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lwf_unsloth.errors import ConfigError
from lwf_unsloth.sweep_file import read_sweep_file
from lwf_unsloth.sweep_result import SweepResult, TrialRecord

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.timeout(900)  # a busy machine takes long
LONGEST = 600
"""Seconds after which what a test waits for will not come, on the busiest machine."""
ROOT = Path(__file__).resolve().parent.parent

GRID = """
training: {max_steps: 2}
data: {task: task.jsonl}
grid:
  lwf_lambda: [0.5, 1, 2]
  r: [4, 8]
evaluate: {general: general.jsonl}
"""
STAND_IN = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lwf_unsloth.trial import tie_to_parent, write_result

tie_to_parent()
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
log = folder.parent.parent / "ran.txt"
if "corners" in job:
    write_result(folder, {{"state": "complete"}})
    sys.exit()
params = job["params"]
with log.open("a") as file:
    file.write("begun " + json.dumps(params, sort_keys=True) + "\\n")
time.sleep(job["base"]["training"].get("seconds", 0))
gate = folder.parent.parent.parent / "gate"
while gate.exists():  # the test lets so many trials end as there are passes
    try:
        next(gate.iterdir()).unlink()
        break
    except (StopIteration, FileNotFoundError):
        time.sleep(0.02)
strength = params["lwf_lambda"]
if strength == job["base"]["training"].get("dies_at"):
    print("CUDA error: something broke")
    sys.exit(3)
result = {{"state": "complete", "gain": 1 / strength, "forgetting": 0.1 / strength**2, "seed": 42}}
if strength == job["base"]["training"].get("too_big_at"):
    result = {{"state": "skipped", "reason": "Batch 8 x 512 tokens does not fit on the GPU."}}
if strength == job["base"]["training"].get("nan_at"):
    result["gain"] = float("nan")
write_result(folder, result)
with log.open("a") as file:
    file.write("ended " + json.dumps(params, sort_keys=True) + "\\n")
"""


@pytest.fixture()
def place(tmp_path):
    """Folder with the stand-in; after the test no process of it is left."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    yield tmp_path
    for process in running(tmp_path):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def running(place):
    """The processes whose command names the folder: the sweeps of `start` and all trials."""
    mine = [p for p in psutil.process_iter(["cmdline"]) if p.pid != os.getpid()]
    return [p for p in mine if any(str(place) in word for word in p.info["cmdline"] or ())]


def until(found, process=None):
    """Waits until something is so; a process, if given, must not end before."""
    begin = time.monotonic()
    while not found():
        assert process is None or process.poll() is None, "it ended before"
        assert time.monotonic() - begin < LONGEST, "it never came to that"
        time.sleep(0.02)


def plan_of(place, text=GRID):
    (place / "grid.yaml").write_text(text)
    return read_sweep_file(place / "grid.yaml")


def swept(place, text=GRID, **changes):
    from lwf_unsloth.sweep import run_sweep

    command = (sys.executable, str(place / "stand_in.py"))
    return run_sweep(plan_of(place, text), output=place / "out", command=command, **changes)


def ran(place, word="ended"):
    path = place / "out" / "ran.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(word)]


# ------------------------------------------------------------------ the file


def test_a_grid_is_every_combination_once(place):
    points = list(plan_of(place).slots().values())
    assert len(points) == 6 and len({tuple(p.items()) for p in points}) == 6
    seen = {(name, p[name]) for p in plan_of(place).corners() for name in p}
    assert seen == {("lwf_lambda", v) for v in (0.5, 1, 2)} | {("r", 4), ("r", 8)}


def test_a_larger_budget_is_the_same_sweep_and_another_setting_is_not(place):
    text = GRID.replace("grid:", "trials: 4\nspace:")
    assert plan_of(place, text).digest == plan_of(place, text.replace(": 4\n", ": 9\n")).digest
    assert plan_of(place, text).digest != plan_of(place, text.replace("[4, 8]", "[4]")).digest
    assert plan_of(place, text).digest != plan_of(place).digest


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("grid:", "gird:", "Did you mean grid"),
        ("[0.5, 1, 2]", "2", "list of texts or numbers"),
        ("[0.5, 1, 2]", "[]", "list of texts or numbers"),
        ("[0.5, 1, 2]", "[1, 1]", "twice"),
        ("[0.5, 1, 2]", "{low: 1, high: 2}", "list of texts"),
        ("grid:", "trials: 3\ngrid:", "either `grid`"),
        ("grid:", "trials: 0\nspace:", "whole number from 1"),
        (
            "grid:\n  lwf_lambda: [0.5, 1, 2]",
            "trials: 3\nspace:\n  a: {low: 2, high: 1}",
            "low < hi",
        ),
        ("{general: general.jsonl}", "{limit: 3}", "evaluate.general"),
        ("{general: general.jsonl}", "{general: g.jsonl, gain: bleu}", "evaluate.gain"),
        ("task: task", "tusk: task", "Did you mean task"),
    ],
)
def test_a_wrong_file_is_refused_and_says_what_is_wrong(place, old, new, said):
    assert old in GRID
    with pytest.raises(ConfigError, match=said):
        plan_of(place, GRID.replace(old, new))


def test_settings_find_their_section_and_unknown_ones_are_refused():
    from lwf_unsloth.trial import with_settings

    base = {"training": {"max_steps": 3}, "data": {"task": "t.jsonl"}}
    found = with_settings(base, {"lwf_lambda": 1, "r": 4, "data.limit": 7})
    assert found["training"] == {"max_steps": 3, "lwf_lambda": 1} and found["model"] == {"r": 4}
    assert found["data"]["limit"] == 7 and "limit" not in base["data"]
    for name, said in {"lamda": "neither", "trust_remote_code": "both", "x.r": "sections"}.items():
        with pytest.raises(ConfigError, match=said):
            with_settings(base, {name: 1})


# ------------------------------------------------------------------ the results


def test_the_front_is_what_no_other_trial_beats():
    values = [(1.0, 0.1), (2.0, 0.2), (1.5, 0.3), (2.0, 0.2), (0.5, 0.1)]
    trials = [TrialRecord(i, "complete", {}, *v, {}) for i, v in enumerate(values)]
    trials.append(TrialRecord(9, "failed", {}, None, None, {"reason": "no"}))
    result = SweepResult("x", tuple(trials))
    assert [one.number for one in result.front] == [1, 3, 0]
    assert result.best().number == 1 and result.best(0.15).number == 0
    assert result.best(0.05) is None and "trial 9 failed: no" in str(result)


@pytest.mark.slow
def test_failed_and_too_large_trials_are_recorded_with_their_reason_and_ignored_for_best(place):
    special = "{max_steps: 2, dies_at: 0.5, too_big_at: 1}"
    result = swept(place, GRID.replace("{max_steps: 2}", special), workers=2)
    assert [len(result.of(s)) for s in ("complete", "failed", "skipped")] == [2, 2, 2]
    reason = result.of("failed")[0].details["reason"]
    assert "code 3" in reason and "CUDA error: something broke" in reason
    assert "does not fit" in result.of("skipped")[0].details["reason"]
    assert {one.params["lwf_lambda"] for one in result.front} == {2}
    lines = [json.loads(x) for x in (place / "out" / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and {x["state"] for x in lines} == {"complete", "failed", "skipped"}
    done = next(line for line in lines if line["state"] == "complete")
    assert done["gain"] == 0.5 and done["seed"] == 42 and "optuna" in done["versions"]
    (place / "out" / "trials.jsonl").write_text('{"number": 0, "sta')
    again = swept(place, GRID.replace("{max_steps: 2}", special))
    assert len(ran(place, "begun")) == 6 and again == result, "what failed is not run again"
    text = (place / "out" / "trials.jsonl").read_text()
    assert [json.loads(x) for x in text.splitlines()] == lines, "a torn file is written anew"


def test_another_plan_in_the_same_study_is_refused(place):
    small = GRID.replace("[0.5, 1, 2]", "[1]").replace("[4, 8]", "[4]")
    swept(place, small)
    for old, new in (("max_steps: 2", "max_steps: 3"), ("  r:", "  lora_alpha:"), ("[4]", "[x]")):
        with pytest.raises(ConfigError, match="another sweep"):
            swept(place, small.replace(old, new))


def test_a_grid_that_has_got_more_values_runs_what_is_new_and_failed_ones_only_when_asked(place):
    small = GRID.replace("[0.5, 1, 2]", "[0.5, 2]").replace("[4, 8]", "[8]")
    first = small.replace("{max_steps: 2}", "{max_steps: 2, dies_at: 2}")
    assert [one.state for one in swept(place, first).trials] == ["complete", "failed"]
    more = swept(place, first.replace("[8]", "[4, 8]").replace("[0.5, 2]", "[0.5]"))
    assert len(ran(place, "begun")) == 3, "of the new point alone"
    assert [one.params for one in more.of("complete")] == [
        {"lwf_lambda": 0.5, "r": 8},
        {"lwf_lambda": 0.5, "r": 4},
    ]
    (place / "stand_in.py").write_text(STAND_IN.replace("sys.exit(3)", "pass"))
    assert len(swept(place, first).of("failed")) == 1
    again = swept(place, first, retry_failed=True)
    assert len(again.of("complete")) == 3 and not again.of("failed")
    assert len(ran(place, "begun")) == 4


@pytest.mark.slow
def test_a_budget_of_trials_is_spent_exactly_and_can_be_raised(place):
    text = GRID.replace("grid:", "trials: 3\nspace:").replace(
        "[0.5, 1, 2]", "{low: 0.1, high: 9, log: true}"
    )
    assert len(swept(place, text, workers=2).of("complete")) == 3
    raised = swept(place, text.replace(": 3\n", ": 4\n"), workers=2)
    assert len(raised.of("complete")) == 4 == len(ran(place))
    assert all(0.1 <= one.params["lwf_lambda"] <= 9 for one in raised.trials)


def start(place, text, workers=3, storage=None, **changes):
    """The sweep in a process that can be killed."""
    plan_of(place, text)
    code = (
        # A shell's background job ignores the interrupt, and so do the tests that it starts.
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lwf_unsloth.sweep import run_sweep\n"
        "from lwf_unsloth.sweep_file import read_sweep_file\n"
        f"run_sweep(read_sweep_file({str(place / 'grid.yaml')!r}), workers={workers}, "
        f"output={str(place / 'out')!r}, storage={storage!r}, "
        f"command=(sys.executable, {str(place / 'stand_in.py')!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **changes)


def killed_after(place, text, ended, storage=None):
    """Kills the sweep when so many trials have ended and each of its 3 workers waits for one."""
    before, begun = len(ran(place)), len(ran(place, "begun"))
    (place / "gate").mkdir()
    for number in range(ended - before):
        (place / "gate" / str(number)).touch()
    process = start(place, text, storage=storage)
    wanted = (ended, begun + ended - before + 3)
    until(lambda: (len(ran(place)), len(ran(place, "begun"))) == wanted, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not running(place))  # the killed sweep's trials end with it
    assert (len(ran(place)), len(ran(place, "begun"))) == wanted
    shutil.rmtree(place / "gate")


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sweep_killed_in_the_middle_goes_on_with_what_is_unfinished(place, kills):
    text = GRID if kills == 1 else GRID.replace("[4, 8]", "[4, 8, 16, 32]")
    for kill in range(kills):
        killed_after(place, text, ended=1 + 4 * kill)
    result = swept(place, text, workers=3)
    wanted = 6 * kills
    assert len(result.of("complete")) == wanted and not result.of("failed")
    assert sorted(ran(place)) == sorted(set(ran(place))), "none was run twice to the end"
    assert len(ran(place)) == wanted
    assert result.best().params["lwf_lambda"] == 0.5
    lines = (place / "out" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == wanted


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_result_that_the_killed_sweep_did_not_record_is_taken_and_not_run_again(place):
    """The trial had ended, but the worker was killed before the study knew."""
    small = GRID.replace("[0.5, 1, 2]", "[1]").replace("[4, 8]", "[4]")
    from lwf_unsloth.sweep import _Sweep

    sweep = _Sweep(
        plan_of(place, small),
        place / "out",
        f"sqlite:///{place / 'out' / 'study.db'}",
        (sys.executable, str(place / "stand_in.py")),
    )
    (place / "out" / "trials").mkdir(parents=True)
    sweep.begin()
    trial = sweep.study().ask()
    trial.suggest_float("lwf_lambda", 1, 1)
    trial.suggest_float("r", 4, 4)
    trial.set_user_attr("owner", {**_owner(), "pid": 2**22 + 1})
    folder = place / "out" / "trials" / "trial-0000"
    folder.mkdir()
    result = {"state": "complete", "gain": 5.0, "forgetting": 0.5}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "job.json").write_text(json.dumps({"owner": {**_owner(), "pid": 2**22 + 1}}))
    found = swept(place, small)
    assert [one.gain for one in found.of("complete")] == [5.0]
    assert not (place / "out" / "ran.txt").exists()


def _owner():
    from lwf_unsloth.trial_process import this_worker

    return this_worker()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
@pytest.mark.parametrize("text", [GRID, GRID.replace("grid:", "trials: 6\nspace:")])
def test_a_worker_that_finds_the_waiting_trial_taken_by_another_process_steps_back(place, text):
    """Between a worker's look and its grasp another process took the last waiting trial."""
    from lwf_unsloth.sweep import _Hold, _Sweep

    plan = plan_of(place, text)
    (place / "out" / "trials").mkdir(parents=True)
    url = f"sqlite:///{place / 'out' / 'study.db'}"
    sweep = _Sweep(plan, place / "out", url, (sys.executable, str(place / "stand_in.py")))
    study = sweep.study()
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned):
        sweep._objective(trial, study, _Hold(sweep.taking))
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert not (place / "out" / "ran.txt").exists() and not sweep.result().trials
    found = swept(place, text)
    assert len(found.of("complete")) == 6 and not found.of("failed")


def test_a_waiting_trial_is_taken_once_when_two_workers_reach_for_it_at_the_same_moment(tmp_path):
    from lwf_unsloth.sweep_storage import open_storage

    url = f"sqlite:///{tmp_path / 'study.db'}"
    storages = [open_storage(url) for _ in range(2)]
    study = optuna.create_study(storage=storages[0])
    for _ in range(20):
        study.enqueue_trial({})
    trials, both = [one._trial_id for one in study.get_trials()], threading.Barrier(2)

    def take(storage):
        taken = []
        for trial in trials:
            both.wait(timeout=30)
            taken.append(storage.set_trial_state_values(trial, optuna.trial.TrialState.RUNNING))
        return taken

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(take, storages)
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * 20


@pytest.mark.slow
def test_two_sweeps_that_begin_at_the_same_moment_check_the_settings_apart(place):
    """At once in one folder, one would take away the result of the other."""
    text = GRID.replace("[0.5, 1, 2]", "[1]").replace("[4, 8]", "[4]")
    stand_in = (place / "stand_in.py").read_text()
    wait = (  # each until the other checks too, or can be no more in time
        "    for _ in range(1500):\n"
        "        if len(list(folder.parent.glob('check*'))) > 1: break\n"
        "        time.sleep(0.02)\n"
        "    time.sleep(0.2)\n"
    )
    late = stand_in.replace('if "corners" in job:\n', 'if "corners" in job:\n' + wait)
    assert late != stand_in
    (place / "stand_in.py").write_text(late)
    both = [start(place, text, workers=1) for _ in range(2)]
    assert [process.wait(timeout=LONGEST) for process in both] == [0, 0]
    assert len(ran(place)) == 1
    assert not list((place / "out" / "trials").glob("check*"))


@pytest.mark.slow
def test_two_sweeps_of_one_study_share_the_trials(place):
    text = GRID.replace("{max_steps: 2}", "{max_steps: 2, seconds: 0.3}")
    both = [start(place, text, workers=2) for _ in range(2)]
    assert [process.wait(timeout=LONGEST) for process in both] == [0, 0]
    assert sorted(ran(place)) == sorted(set(ran(place))) and len(ran(place)) == 6


@pytest.fixture()
def postgres(tmp_path):
    """The URL of a PostgreSQL that the test starts, reached through a socket in its folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    tools = found[-1].parent if found else Path(shutil.which("initdb") or "/none/initdb").parent
    if not (tools / "initdb").exists():
        pytest.skip("no PostgreSQL on this machine")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # a socket's path must be short
        if user:
            shutil.chown(folder, user)
        data, given = f"{folder}/data", {"user": user, "check": True, "cwd": "/"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([tools / "initdb", "-D", data, "-A", "trust", "-U", "me"], **given, **quiet)
        server = [tools / "pg_ctl", "-D", data, "-w", "-l", f"{folder}/log"]
        options = ["-o", f"-k {folder} -c listen_addresses=''"]
        subprocess.run([*server, *options, "start"], **given, **quiet)
        yield f"postgresql+psycopg://me@/postgres?host={folder}"
        subprocess.run([*server, "-m", "immediate", "stop"], **given, **quiet)


@pytest.mark.slow
def test_twelve_trials_on_postgresql_killed_twice_end_as_an_undisturbed_sweep(place, postgres):
    pytest.importorskip("psycopg")
    text = GRID.replace("[4, 8]", "[4, 8, 16, 32]")
    for ended in (2, 6):
        killed_after(place, text, ended, storage=postgres)
    result = swept(place, text, workers=3, storage=postgres)
    done = ran(place)
    assert len(result.of("complete")) == 12 == len(done) == len(set(done))
    assert len(ran(place, "begun")) > 12
    (place / "other").mkdir()
    (place / "other" / "stand_in.py").write_text(STAND_IN)
    undisturbed = swept(place / "other", text, workers=3)
    best = [
        {json.dumps(one.params, sort_keys=True) for one in r.front} for r in (result, undisturbed)
    ]
    assert best[0] == best[1]


# ------------------------------------------------------------------ real trials


@pytest.mark.slow
def test_two_real_trials_are_trained_measured_and_recorded_by_the_command(
    tiny_model_dir, alpaca_rows, tmp_path
):
    for name, rows in {"task": alpaca_rows(24), "general": alpaca_rows(8, "keep")}.items():
        lines = (json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "grid.yaml").write_text(f"""
model: {{model_name: "{tiny_model_dir}", dtype: float32, r: 4}}
training: {{max_steps: 3, learning_rate: 1e-2, max_length: 128, bf16: false, warmup_steps: 0}}
data: {{task: "{tmp_path}/task.jsonl", rehearsal: "{tmp_path}/general.jsonl", test_size: 0.25}}
grid: {{lwf_lambda: [0.5, 4]}}
evaluate: {{general: "{tmp_path}/general.jsonl", limit: 8}}
""")
    command = [sys.executable, "-m", "lwf_unsloth.cli", "sweep", "grid.yaml", "-o", "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["complete", "complete"], lines
    assert "2 complete" in done.stdout
    for line in lines:
        assert line["forgetting"] > 0 and line["config"]["training"]["lwf_lambda"] in (0.5, 4)
        assert Path(line["adapter"], "adapter_model.safetensors").is_file()
        assert line["seed"] == 42 and "unsloth" in line["versions"]
        assert line["scores"]["general"]["kl"]["tuned"]["value"] == line["forgetting"]
    wrong = (tmp_path / "grid.yaml").read_text().replace("[0.5, 4]", "[0.5, -4]")
    (tmp_path / "grid.yaml").write_text(wrong)
    command[-1] = "other"
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "lwf_lambda is -4" in done.stderr, "before the first trial"


# ------------------------------------------------------------------ what is shown of it


def measured(number, gain, forgetting, **details):
    """A trial as the process of a real one records it: the NLL fell, so its change is negative."""
    nll = {"value": -gain, "low": -gain - 0.2, "high": -gain + 0.1, "se": 0.1, "n": 9}
    kl = {"value": forgetting, "low": forgetting / 2, "high": 3 * forgetting, "se": 0.1, "n": 9}
    scores = {"task": {"nll": {"change": nll}}, "general": {"kl": {"tuned": kl, "change": None}}}
    file = {"model": {"r": 4}, "training": {"lwf_lambda": 2.0}, "data": {"task": "t.jsonl"}}
    known = {"scores": scores, "file": file, "objectives": {"gain": "nll", "forgetting": "kl"}}
    return TrialRecord(number, "complete", {"r": number}, gain, forgetting, {**known, **details})


@pytest.fixture()
def shown():
    """Three trials, of which 0 and 2 are the front, and one that failed."""
    lost = TrialRecord(3, "failed", {"r": 9}, None, None, {"reason": "no <b>\nmore"})
    return SweepResult("x", (measured(0, 1.0, 0.1), measured(1, 0.9, 0.2), measured(2, 2, 5), lost))


def test_gain_and_forgetting_have_the_intervals_of_their_measures(shown):
    one = shown.trials[0]
    gain, cost = one.interval("gain"), one.interval("forgetting")
    assert (gain.value, gain.low, gain.high) == pytest.approx((1.0, 0.9, 1.2))
    assert (cost.value, cost.low, cost.high) == pytest.approx((0.1, 0.05, 0.3))
    assert measured(0, 1.0, 0.1, scores={}).interval("gain") is None


def test_the_table_has_the_front_first_and_every_failure_with_its_reason(shown):
    rows = shown.table().rows
    assert [row[0] for row in rows] == ["2", "0", "1"]
    assert [bool(row[-1]) for row in rows] == [True, True, False]
    assert "+1.000 [+0.900, +1.200]" in rows[1]
    html = shown._repr_html_()
    assert "trial 3 failed: no &lt;b&gt;" in html and "nats per token" in html
    assert json.loads(json.dumps(shown.to_dict()))["front"] == [2, 0]


def test_the_best_settings_are_a_training_file(shown, tmp_path):
    from lwf_unsloth.errors import DataError
    from lwf_unsloth.train_file import read_train_file

    (tmp_path / "best.yaml").write_text(shown.best_config(0.15))
    file = read_train_file(tmp_path / "best.yaml")
    assert file.training == {"lwf_lambda": 2.0} and file.model == {"r": 4}
    assert shown.best_config().startswith("# Trial 2: gain 2, forgetting 5")
    with pytest.raises(DataError, match=r"forgets 0.01 or less. The least is 0.1, in trial 0"):
        shown.best_config(0.01)
    with pytest.raises(DataError, match=r"(?s)No trial of the sweep y is complete.*0 complete"):
        SweepResult("y", ()).best_config()


def test_the_figure_tells_the_front_by_shape_and_number_and_has_every_whisker(shown, tmp_path):
    from matplotlib.text import Text

    from lwf_unsloth.errors import DataError
    from lwf_unsloth.sweep_plot import plot_sweep

    chart = plot_sweep(shown, 0.15)
    chart.figure.canvas.draw()
    axes = chart.figure.axes[0]
    points = {(bar[0].get_xdata()[0], bar[0].get_ydata()[0]): bar for bar in axes.containers}
    assert set(points) == {(0.1, 1.0), (0.2, 0.9), (5, 2)}
    assert {place: bar[0].get_marker() for place, bar in points.items()} == {
        (0.1, 1.0): "D",
        (0.2, 0.9): "o",
        (5, 2): "D",
    }
    across, up = (bars.get_segments()[0] for bars in points[0.1, 1.0][2])
    assert [x for x, _ in across] == pytest.approx([0.05, 0.3])
    assert [y for _, y in up] == pytest.approx([0.9, 1.2])
    said = [one.get_text() for one in chart.figure.findobj(Text)]
    assert {"0", "2", "0: r 0", "2: r 2", "limit 0.15", "best under the limit"} <= set(said)
    assert axes.get_xscale() == "log" and any("log scale" in text for text in said)
    assert [path.suffix for path in chart.save(tmp_path / "front")] == [".png", ".svg"]
    with pytest.raises(DataError, match="is complete"):
        plot_sweep(SweepResult("y", (shown.trials[-1],)))


@pytest.mark.slow
def test_an_interrupt_ends_the_trials_and_the_next_call_runs_them_again(place):
    """As Ctrl-C, which the shell sends to every process of the group, so to the trial's too."""
    text = GRID.replace("[0.5, 1, 2]", "[1]").replace("[4, 8]", "[4]")
    (place / "gate").mkdir()  # the trial would never end
    process = start(place, text, workers=1, start_new_session=True)
    until(lambda: ran(place, "begun"), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=LONGEST) != 0
    assert not running(place) and not ran(place)
    (place / "gate").rmdir()
    result = swept(place, text)
    assert len(result.of("complete")) == 1 and not result.of("failed")
