"""Settings that TRL's SFTConfig has and that would change nothing here, each with what does it.

The rows are tokenised, mixed and collated by this package and the loss is its own, so a setting of
TRL's for one of these would be taken and silently ignored.
"""

from dataclasses import fields
from typing import Any

from lwf_unsloth.errors import ConfigError

_MODEL = "the model is loaded before the trainer: give it to ModelConfig or load_model"
_TOKENIZER = "the tokenizer is used as load_model gave it: set it there"
_ROWS = "rows are encoded here, by the tokenizer's prompt template"

ALWAYS = {
    "model_init_kwargs": _MODEL,
    "trust_remote_code": _MODEL,
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "chat_template_path": f"{_ROWS}: give another with set_template(tokenizer, template)",
    "dataset_text_field": f"{_ROWS}: name the column in load_text(..., column=...)",
    "dataset_kwargs": _ROWS,
    "truncation_mode": "a row that is too long loses its tail, and is counted",
    "assistant_only_loss": 'labels cover what train_on says ("response" or "all")',
    "bf16_full_eval": "it would cast the model, the adapter included, for good",
    "fp16_full_eval": "it would cast the model, the adapter included, for good",
    "use_liger_kernel": "Unsloth's kernels are in place, and the loss is taken in chunks already",
}
"""Field -> why a value other than the default has no effect, and what has."""

WITH_OWN_LOSS = {
    "loss_type": "the cross entropy of the loss is the plain one",
    "router_aux_loss_coef": "the loss has no term for a router",
    "train_sampling_strategy": "task and rehearsal rows are interleaved by the ratio",
}
"""The same where the KL acts or rows are rehearsed; else the SFTTrainer honours them."""


def check_without_effect(config: Any, own_loss: bool) -> None:
    """Refuses settings that nothing here reads.

    Args:
        config: `LwFConfig`.
        own_loss: Whether there is a KL term or rehearsal; else the SFTTrainer's loss is used.

    Raises:
        ConfigError: Names the first such field, its value, and what to set in its place.
    """
    standard = {field.name: field.default for field in fields(config)}
    for name, why in {**ALWAYS, **(WITH_OWN_LOSS if own_loss else {})}.items():
        value = getattr(config, name, standard.get(name))
        if name in standard and value != standard[name] and value not in (None, False):
            raise ConfigError(
                f"{name}={value!r} would have no effect: {why}. Leave it at {standard[name]!r}."
            )
    only = config.completion_only_loss
    if only is not None and only != (config.train_on == "response"):
        raise ConfigError(
            f"completion_only_loss={only!r} would have no effect: labels cover what train_on says, "
            f'which is {config.train_on!r}. Set train_on="{"response" if only else "all"}".'
        )
