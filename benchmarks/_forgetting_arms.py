"""Which adapters the forgetting benchmark trains, and in what order.

A family is a way to train. Rates are raised until the score falls (`LADDER`), so what comes next
depends on what is done: `plan` reads the rows that are there and is asked again after each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TASK_ROWS = 16
"""Task rows an optimizer step; rehearsal rows come on top."""
LADDER = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""Rates: the first three always, each higher one while the highest so far is the best."""
ALWAYS = 3
DIALS = (0.75, 0.5)
"""Scales at which plain's adapters are measured again, without training."""
KINDS = {
    "plain": "plain SFT, and turned down",
    "ce": "cross entropy on rehearsal",
    "kl_task": "KL on task rows",
    "kl_rehearsal": "KL on rehearsal rows only",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A way to train."""

    title: str
    kind: str
    """A key of `KINDS`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `LwFConfig`."""
    rehearsal: int = 0
    """Rehearsal rows a step."""
    pool: str | None = None
    """"general": given rows; "self": written by the base, as rehearsal_dataset="self" does;
    "answers": its own answers to the given instructions."""


def _ours(title: str, rehearsal: int = 1, pool: str = "general", **changes: Any) -> Family:
    return Family(title, "kl_rehearsal", {"lwf_lambda": 2.0, **changes}, rehearsal, pool)


FAMILIES = {
    "plain_sft": Family("plain SFT", "plain", {"lwf_lambda": 0.0}),
    "rehearsal_ce": Family(
        "rehearsal as CE", "ce", {"lwf_lambda": 0.0, "rehearsal_ce": True}, 4, "general"
    ),
    "document": Family(
        "the document: CE all + 0.5 KL on all", "kl_task",
        {"lwf_lambda": 0.5, "lwf_rows": "all", "rehearsal_ce": True}, 4, "general",
    ),
    "masked_all": Family(
        "KL target-masked on all, lambda 1", "kl_task",
        {"lwf_lambda": 1.0, "lwf_rows": "all", "lwf_kl": "target_masked"}, 4, "general",
    ),
    "response_kl": Family(
        "KL on the task's answers, no rehearsal", "kl_task",
        {"lwf_lambda": 1.0, "lwf_rows": "response"},
    ),
    "ours": _ours("ours: KL on rehearsal, lambda 2, ratio .06"),
    "ours_self": _ours("ours, rows written by the base", pool="self"),
    "ours_answers": _ours("ours, answers written by the base", pool="answers"),
    "ours_r20": _ours("ours, ratio .2", 4),
    "ours_l05": _ours("ours, lambda .5", lwf_lambda=0.5),
    "ours_l5": _ours("ours, lambda 5", lwf_lambda=5.0),
    "ours_r20_l05": _ours("ours, ratio .2, lambda .5", 4, lwf_lambda=0.5),
    "ours_r20_l5": _ours("ours, ratio .2, lambda 5", 4, lwf_lambda=5.0),
    "ours_t2": _ours("ours, temperature 2", lwf_temperature=2.0),
    "ours_smooth": _ours("ours, label smoothing .1", label_smoothing_factor=0.1),
    "ours_linear": _ours("ours, lambda 4 -> 0, linear", lwf_lambda_schedule="linear:4->0"),
    "ours_cosine": _ours("ours, lambda 4 -> .5, cosine", lwf_lambda_schedule="cosine:4->0.5"),
    "ours_warmup": _ours("ours, lambda rises over .1", lwf_lambda_schedule="warmup:0.1"),
    "ours_budget": _ours("ours, KL budget .01", lwf_kl_budget=0.01),
    "ours_rank": _ours("ours, rank 4, from .3 on 16", rank_schedule=[[0.0, 4], [0.3, 16]]),
}  # fmt: skip
"""Arm -> how it trains."""
FROZEN, SCALED = "frozen", "plain_scaled_{:g}"
SEEDED = ("plain_sft", "ours", "document")
"""Families whose best rate gets every seed."""
OTHERS = ("ours_self", "rehearsal_ce", "masked_all", "response_kl", "ours_r20", "ours_answers")
GRID = ("ours_l05", "ours_l5", "ours_r20_l05", "ours_r20_l5")
EXTRAS = (
    "ours_t2", "ours_smooth", "ours_linear", "ours_cosine", "ours_warmup", "ours_budget",
    "ours_rank",
)  # fmt: skip
NAMES = (FROZEN, *FAMILIES)


def title_of(arm: str) -> str:
    """An arm as the tables call it."""
    if arm in FAMILIES:
        return FAMILIES[arm].title
    scale = arm.rpartition("_")[2]
    return "before" if arm == FROZEN else f"plain SFT, adapter scaled {scale}"


def kind_of(arm: str) -> str:
    """An arm's key of `KINDS`."""
    return FAMILIES[arm].kind if arm in FAMILIES else "plain"


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    lr: float = 0.0
    """0 of the frozen model."""
    seed: int = 0

    @property
    def key(self) -> str:
        """What tells jobs of a model apart."""
        return f"{self.arm} {self.lr:g} {self.seed}"


def key_of(row: Row) -> str:
    """The key of the job that gave a row."""
    return Job(row["arm"], row["lr"], row["seed"]).key


def plan(
    rows: Sequence[Row], seeds: Sequence[int], arms: Sequence[str], skip: Sequence[str] = ()
) -> list[Job]:
    """The jobs that can be known now, the most wanted first; those done included.

    Args:
        rows: One model's rows so far, with "new_score", or "error".
        seeds: The first serves all; the others `SEEDED`'s best rates.
        arms: Keys of `NAMES` that are wanted.
        skip: Families that this version of the library cannot train.
    """
    jobs = (job for job in _all(rows, seeds) if job.arm in arms and job.arm not in skip)
    return list(dict.fromkeys(jobs))


def _all(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Job]:
    first = seeds[0]
    yield Job(FROZEN, seed=first)
    ladders = {name: _ladder(rows, name, first) for name in SEEDED}
    for jobs in ladders.values():
        yield from jobs[:ALWAYS]
    for jobs in ladders.values():
        yield from jobs[ALWAYS:]
    for name in SEEDED:
        if rate := best_rate(rows, name, first):
            yield from (Job(name, rate, seed) for seed in seeds)
    yield Job("plain_sft", 2e-4, first)
    rate = best_rate(rows, "ours", first)
    if rate is None:
        return
    for name in (*OTHERS, *GRID, *EXTRAS):
        yield Job(name, rate, first)
    yield from (Job("ours_self", rate, seed) for seed in seeds)
    for name in ("ours_r20", *GRID):
        yield from (Job(name, other, first) for other in LADDER[:ALWAYS])


def _ladder(rows: Sequence[Row], name: str, seed: int) -> list[Job]:
    """Rates of a family: the first ones, then one above the best as long as the best is the top."""
    scores = _scores(rows, name, seed)
    jobs = [Job(name, rate, seed) for rate in LADDER[:ALWAYS]]
    for rate in LADDER[ALWAYS:]:
        tried = [job.lr for job in jobs]
        if any(one not in scores for one in tried) or max(tried, key=scores.get) != tried[-1]:  # type: ignore[arg-type]
            break
        jobs.append(Job(name, rate, seed))
    return jobs


def best_rate(rows: Sequence[Row], name: str, seed: int) -> float | None:
    """A family's rate with the best score, None while its ladder is not done."""
    scores = _scores(rows, name, seed)
    tried = [job.lr for job in _ladder(rows, name, seed)]
    if any(rate not in scores for rate in tried):
        return None
    return max(tried, key=lambda rate: scores[rate])


def _scores(rows: Sequence[Row], name: str, seed: int) -> dict[float, float]:
    """Rate -> score; a rate that failed has none to speak of."""
    found = [row for row in rows if row["arm"] == name and row["seed"] == seed]
    return {row["lr"]: -1.0 if row.get("error") else row["new_score"] for row in found}


def unavailable(fields: Sequence[str]) -> list[str]:
    """Families with a setting that is not among the fields of this version's `LwFConfig`."""
    return [name for name, one in FAMILIES.items() if not set(one.changes) <= set(fields)]


def settings_of(job: Job, steps: int, rank: int) -> dict[str, Any]:
    """`LwFConfig`'s settings for a job; every arm has the same task rows, steps and schedule."""
    family = FAMILIES[job.arm]
    changes = dict(family.changes)
    if "rank_schedule" in changes:
        changes["rank_schedule"] = [[0.0, max(1, rank // 4)], [0.3, rank]]
    rows = TASK_ROWS + family.rehearsal
    return {
        "learning_rate": job.lr,
        "max_steps": steps,
        "warmup_steps": min(10, steps // 10),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "rehearsal_ratio": family.rehearsal / rows,
        "max_length": 512,
        "seed": job.seed,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 20,
        **changes,
    }


def seeded(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows without an error by arm and rate, each a list over seeds."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if not row.get("error"):
            found.setdefault((row["arm"], row["lr"]), []).append(row)
    return found


def scaled(job: Job, scale: float) -> Job:
    """The job under whose key a turned-down adapter's row stands."""
    return replace(job, arm=SCALED.format(scale))
