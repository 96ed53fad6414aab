"""The panel, driven as objects: clicks, uploads, messages, stop and dial."""

import json
import re
import threading
from datetime import UTC, datetime

import pytest
import torch
from ipywidgets import Widget

import lwf_unsloth as lwf
from lwf_unsloth.adapter_dial import adapter_scale
from lwf_unsloth.checkpoints import is_complete
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.panel_code import REHEARSALS, PanelPlan, Rehearsal, script
from lwf_unsloth.panel_parts import message, uploads
from lwf_unsloth.teacher import trained_tensors
from lwf_unsloth.widgets import Panel

pytestmark = pytest.mark.timeout(900)  # a busy machine takes long
EVIL = "<script>alert(1)</script>"
SMALL = {"max_steps": 4, "learning_rate": 2e-3, "rehearsal_ratio": 0.25, "max_length": 96}


@pytest.fixture()
def rows_file(tmp_path, alpaca_rows):
    path = tmp_path / "rows.jsonl"
    text = "\n".join(json.dumps(row) for row in alpaca_rows(24))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture()
def made(tiny_peft, tmp_path, rows_file):
    """A panel over the tiny model, its rows checked."""
    model, tokenizer = tiny_peft()
    general = tmp_path / "general.jsonl"
    general.write_text(rows_file.read_text(encoding="utf-8").replace("task:", "general:"), "utf-8")
    panel = lwf.panel(
        model,
        tokenizer,
        source=rows_file,
        output_dir=tmp_path / "runs",
        max_new_tokens=4,
        **SMALL,
    )
    panel.parts.rehearsal_path.value = str(general)
    panel.parts.rehearsal.value = "instructions"
    done(panel)
    panel.parts.check.click()
    done(panel)
    return panel


def done(panel: Panel) -> None:
    assert panel.wait(600), "the work did not end"


def said(panel: Panel, place: str) -> str:
    return re.sub(r"<[^>]+>", " ", panel.parts.said[place].value)


def change_all(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# ---------------------------------------------------------------------------- rows


def test_a_checked_file_shows_its_report_and_the_preflight_verdict(made):
    assert "24 of 24 rows kept: 22 train, 2 test" in said(made, "rows")
    assert "Batch 2 x 96 tokens fits on the CPU" in said(made, "fit")
    assert "lwf-ok" in made.parts.said["fit"].value


def test_an_upload_is_kept_named_and_checked(tiny_peft, tmp_path, rows_file):
    panel = lwf.panel(*tiny_peft(), output_dir=tmp_path / "runs", **SMALL)
    content = memoryview(rows_file.read_bytes())
    one = {"name": f"../../{EVIL}.jsonl", "content": content, "size": len(content), "type": ""}
    panel.parts.upload.value = ({**one, "last_modified": datetime.now(UTC)},)
    done(panel)
    kept = list((tmp_path / "runs" / "uploads").iterdir())
    assert [path.read_bytes() for path in kept] == [rows_file.read_bytes()]
    assert panel.parts.source.value == kept[0].as_posix()
    assert "24 of 24 rows kept" in said(panel, "rows")
    assert panel.parts.upload.value == ()


def test_the_value_of_older_ipywidgets_is_read_too():
    old = {"a.json": {"metadata": {"name": "a.json"}, "content": b"[]"}}
    new = ({"name": "a.json", "content": memoryview(b"[]")},)
    assert uploads(old) == uploads(new) == [("a.json", b"[]")]


def test_a_bad_file_is_a_message_without_markup_and_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({EVIL: 1}), encoding="utf-8")
    panel = lwf.panel(source=path, output_dir=tmp_path / "runs")
    panel.parts.check.click()
    done(panel)
    shown = panel.parts.said["rows"].value
    assert "lwf-bad" in shown and "&lt;script&gt;" in shown and "<script" not in shown
    assert isinstance(panel.error, lwf.DataError)
    text = "".join(capsys.readouterr())
    assert "Traceback" not in text + shown
    assert not panel.parts.check.disabled


def test_without_rows_or_model_each_button_says_what_is_missing(tmp_path):
    panel = lwf.panel(output_dir=tmp_path / "runs")
    for button, place, word in [
        ("check", "rows", "No file is named"),
        ("load", "model", "No model is named"),
        ("train", "training", "no rows yet"),
        ("ask", "answers", "no model yet"),
        ("save", "answers", "no model yet"),
        ("held_out", "answers", "no held-out row"),
    ]:
        getattr(panel.parts, button).click()
        done(panel)
        assert word in said(panel, place)


def test_an_error_that_is_not_ours_is_a_message_too(made, monkeypatch):
    def fall(plan):
        raise RuntimeError("CUDA out of memory\n  at line 3")

    monkeypatch.setattr(made.session, "ask", fall)
    made.parts.ask.click()
    done(made)
    assert "RuntimeError: CUDA out of memory. Lower the rows a forward" in said(made, "answers")
    assert "line 3" not in said(made, "answers")
    assert not made.parts.ask.disabled


def test_a_file_with_dropped_rows_is_marked(made, rows_file):
    assert "lwf-ok" in made.parts.said["rows"].value
    with rows_file.open("a", encoding="utf-8") as file:
        file.write('\n{"instruction": "no answer"}\n')
    made.parts.check.click()
    done(made)
    assert "lwf-warn" in made.parts.said["rows"].value and "missing" in said(made, "rows")


# ------------------------------------------------------------------------ settings


def test_a_setting_out_of_range_is_told_at_once_and_again_when_it_is_put_right(made):
    made.parts.numbers["lwf_lambda"].value = -1
    assert "lwf_lambda is -1" in said(made, "fit") and "lwf-bad" in made.parts.said["fit"].value
    made.parts.numbers["lwf_lambda"].value = 1
    assert "fits on the CPU" in said(made, "fit")


def test_a_batch_that_does_not_fit_is_told_beside_the_settings(made, monkeypatch):
    from lwf_unsloth import preflight

    monkeypatch.setattr(preflight, "free_memory", lambda: 30 * 2**20)
    made.parts.numbers["per_device_train_batch_size"].value = 64
    assert "does not fit" in said(made, "fit") and "Largest that fits" in said(made, "fit")


def test_a_button_that_can_be_pressed_does_something_while_the_last_work_is_ending(made):
    seen = []
    made.parts.train.observe(lambda change: seen.append((change["new"], made.busy)), "disabled")
    made.parts.check.click()
    done(made)
    assert seen[-1] == (False, False) and len(seen) == 2


def test_the_verdict_shown_last_is_that_on_the_newest_settings(made, monkeypatch):
    """A person changes a setting while the work's end looks at the older ones."""
    fit, number = made.session.fit, made.parts.numbers["lwf_lambda"]
    person = threading.Thread(target=lambda: setattr(number, "value", -1))

    def slow(plan):
        if person.ident is None:
            person.start()
            person.join(0.5)  # it waits for its turn
        return fit(plan)

    monkeypatch.setattr(made.session, "fit", slow)
    made._refresh()
    person.join()
    assert "lwf_lambda is -1" in said(made, "fit")


def test_a_model_needs_its_tokenizer():
    with pytest.raises(ConfigError, match="without its tokenizer"):
        lwf.panel(object())


def test_a_named_model_is_loaded_by_the_button(tiny_model_dir, tmp_path, rows_file):
    panel = lwf.panel(str(tiny_model_dir), source=rows_file, output_dir=tmp_path / "runs")
    panel.parts.load.click()
    done(panel)
    assert "tiny-llama: 4-bit weights" in said(panel, "model")
    assert f"lwf.load_model({str(tiny_model_dir)!r})" in script(panel.plan)
    panel.parts.model.value = "no/such/folder/at/all"
    panel.parts.load.click()
    done(panel)
    assert "lwf-bad" in panel.parts.said["model"].value and panel.session.model is None


# ------------------------------------------------------------------------ training


def test_training_draws_its_chart_saves_its_adapter_and_starts_anew_each_time(made):
    untrained = change_all(trained_tensors(made.session.model))
    results = []
    for run in ("run-1", "run-2"):
        made.parts.train.click()
        assert made.parts.check.disabled and not made.parts.stop.disabled
        done(made)
        assert made.error is None, said(made, "training")
        assert (made.folder / run / "adapter" / "adapter_model.safetensors").is_file()
        results.append(change_all(trained_tensors(made.session.model)))
    assert "4 steps trained, adapter saved" in said(made, "training")
    assert bytes(made.parts.chart.value).startswith(b"\x89PNG")
    assert made.parts.bar.value == made.parts.bar.max == 4
    assert re.search(r"step 4 of 4 .* task loss [\d.]+ .* KL rehearsal", said_at(made))
    assert not torch.equal(results[0], untrained)
    torch.testing.assert_close(results[0], results[1])
    assert made.parts.stop.disabled and not made.parts.train.disabled


def said_at(panel):
    return re.sub(r"<[^>]+>", " ", panel.parts.at.value)


@pytest.mark.slow
def test_stop_leaves_a_checkpoint_and_going_on_ends_where_the_whole_run_ends(made, monkeypatch):
    made.parts.train.click()
    done(made)
    whole = change_all(trained_tensors(made.session.model))

    follow = made._follow

    def stop_at_two(state):
        follow(state)
        if state.global_step == 1:
            made.parts.stop.click()

    monkeypatch.setattr(made, "_follow", stop_at_two)
    made.parts.train.click()
    done(made)
    assert "Stopped at step 2 of 4" in said(made, "training")
    assert is_complete(made.folder / "run-2" / "checkpoint-2")
    assert not made.parts.resume.disabled

    monkeypatch.setattr(made, "_follow", follow)
    made.parts.resume.click()
    done(made)
    assert made.error is None, said(made, "training")
    assert "4 steps trained" in said(made, "training")
    torch.testing.assert_close(change_all(trained_tensors(made.session.model)), whole)


def test_a_model_that_a_cell_uses_is_refused_with_the_reason(made):
    from lwf_unsloth.locks import model_lock

    with model_lock(made.session.model, "scoring"):
        for button, place in (("ask", "answers"), ("train", "training"), ("save", "answers")):
            made.parts.prompt.value = "Say one."
            getattr(made.parts, button).click()
            done(made)
            assert "in use by another thread (scoring)" in said(made, place)


@pytest.mark.slow
def test_what_the_library_warns_of_while_it_works_stands_in_the_panel(made):
    made.parts.numbers["max_steps"].value = 1
    made.more["warmup_steps"] = 50
    made.parts.train.click()
    done(made)
    assert "warm" in said(made, "training").lower() and "⚠" in said(made, "training")


# ------------------------------------------------------------------ answers and dial


@pytest.mark.slow
def test_the_dial_asks_anew_and_leaves_the_model_as_trained(made):
    made.parts.train.click()
    done(made)
    trained = change_all(trained_tensors(made.session.model))
    made.parts.prompt.value = "task: say what number 3 is."
    made.parts.ask.click()
    done(made)
    assert "<table" in made.parts.table.value and "<title" not in made.parts.table.value
    made.parts.dial.value = 0.5
    done(made)
    assert "dial at 0.5" in made.parts.table.value
    assert adapter_scale(made.session.model) == 1
    assert torch.equal(change_all(trained_tensors(made.session.model)), trained)
    made.parts.dial.value = 0.0
    done(made)
    before, after = made.session._before[1], made.session.ask(made.plan).after
    assert [one.text for one in before] == [one.text for one in after]
    made.parts.dial.value = 0.5
    done(made)
    made.parts.save.click()
    done(made)
    config = json.loads((made.run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == 4 and adapter_scale(made.session.model) == 1


def test_a_held_out_row_fills_the_prompt_and_shows_the_files_own_answer(made):
    row = made.session.task["test"][0]
    assert made.parts.prompt.value == row["instruction"]
    made.parts.held_out.click()
    other = made.session.task["test"][1]
    assert made.parts.prompt.value == other["instruction"]
    assert other["output"].strip() in said(made, "answers")


# ------------------------------------------------------------------------- the code


@pytest.mark.slow
def test_the_code_shown_does_what_the_panel_did(made, tiny_peft, capsys):
    made.parts.prompt.value = "task: say what number 3 is."
    made.parts.train.click()
    done(made)
    made.parts.ask.click()
    done(made)
    by_panel = change_all(trained_tensors(made.session.model))
    model, tokenizer = tiny_peft()
    code = script(made.plan)
    assert made.parts.code.value.count("lwf.") == code.count("lwf.")
    names = {"model": model, "tokenizer": tokenizer}
    exec(code.replace("lwf.compare(", "found = lwf.compare("), names)
    assert "24 of 24 rows kept" in capsys.readouterr().out
    torch.testing.assert_close(change_all(trained_tensors(model)), by_panel)
    assert [one.text for one in names["found"].after] == [
        one.text for one in made.session.ask(made.plan).after
    ]


@pytest.mark.parametrize("kind", REHEARSALS.values())
def test_every_rehearsal_has_code_that_reads(kind):
    plan = PanelPlan("a'b.json", "m", Rehearsal(kind, 'p"q.json'), {"max_steps": 1}, scale=0.5)
    compile(script(plan), kind, "exec")


def test_the_panel_is_one_widget_and_carries_no_script(made):
    assert isinstance(made, Widget)
    waiting, texts = [made], []
    while waiting:
        widget = waiting.pop()
        waiting += getattr(widget, "children", ())
        texts.append(str(getattr(widget, "value", "")))
    assert len(texts) > 40 and not any("<script" in text for text in texts)


def test_a_message_is_text_and_nothing_else():
    shown = message(f"{EVIL} $x$", "bad", notes=[EVIL], details=EVIL)
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 3
