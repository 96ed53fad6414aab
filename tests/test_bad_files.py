"""151 files as people bring them, each wrong in one way: what is kept, dropped by name, refused."""

import json
import logging
from pathlib import Path

import pytest

from lwf_unsloth import LwfError, load_alpaca, load_text

FOLDER = Path(__file__).resolve().parent / "data" / "bad"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


def test_every_bad_file_has_its_right_outcome_and_there_are_many():
    names = {path.name for path in FOLDER.iterdir()} - {"expected.json"}
    assert names == set(EXPECTED) and len(names) > 150
    kinds = [set(right) for right in EXPECTED.values()]
    assert kinds.count({"error"}) > 60 and len(kinds) - kinds.count({"error"}) > 60


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_bad_file_is_taken_dropped_or_refused_as_is_right(name):
    right = EXPECTED[name]
    if "error" in right:
        with pytest.raises(LwfError) as caught:
            load_alpaca(FOLDER / name, test_size=None)
        assert right["error"] in str(caught.value)
        return
    data = load_alpaca(FOLDER / name, test_size=None)
    part = data.report.sources[0]
    assert part.rows_read == right["read"] == part.kept + sum(map(len, part.dropped.values()))
    assert part.dropped == right["dropped"]
    assert [row["output"][:40] for row in data["train"]] == right["outputs"]


def test_no_bad_file_brings_load_text_or_an_upload_down(caplog):
    caplog.set_level(logging.ERROR)
    for name in sorted(EXPECTED):
        content = (FOLDER / name).read_bytes()
        for load, source in (
            (load_text, FOLDER / name),
            (load_text, content),
            (load_alpaca, content),
        ):
            try:
                report = load(source, test_size=None).report
            except LwfError as error:
                assert str(error)
            else:
                assert report.rows_read == report.kept + sum(
                    len(rows) for part in report.sources for rows in part.dropped.values()
                )
