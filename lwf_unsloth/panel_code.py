"""What is set in the panel, and the code that does the same without it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAMPLES = {"general": "general.jsonl", "passages": "passages.jsonl"}
REHEARSALS = {
    "general instructions (sample)": "general",
    "plain passages (sample)": "passages",
    "written by the model itself": "self",
    "my own instructions": "instructions",
    "my own passages": "texts",
    "none": "none",
}
"""What the panel offers as rehearsal -> its kind."""


@dataclass(frozen=True)
class Rehearsal:
    """Where the rehearsal rows come from."""

    kind: str = "general"
    """One of the values of `REHEARSALS`."""
    path: str = ""
    """The file of "instructions" and "texts"."""

    def code(self) -> str:
        """The expression that gives the rows."""
        if self.kind in ("none", "self"):
            return {"none": "None", "self": '"self"'}[self.kind]
        name = SAMPLES.get(self.kind)
        source = f"lwf.sample_path({name!r})" if name else repr(self.path)
        load = "load_alpaca" if self.kind in ("general", "instructions") else "load_text"
        return f'lwf.{load}({source}, test_size=None)["train"]'


@dataclass(frozen=True)
class PanelPlan:
    """All that is set in the panel."""

    source: str = ""
    """The task rows: a file, folder or hub id."""
    model: str = ""
    """Name of the model; empty where the caller gave a loaded one."""
    rehearsal: Rehearsal = Rehearsal()
    training: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `LwFConfig`."""
    output_dir: str = "runs/panel/run-1"
    resume: bool = False
    prompt: Mapping[str, str] = field(default_factory=dict)
    """`instruction`, and `input` where there is one."""
    max_new_tokens: int = 128
    scale: float = 1.0
    """Of the adapter: 0 is the base, 1 the adapter as trained."""


def script(plan: PanelPlan) -> str:
    """The panel's steps as Python that can be copied and run by itself.

    Args:
        plan: What is set.

    Returns:
        The code; where the caller gave the model, it takes the names `model` and `tokenizer`.
    """
    load = f"model, tokenizer = lwf.load_model({plan.model!r})"
    given = "# model, tokenizer: the ones that the panel was given"
    settings = "".join(f"    {name}={value!r},\n" for name, value in plan.training.items())
    train = "trainer.train(resume_from_checkpoint=True)" if plan.resume else "trainer.train()"
    tokens = f"max_new_tokens={plan.max_new_tokens}"
    after = [
        f'after = lwf.generate(model, tokenizer, prompt, {tokens}, label="after")',
        f"lwf.save_adapter(model, tokenizer, {plan.output_dir + '/adapter'!r})",
    ]
    if plan.scale != 1:
        scaled = f"with lwf.scale_adapter(model, {plan.scale!r}):  # 0 is the base, 1 as trained"
        after = [scaled, *(f"    {line}" for line in after)]
    lines = "\n".join(after)
    return f"""import lwf_unsloth as lwf

task = lwf.load_alpaca({plan.source!r})
print(task.report)
rehearsal = {plan.rehearsal.code()}

{load if plan.model else given}
args = lwf.LwFConfig(
    {plan.output_dir!r},
{settings})
trainer = lwf.LwFTrainer(
    model,
    args=args,
    processing_class=tokenizer,
    train_dataset=task["train"],
    rehearsal_dataset=rehearsal,
)
{train}

prompt = {dict(plan.prompt)!r}
before = lwf.generate(model, tokenizer, prompt, {tokens}, adapter=False, label="before")
{lines}
lwf.compare(before, after)
"""
