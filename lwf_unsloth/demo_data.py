"""The rows of the demo, and which rehearsal serves the model at hand."""

import json
from dataclasses import dataclass
from typing import Any

from lwf_unsloth.alpaca import encode_rows, load_alpaca, load_text
from lwf_unsloth.prechecks import stop_probability
from lwf_unsloth.samples import sample_path
from lwf_unsloth.teacher import OwnTeacher

HELD_OUT_SEED = 42
"""Which rows are held out; not the run's seed, so that all runs are scored on the same rows."""
STOPS = 0.05
"""Below this probability of EOS where an answer ends, the model counts as one that never stops."""


@dataclass(frozen=True)
class DemoData:
    """The rows of the demo."""

    task: Any
    heldout: list[dict[str, str]]
    """Questions in other words, each with the `answer_contains` of a right answer."""
    rehearsal: Any
    retention: Any
    """Rows of the rehearsal's kind that are never trained on."""
    kind: str
    """Kind of the rehearsal: "general instructions" or "passages"."""
    dropped: int
    """Rows that could not be used."""

    def __str__(self) -> str:
        """One line."""
        return (
            f"{len(self.task)} task rows; {len(self.rehearsal)} {self.kind} as rehearsal; "
            f"{len(self.heldout)} held-out questions; {len(self.retention)} {self.kind} to measure "
            "what is kept."
        )


def demo_data(model: Any, tokenizer: Any, questions: int | None = None) -> DemoData:
    """Loads the samples; looks at the model to see which rehearsal serves it."""
    task = load_alpaca(sample_path("faq_task"), test_size=None)
    general = load_alpaca(sample_path("general"), test_size=60, seed=HELD_OUT_SEED)
    kind = "general instructions"
    if not _stops(model, tokenizer, general["test"]):
        kind = "passages"
        general = load_text(sample_path("passages"), test_size=30, seed=HELD_OUT_SEED)
    lines = sample_path("faq_heldout").read_text(encoding="utf-8").splitlines()
    reports = (task.report, general.report)
    return DemoData(
        task["train"],
        [json.loads(line) for line in lines][:questions],
        general["train"],
        general["test"],
        kind,
        sum(len(numbers) for report in reports for numbers in report.dropped.values()),
    )


def _stops(model: Any, tokenizer: Any, rows: Any) -> bool:
    """Whether the base model ends its answers in the served template."""
    encoded, _ = encode_rows(tokenizer, rows, max_length=512)
    teacher, device = OwnTeacher(model), model.get_input_embeddings().weight.device
    found = stop_probability(teacher, teacher.head, encoded, tokenizer.eos_token_id, device)
    return found is not None and found >= STOPS
