"""What is settled or refused before the first step."""

import logging

import pytest

from lwf_unsloth.errors import ConfigError, DataError, ModelError


@pytest.fixture()
def make_trainer(tiny_peft, alpaca_rows, tmp_path):
    """Factory: a trainer on 6 rows of a model loaded for 110 tokens; keywords replace arguments."""

    def make(max_length=110, **given):
        from lwf_unsloth.config import LwFConfig
        from lwf_unsloth.trainer import LwFTrainer

        model, tokenizer = tiny_peft(max_seq_length=110)
        values = {
            "model": model,
            "args": LwFConfig(
                str(tmp_path), bf16=False, max_length=max_length, disable_tqdm=True, max_steps=1
            ),
            "processing_class": tokenizer,
            "train_dataset": alpaca_rows(6),
            **given,
        }
        return LwFTrainer(values.pop("model"), **values)

    return make


def longest(trainer):
    return max(map(len, trainer.train_dataset["input_ids"]))


def test_without_max_length_rows_are_cut_at_what_the_model_was_loaded_for(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="lwf_unsloth"):
        trainer = make_trainer(max_length=None)
    assert longest(trainer) == trainer.args.max_length == 110
    assert "cut at the model's 110 tokens" in caplog.text
    assert "cut at max_length=110" in caplog.text, "the rows that lost their end are named"


def test_a_max_length_over_the_models_is_brought_down_and_told(make_trainer, caplog):
    assert longest(make_trainer(max_length=200)) == 110
    assert "max_length is 200, but the model was loaded for 110" in caplog.text
    assert longest(make_trainer(max_length=105)) == 105


def test_arguments_of_another_kind_are_refused_by_name(make_trainer, tmp_path):
    from trl import SFTConfig

    with pytest.raises(ConfigError, match="args is a .*must be an LwFConfig"):
        make_trainer(args=SFTConfig(str(tmp_path), bf16=False))
    for model in ("unsloth/gemma-2b-bnb-4bit", None):
        with pytest.raises(ModelError, match="load_model"):
            make_trainer(model=model)
    for tokenizer in (None, "unsloth/gemma-2b-bnb-4bit"):
        with pytest.raises(DataError, match="The tokenizer is a .*load_model"):
            make_trainer(processing_class=tokenizer)
