"""Recipes side by side: the signs of gain and loss, the table, the figure, what is refused."""

import json

import pytest
from test_forgetting import N, one_set, scores
from test_plots import texts

from lwf_unsloth.errors import DataError
from lwf_unsloth.plots import STYLES, plot_recipes
from lwf_unsloth.recipes import Recipes, compare_recipes


def arm(right, nll, general, leak, **settings):
    return scores(
        one_set("faq", "task", 3.0, nll, right=(0, right), settings=settings),
        one_set("general", "general", 2.0, general, leak=(0, leak), settings=settings),
    )


@pytest.fixture
def recipes():
    return compare_recipes({"no help": arm(36, 0.4, 2.5, 30), "ours": arm(32, 0.6, 1.9, 0)})


def test_a_gain_and_a_loss_are_both_above_zero(recipes):
    assert recipes.change("faq", "nll")["no help"].value == pytest.approx(2.6)
    assert recipes.change("faq", "right")["ours"].value == pytest.approx(32 / N)
    assert recipes.change("general", "nll")["no help"].value == pytest.approx(0.5)
    assert recipes.change("general", "nll")["ours"].value == pytest.approx(-0.1)
    assert recipes.change("general", "leak")["no help"].value == pytest.approx(30 / N)
    assert recipes.change("general", "kl")["ours"].value == pytest.approx(0.01)
    for change in (
        *recipes.change("faq", "nll").values(),
        *recipes.change("faq", "right").values(),
    ):
        assert change.low <= change.value <= change.high


def test_the_table_has_a_column_a_recipe_and_a_row_a_measure(recipes):
    table = recipes.table()
    assert table.heads == ("set", "measure", "base", "no help", "ours")
    rows = {(row[0], row[1].split(",")[0].split(":")[0]): row[2:] for row in table.rows}
    assert rows["faq", "NLL"][1].startswith("+2.600") and rows["faq", "NLL"][0] == "3.000"
    assert rows["general", "NLL"][2].startswith("-0.100")
    assert rows["", "leak"][0] == "0.0 %" and rows["", "leak"][1].startswith("75.0 %")
    assert "ours" in recipes._repr_html_() and "| ours |" in recipes.to_markdown()


def test_it_comes_back_from_its_file(recipes, tmp_path):
    path = recipes.save(tmp_path / "recipes.json")
    again = Recipes.from_dict(json.loads(path.read_text(encoding="utf-8")))
    assert again.table() == recipes.table()


def test_the_figure_has_a_marker_a_recipe_and_a_panel_a_cost(recipes):
    figure = plot_recipes(recipes).figure
    assert {"no help", "ours", "general: KL(base || tuned)"} <= set(texts(plot_recipes(recipes)))
    assert len(figure.axes) == 3  # NLL, KL, leak
    for axes, (cost, factor) in zip(
        figure.axes, {"nll": 1, "kl": 1, "leak": 100}.items(), strict=True
    ):
        for bar, name, style in zip(axes.containers, recipes.scores, STYLES, strict=False):
            assert bar.lines[0].get_marker() == style[1]
            assert bar.lines[0].get_xdata() == [
                factor * recipes.change("general", cost)[name].value
            ]
            right = recipes.change("faq", "right")[name]
            assert bar.lines[0].get_ydata() == [100 * right.value]
            (low, high) = bar.lines[2][1].get_segments()[0][:, 1]
            assert (low, high) == pytest.approx((100 * right.low, 100 * right.high))


def test_where_no_answers_were_asked_for_the_gain_is_the_nll():
    found = scores(
        one_set("faq", "task", 3.0, 1.0),
        one_set("one", "general", 2.0, 2.1),
        one_set("two", "general", 2.0, 2.1),
    )
    figure = plot_recipes(compare_recipes({"a": found, "b": found})).figure
    assert len(figure.axes) == 4 and "NLL" in figure.axes[0].get_ylabel()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="needs what evaluate"):
        compare_recipes({})
    with pytest.raises(DataError, match="differs in data_sha256"):
        compare_recipes({"a": arm(1, 2, 2, 0), "b": arm(1, 2, 2, 0, data_sha256="other")})
    with pytest.raises(DataError, match="one of each"):
        compare_recipes({"a": scores(one_set("faq", "task", 3.0, 1.0))})
