"""The dial: an adapter turned down after training, for less forgetting at less gain.

The LoRA update B A x is multiplied by a factor on the fly (`scaling`, which PEFT's layers and
Unsloth's kernels read at every forward), so no scale needs training: 0 is the base exactly, 1 the
adapter as trained (cf. WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903, which interpolates all
weights).
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lwf_unsloth.adapters import active_adapter
from lwf_unsloth.arguments import checked
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.evaluation import evaluate
from lwf_unsloth.hidden import unwrap
from lwf_unsloth.result_table import ResultTable, Tabled, figure
from lwf_unsloth.scores import Measure, Scores

logger = logging.getLogger(__name__)

WHAT = "lwf_unsloth dial"
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = ("nll", "kl", "right", "leak", "eos")
"""Measures of the table, where they were measured."""
_TRAINED = "_lwf_as_trained"
"""Attribute of the model: adapter -> what belongs to its scale 1."""


@dataclass(frozen=True)
class _AsTrained:
    """What a scale multiplies, as training left it."""

    scaling: dict[str, float]
    """Factor of each LoRA layer, by module name."""
    alpha: float
    patterns: dict[str, float]
    """PEFT's alpha_pattern."""


@checked()
def set_adapter_scale(model: Any, scale: float) -> None:
    """Scales the active adapter until it is set anew; 1 is the adapter as trained, 0 the base.

    `lora_alpha` in the adapter's config is changed with it, so `save_adapter`, `merge_model` and
    PEFT's own saving write an ordinary adapter with the scale in it. A snapshot teacher made
    before is scaled too, since it shares the layers: set the scale back before a second task.

    Args:
        model: A LoRA model, e.g. from `load_model`.
        scale: 0 or more; above 1 goes beyond what was trained.

    Raises:
        ConfigError: No such scale.
        ModelError: No single active LoRA adapter, or one whose scale is more than a factor (merged,
            DoRA, trained biases or embeddings).
    """
    _check_scale(scale)
    peft = unwrap(model)
    name = active_adapter(peft)
    layers = _lora_layers(peft, name)
    trained = _as_trained(peft, name, layers)
    for path, layer in layers.items():
        layer.scaling[name] = trained.scaling[path] * scale
    config = peft.peft_config[name]
    config.lora_alpha = _whole(trained.alpha * scale)
    patterns = {key: _whole(alpha * scale) for key, alpha in trained.patterns.items()}
    config.alpha_pattern = patterns
    loaded = getattr(peft, "lwf_loaded", None)
    if loaded is not None and loaded.lora:
        peft.lwf_loaded = replace(loaded, lora={**loaded.lora, "lora_alpha": config.lora_alpha})
    if scale == 1:
        vars(peft)[_TRAINED].pop(name)


def _check_scale(scale: Any) -> None:
    """Raises a ConfigError for what is no number from 0 on."""
    if (
        isinstance(scale, bool)
        or not isinstance(scale, (int, float))
        or not (math.isfinite(scale) and scale >= 0)
    ):
        raise ConfigError(
            f"scale is {scale!r}, but must be a number from 0 (the base) on; 1 is the adapter as "
            "trained."
        )


def adapter_scale(model: Any) -> float:
    """The scale that the active adapter stands at; 1 where it was never set."""
    peft = unwrap(model)
    name = active_adapter(peft)
    trained = vars(peft).get(_TRAINED, {}).get(name)
    if trained is None:
        return 1.0
    layers = _lora_layers(peft, name)
    path = max(trained.scaling, key=lambda one: abs(trained.scaling[one]))
    return float(layers[path].scaling[name] / trained.scaling[path])


@checked()
@contextmanager
def scale_adapter(model: Any, scale: float) -> Iterator[None]:
    """Scales the active adapter for a block; puts back the scale it had, also after an exception.

    Args:
        model: A LoRA model.
        scale: 0 or more; 1 is the adapter as trained, whatever `set_adapter_scale` has set.

    Raises:
        ConfigError, ModelError: As `set_adapter_scale`.
    """
    before = adapter_scale(model)
    set_adapter_scale(model, scale)
    try:
        yield
    finally:
        set_adapter_scale(model, before)


def _lora_layers(model: Any, name: str) -> dict[str, Any]:
    """The LoRA layers of an adapter by module name, checked."""
    config = model.peft_config[name]
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling
    }
    wrong = ""
    if not layers:
        wrong = "has no LoRA layers"
    elif any(getattr(layer, "merged", False) is True for layer in layers.values()):
        wrong = "is merged into the weights"
    elif getattr(config, "use_dora", False):
        wrong = "is DoRA, which also changes the size of the base's weights"
    elif getattr(config, "bias", "none") != "none" or getattr(config, "modules_to_save", None):
        wrong = "trains more than LoRA (biases or whole modules)"
    if wrong:
        raise ModelError(
            f"The adapter {name!r} {wrong}, so a factor on it does not lead from the base to the "
            "tuned model. Take a plain LoRA adapter, not merged."
        )
    return layers


def _as_trained(model: Any, name: str, layers: Mapping[str, Any]) -> _AsTrained:
    """What was noted before the first scaling; noted now if this is the first."""
    noted = vars(model).setdefault(_TRAINED, {})
    if name not in noted:
        config = model.peft_config[name]
        noted[name] = _AsTrained(
            {path: float(layer.scaling[name]) for path, layer in layers.items()},
            config.lora_alpha,
            dict(getattr(config, "alpha_pattern", None) or {}),
        )
    return noted[name]


def _whole(value: float) -> float:
    """A whole number as an int, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value


@dataclass(frozen=True, repr=False)
class DialResult(Tabled):
    """Scores at each scale; shows itself as a table."""

    scores: Mapping[float, Scores]
    """Scale -> scores, the smallest scale first."""
    stopped: str = ""
    """Why scales that were asked for are missing; empty where none is."""

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales, ascending."""
        return tuple(self.scores)

    def measure(self, set: str, name: str) -> dict[float, Measure]:
        """One measure of one set at each scale."""
        return {scale: one[set].measures[name] for scale, one in self.scores.items()}

    def choose(self, budget: float = 0.02, measure: str = "kl") -> float:
        """The scale with most gain on the task sets among those that cost no more than a budget.

        Args:
            budget: Most that any general set may show.
            measure: "kl" (nats per token), "nll" (its rise) or "leak" (its rise).

        Returns:
            The scale; the smallest one where none is within the budget.

        Raises:
            DataError: The scores hold no task set, no general set, or not this measure.
        """
        one = next(iter(self.scores.values()))
        tasks = [name for name, part in one.items() if part.kind == "task"]
        general = [
            name
            for name, part in one.items()
            if part.kind == "general" and measure in part.measures
        ]
        if not tasks or not general:
            raise DataError(
                f"The sets {list(one)} hold {len(tasks)} task sets and {len(general)} general sets "
                f"with {measure!r}; choosing a scale needs one of each."
            )
        within = [
            scale
            for scale, found in self.scores.items()
            if max(_cost(found[name].measures[measure]) for name in general) <= budget
        ]

        def gain(scale: float) -> float:
            parts = [self.scores[scale][name]["nll"].gain or 0.0 for name in tasks]
            return sum(parts) / len(parts)

        return max(within or [min(self.scales)], key=gain)

    def table(self) -> ResultTable:
        """One row a set and measure, one column a scale."""
        rows: list[tuple[str, ...]] = []
        one = next(iter(self.scores.values()))
        for name, part in one.items():
            first = True
            for key in SHOWN:
                if key not in part.measures:
                    continue
                found = self.measure(name, key).values()
                cells = (figure(at.tuned.value, at.unit) for at in found)
                rows.append((name if first else "", part.measures[key].name, *cells))
                first = False
        heads = ("set", "measure", *(f"scale {scale:g}" for scale in self.scales))
        caption = " ".join(text for text in (one.caption, self.stopped) if text)
        return ResultTable(heads, tuple(rows), caption)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them back."""
        scores = {f"{scale!r}": one.to_dict() for scale, one in self.scores.items()}
        return {"what": WHAT, "scores": scores, "stopped": self.stopped}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DialResult":
        """The object that `to_dict` gave."""
        scores = {float(scale): Scores.from_dict(one) for scale, one in values["scores"].items()}
        return cls(scores, str(values.get("stopped") or ""))


@checked()
def dial(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Any],
    scales: Sequence[float] = SCALES,
    *,
    answers: bool = False,
    done: DialResult | None = None,
    **settings: Any,
) -> DialResult:
    """Retention and gain at several scales of the adapter, without training.

    Args:
        model: From `load_model`, trained; left as it was found.
        tokenizer: Its tokenizer.
        sets: As `evaluate` takes them.
        scales: The scales to try.
        answers: Whether answers are asked for at every scale too (right answers, leak).
        done: What an earlier call that was cut off has given, of the same model, sets and settings:
            its scales are not measured again.
        **settings: As `evaluate` takes them; `base` is the model with the adapter off.

    Returns:
        The scores at each scale. `set_adapter_scale(model, result.choose())` and `save_adapter`
        keep one. Where an error or an interrupt comes after the first scale, what is done is given
        back, and `stopped` says why the rest is missing; give it as `done` to go on.

    Raises:
        ConfigError: A scale out of range, none, or another base.
        DataError, ModelError: As `evaluate` and `set_adapter_scale`.
    """
    if settings.get("base", "adapter_off") != "adapter_off":
        raise ConfigError(
            "dial goes from the model with the adapter off to the adapter as trained, so its base "
            'is "adapter_off": a snapshot of the adapter would be scaled with it. Leave base out.'
        )
    if not scales:
        raise ConfigError("scales is empty; give at least one, e.g. (0, 0.5, 1).")
    for scale in scales:
        _check_scale(scale)
    found, stopped = dict(done.scores) if done is not None else {}, ""
    for scale in sorted({float(scale) for scale in scales} - found.keys()):
        label = f"scale {scale:g}"
        try:
            with scale_adapter(model, scale):
                given = {**settings, "label": label}
                found[scale] = evaluate(model, tokenizer, sets, answers=answers, **given)
        except (Exception, KeyboardInterrupt) as error:
            if not found:
                raise
            why = str(error).split("\n")[0] or type(error).__name__
            stopped = f"Stopped at {label}, so later scales are missing: {why}"
            logger.warning("dial: %s", stopped)
            break
        logger.info("dial: %s done", label)
    return DialResult(dict(sorted(found.items())), stopped)


def _cost(measure: Measure) -> float:
    """What a general set lost: the rise, or the KL itself."""
    return measure.tuned.value if measure.change is None else measure.change.value
