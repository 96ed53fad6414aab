"""The forgetting report: the papers' figures, paired intervals, the right stages compared."""

import html
import json
import math
from dataclasses import replace

import pytest

from lwf_unsloth.answer_scores import AnswerValues
from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.errors import ConfigError, DataError
from lwf_unsloth.forgetting import forgetting_report
from lwf_unsloth.scores import Scores, SetScores
from lwf_unsloth.scoring import Score

N = 40


def one_set(name, kind, base, tuned, *, right=None, leak=None, settings=None):
    """A set of N rows of 2 tokens whose means are `base` and `tuned`, with a spread of rows."""
    spread = [0.4 * math.sin(i) - sum(0.4 * math.sin(k) for k in range(N)) / N for i in range(N)]
    tokens = (2,) * N
    rows = [[2 * (mean + one) for one in spread] for mean in (base, tuned)]
    settings = {"data_sha256": name, "adapter": "on", "base": "adapter_off", **(settings or {})}
    score = Score(tokens, tuple(rows[1]), tuple(rows[0]), tuple([0.02] * N), settings=settings)
    prompts = tuple(Answer(f"{name} {i}", "x", "eos", 1) for i in range(N))
    answers = dict.fromkeys(("base", "tuned"), Generations(prompts, Decoding()))
    values = {
        side: AnswerValues(shares(part) if part is not None else (), (1.0,) * N, (1.0,) * N)
        for side, part in zip(("base", "tuned"), right or (None, None), strict=True)
    }
    leaks = {} if leak is None else dict(zip(("base", "tuned"), map(shares, leak), strict=True))
    return SetScores(name, kind, score, "facts found", answers, values, leaks)


def shares(hits):
    return (1.0,) * hits + (0.0,) * (N - hits)


def scores(*sets, label=""):
    return Scores({one.name: one for one in sets}, label=label)


def one_training(**changes):
    return scores(
        one_set("faq", "task", 3.0, 0.5, right=(0, 32)),
        one_set("general", "general", 2.0, 2.3, leak=(0, 10)),
        **changes,
    )


def sequence():
    """Base, then A, then B: A falls back from 36 to 30 facts, general rises and recovers."""
    after_a = scores(
        one_set("a", "task", 3.0, 0.5, right=(0, 36)),
        one_set("b", "task", 2.5, 2.4, right=(2, 3)),
        one_set("general", "general", 2.0, 1.9),
    )
    after_b = scores(
        one_set("a", "task", 3.0, 0.9, right=(0, 30)),
        one_set("b", "task", 2.5, 0.4, right=(2, 38)),
        one_set("general", "general", 2.0, 2.05),
    )
    return after_a, after_b


def test_one_training_gives_gain_and_forgetting():
    report = forgetting_report(one_training())
    assert report.stages == ("base", "after faq")
    assert report["faq"].gain.value == pytest.approx(2.5)
    assert report["faq"].forgetting is None and report["faq"].transfer is None
    assert report["faq", "right"].gain.value == pytest.approx(32 / N)
    assert report["general"].forgetting.value == pytest.approx(0.3)
    assert report["general"].forgetting.clear and report["general"].gain is None
    assert report["general", "leak"].forgetting.value == pytest.approx(10 / N)
    assert report.kl == pytest.approx({"faq": 0.01, "general": 0.01})


def test_the_papers_figures_of_a_sequence_by_hand():
    """R by hand; BWT and F as in the papers' equations, in shares of right answers."""
    report = forgetting_report(*sequence(), tasks=["a", "b"])
    matrix = report.matrix["right"]
    assert matrix["a"] == pytest.approx((0, 36 / N, 30 / N))
    assert matrix["b"] == pytest.approx((2 / N, 3 / N, 38 / N))
    r = {name: values for name, values in matrix.items()}
    bwt = (r["a"][2] - r["a"][1]) / 1  # 1 / (T - 1) sum over i < T of R[T][i] - R[i][i]
    forgot = (max(r["a"][:2]) - r["a"][2]) / 1  # 1 / (k - 1) sum over j < k
    averages = report.averages()["right"]
    assert averages["transfer"] == pytest.approx(bwt) == pytest.approx(-0.15)
    assert averages["forgetting"] == pytest.approx(forgot) == pytest.approx(0.15)
    assert averages["gain"] == pytest.approx((30 / N + 36 / N) / 2)


def test_nll_counts_the_other_way():
    report = forgetting_report(*sequence(), tasks=["a", "b"])
    assert report["a"].transfer.value == pytest.approx(-0.4)
    assert report["a"].forgetting.value == pytest.approx(0.4)
    assert report["a"].gain.value == pytest.approx(2.1)
    assert report["b"].forgetting is None


def test_forgetting_is_against_the_best_earlier_stage_and_not_the_base():
    report = forgetting_report(*sequence(), tasks=["a", "b"])
    general = report["general"]
    assert general.levels == pytest.approx((2.0, 1.9, 2.05))
    assert general.forgetting.value == pytest.approx(0.15)
    assert general.transfer is None


def test_leaks_by_different_forms_are_not_compared():
    def stage(form):
        found = scores(one_set("a", "task", 3, 1), one_set("g", "general", 2, 2, leak=(0, 4)))
        return Scores(found.sets, {"leak": form})

    same = forgetting_report(stage("x"), stage("x"), tasks=["a", "a"])
    assert same["g", "leak"].levels == pytest.approx((0, 0.1, 0.1))
    with pytest.raises(KeyError):
        forgetting_report(stage("x"), stage("y"), tasks=["a", "a"])["g", "leak"]


def test_right_answers_by_different_metrics_are_not_compared():
    def stage(metric):
        one = one_set("a", "task", 3, 1, right=(0, 9))
        return scores(replace(one, right_by=metric))

    same = forgetting_report(stage("exact match"), stage("exact match"), tasks=["a", "a"])
    assert same["a", "right"].levels == pytest.approx((0, 9 / N, 9 / N))
    with pytest.raises(KeyError):
        forgetting_report(stage("exact match"), stage("facts found"), tasks=["a", "a"])[
            "a", "right"
        ]


def test_every_line_of_the_file_has_the_same_keys():
    lines = forgetting_report(one_training()).to_dict()["lines"]
    assert len({tuple(line) for line in lines}) == 1
    assert [line["learned_at"] for line in lines] == [1, 1, None, None]


def test_what_improved_was_not_forgotten():
    better = scores(one_set("faq", "task", 3, 1), one_set("general", "general", 2.0, 1.8))
    assert forgetting_report(better)["general"].forgetting.value == pytest.approx(-0.2)


def test_equal_models_forget_exactly_nothing():
    same = scores(one_set("faq", "task", 3.0, 3.0), one_set("general", "general", 2.0, 2.0))
    part = forgetting_report(same)["general"].forgetting
    assert (part.value, part.low, part.high) == (0, 0, 0)
    assert "-0.0" not in str(forgetting_report(same))


def test_scores_of_an_untrained_adapter_are_the_first_stage():
    untrained = {"adapter": "untrained"}
    before = scores(
        one_set("faq", "task", 3.0, 3.0, settings=untrained),
        one_set("general", "general", 2.0, 2.0, settings=untrained),
        label="before",
    )
    after = scores(one_set("faq", "task", 3.0, 0.5), one_set("general", "general", 2.0, 2.3))
    report = forgetting_report(before, after)
    assert report.stages == ("before", "after faq")
    assert report["general"].levels == pytest.approx((2.0, 2.3))


def test_what_the_sample_could_not_show_is_said():
    noisy = one_set("general", "general", 2.0, 2.0)
    rows = [value + 0.3 * (-1) ** i for i, value in enumerate(noisy.score.row_base_nll)]
    score = Score(noisy.score.row_tokens, tuple(rows), noisy.score.row_base_nll)
    found = scores(one_set("faq", "task", 3, 1), SetScores("general", "general", score))
    note = forgetting_report(found).notes[-1]
    assert "No forgetting is shown" in note and "general 0.0" in note


def test_the_tables_the_card_and_the_file_say_the_same(tmp_path):
    report = forgetting_report(one_training(), tasks="faq")
    text, page, markdown = str(report), report._repr_html_(), report.to_markdown()
    for shown in (text, page, markdown):
        assert "+0.300" in shown and "facts found" in shown
    card = report.card()
    assert card["general: NLL, nats per token"]["forgetting"].startswith("+0.300 [")
    values = json.loads(report.save(tmp_path / "r.json").read_text(encoding="utf-8"))
    assert values["lines"][0]["gain"]["value"] == pytest.approx(2.5)
    assert values["averages"]["nll"]["forgetting"] == pytest.approx(0.3)


def test_the_model_card_holds_the_report():
    from lwf_unsloth.model_card import adapter_card

    record = {"base": {"name": "some/base"}, "eos_token": "</s>", "template": {"name": "alpaca"}}
    card = adapter_card(record, {"evaluation": forgetting_report(one_training()).card()})
    section = html.unescape(card).split("## Evaluation\n\n")[1].split("\n\n")[0].splitlines()
    assert section[0] == "| | base | after faq | gain | forgetting | backward transfer | KL now |"
    assert section[1] == "|---|" + "---|" * 6
    assert section[2].startswith("| faq: NLL, nats per token | 3.000 | 0.500 | +2.500 [")
    assert {line.count("|") for line in section} == {8}


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: forgetting_report(), DataError, "evaluate"),
        (lambda: forgetting_report({"a": 1}), DataError, "dict"),
        (lambda: forgetting_report(*sequence()), ConfigError, "2 trainings"),
        (lambda: forgetting_report(*sequence(), tasks=["a", "c"]), ConfigError, "tasks"),
        (lambda: forgetting_report(one_training(), sequence()[0]), DataError, "same sets"),
    ],
)
def test_what_does_not_fit_together_is_refused(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_stages_measured_on_other_rows_or_another_precision_are_refused():
    for change in ({"data_sha256": "other"}, {"bits": 16}, {"template": "plain"}):
        other = scores(one_set("a", "task", 3, 1, settings=change))
        with pytest.raises(DataError, match=next(iter(change))):
            forgetting_report(scores(one_set("a", "task", 3, 1)), other, tasks=["a", "a"])


def test_scores_without_a_base_cannot_stand_alone():
    score = Score((2, 2), (1.0, 1.5))
    alone = Scores({"a": SetScores("a", "task", score)})
    with pytest.raises(DataError, match="base=None"):
        forgetting_report(alone)
    report = forgetting_report(alone, alone, tasks=["a"])
    assert report["a"].gain.value == 0


def test_a_second_task_on_the_real_model_is_measured_against_the_first(tiny_peft, alpaca_rows):
    import torch

    from lwf_unsloth.evaluation import evaluate
    from lwf_unsloth.teacher import make_teacher

    model, tokenizer = tiny_peft()
    sets = {name: alpaca_rows(5, name) for name in ("a", "b", "general")}
    stages = []
    for seed in (1, 2):
        start = make_teacher(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(seed)
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        stages.append(evaluate(model, tokenizer, sets, base=start, answers=False))
    report = forgetting_report(*stages, tasks=["a", "b"])
    assert report["a"].levels[1] == pytest.approx(stages[1]["a"]["nll"].base.value)
    assert report["a"].transfer.value == pytest.approx(-stages[1]["a"]["nll"].change.value)
