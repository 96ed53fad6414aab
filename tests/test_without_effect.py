"""Settings of TRL's that nothing here reads are refused, not taken and ignored."""

import dataclasses

import pytest

from lwf_unsloth.backend import prepare

prepare()
import transformers  # noqa: E402
import trl  # noqa: E402

from lwf_unsloth.config import LwFConfig  # noqa: E402
from lwf_unsloth.errors import ConfigError  # noqa: E402
from lwf_unsloth.without_effect import ALWAYS, WITH_OWN_LOSS  # noqa: E402

OTHER = {
    "model_init_kwargs": {"dtype": "float16"},
    "trust_remote_code": bool(1),
    "router_aux_loss_coef": 0.1,
    "chat_template_path": "template.jinja",
    "dataset_text_field": "content",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "eos_token": "</s>",
    "pad_token": "</s>",
    "truncation_mode": "keep_end",
    "assistant_only_loss": True,
    "loss_type": "dft",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "train_sampling_strategy": "sequential",
}
READ = {"max_length", "packing", "padding_free", "eval_packing", "completion_only_loss"}
READ |= {"pad_to_multiple_of"}
HARMLESS = {
    "dataset_num_proc": "our encoding is quick in one process",
    "shuffle_dataset": "the order is random by seed and epoch anyhow",
    "packing_strategy": "only packing reads it, and that is refused",
    "activation_offloading": "it moves tensors and changes no number",
}


def test_every_setting_that_trl_adds_is_read_refused_or_harmless():
    def names(kind):
        return {field.name for field in dataclasses.fields(kind)}

    added = names(trl.SFTConfig) - names(transformers.TrainingArguments)
    assert added <= set(ALWAYS) | set(WITH_OWN_LOSS) | READ | set(HARMLESS)


@pytest.mark.parametrize("name", [*ALWAYS, *WITH_OWN_LOSS])
def test_a_setting_without_effect_is_refused_with_what_to_set_instead(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}=.* would have no effect: .* Leave it at"):
        LwFConfig(str(tmp_path), **{name: OTHER[name]})


@pytest.mark.parametrize("name", WITH_OWN_LOSS)
def test_without_kl_the_sfttrainers_own_settings_are_taken(name, tmp_path):
    assert (
        getattr(LwFConfig(str(tmp_path), lwf_lambda=0.0, **{name: OTHER[name]}), name)
        == (OTHER[name])
    )


def test_lambda_0_with_rehearsal_is_our_loss_too(tiny_peft, alpaca_rows, tmp_path):
    from datasets import Dataset

    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    rows = Dataset.from_list(alpaca_rows(8))
    args = LwFConfig(str(tmp_path), lwf_lambda=0.0, rehearsal_ce=True, loss_type="dft")
    with pytest.raises(ConfigError, match="loss_type='dft' would have no effect"):
        LwFTrainer(
            model,
            args=args,
            processing_class=tokenizer,
            train_dataset=rows,
            rehearsal_dataset=rows,
        )


@pytest.mark.parametrize(("only", "train_on"), [(True, "response"), (False, "all"), (None, "all")])
def test_completion_only_loss_that_says_what_train_on_says_is_taken(only, train_on, tmp_path):
    LwFConfig(str(tmp_path), completion_only_loss=only, train_on=train_on)


@pytest.mark.parametrize(("only", "train_on"), [(True, "all"), (False, "response")])
def test_completion_only_loss_against_train_on_is_refused(only, train_on, tmp_path):
    with pytest.raises(ConfigError, match='Set train_on="(response|all)"'):
        LwFConfig(str(tmp_path), completion_only_loss=only, train_on=train_on)


def test_eval_packing_is_refused_as_packing_is(tmp_path):
    with pytest.raises(ConfigError, match="leave them False"):
        LwFConfig(str(tmp_path), eval_packing=True)
