"""A setting of the wrong type or range is refused by name, whatever it is, before any work."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwf_unsloth.backend import prepare

prepare()
from lwf_unsloth.config import LwFConfig, ModelConfig  # noqa: E402
from lwf_unsloth.errors import ConfigError  # noqa: E402
from lwf_unsloth.field_types import SEED_MOST  # noqa: E402

FIELDS = [(kind, f.name) for kind in (LwFConfig, ModelConfig) for f in dataclasses.fields(kind)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_any_value_in_any_field_is_taken_or_refused_by_us(field, value):
    kind, name = field
    if name == "device_map":  # anything goes: it is passed on
        return
    try:
        kind(**{"output_dir": "runs/x"} | {name: value} if kind is LwFConfig else {name: value})
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        (LwFConfig, "learning_rate", "2e-4", "learning_rate is '2e-4' .* Write the number"),
        (LwFConfig, "learning_rate", float("nan"), "a finite number"),
        (LwFConfig, "max_length", "512", "a whole number or None"),
        (LwFConfig, "max_length", 0, "max_length is 0, but it must be 1 or more"),
        (LwFConfig, "seed", SEED_MOST + 1, "seed is 4294967296, but it must be 0 to 4294967295"),
        (LwFConfig, "gradient_accumulation_steps", 0.5, "a whole number"),
        (LwFConfig, "max_steps", 0, "or -1 for num_train_epochs"),
        (LwFConfig, "optim", "adam2", "do not go together: adam2 is not a valid"),
        (LwFConfig, "rehearsal_ce", "no", "Any text would count as True"),
        (LwFConfig, "output_dir", "a\0b", "no path holds a null character"),
        (LwFConfig, "report_to", [1], "the name of a service"),
        (ModelConfig, "load_in_4bit", "false", "Any text would count as True"),
        (ModelConfig, "trust_remote_code", "no", "Any text would count as True"),
        (ModelConfig, "target_modules", [1], "a list of texts"),
        (ModelConfig, "r", True, "r is True .* a whole number"),
        (ModelConfig, "random_state", -1, "random_state is -1"),
    ],
)
def test_what_is_wrong_is_named_with_what_it_takes(kind, name, value, said):
    with pytest.raises(ConfigError, match=said):
        kind(**{name: value})


def test_a_secret_is_not_shown_where_its_type_is_wrong():
    with pytest.raises(ConfigError, match="token is not shown") as caught:
        ModelConfig(token=["hf_secret"])
    assert "hf_secret" not in str(caught.value)


def test_what_people_write_is_taken():
    import numpy

    config = LwFConfig(
        Path("runs/x"),
        learning_rate=numpy.float32(1e-3),
        per_device_train_batch_size=numpy.int64(3),
        warmup_steps=5,
        num_train_epochs=2,
        report_to=["tensorboard"],
        logging_steps=0.1,
        max_steps=-1,
        label_names=("labels",),
        lr_scheduler_kwargs={"num_cycles": 1},
    )
    assert dataclasses.replace(config).max_length == 512
    model = ModelConfig(
        Path("runs/x"), target_modules=("q_proj",), use_gradient_checkpointing=False
    )
    assert model.to_dict()["model_name"] == "runs/x"
