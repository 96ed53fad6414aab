"""A trial in the study: its settings, whether its slot needs another one, and its record.

A slot is a place of the sweep: a point of the grid, or one of so many trials that Optuna chooses.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from lwf_unsloth.sweep_file import is_number_list
from lwf_unsloth.sweep_result import COMPLETE, FAILED, SKIPPED, TrialRecord
from lwf_unsloth.trial_process import is_gone


def states(study: Any) -> set[str]:
    """The states that trials of the study are in."""
    return {one.state.name for one in study.get_trials(deepcopy=False)}


def settings(trial: Any, space: Mapping[str, Any], grid: bool) -> dict[str, Any]:
    """A trial's settings: its point of the grid, or chosen by the sampler."""
    point = json.loads(trial.user_attrs["slot"]) if grid else None
    return {name: _suggest(trial, name, given, point) for name, given in space.items()}


def _suggest(trial: Any, name: str, given: Any, point: Mapping[str, Any] | None) -> Any:
    """One setting. Numbers of a grid are not categories, whose number Optuna would fix for good: a
    grid may get more of them, also while another process runs it as it was.
    """
    if point is not None and is_number_list(given):
        values = [*given, point[name]]
        trial.suggest_float(name, min(values), max(values))
        return point[name]
    if isinstance(given, list):
        return trial.suggest_categorical(name, given)
    whole = all(isinstance(given[end], int) for end in ("low", "high"))
    suggest = trial.suggest_int if whole else trial.suggest_float
    rest = {key: given[key] for key in ("log", "step") if key in given}
    return suggest(name, given["low"], given["high"], **rest)


def covers(trial: Any) -> bool:
    """Whether a trial's slot needs no other: it waits, runs, or has ended with an outcome."""
    if trial.user_attrs.get("duplicate"):
        return False
    return trial.state.name != "FAIL" or "reason" in trial.user_attrs


def is_second(trial: Any, study: Any) -> bool:
    """Whether the slot is another's: one that was begun before and runs, or that has ended; one
    that failed too, unless this trial was asked for after it had.
    """
    after = trial.user_attrs.get("after", math.inf)
    for one in study.get_trials(deepcopy=False):
        if one.number == trial.number or one.user_attrs.get("slot") != trial.user_attrs["slot"]:
            continue
        runs = one.state.name == "RUNNING" and one.number < trial.number and not is_gone(one)
        failed = one.state.name == "FAIL" and one.number <= after
        ended = one.state.is_finished() and covers(one) and not failed
        if runs or ended:
            return True
    return False


def newest(study: Any) -> list[TrialRecord]:
    """The ended trials, of each slot the last one."""
    trials = [one for one in study.get_trials(deepcopy=False) if record(one) is not None]
    last = {one.user_attrs.get("slot", f"trial {one.number}"): one.number for one in trials}
    found = (record(one) for one in trials if one.number in last.values())
    return [one for one in found if one is not None]


def last_ended(study: Any) -> dict[str, int]:
    """The last trial of each slot that has ended with an outcome."""
    trials = study.get_trials(deepcopy=False)
    ended = [one for one in trials if one.state.is_finished() and covers(one)]
    return {one.user_attrs["slot"]: one.number for one in ended if "slot" in one.user_attrs}


def failed_slots(study: Any) -> set[str]:
    """Slots whose last trial failed by itself."""
    slots: dict[str, bool] = {}
    for one in study.get_trials(deepcopy=False):
        if covers(one) and "slot" in one.user_attrs:
            slots[one.user_attrs["slot"]] = one.state.name == "FAIL"
    return {slot for slot, failed in slots.items() if failed}


def record(trial: Any) -> TrialRecord | None:
    """An ended trial with an outcome; None for others."""
    state = {"COMPLETE": COMPLETE, "FAIL": FAILED, "PRUNED": SKIPPED}.get(trial.state.name)
    if state is None or not covers(trial):
        return None
    gain, forgetting = trial.values if state == COMPLETE else (None, None)
    own = ("state", "params", "owner", "after", "digest")
    details = {key: value for key, value in trial.user_attrs.items() if key not in own}
    params = dict(trial.user_attrs.get("params", trial.params))
    return TrialRecord(trial.number, state, params, gain, forgetting, details)
