"""Figures: they hold every number, also in grey; names are text; no global state is left."""

import subprocess
import sys

import pytest
from test_forgetting import N, one_set, one_training, scores, sequence

from lwf_unsloth.adapter_dial import DialResult
from lwf_unsloth.errors import DataError
from lwf_unsloth.forgetting import forgetting_report
from lwf_unsloth.plots import STYLES, plot_dial, plot_forgetting
from lwf_unsloth.scores import Scores, SetScores
from lwf_unsloth.scoring import Score


def dial_result():
    return DialResult(
        {
            scale: scores(
                one_set("faq", "task", 3.0, 3.0 - 2.5 * scale, right=(0, int(32 * scale))),
                one_set("general", "general", 2.0, 2 + 0.3 * scale**2, leak=(0, int(20 * scale))),
                one_set("passages", "general", 2.5, 2.5 + 0.1 * scale),
            )
            for scale in (0.0, 0.25, 0.5, 0.75, 1.0)
        }
    )


def texts(chart):
    chart.figure.canvas.draw()
    from matplotlib.text import Text

    return [one.get_text() for one in chart.figure.findobj(Text) if one.get_text()]


def test_one_trainings_figure_says_gain_and_forgetting():
    chart = plot_forgetting(forgetting_report(one_training()))
    found = texts(chart)
    for wanted in ("+2.500", "+0.300", "+80.0", "+25.0", "faq", "general", "nats per token"):
        assert wanted in found
    assert len(chart.figure.axes) == 4


def test_a_sequences_figure_has_the_levels_too():
    report = forgetting_report(*sequence(), tasks=["a", "b"])
    chart = plot_forgetting(report)
    assert len(chart.figure.axes) == 6
    assert {"after a", "after b"} <= set(texts(chart))
    lines = chart.figure.axes[2].get_lines()
    assert [list(line.get_ydata()) for line in lines if len(line.get_ydata()) == 3] == [
        pytest.approx(values) for values in report.matrix["nll"].values()
    ]


def test_the_whiskers_are_the_intervals():
    report = forgetting_report(scores(*noisy()))
    chart = plot_forgetting(report)
    axes = chart.figure.axes[1]
    (bar,) = axes.containers
    ((start, end),) = bar[2][0].get_segments()
    part = report["general"].forgetting
    assert (start[0], end[0]) == pytest.approx((part.low, part.high))
    assert start[0] < end[0]


def noisy():
    whole = one_set("general", "general", 2.0, 2.1).score
    rows = tuple(value + 0.3 * (-1) ** i for i, value in enumerate(whole.row_nll))
    score = Score(whole.row_tokens, rows, whole.row_base_nll)
    return one_set("faq", "task", 3, 1), SetScores("general", "general", score)


def test_the_dials_figure_has_a_panel_for_all_that_was_measured():
    chart = plot_dial(dial_result())
    assert len(chart.figure.axes) == 5
    found = texts(chart)
    assert {"faq", "general", "passages"} <= set(found)
    values = chart.figure.axes[4].containers[0][0].get_ydata()
    assert list(values) == pytest.approx([100 * int(20 * s) / N for s in (0, 0.25, 0.5, 0.75, 1)])


def test_a_dial_without_a_base_has_nothing_to_show():
    alone = SetScores("a", "task", Score((2, 2), (1.0, 1.5)))
    with pytest.raises(DataError, match="nothing to show"):
        plot_dial(DialResult({1.0: Scores({"a": alone})}))


def test_sets_differ_by_marker_and_line_and_not_by_colour_alone():
    colours, markers, lines = zip(*STYLES, strict=True)
    assert len(set(colours)) == len(set(markers)) == len(set(map(str, lines))) == len(STYLES)


def test_names_are_text_and_fit():
    name = "$x$ <b>\u202e " + "long " * 20
    report = forgetting_report(scores(one_set("t", "task", 3, 1), one_set(name, "general", 2, 2)))
    label = next(text for text in texts(plot_forgetting(report)) if "<b>" in text)
    assert label.startswith(r"\$x\$ <b>[U+202E]") and label.endswith("…")


def test_charts_save_themselves_twice_and_show_themselves(tmp_path):
    chart = plot_forgetting(forgetting_report(one_training()))
    png, svg = chart.save(tmp_path / "new" / "figure.v2.png")
    assert (png.name, svg.name) == ("figure.v2.png", "figure.v2.svg")
    assert png.read_bytes()[:4] == chart._repr_png_()[:4] == b"\x89PNG"
    assert "<svg" in svg.read_text(encoding="utf-8")


@pytest.mark.slow
def test_matplotlibs_own_state_is_left_alone_and_no_model_library_is_needed():
    code = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams)\n"
        "import lwf_unsloth.plots\n"
        "assert dict(matplotlib.rcParams) == before, 'settings'\n"
        "assert not {'unsloth', 'transformers'} & set(sys.modules), 'heavy'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_dial(dial_result())
    assert plt.get_fignums() == before


def test_a_training_is_drawn_while_it_goes_on_and_without_a_kl():
    from lwf_unsloth.plots import plot_training

    history = [{"step": 1, "task_loss": 2.0, "kl_rehearsal": 0.0}, {"step": 2, "task_loss": 1.5}]
    losses, kls = plot_training([*history, {"step": 2, "train_runtime": 1.0}], 10).figure.axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[2.0, 1.5]]
    assert [list(line.get_ydata()) for line in kls.lines] == [[0.0]]
    assert losses.get_xlim() == (0, 10)
    assert plot_training([])._repr_png_().startswith(b"\x89PNG")
