"""What the task files beside this one call: their rows, and how an answer is judged."""

import json
from typing import Any

from datasets import Dataset, DatasetDict

from lwf_unsloth.instruction_checks import instruction_rows, score_answer
from lwf_unsloth.skill_data import skill_splits


def mmlu(**_: Any) -> DatasetDict:
    """MMLU's questions."""
    return _skill("mmlu")


def piqa(**_: Any) -> DatasetDict:
    """PIQA's questions."""
    return _skill("piqa")


def siqa(**_: Any) -> DatasetDict:
    """Social IQa's questions."""
    return _skill("siqa")


def commonsenseqa(**_: Any) -> DatasetDict:
    """CommonsenseQA's questions."""
    return _skill("commonsenseqa")


def instructions(**_: Any) -> DatasetDict:
    """Prompts with their constraints, as JSON text: a column must have one form."""
    rows = [row | {"checks": json.dumps(row["checks"])} for row in instruction_rows()]
    return DatasetDict({"test": Dataset.from_list(rows)})


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Whether all constraints of a prompt are kept, and which of them."""
    kept = score_answer(results[0], json.loads(doc["checks"]))
    return {"prompt_strict_acc": float(all(kept)), "instruction_strict_acc": kept}


def share(items: list[list[bool]]) -> float:
    """Share of constraints that are kept, over all prompts."""
    flat = [kept for item in items for kept in item]
    return sum(flat) / len(flat)


def _skill(name: str) -> DatasetDict:
    """Both splits as datasets, without a copy in the datasets library's own cache."""
    return DatasetDict({key: Dataset.from_list(rows) for key, rows in skill_splits(name).items()})
