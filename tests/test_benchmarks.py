"""The benchmarks: arms compute one loss, figures are what they say, tables are the results'."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import _results, _steps, answers_table, fits_t4, step_cost, tables  # noqa: E402
from benchmarks._steps import Kind, Loop, Size, period, tried  # noqa: E402


@pytest.fixture()
def loop(tiny_peft):
    """A tiny model in training whose LoRA has moved away from its teacher."""
    model, tokenizer = tiny_peft()
    loop = Loop(model, tokenizer)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return loop


def value(loss, loop, batch):
    return loss(loop, batch).item()


@pytest.mark.parametrize("labelled", [1.0, 0.5])
def test_arms_with_kl_on_all_rows_compute_the_same_loss(loop, tiny_peft, labelled):
    loop.use_second(tiny_peft()[0])
    batch = loop.batch(Size(2, 16, labelled))
    found = {
        name: value(getattr(_steps, name), loop, batch)
        for name in ("ours_all", "full_logits", "two_calls", "two_models")
    }
    rates = [group.update(lr=0.0) for group in loop.optimizer.param_groups]
    assert len(rates) == 1, "filling the cache takes a step, which must not move the student"
    found["ours_all_cached"] = value(_steps.ours_all_cached(loop, batch), loop, batch)
    assert found == pytest.approx(dict.fromkeys(found, found["full_logits"]), rel=1e-4)
    kl_alone = found["full_logits"] - value(_steps.plain_unsloth, loop, batch)
    assert kl_alone > 0.1
    if labelled == 1.0:
        assert value(_steps.trl_gkd, loop, batch) * _steps.LAMBDA == pytest.approx(
            kl_alone, rel=1e-3
        )


def test_the_default_recipe_without_rehearsal_rows_is_the_plain_loss(loop):
    batch = loop.batch(Size(3, 12, 0.5))
    plain = value(_steps.plain_unsloth, loop, batch)
    assert value(_steps.ours_rehearsal, loop, batch) == pytest.approx(plain, rel=1e-5)
    mixed = loop.batch(Size(3, 12, 0.5), rehearsal=1)
    assert value(_steps.ours_rehearsal, loop, mixed) != pytest.approx(plain, rel=1e-3)


def test_a_step_trains_and_leaves_no_gradients(loop):
    before = [p.detach().clone() for p in loop.trained]
    loss = loop.step(_steps.ours_all, loop.batch(Size(2, 8)))
    assert torch.isfinite(loss)
    assert any(not torch.equal(*pair) for pair in zip(before, loop.trained, strict=True))
    assert all(p.grad is None for p in loop.trained)


def test_half_labelled_batches_mask_the_first_half_of_every_task_row(loop):
    batch = loop.batch(Size(2, 10, 0.5), rehearsal=1)
    assert (batch["labels"] != -100).sum(1).tolist() == [5, 5]
    assert batch["is_rehearsal"].tolist() == [True, False]


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
@pytest.mark.parametrize("share", step_cost.SHARES.values())
def test_a_period_holds_exactly_its_share_of_rehearsal_rows(batch, share):
    kinds = period(batch, share)
    rows = batch * sum(kind.times for kind in kinds)
    rehearsal = sum(kind.rehearsal * kind.times for kind in kinds)
    assert Fraction(rehearsal, rows) == share
    counts = [kind.rehearsal for kind in kinds]
    assert max(counts) - min(counts) <= 1 and max(counts) <= batch


def test_times_are_weighted_by_how_often_a_batch_comes_and_counted_per_task_row():
    plain = [step_cost.Item("plain_unsloth", Kind(), print, 2.0, [10.0, 20.0])]
    mixed = [
        step_cost.Item("ours_r20", Kind(0, 3), print, 2.5, [10.0, 20.0]),
        step_cost.Item("ours_r20", Kind(2, 1), print, 3.0, [30.0, 60.0]),
    ]
    found = step_cost.record(mixed, plain, 4)
    assert found["peak_gib"] == 3.0
    assert found["ms_median"] == (3 * 15 + 45) / 4 and found["ms_min"] == (3 * 10 + 30) / 4
    assert found["ms_per_task_row"] == pytest.approx((3 * 15 + 45) / 14, abs=1e-3)
    assert found["ratio"] == pytest.approx((60 / 14) / (10 / 4), abs=1e-4)  # alike in both rounds


@pytest.mark.parametrize("limit", [0, 255, 256, 700, 4096, 8191, 8192, 9000])
def test_the_longest_length_that_fits_is_found(limit):
    tries = []

    def fits(length):
        tries.append(length)
        return 1.0 if length <= limit else None

    length, peak = fits_t4.longest(fits, 256, 8192)
    assert length == min(limit // 256 * 256, 8192)
    assert (peak is None) == (length == 0)
    assert len(tries) <= 6


def test_running_out_of_memory_is_an_error_in_a_row_and_anything_else_keeps_its_name(loop):
    def run(error):
        raise error

    made = tried(loop, partial(run, torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB")))
    assert made.error == _steps.OUT_OF_MEMORY
    assert tried(loop, partial(run, ValueError("no\nmore"))).error == "ValueError: no"
    assert tried(loop, lambda: 3).value == 3


def fake_results(folder):
    meta = {"card": "Card", "torch": "2", "unsloth": "3", "commit": "0123456789", "date": "2026-01"}
    meta["command"] = "python -m benchmarks.x"
    ours = {"peak_gib": 2.7, "ms_median": 130.0, "ms_per_task_row": 32.5, "ratio": 1.3}
    plain = {"peak_gib": 2.68, "ms_median": 100.0, "ms_per_task_row": 25.0, "ratio": 1.0}
    script = {"peak_gib": 23.77, "ms_median": 400.0, "ms_per_task_row": 100.0}
    step = [
        {"shape": "B4xT512", "labelled": 0.5, "arm": arm, **figures}
        for arm, figures in {
            "plain_unsloth": plain,
            "ours_r06": ours,
            "full_logits": {"error": "out of memory"},
            "document_script": script,
        }.items()
    ]
    stage = [
        {"vocab": 256000, "dtype": "fp16", "arm": arm, "ms_median": 9.5, "peak_mib": 600.0}
        | {"grad_error": error}
        for arm, error in (("ours", 1.2e-4), ("trl", None))
    ]
    fits = [
        {"batch": 4, "arm": "ours", "longest_length": 8192},
        {"batch": 4, "arm": "full_logits", "longest_length": 0},
        {"batch": 4, "arm": "plain_unsloth", "error": "no time left"},
    ]
    for name, rows in (("step_cost", step), ("loss_stage", stage), ("fits_t4", fits)):
        text = json.dumps({"meta": meta, "rows": rows})
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def test_tables_say_what_the_results_say(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.step_cost() is None and tables.hardware() is None
    fake_results(tmp_path)
    cost = tables.step_cost()
    assert "| plain Unsloth SFT | 2.68 GiB, 100 ms |" in cost
    assert "| **ours**, default recipe, ratio 0.06 | 2.70 GiB, × 1.30 |" in cost
    assert "| LwF with full logits on Unsloth | out of memory |" in cost
    assert "| the document's script | 23.77 GiB, × 4.00 |" in cost
    assert "50% of the tokens labelled" in cost and "Card, torch 2, unsloth 3" in cost
    assert "| **ours** | 9.5 ms, 600 MiB, 1.2e-04 |" in tables.loss_stage()
    assert "| trl | 9.5 ms, 600 MiB, NaN |" in tables.loss_stage()
    assert "| **ours**, default recipe | 8192 |" in tables.fits_t4()
    assert "| LwF with full logits on Unsloth | none |" in tables.fits_t4()
    shown = "| **ours**, default recipe, ratio 0.06 | 2.70 GiB |  |  | 8192 |"
    assert shown in tables.hardware()


def test_the_table_of_self_written_rehearsal_has_means_and_what_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.self_rehearsal() is None
    fake_results(tmp_path)
    meta = json.loads((tmp_path / "step_cost.json").read_text(encoding="utf-8"))["meta"]
    figures = {"nll_task": 0.5, "kl_general": 0.01, "nll_general_rise": 0.002, "seconds": 20.0}
    rows = [
        {"part": "first", "arm": "self", "seed": 0, "facts": 0.7, **figures},
        {"part": "first", "arm": "self", "seed": 1, "facts": 0.9, **figures},
        {"part": "first", "arm": "none", "seed": 0, "error": "DataError: no rows"},
        {"part": "second", "arm": "after the FAQ", "seed": 0, "facts": 0.8},
        {"part": "second", "arm": "base, general", "facts": 0.8, "facts_after_second": 0.6},
        {"part": "second", "arm": "none", "facts": 0.8, "facts_after_second": 0.0},
        {"part": "evaluation", "arm": "5 sets x 200 rows", "seconds": 31.0},
    ]
    text = json.dumps({"meta": meta, "rows": rows})
    (tmp_path / "self_rehearsal.json").write_text(text, encoding="utf-8")
    table = tables.self_rehearsal()
    assert "| **rows that the model wrote itself** | 80% ± 14% | 0.50 ± 0.00 |" in table
    assert "| no rehearsal (plain fine-tuning) | DataError |" in table
    assert "| after the FAQ | 80% |  |  |" in table
    assert "| base, general | 80% | 60% | 75% |" in table
    assert "| none | 80% | 0% | 0% |" in table
    assert "5 sets x 200 rows: 31 s" in table


def test_a_page_keeps_its_text_around_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "before\n<!-- table: fits_t4 -->\nold\n<!-- end -->\nafter\n"
    assert tables.filled(page) == page, "without a result a table stays"
    fake_results(tmp_path)
    new = tables.filled(page)
    assert new.startswith("before\n<!-- table: fits_t4 -->\n|") and new.endswith("end -->\nafter\n")
    assert "old" not in new and tables.filled(new) == new


def test_the_pages_show_the_committed_results():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_cost", "fits_t4", "loss_stage"])
def test_every_benchmark_runs_in_a_tiny_shape(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--out", str(tmp_path)]
    if name != "loss_stage":
        command += ["--folder", str(tmp_path / "model")]
    if name == "step_cost":
        arms = ("plain_unsloth", "ours_all_cached", "ours_r20", "two_models", "document_script")
        command += ["--profile", "--labelled", "0.5", "--arms", *arms]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert result["meta"]["command"].startswith(f"python -m benchmarks.{name} --smoke")
    assert str(tmp_path) not in json.dumps(result), "no place on this machine"
    wrong = {row["arm"]: row["error"] for row in result["rows"] if "error" in row}
    missing = {arm for arm, error in wrong.items() if error.startswith("ModuleNotFoundError")}
    assert result["rows"] and missing <= {"liger", "trl"} and set(wrong) == missing
    if name == "step_cost":
        told = (tmp_path / "step_cost_profile.txt").read_text(encoding="utf-8")
        assert "teacher's forward" in told and "backward" in told


@pytest.mark.slow
def test_the_second_task_runs_on_a_tiny_model(tiny_model_dir, tmp_path):
    command = [sys.executable, "-m", "benchmarks.second_task", "--smoke", "--out", str(tmp_path)]
    command += ["--model", str(tiny_model_dir), "--parts", "first", "second"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / "self_rehearsal.json").read_text(encoding="utf-8"))
    found = {(row["part"], row["arm"]): row for row in result["rows"]}
    assert found["first", "base"]["kl_general"] == 0 == found["first", "base"]["nll_general_rise"]
    assert found["first", "general"]["kl_general"] > 0 and found["first", "none"]["facts"] == 0
    assert "facts_after_second" in found["second", "base, general"]
    wrong = {arm for (_, arm), row in found.items() if "error" in row}
    assert wrong <= {"self", "snapshot, self"}, "a model of random weights writes nothing of use"


def test_the_table_of_schedules_takes_the_ratio_seed_by_seed_and_a_table_for_each_card():
    from benchmarks.schedules_table import section

    figures = {"facts": 0.8, "nll_task": 0.5, "nll_general_rise": 0.002}
    rows = [
        {"arm": arm, "seed": seed, "steps": 60, "kl_general": kl, **figures, **more}
        for arm, seed, kl, more in (
            ("constant", 0, 0.02, {}),
            ("constant", 1, 0.04, {}),
            ("budget", 0, 0.01, {"lambda_path": [2.0, 3.25, 4.5]}),
            ("budget", 1, 0.04, {"lambda_path": [2.0, 9.0, 9.0]}),
        )
    ]
    rows.append({"arm": "rank", "seed": 0, "steps": 110, "card": "B", "error": "TrainError: x"})
    table = section({"meta": {"card": "A"}, "rows": rows}, tables.as_table)
    assert "| KL budget .02 | 80% ± 0% | 0.50 ± 0.00 | 0.0250 ± 0.0212 | 0.75 (0.50 to 1.00) |" in (
        table
    )
    assert "| 2, 3.25, 4.5 |" in table and "A, 60 steps, seeds 0, 1;" in table
    assert "| rank 2, from .3 on 8 | TrainError |" in table and "B, 110 steps, seed 0;" in table


@pytest.mark.slow
def test_the_benchmark_of_schedules_runs_on_a_tiny_model_and_goes_on_where_it_was(
    tiny_model_dir, tmp_path
):
    command = [sys.executable, "-m", "benchmarks.schedules", "--smoke", "--out", str(tmp_path)]
    command += ["--model", str(tiny_model_dir), "--arms"]

    def rows(*arms):
        run = subprocess.run([*command, *arms], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return json.loads((tmp_path / "schedules.json").read_text(encoding="utf-8"))["rows"]

    (first,) = rows("linear")
    assert first["lambda_path"][0] == 4 and first["lambda_path"][-1] < 4
    both = rows("linear", "budget")
    assert [row["arm"] for row in both] == ["linear", "budget"], "linear was not run again"
    assert both[0]["seconds"] == first["seconds"] and not [row for row in both if "error" in row]


def test_rows_of_parts_that_are_not_run_again_keep_the_commit_they_were_measured_at(
    tmp_path, monkeypatch
):
    from argparse import Namespace

    from benchmarks import second_task

    rows = [{"part": part, "arm": "none", "seed": 0} for part in ("first", "second")]
    meta = {"commit": "abc", "date": "2026-01-01", "card": "H100", "seed": 1}
    text = json.dumps({"meta": meta, "rows": rows})
    (tmp_path / "self_rehearsal.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(second_task, "RESULTS", tmp_path)
    kept = [{**rows[0], "commit": "abc", "date": "2026-01-01", "card": "H100"}]
    for out in (None, tmp_path, tmp_path / "empty"):
        options = Namespace(out=out, parts=["second"], smoke=False, add=False)
        assert second_task.other_parts(options) == kept
    monkeypatch.setattr(second_task, "device_name", lambda: "H100")
    options.add, options.seeds = True, [1]
    assert len(second_task.other_parts(options)) == 2, "seed 0 was measured on this card"
    monkeypatch.setattr(second_task, "device_name", lambda: "a CPU")
    assert second_task.other_parts(options) == kept
    options.smoke = True
    assert second_task.other_parts(options) == []


def test_the_time_of_evaluating_on_a_gpu_does_not_replace_that_on_a_cpu(tmp_path, monkeypatch):
    from argparse import Namespace

    from benchmarks import second_task

    monkeypatch.setattr(second_task, "RESULTS", tmp_path)
    monkeypatch.setattr(second_task, "on_cuda", lambda: True)
    arms = ["5 sets x 200 rows, CPU", "5 sets x 200 rows, GPU"]
    rows = [{"part": "evaluation", "arm": arm, "commit": "abc"} for arm in arms]
    text = json.dumps({"meta": {"commit": "def", "card": "none"}, "rows": rows})
    (tmp_path / "self_rehearsal.json").write_text(text, encoding="utf-8")
    options = Namespace(out=None, parts=["evaluation"], smoke=False, add=True)
    (kept,) = second_task.other_parts(options)
    assert kept["arm"] == arms[0] and kept["commit"] == "abc"


def test_a_part_that_fails_is_told_with_its_time_and_ends_no_other(capsys):
    from benchmarks.second_task import timed

    with timed("second, seed 0"):
        raise ValueError("no memory")
    said = capsys.readouterr()
    assert re.search(r"^second, seed 0: \d+ s$", said.out, re.MULTILINE) and "no memory" in said.err


def test_rows_that_are_not_measured_again_stay_with_their_commit(tmp_path, monkeypatch):
    before = {
        "meta": {"commit": "old", "date": "2026-01-01", "card": "Card"},
        "rows": [
            {"arm": "a", "size": 1, "ms": 5},
            {"arm": "b", "size": 1, "ms": 6},
            {"arm": "c", "size": 1, "ms": 7, "commit": "older"},
        ],
    }
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    assert _results.earlier_rows("steps", ("arm", "size"), []) == [], "no file yet"
    (tmp_path / "steps.json").write_text(json.dumps(before))
    kept = _results.earlier_rows("steps", ("arm", "size"), [{"arm": "a", "size": 1, "ms": 4}])
    assert [(row["arm"], row["ms"], row["commit"]) for row in kept] == [
        ("b", 6, "old"),
        ("c", 7, "older"),
    ]
    assert kept[1]["date"] == "2026-01-01" and kept[0]["card"] == "Card"


def test_the_answers_table_shows_five_prompts_as_text_that_is_no_markup(tmp_path):
    assert answers_table.answers(tmp_path) is None
    before = [{"prompt": f"P{i}", "text": "x" * 900, "stop": "length", "tokens": 256} for i in "ab"]
    after = [{"prompt": f"P{i}", "text": "<b>7 | 8</b>", "stop": "eos", "tokens": 9} for i in "ab"]
    folder = tmp_path / answers_table.RUN
    folder.mkdir()
    rates = {"before": 0.0, "after": 1.0}
    sides = {"before": {"answers": before}, "after": {"answers": after}, "eos_rate": rates}
    (folder / "comparison.json").write_text(json.dumps(sides), encoding="utf-8")
    table = answers_table.answers(tmp_path)
    assert table.count("| P") == 2 and "0% → 100%" in table and "comparison.png" not in table
    assert "x …<br>(cut by length, 256 tokens)" in table and "x" * 300 not in table
    assert "&#60;b&#62;7 &#124; 8&#60;/b&#62;<br>(ended by itself, 9 tokens)" in table
    (folder / "comparison.png").write_bytes(b"")
    assert f"![The five prompts before and after](benchmarks/results/{folder.name}/" in (
        answers_table.answers(tmp_path)
    )


def test_the_demos_questions_are_shown_in_their_order_and_a_cut_answer_says_so():
    rows = [
        {"prompt": f"Q{i}", "before": "a\nb", "before_stop": "length", "after": "c " * 90}
        | {"after_stop": "eos"}
        for i in range(9)
    ]
    table = answers_table.demo_answers({"rows": rows}, count=2)
    lines = table.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| Q0 | a (cut by length) | c c")
    assert lines[3].endswith("c … |") and len(lines[3]) < 160
