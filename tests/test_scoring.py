"""Scores: the right tokens, weighted by tokens; the right model, left as it was."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import change_adapter

from lwf_unsloth import scoring
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.losses import Head
from lwf_unsloth.records import encode_row
from lwf_unsloth.scoring import Score, score
from lwf_unsloth.teacher import OwnTeacher, trained_tensors
from lwf_unsloth.token_stats import Side, calibration_error, token_stats

STAND_INS = SimpleNamespace(named_modules=None), SimpleNamespace(eos_token_id=2)
UNEQUAL = [
    {"instruction": "Say yes.", "input": "", "output": "Yes."},
    {"instruction": "Count.", "input": "to nine", "output": "1 2 3 4 5 6 7 8 9 " * 6},
    {"instruction": "Where is the fox?", "input": "", "output": "Near the river bank, over there."},
]
TEXTS = [{"text": "The quick brown fox jumps over the lazy dog."}, {"text": "Sleep is important."}]


def reference(model, tokenizer, rows, train_on="response"):
    """(tokens, nll, base nll, kl) by hand: one row at a time, full logits, fp64."""
    sums = []
    for row in rows:
        encoded = encode_row(tokenizer, row, max_length=512, train_on=train_on)
        ids = torch.tensor([encoded.input_ids])
        logs = []
        for context in (torch.no_grad(), model.disable_adapter()):
            with torch.no_grad(), context:
                logs.append(model(input_ids=ids).logits[0, :-1].double().log_softmax(-1))
        tuned, base = logs
        places = [i for i, label in enumerate(encoded.labels[1:]) if label != -100]
        labels = ids[0, 1:][places]
        kl = (base.exp() * (base - tuned)).sum(-1)[places].sum()
        nll = [-log[places].gather(1, labels[:, None]).sum() for log in (tuned, base)]
        sums.append([len(places), *(x.item() for x in (*nll, kl))])
    return [list(part) for part in zip(*sums, strict=True)]


@pytest.mark.parametrize("response_only", [True, False])
def test_score_equals_a_naive_reference_in_fp64(tiny_peft, response_only):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    rows = UNEQUAL + TEXTS
    train_on = "response" if response_only else "all"
    tokens, nll, base_nll, kl = reference(model, tokenizer, rows, train_on)
    found = score(model, tokenizer, rows, response_only=response_only, batch_size=2)
    assert list(found.row_tokens) == tokens
    assert found.row_nll == pytest.approx(nll, rel=1e-5)
    assert found.row_base_nll == pytest.approx(base_nll, rel=1e-5)
    assert found.row_kl == pytest.approx(kl, rel=1e-4)
    assert found.nll == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
    assert found.kl == pytest.approx(sum(kl) / sum(tokens), rel=1e-4)
    assert found.rise == pytest.approx((sum(nll) - sum(base_nll)) / sum(tokens), rel=1e-3)


def test_the_calibration_error_equals_one_counted_by_hand(tiny_peft):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    gaps, tokens = [0.0] * 15, 0
    for row in UNEQUAL:
        encoded = encode_row(tokenizer, row, max_length=512)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1]
        for place, label in enumerate(encoded.labels[1:]):
            if label == -100:
                continue
            confidence, likeliest = logits[place].double().softmax(-1).max(-1)
            gaps[min(int(confidence * 15), 14)] += float(confidence) - float(likeliest == label)
            tokens += 1
    found = score(model, tokenizer, UNEQUAL, batch_size=2)
    assert found.ece == pytest.approx(sum(map(abs, gaps)) / tokens, abs=1e-5)
    assert found.base_ece != found.ece
    assert score(model, tokenizer, UNEQUAL, base=None).base_ece is None


def test_a_model_as_sure_as_it_is_right_has_no_calibration_error():
    half = torch.full((4,), 0.5)
    side = Side(half, half, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    even = side.gaps(torch.zeros(4, dtype=torch.long), 1)
    assert float(calibration_error(even, torch.tensor([4]))) == 0
    sure = Side(half, torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    gaps = sure.gaps(torch.tensor([0, 0, 1, 1]), 2)
    assert calibration_error(gaps, torch.tensor([2, 2])).tolist() == [0.5, 1.0]


def test_tokens_read_by_chunks_say_the_same():
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 8, generator=generator), softcap=5.0, scale=0.5)
    tuned, base = torch.randn(2, 20, 8, generator=generator)
    labels = torch.randint(50, (20,), generator=generator)
    whole, parts = (token_stats(tuned, labels, head, base, chunk_rows=n) for n in (20, 3))
    logits = 5 * torch.tanh(tuned @ head.weight.T * 0.5 / 5)
    assert torch.allclose(whole.tuned.nll, torch.nn.functional.cross_entropy(
        logits, labels, reduction="none"), atol=1e-5)  # fmt: skip
    assert torch.allclose(whole.kl, parts.kl, atol=1e-6)
    assert torch.allclose(whole.tuned.nll, parts.tuned.nll, atol=1e-5)
    assert token_stats(tuned, labels, head, tuned, chunk_rows=3).kl.eq(0).all()
    assert token_stats(tuned, labels[:0], head).tuned.nll.numel() == 0


def test_an_untrained_adapter_scores_exactly_as_the_base(tiny_peft):
    model, tokenizer = tiny_peft()
    found = score(model, tokenizer, UNEQUAL)
    assert found.kl == 0
    assert found.row_nll == found.row_base_nll


def test_the_base_score_does_not_see_the_adapter(tiny_peft):
    model, tokenizer = tiny_peft()
    untrained = score(model, tokenizer, UNEQUAL)
    change_adapter(model)
    trained = score(model, tokenizer, UNEQUAL)
    assert trained.row_base_nll == untrained.row_base_nll
    assert trained.row_nll != untrained.row_nll
    assert trained.kl > 0


def test_the_batch_size_and_the_order_of_rows_do_not_change_a_row(tiny_peft):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    one, all_at_once = (score(model, tokenizer, UNEQUAL, batch_size=n) for n in (1, 8))
    backwards = score(model, tokenizer, UNEQUAL[::-1], batch_size=2)
    for name in ("row_nll", "row_base_nll", "row_kl"):
        assert getattr(one, name) == pytest.approx(getattr(all_at_once, name), rel=1e-5)
        assert getattr(one, name) == pytest.approx(getattr(backwards, name)[::-1], rel=1e-5)


def test_the_mean_is_over_tokens_and_not_over_rows():
    found = Score((1, 9), (2.0, 0.0), (1.0, 0.0), (0.5, 0.5))
    assert (found.nll, found.base_nll, found.kl, found.tokens) == (0.2, 0.1, 0.1, 10)


def test_without_a_base_only_the_tuned_model_is_measured(tiny_peft):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    alone = score(model, tokenizer, UNEQUAL, base=None)
    assert (alone.base_nll, alone.kl, alone.rise) == (None, None, None)
    assert alone.row_nll == pytest.approx(score(model, tokenizer, UNEQUAL).row_nll, rel=1e-6)


def test_a_teacher_given_is_the_base(tiny_peft):
    model, tokenizer = tiny_peft()
    change_adapter(model, seed=1)
    earlier = score(model, tokenizer, UNEQUAL, base=None)
    snapshot = OwnTeacher(model, trained_tensors(model))
    change_adapter(model, seed=2)
    now = score(model, tokenizer, UNEQUAL, base=snapshot)
    assert now.row_base_nll == pytest.approx(earlier.row_nll, rel=1e-6)
    assert now.kl > 0
    assert now.settings["base"] == "snapshot"


def test_scoring_leaves_the_model_as_it_was(tiny_peft):
    model, tokenizer = tiny_peft(use_gradient_checkpointing=True)
    change_adapter(model)

    def state():
        modules = [(m.training, vars(m).get("gradient_checkpointing")) for m in model.modules()]
        grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return (
            modules,
            grads,
            model.config.use_cache,
            tokenizer.padding_side,
            torch.is_grad_enabled(),
        )

    for mode in (True, False):
        model.train(mode)
        before = state()
        score(model, tokenizer, UNEQUAL)
        assert state() == before


def test_the_model_is_left_as_it_was_after_an_error(tiny_peft, monkeypatch):
    model, tokenizer = tiny_peft()
    model.eval()
    monkeypatch.setattr(scoring, "token_stats", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(model, tokenizer, UNEQUAL)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_rows_times_vocabulary_never_live(tiny_peft, monkeypatch):
    model, tokenizer = tiny_peft()
    monkeypatch.setattr(scoring, "model_logits", lambda *a: pytest.fail("full logits"))
    score(model, tokenizer, UNEQUAL)


def test_full_logits_of_an_unknown_head_give_the_same_numbers(tiny_peft, monkeypatch):
    model, tokenizer = tiny_peft()
    change_adapter(model)
    usual = score(model, tokenizer, UNEQUAL)
    monkeypatch.setattr(
        scoring.Objective,
        "of",
        classmethod(lambda cls, model, teacher, probe: cls(None, teacher)),
    )
    full = score(model, tokenizer, UNEQUAL)
    for name in ("row_nll", "row_base_nll", "row_kl"):
        assert getattr(full, name) == pytest.approx(getattr(usual, name), rel=1e-4)


def test_a_saved_adapter_loaded_anew_scores_as_it_did_after_training(
    tiny_peft, tiny_model_dir, alpaca_rows, tmp_path
):
    from lwf_unsloth.adapters import save_adapter
    from lwf_unsloth.config import LwFConfig
    from lwf_unsloth.model import load_adapter
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    args = LwFConfig(
        str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        warmup_steps=0,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = alpaca_rows(8)
    LwFTrainer(model, args=args, processing_class=tokenizer, train_dataset=rows).train()
    trained = score(model, tokenizer, UNEQUAL)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    again = score(*load_adapter(tmp_path / "adapter", base=str(tiny_model_dir)), UNEQUAL)
    assert trained.kl > 0
    assert again.row_nll == pytest.approx(trained.row_nll, abs=1e-3)
    assert again.row_base_nll == pytest.approx(trained.row_base_nll, abs=1e-3)
    assert again.settings["weights"] == trained.settings["weights"]


def test_dropout_has_no_effect_on_a_score(tiny_peft):
    model, tokenizer = tiny_peft(lora_dropout=0.5)
    change_adapter(model)
    model.train()
    first, second = (score(model, tokenizer, UNEQUAL) for _ in range(2))
    assert first.row_nll == second.row_nll


def test_rows_without_a_token_to_score_are_told_and_cut_rows_counted(tiny_peft, caplog):
    model, tokenizer = tiny_peft()
    rows = [*UNEQUAL, {"instruction": "long " * 200, "input": "", "output": "never seen"}]
    with caplog.at_level(logging.WARNING, "lwf_unsloth.scoring"):
        found = score(model, tokenizer, rows, max_length=150)
    assert (found.rows, found.settings["dropped"]) == (3, 1)
    assert "(4)" in caplog.text
    with pytest.raises(DataError, match="max_length"):
        score(model, tokenizer, rows[3:], max_length=100)


def test_what_decides_the_numbers_is_recorded(tiny_peft):
    model, tokenizer = tiny_peft()
    settings = score(model, tokenizer, UNEQUAL).to_dict()["settings"]
    assert settings["template"] == "alpaca"
    assert settings["bos"] == "<s>"
    assert (settings["bits"], settings["dtype"]) == (4, "float32")
    assert settings["scored"] == "response"
    assert settings["adapter"] == "untrained"
    change_adapter(model)
    changed = score(model, tokenizer, UNEQUAL[:2]).to_dict()["settings"]
    assert changed["weights"] != settings["weights"]
    assert changed["data_sha256"] != settings["data_sha256"]


def test_rows_are_cut_at_what_the_model_was_loaded_for(tiny_peft, caplog):
    model, tokenizer = tiny_peft(max_seq_length=30)
    rows = [{"text": "the river and the fox and the bank " * 10}, {"text": "the fox"}]
    for asked, told in ((512, 1), (None, 1), (30, 1), (20, 1)):
        found = score(model, tokenizer, rows, max_length=asked)
        assert found.settings["max_length"] == min(30, asked or 30)
        assert found.settings["cut"] == told and max(found.row_tokens) < min(30, asked or 30)
    assert caplog.text.count("the model was loaded for 30 tokens") == 1


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_whose_off_is_not_the_base_is_refused_and_a_teacher_is_taken(tiny_peft, bias):
    model, tokenizer = tiny_peft()
    model.peft_config["default"].bias = bias
    rows = [{"text": "the river and the fox"}]
    with pytest.raises(ModelError, match=f"trains biases.*{bias}.*make_teacher"):
        score(model, tokenizer, rows)
    teacher = OwnTeacher(model, trained_tensors(model))
    assert score(model, tokenizer, rows, base=teacher).kl == 0
    assert score(model, tokenizer, rows, base=None).kl is None


def test_rows_are_cut_at_what_a_second_model_was_loaded_for_too(tiny_peft):
    from lwf_unsloth.teacher import make_teacher

    model, tokenizer = tiny_peft()
    other, _ = tiny_peft()
    other.max_seq_length = 30
    rows = [{"text": "the river and the fox and the bank " * 10}]
    found = score(model, tokenizer, rows, base=make_teacher(model, other))
    assert found.settings["max_length"] == 30 and found.settings["cut"] == 1
    with pytest.raises(ConfigError, match="make_teacher"):
        score(model, tokenizer, rows, base=other)


def test_a_model_that_gives_nan_breaks_no_bin():
    nan = torch.tensor([float("nan"), 0.5])
    gaps = Side(nan, nan, torch.ones(2)).gaps(torch.tensor([0, 1]), 2)
    assert gaps.isnan().tolist()[0][0] and gaps[1].sum() == -0.5


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": True}, {"base": "none"}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        score(*STAND_INS, UNEQUAL, **wrong)
