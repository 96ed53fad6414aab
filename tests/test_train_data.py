"""The rows that a trainer is given: none lost, none learned that should not be, errors of ours."""

import pytest

from lwf_unsloth.errors import ConfigError, DataError


def texts(trainer):
    return [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]


def test_a_list_of_rows_keeps_columns_that_its_first_row_lacks(make_trainer):
    rows = [{"instruction": "first", "output": "yes"}]
    rows += [{"instruction": f"b {i}", "input": "THE CONTEXT", "output": "yes"} for i in range(3)]
    trainer = make_trainer(task=rows, rehearsal=0)
    assert ["THE CONTEXT" in text for text in texts(trainer)] == [False, True, True, True]


def test_a_list_may_mix_passages_and_alpaca_rows(make_trainer):
    rows = [{"text": "a passage"}, {"instruction": "ask", "output": "yes"}]
    assert len(texts(make_trainer(task=rows, rehearsal=0))) == 2


BAD = {
    "numbers": [1, 2],
    "texts": ["a"],
    "an int among texts": [{"instruction": "a", "output": "x"}, {"instruction": "b", "output": 4}],
}


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD)
def test_rows_of_another_type_are_errors_of_ours(make_trainer, rows):
    with pytest.raises(DataError, match="[Rr]ow [12]"):
        make_trainer(task=rows, rehearsal=0)


def test_rows_that_mix_rehearsal_marked_are_refused_as_task_rows(make_trainer, alpaca_rows):
    from lwf_unsloth.rehearsal import mix_rehearsal

    with pytest.raises(DataError, match="3 rows of train_dataset are marked is_rehearsal"):
        make_trainer(task=mix_rehearsal(alpaca_rows(9), alpaca_rows(4, "keep"), 0.25), rehearsal=0)


def test_a_ratio_that_gives_no_rehearsal_row_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"0.1 beside 4 task rows.*0.2 or more"):
        make_trainer(task=4, rehearsal_ratio=0.1)
    assert make_trainer(task=4, rehearsal_ratio=0.2).rows.n_rehearsal == 6


def test_encoded_rows_are_cut_dropped_and_checked_like_others(make_trainer, caplog):
    long = {"input_ids": [1] + [5] * 299, "labels": [-100] + [5] * 299}
    late = {"input_ids": [1] + [5] * 299, "labels": [-100] * 299 + [5]}
    trainer = make_trainer(task=[long, late], rehearsal=0, max_length=64)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [64]
    assert "2 of 2 encoded rows are cut at max_length=64, 1 without a label" in caplog.text
    with pytest.raises(DataError, match="No row of train_dataset has a label"):
        make_trainer(task=[late], rehearsal=0, max_length=64)
    with pytest.raises(DataError, match="Row 1 of train_dataset has 3 input_ids and 2 labels"):
        make_trainer(task=[{"input_ids": [1, 5, 6], "labels": [-100, 5]}], rehearsal=0)
