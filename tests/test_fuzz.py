"""Anything at all as input: a short run of the campaign's laws, and that it can find a fault."""

import pytest

from lwf_unsloth import alpaca
from lwf_unsloth.errors import DataError
from tests.campaigns import fuzz

QUICK = {"any_bytes", "arguments_of_the_loaders", "mixing", "training_files", "sweep_files"}


@pytest.mark.parametrize("laws", [QUICK, {"settings_of_any_value", "templates_and_encoding"}])
def test_a_short_campaign_finds_no_crash_and_no_silent_loss(laws):
    found = fuzz.campaign(150, laws)
    assert found["wrong"] == [] and found["cases"] > 20 and found["refused"] > 0


def test_the_campaign_finds_a_row_that_is_lost_and_an_error_of_a_library(monkeypatch):
    finish = alpaca._finish

    def losing(train, test, plan, report):
        finish(train, test, plan, report)
        report.sources[0].rows_read += 1

    monkeypatch.setattr(alpaca, "_finish", losing)
    found = fuzz.campaign(60, {"arguments_of_the_loaders"})
    assert found["silent_losses"] == 1 and "read" in found["wrong"][0]

    def falling(*_):
        raise KeyError("instruction")

    monkeypatch.setattr(alpaca, "_finish", falling)
    found = fuzz.campaign(60, {"arguments_of_the_loaders"})
    assert found["crashes"] == 1 and "KeyError" in found["wrong"][0]


def test_an_error_that_says_nothing_is_a_crash(monkeypatch):
    def silent(*_):
        raise DataError("")

    monkeypatch.setattr(alpaca, "_finish", silent)
    assert fuzz.campaign(60, {"arguments_of_the_loaders"})["crashes"] == 1
