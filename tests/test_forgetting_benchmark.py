"""The forgetting benchmark: its rows, its order of work, one base for many adapters, going on after
a kill, and what its report says."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import _forgetting_arms as arms  # noqa: E402
from benchmarks import _sql_task, forgetting  # noqa: E402
from lwf_unsloth.errors import DataError  # noqa: E402
from lwf_unsloth.kept_folders import write_manifest  # noqa: E402

COLUMNS = "pets.id | pets.name | pets.* | owner.pet | owner.*"
TASKS = [
    {
        "examples": [
            {"input": f"How many pets? | * | {COLUMNS}", "target": ["select count ( pets.* )"]},
            {
                "input": f"And owners? | How many pets? | * | {COLUMNS}",
                "target": ["select count ( owner.* )"],
            },
        ]
    },
    {"examples": [{"input": f"How many pets? | * | {COLUMNS}", "target": ["select pets.*"]}]},
]


def test_a_question_comes_once_with_its_tables_and_what_was_asked_before():
    first, second = _sql_task.sql_rows(TASKS)
    assert first["input"] == "pets(id, name)\nowner(pet)"
    assert first["instruction"].endswith("\nQuestion: How many pets?")
    assert first["output"] == "select count ( pets.* )" and first["database"] == "pets"
    assert "Earlier questions: How many pets?\nQuestion: And owners?" in second["instruction"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("select a.x , a.y", 1),
        ("SELECT  a.y ,\na.x;", 1),
        ("```sql\nselect a.x , a.y\n```", 1),
        ("select a.x", 0),
        ("select a.x , a.y where a.z = value", 0),
        ("", 0),
    ],
)
def test_a_query_is_right_in_any_accepted_form_whatever_its_case_and_spaces(answer, right):
    row = {"accepted": ["select a.x , a.y", "select a.y , a.x"]}
    assert _sql_task.exact_sql(answer, row) == right


def test_another_file_than_the_checked_one_is_refused(tmp_path):
    wrong = tmp_path / "bigbench.tar.gz"
    wrong.write_bytes(b"something else")
    with pytest.raises(DataError, match="has the hash"):
        _sql_task.prepare(tmp_path / "data", sdist=wrong)
    with pytest.raises(DataError, match="--prepare"):
        _sql_task.load(tmp_path, "gemma-3-270m")


# ------------------------------------------------------------------- the order of work


def row(arm, lr, score, seed=0, **more):
    return {"arm": arm, "lr": lr, "seed": seed, "new_score": score, **more}


def planned(rows, seeds=(0, 1, 2)):
    return arms.plan(rows, seeds, arms.NAMES)


def test_a_rate_is_raised_until_the_score_falls_and_the_best_gets_every_seed():
    rows = [
        row("plain_sft", rate, score) for rate, score in ((1e-3, 0.1), (2e-3, 0.2), (4e-3, 0.3))
    ]
    assert arms.Job("plain_sft", 8e-3) in planned(rows)
    assert arms.best_rate(rows, "plain_sft", 0) is None, "8e-3 may be better still"
    rows.append(row("plain_sft", 8e-3, 0.25))
    assert arms.best_rate(rows, "plain_sft", 0) == 4e-3
    found = planned(rows)
    assert {arms.Job("plain_sft", 4e-3, seed) for seed in (0, 1, 2)} <= set(found)
    assert arms.Job("plain_sft", 1.6e-2) not in found


def test_a_rate_that_fails_does_not_hold_up_the_ladder():
    rows = [row("ours", 1e-3, 0.1), row("ours", 2e-3, 0.2)]
    rows.append({"arm": "ours", "lr": 4e-3, "seed": 0, "error": "NaN"})
    assert arms.best_rate(rows, "ours", 0) == 2e-3


def test_the_other_arms_wait_for_the_rate_that_is_best_for_ours():
    assert {job.arm for job in planned([])} == {"frozen", "plain_sft", "ours", "document"}
    rows = [row("ours", rate, score) for rate, score in ((1e-3, 0.3), (2e-3, 0.2), (4e-3, 0.1))]
    found = planned(rows)
    assert {job.arm for job in found} == set(arms.NAMES)
    assert arms.Job("ours_t2", 1e-3) in found and arms.Job("masked_all", 1e-3) in found
    assert len(found) == len(set(found))


def test_every_arm_has_settings_that_the_library_takes(tmp_path):
    from lwf_unsloth.config import LwFConfig

    for name in arms.FAMILIES:
        values = arms.settings_of(arms.Job(name, 1e-3), 166, 16)
        config = LwFConfig(str(tmp_path), **values)
        assert config.per_device_train_batch_size * (1 - config.rehearsal_ratio) == pytest.approx(
            16
        )
    assert arms.unavailable(["lwf_lambda"]) != []
    assert "ours_rank" in arms.unavailable(
        [n for n in LwFConfig.__dataclass_fields__ if n != "rank_schedule"]
    )


def test_processes_share_the_jobs_and_wait_for_no_dead_one(tmp_path):
    from benchmarks._forgetting_store import Store

    settings = {"steps": 2, "rank": 4, "seeds": [0]}
    jobs = [arms.Job("frozen"), arms.Job("ours", 1e-3)]
    one, other = (Store(tmp_path / "out", tmp_path, "m", "d", settings) for _ in range(2))
    assert one.take(lambda rows: jobs) == (jobs[0], True)
    assert other.take(lambda rows: jobs) == (jobs[1], True)
    assert one.take(lambda rows: jobs) == (None, True), "this process is at work on both"
    one.end(jobs[0])
    claim = next(tmp_path.glob("claim-ours*"))
    claim.write_text(f"{jobs[1].key}|{2**22 + 1}")
    assert other.take(lambda rows: jobs) == (None, False), "no such process: nothing comes of it"


def test_a_worker_that_fails_ends_no_other(tmp_path, monkeypatch):
    waited = []

    class Run:
        def __init__(self, command, env):
            self.number = len(waited)
            waited.append(False)

        def wait(self):
            waited[self.number] = True
            return 3 if self.number == 0 else 0

    monkeypatch.setattr(forgetting.subprocess, "Popen", Run)
    options = forgetting._parser().parse_args(["--workers", "3", "--stagger", "0"])
    options.scratch = tmp_path
    assert forgetting.spread(options) == 3
    assert waited == [True] * 3


def test_rows_are_kept_beside_other_models_and_replaced_by_key_and_measured_anew_on_other_data(
    tmp_path, monkeypatch
):
    from benchmarks import _forgetting_store as kept

    monkeypatch.setattr(kept, "RESULTS", tmp_path / "none")
    settings = {"steps": 2, "rank": 4, "seeds": [0]}

    def store(model, data, run):
        (tmp_path / run).mkdir(exist_ok=True)
        return kept.Store(tmp_path / "out", tmp_path / run, model, data, settings)

    frozen = {"arm": "frozen", "lr": 0.0, "seed": 0}
    store("m", "d", "1").add([{**frozen, "new_score": 0.1}], {"frozen 0 0": {"right": "10"}})
    store("n", "d", "1").add([{**frozen, "new_score": 0.2}], {})
    store("m", "d", "2").add([{**frozen, "error": "NaN"}], {})
    rows = read(tmp_path / "out")["rows"]
    assert [(r["model"], r.get("new_score"), r.get("error")) for r in rows] == [
        ("n", 0.2, None),
        ("m", None, "NaN"),
    ]
    assert "commit" in rows[0] and "commit" not in rows[1], "an earlier run's row says whose it is"
    again = store("m", "d", "3")
    assert again.take(lambda rows: [arms.Job("frozen")])[0], "what failed is tried again"
    assert store("m", "other", "4").rows() == []
    assert kept.read_items(tmp_path / "out") == {"m frozen 0 0": {"right": "10"}}
    assert kept.unpacked(kept.packed([0.1234, -2.0])) == [0.123, -2.0]


# --------------------------------------------------------------------- a tiny model


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared folder of made-up rows."""
    folder = tmp_path_factory.mktemp("sql")
    rows = [
        {
            "instruction": f"Question: How many in {name} {i}?",
            "input": f"{name}(id, number{i})",
            "output": f"select {name}.number{i}",
            "accepted": [f"select {name}.number{i}"],
            "database": name,
            "long": False,
        }
        for name in ("museum", "stadium", "singer")
        for i in range(12)
    ]
    general = [
        {"instruction": f"Say {i}.", "input": "", "output": f"The number is {i}."}
        for i in range(30)
    ]
    _sql_task._write(folder / "sql.jsonl", rows)
    _sql_task._write(folder / "general.jsonl", general)
    _sql_task._write(
        folder / "web.jsonl", [{"text": f"The quick brown fox {i} jumps."} for i in range(4)]
    )
    write_manifest(folder / "manifest.json", {})
    return folder


@pytest.fixture()
def options(tmp_path, tiny_model_dir, prepared):
    """The command's options on the tiny model."""

    def make(*more):
        words = ["--smoke", "--model", "tiny", "--model-path", str(tiny_model_dir), "--rank", "4"]
        words += ["--data", str(prepared), "--out", str(tmp_path / "out"), "--dtype", "float32"]
        found = forgetting._parser().parse_args([*words, "--rows", "24", *map(str, more)])
        found.steps, found.score_batch, found.answer_batch = 2, 8, 8
        found.scratch = tmp_path / f"scratch{len(list(tmp_path.iterdir()))}"
        found.scratch.mkdir()
        return found

    return make


@pytest.fixture()
def bench(options, prepared):
    """A bench on the tiny model."""
    from benchmarks._forgetting_bench import Bench

    return lambda: Bench(options(), _sql_task.load(prepared, "tiny").few(24))


def figures(found):
    """Rows and items of a job, without times."""
    rows, items = found
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in rows], items


@pytest.mark.slow
@pytest.mark.timeout(900)  # where other processes share the cores
def test_an_adapter_begun_anew_on_a_loaded_base_gives_what_a_fresh_load_gives(bench):
    first = bench()
    job = arms.Job("ours", 5e-2, 1)
    expected = figures(first.run(job))
    assert expected[0][0]["kl_general"] > 0, "it has learned something"
    first.run(arms.Job("plain_sft", 5e-2, 0))
    assert figures(first.run(job)) == expected
    assert figures(bench().run(job)) == expected
    frozen = figures(first.run(arms.Job("frozen")))[0][0]
    assert frozen["kl_general"] == 0 and frozen["gain"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_and_ends_with_every_arm_measured_once(options, monkeypatch):
    from benchmarks import _forgetting_bench

    monkeypatch.setattr(arms, "LADDER", arms.LADDER[:1])
    monkeypatch.setattr(arms, "ALWAYS", 1)
    written = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(4)]
    monkeypatch.setattr(_forgetting_bench, "self_rehearsal", lambda *args, **more: written)
    ran = []
    run = _forgetting_bench.Bench.run

    def counted(self, job):
        ran.append(job.key)
        if len(ran) == 4:
            raise KeyboardInterrupt  # as a kill: nothing of this job is written
        return run(self, job)

    monkeypatch.setattr(_forgetting_bench.Bench, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        forgetting.work(options("--seeds", 0), float("inf"))
    first = options("--seeds", 0)
    rows = read(first.out)["rows"]
    assert len([r for r in rows if not r["arm"].startswith("plain_scaled")]) == 3
    forgetting.work(options("--seeds", 0), float("inf"))
    assert len(ran) == len(set(ran)) + 1, "only the killed job ran twice"
    rows = read(first.out)["rows"]
    assert [r for r in rows if r.get("error")] == []
    assert {r["arm"] for r in rows} == {*arms.NAMES, "plain_scaled_0.75", "plain_scaled_0.5"}
    assert len({arms.key_of(r) for r in rows}) == len(rows)
    assert forgetting.work(first, float("inf")) == 0, "nothing is left"


@pytest.mark.slow
def test_no_job_begins_that_would_outlast_the_limit(options, capsys):
    import time

    assert forgetting.work(options("--arms", "frozen"), time.monotonic() + 60) == 0
    assert "too little for another job" in capsys.readouterr().out


def read(folder):
    return json.loads((folder / "forgetting.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------- the report


def result_of(values):
    """A result and its items: arm -> (right answers, KL of each general row)."""
    from benchmarks._forgetting_store import packed

    rows, items = [], {}
    for number, (arm, (right, kl)) in enumerate(values.items()):
        one = row(arm, 0.0 if arm == "frozen" else 1e-3, right.count("1") / len(right), model="m")
        one |= {"new_nll_base": 3.0, "new_nll": 3.0 - number, "kl_general": sum(kl) / len(kl)}
        one |= {"kl_task": 1.0, "leak_rate": 0.0, "eos_rate": 1.0, "accuracy": {}}
        one |= {"nll_general_base": 2.0, "nll_general_tuned": 2.0 + 2 * one["kl_general"]}
        rows.append(one)
        items[f"m {arms.key_of(one)}"] = {
            "right": right, "leak": "0" * len(kl), "general_kl": packed(kl),
            "general_rise": packed([2 * k for k in kl]), "task_gain": packed([number] * len(right)),
        }  # fmt: skip
    meta = {"card": "C", "torch": "1", "unsloth": "2", "commit": "abc", "date": "2026-01-01"}
    meta |= {"command": "x", "settings": {"steps": 2, "rank": 4}}
    return {"meta": meta, "rows": rows}, items


@pytest.fixture()
def results(monkeypatch, tmp_path):
    """A folder of results that the tables read, and how to fill it."""
    from benchmarks import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def fill(result, items=None):
        (tmp_path / "forgetting.json").write_text(json.dumps(result))
        if items is not None:
            (tmp_path / "forgetting_items.json").write_text(json.dumps(items))
        return tmp_path

    return fill


def test_shares_are_taken_of_plain_sft_over_the_frozen_model():
    from benchmarks import _forgetting_stats as stats

    result, items = result_of(
        {
            "frozen": ("1000000000" * 20, [0.0] * 6),
            "plain_sft": ("1111100000" * 20, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]),
            "ours": ("1111000000" * 20, [0.1, 0.2, 0.1, 0.2, 0.1, 0.2]),
            "document": ("1110000000" * 20, [0.5] * 6),
        }
    )
    found = stats.groups(result["rows"], "m")
    plain, ours, document = (stats.best(found, arm) for arm in ("plain_sft", "ours", "document"))
    kept = stats.share(ours, plain, items, "right")
    assert kept.value == pytest.approx(3 / 4) and kept.low < 3 / 4 < kept.high
    kl = stats.share(ours, plain, items, "general_kl")
    assert kl.value == pytest.approx(0.1) and kl.high - kl.low == pytest.approx(0, abs=1e-9)
    assert stats.share(ours, plain, items, "task_gain").value == pytest.approx(2.0)
    assert stats.dominating(document, found) == [ours]
    assert stats.dominating(ours, found) == [] and stats.dominating(plain, found) == []
    told = {one[:3]: one[4] for one in stats.predictions(result["rows"], "m")}
    assert told == {}, "three adapters are too few"


def test_the_fit_of_a_straight_line_is_one_and_of_what_never_moves_not_told():
    from benchmarks._forgetting_stats import r_squared

    assert r_squared([(1, 2), (2, 4), (3, 6), (4, 8)]) == pytest.approx(1.0)
    assert r_squared([(1, 1), (2, 1), (3, 1), (4, 1)]) is None
    assert 0 < r_squared([(1, 2), (2, 1), (3, 5), (4, 3)]) < 1


def test_the_report_is_absent_without_a_result_and_whole_with_half_of_one(results, tmp_path):
    from benchmarks import _forgetting_plots, tables

    page = "<!-- table: forgetting -->\n<!-- end -->\n"
    assert tables.filled(page) == page
    assert _forgetting_plots.draw(tmp_path) == []
    result, items = result_of({"frozen": ("1000", [0.0] * 4)})
    results(result, items)
    assert "| before |" in tables.filled(page) and _forgetting_plots.draw(tmp_path) == []
    result, items = result_of({"frozen": ("1000", [0.0] * 4), "ours": ("1100", [0.1] * 4)})
    result["rows"].append({"model": "m", "arm": "ours", "lr": 2e-3, "seed": 0, "error": "NaN"})
    results(result)
    shown = tables.filled(page)
    assert "ours at 0.002: NaN" in shown and "rate 0.001, against plain" not in shown
    result, items = result_of(
        {
            "frozen": ("1000", [0.0] * 4),
            "plain_sft": ("1110", [1.0] * 4),
            "ours": ("1100", [0.1] * 4),
        }
    )
    folder = results(result, items)
    drawn = _forgetting_plots.draw(folder)
    assert [path.name for path in drawn] == ["forgetting_pareto.png", "forgetting_predicted.png"]
    shown = tables.filled(page)
    assert (
        "gain kept 50%" in shown
        and "10% [10%, 10%]" in shown
        and "results/forgetting_pareto.png" in shown
    )
