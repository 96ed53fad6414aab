"""What the trainer is given: whatever it is, an error of ours before any work, or a trainer."""

import pytest
from datasets import Dataset

from lwf_unsloth.config import LwFConfig
from lwf_unsloth.errors import ConfigError, DataError, LwfError, ModelError, TeacherError
from lwf_unsloth.trainer import LwFTrainer

ANYTHING = ["", "abc", True, -1, 0.5, [1, "a"], {"a": 1}, b"x", object(), [None], [{}]]
ANYTHING += [[{"instruction": 1}], [{"input_ids": "x", "labels": [1]}]]
ANYTHING += [[{"input_ids": [1, 2], "labels": [1]}], [{"input_ids": [-5, 3], "labels": [-5, 3]}]]


@pytest.fixture
def parts(tiny_peft, alpaca_rows, tmp_path):
    model, tokenizer = tiny_peft()
    settings = {"max_steps": 1, "max_length": 256, "disable_tqdm": True, "save_strategy": "no"}
    settings["rehearsal_ratio"] = 0.5
    return {
        "model": model,
        "args": LwFConfig(str(tmp_path / "run"), **settings),
        "processing_class": tokenizer,
        "train_dataset": alpaca_rows(8),
        "rehearsal_dataset": alpaca_rows(3, "keep"),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model", ModelError),
        ("args", ConfigError),
        ("processing_class", DataError),
        ("train_dataset", DataError),
        ("rehearsal_dataset", DataError),
        ("eval_dataset", DataError),
        ("teacher", TeacherError),
        ("callbacks", ConfigError),
        ("compute_metrics", ConfigError),
    ],
)
def test_anything_as_an_argument_is_refused_by_its_name(parts, name, kind):
    for value in ANYTHING:
        if value == "" and name == "eval_dataset":
            continue
        with pytest.raises(kind) as caught:
            LwFTrainer(**{**parts, name: value})
        assert len(str(caught.value)) > 30, value


def test_tokens_beyond_the_models_vocabulary_are_told_with_both_sizes(parts):
    size = parts["model"].get_input_embeddings().num_embeddings
    rows = [{"input_ids": [1, 5, size], "labels": [-100, 5, 6]}]
    for name, where in (("train_dataset", "the rows"), ("eval_dataset", "eval_dataset")):
        with pytest.raises(DataError, match=f"input_ids of {where} go from 1 to {size}, but"):
            LwFTrainer(**{**parts, name: rows})
    with pytest.raises(DataError, match=r"labels of eval_dataset\['a'\] go from 5 to 99999"):
        wrong = [{"input_ids": [1, 5, 6], "labels": [-100, 5, 99999]}]
        LwFTrainer(**{**parts, "eval_dataset": {"a": wrong}})


def test_encoded_rows_and_alpaca_rows_can_be_mixed(parts):
    encoded = Dataset.from_list([{"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2]}])
    for name in ("train_dataset", "rehearsal_dataset"):
        trainer = LwFTrainer(**{**parts, name: encoded})
        trainer.train()
        assert trainer.state.global_step == 1


def test_a_checkpoint_that_is_none_and_an_evaluation_of_nothing_are_told(parts, tmp_path):
    trainer = LwFTrainer(**parts)
    for value in ["abc", -1, ["a"], {"a": 1}, tmp_path / "missing", "a\0b"]:
        with pytest.raises(ConfigError, match="resume_from_checkpoint"):
            trainer.train(resume_from_checkpoint=value)
    with pytest.raises(DataError, match="no eval_dataset"):
        trainer.evaluate()
    with pytest.raises(LwfError):
        trainer.evaluate([{"instruction": 1}])
