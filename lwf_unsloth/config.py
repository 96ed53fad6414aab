"""Every knob once, with unit and range: ModelConfig for the model, LwFConfig (an SFTConfig) for
the training.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lwf_unsloth.backend import prepare
from lwf_unsloth.checks import check_ratio
from lwf_unsloth.errors import ConfigError
from lwf_unsloth.field_types import check_fields
from lwf_unsloth.kl_budget import check_budget
from lwf_unsloth.rank_schedule import freeze_phases, plain, rank_phases
from lwf_unsloth.ranks import check_launch
from lwf_unsloth.schedules import schedules_of
from lwf_unsloth.without_effect import check_without_effect

prepare()

from trl import SFTConfig  # noqa: E402  (Unsloth patches it, so it comes after prepare)

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LWF_ROWS = ("auto", "rehearsal", "all", "response", "prompt")
LWF_KL = ("forward", "reverse", "target_masked")
LWF_CACHE = ("off", "topk", "hidden")


def _refuse(name: str, got: object, needed: str, why: str) -> ConfigError:
    return ConfigError(f"{name} is {got!r}, but must be {needed}: {why}")


@dataclass
class ModelConfig:
    """What to load and which LoRA to add; keyword names of `from_pretrained` and
    `get_peft_model`.
    """

    model_name: str = "unsloth/gemma-2b-bnb-4bit"
    """Hub id, local folder (pre-quantised 4-bit or not), or an embedded name
    ("smollm2-135m-instruct")."""
    max_seq_length: int = 2048
    """Longest sequence in tokens, 1 or more."""
    dtype: str | None = None
    """"float16", "bfloat16" or "float32"; None takes bf16 where the device has it, else fp16 (CPU:
    fp32)."""
    load_in_4bit: bool = True
    """Quantise to 4 bits (bitsandbytes) at load; a pre-quantised folder stays as it is."""
    bnb_4bit_quant_type: str = "nf4"
    """"nf4" or "fp4"."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too (about 0.4 bit a weight less)."""
    bnb_4bit_compute_dtype: str | None = None
    """Dtype of the 4-bit products; None takes `dtype`."""
    device_map: Any = None
    """Passed through to `from_pretrained`; None leaves it to Unsloth (under accelerate: one card a
    rank)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    token: str | None = field(default=None, repr=False)
    """Hub token for private or gated models; never logged, saved or shown."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    r: int = 8
    """LoRA rank, 1 or more."""
    lora_alpha: int = 16
    """LoRA scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on LoRA's input, 0 <= p < 1 (0 is Unsloth's fast path)."""
    bias: str = "none"
    """"none", "all" or "lora_only" (trained biases)."""
    target_modules: tuple[str, ...] | list[str] = TARGET_MODULES
    """Names of the linear modules that get LoRA; the error lists those there are."""
    use_gradient_checkpointing: bool | str = "unsloth"
    """"unsloth" (offloads), True or False."""
    random_state: int = 3407
    """Seed of LoRA's initial values."""

    def __post_init__(self) -> None:
        """Checks every field's range.

        Raises:
            ConfigError: A value out of range; names the field, the value and the range.
        """
        check_fields(self)
        self.model_name = os.fspath(self.model_name)
        if not self.model_name.strip():
            raise _refuse(
                "model_name",
                self.model_name,
                "a hub id, folder or embedded name",
                "there is no model to load",
            )
        if not 0 <= self.lora_dropout < 1:
            raise _refuse("lora_dropout", self.lora_dropout, "in 0 <= p < 1", "it is a probability")
        choices = {
            "dtype": (None, "float16", "bfloat16", "float32"),
            "bnb_4bit_quant_type": ("nf4", "fp4"),
            "bnb_4bit_compute_dtype": (None, "float16", "bfloat16", "float32"),
            "bias": ("none", "all", "lora_only"),
            "use_gradient_checkpointing": ("unsloth", True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise _refuse(
                    name, getattr(self, name), f"one of {allowed}", "nothing else is known here"
                )
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise _refuse(
                "target_modules",
                self.target_modules,
                "a list of module names",
                "LoRA needs a place",
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, without the token."""
        values = asdict(self)
        values.pop("token")
        values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def document(
        cls, model_name: str = "unsloth/gemma-2b-bnb-4bit", **changes: Any
    ) -> "ModelConfig":
        """The model settings of the document the project was founded on: r 8, alpha 16, dropout
        0.05.
        """
        values: dict[str, Any] = {
            "max_seq_length": 512,
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
        }
        return cls(model_name, **{**values, **changes})


@dataclass
class LwFConfig(SFTConfig):
    """Training settings: TRL's, with our defaults, and the `lwf_` and rehearsal knobs.

    The loss is `sum CE / N_ce + lwf_lambda * sum KL / N_kl`, both in nats per token, N counted
    over the whole accumulated batch (Learning without Forgetting, arXiv 1606.09282, with the KL of
    arXiv 1503.02531).
    """

    learning_rate: float = 2e-4
    """Peak rate of AdamW."""
    per_device_train_batch_size: int = 2
    """Rows a forward, task and rehearsal together."""
    gradient_accumulation_steps: int = 4
    """Forwards an optimizer step; 2 x 4 is 8 rows a step."""
    num_train_epochs: float = 1.0
    """Passes over the task rows."""
    warmup_steps: float = 0.05
    """Optimizer steps of linear warm-up; under 1 it is a share of the run."""
    lr_scheduler_type: str = "linear"
    """Decay after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    optim: str = "adamw_torch_fused"
    """Optimizer; LoRA's states are small, so 8-bit ones save nothing worth their noise."""
    max_length: int | None = 512
    """Tokens a row; longer rows lose their tail, counted and told."""
    logging_steps: float = 1
    """Optimizer steps between two log lines."""
    save_strategy: str = "epoch"
    """When checkpoints are written."""
    save_total_limit: int | None = 3
    """Checkpoints kept."""
    report_to: Any = "none"
    """Services to log to, by TRL's names; none unless asked for."""
    train_on: str = "response"
    """"response": labels on the answer only; "all": on the prompt too."""

    lwf_lambda: float = 2.0
    """Weight of the KL term, >= 0. 0 without rehearsal rows is TRL's SFTTrainer exactly."""
    lwf_temperature: float = 1.0
    """Softmax temperature T > 0 of teacher and student; the KL is multiplied by T^2."""
    lwf_lambda_schedule: str = "constant"
    """Lambda over the run: "constant" is `lwf_lambda`; "linear:0->2" and "cosine:4->0.5" go from
    the first value to the second, in place of `lwf_lambda`; "warmup:0.1" rises from 0 to
    `lwf_lambda` over the first tenth of the steps."""
    lwf_temperature_schedule: str = "constant"
    """The same for the temperature; a warm-up begins at 1. Evaluations take `lwf_temperature`, so
    that they can be compared."""
    lwf_kl_budget: float | None = None
    """Nats per token that the KL may take, above 0: lambda then moves by itself, from `lwf_lambda`
    on, so that the KL of the tokens where it acts stays just under the budget. None is off."""
    lwf_lambda_min: float = 0.05
    """Least lambda that a budget gives, above 0."""
    lwf_lambda_max: float = 100.0
    """Most lambda that a budget takes; a KL above the budget there is told."""
    lwf_kl: str = "forward"
    """"forward" KL(teacher || student), "reverse" KL(student || teacher), "target_masked" (arXiv
    2605.29498)."""
    lwf_rows: str = "auto"
    """Where the KL acts: "rehearsal" rows, "all" tokens, "response" or "prompt" tokens of task
    rows (rehearsal rows stay whole). "auto" is "rehearsal" where there are rehearsal rows, else
    "all"."""
    rank_schedule: Any = None
    """LoRA's rank in phases: [(0.0, 4), (0.5, 16)] trains 4 columns in the first half of the steps
    and 16 in the second. The adapter has the last rank from the beginning (`ModelConfig.r`); a text
    says the same, "0:4, 0.5:16". None trains all of it throughout."""
    freeze_schedule: Any = None
    """What stands still, in phases: [(0.0, "mlp"), (0.3, "")] moves no tensor with "mlp" in its
    name (a regular expression) in the first 30 % of the steps, and all of them after. Also
    "0:mlp, 0.3:"."""
    rehearsal_ratio: float = 0.1
    """Share of rehearsal rows in the mixed set, 0 <= ratio < 1; without rehearsal rows it has no
    effect."""
    rehearsal_ce: bool = False
    """Also learn the rehearsal answers by cross entropy (this retrains instead of preserving)."""
    self_rehearsal_rows: int = 200
    """Most rows that the model writes itself with rehearsal_dataset="self", 1 or more; no more than
    the run can use."""
    lwf_stop_at_kl: float | None = None
    """Ends the run, with a checkpoint, when the KL on rehearsal rows (on task rows where there are
    none), as the mean of the last 10 logged values, is above so many nats per token; above 0. None
    is off."""
    lwf_max_bad_steps: int = 20
    """Steps in a row with a gradient that is not finite (each is skipped and told with its rows)
    that end the run, 1 or more; the adapter as it was before them is kept in
    `output_dir`/last_good."""
    lwf_cache: str = "off"
    """Where the teacher's targets of a row come from when it comes again: "off", a forward;
    "hidden", final hidden states on disk, the same loss to rounding; "topk", on disk the
    `lwf_cache_k` most probable tokens and the mass of the rest, a KL from below (forward KL at a
    constant temperature only)."""
    lwf_cache_k: int = 64
    """Tokens kept with "topk", 1 or more; 8 bytes each."""
    lwf_cache_dir: str | None = None
    """Folder of the cache; None is `output_dir`/teacher_cache. Runs that share it, share rows."""

    def __post_init__(self) -> None:
        """Checks the ranges, then TRL's own checks.

        Raises:
            ConfigError: A value out of range; names the field, the value and the range.
        """
        check_launch(self)
        self._precision_given = bool(self.fp16) or self.bf16 is not None
        check_lwf(self)
        try:
            super().__post_init__()
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            raise ConfigError(f"These settings do not go together: {said}") from error

    @classmethod
    def document(cls, output_dir: str = "runs/document", **changes: Any) -> "LwFConfig":
        """The training settings of the document: KL on all tokens at lambda 0.5, CE on rehearsal
        rows, ratio 0.2.

        Batch 4 x accumulation 8, 3 epochs, rate 2e-4, 100 warm-up steps with linear decay, no
        weight decay, 512 tokens.
        """
        values: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 3,
            "learning_rate": 2e-4,
            "warmup_steps": 100,
            "lr_scheduler_type": "linear",
            "weight_decay": 0.0,
            "max_length": 512,
            "lwf_lambda": 0.5,
            "lwf_temperature": 1.0,
            "lwf_rows": "all",
            "lwf_kl": "forward",
            "rehearsal_ratio": 0.2,
            "rehearsal_ce": True,
        }
        return cls(output_dir, **{**values, **changes})

    def __repr__(self) -> str:
        """As `str`, which transformers writes without the values of tokens."""
        return str(self)

    def lwf_settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values for reports and model cards."""
        own = ("lwf_", "rehearsal_", "self_rehearsal_")
        names = [f.name for f in fields(LwFConfig) if f.name.startswith(own)]
        names.remove("lwf_cache_dir")  # a machine's path
        names += [
            "learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
        ]
        names += [
            "max_steps",
            "warmup_steps",
            "weight_decay",
            "max_length",
            "train_on",
            "label_smoothing_factor",
        ]
        names += ["rank_schedule", "freeze_schedule", "seed", "fp16", "bf16"]
        values = {name: getattr(self, name) for name in names}
        values["lr_scheduler_type"] = str(
            getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        )
        return values


def check_lwf(config: LwFConfig) -> None:
    """Checks the ranges of our own fields.

    Raises:
        ConfigError: A value out of range, or settings that leave a part without effect.
    """
    check_fields(config)
    if config.lwf_lambda < 0:
        raise _refuse("lwf_lambda", config.lwf_lambda, "a number >= 0", "it weighs the KL term")
    if config.lwf_temperature <= 0:
        raise _refuse(
            "lwf_temperature", config.lwf_temperature, "a number > 0", "logits are divided by it"
        )
    check_ratio(config.rehearsal_ratio, "rehearsal_ratio")
    if config.lwf_rows not in LWF_ROWS:
        raise _refuse(
            "lwf_rows", config.lwf_rows, f"one of {LWF_ROWS}", "it says on which tokens the KL acts"
        )
    if config.lwf_kl not in LWF_KL:
        raise _refuse("lwf_kl", config.lwf_kl, f"one of {LWF_KL}", "no other direction is built")
    schedules_of(config)
    config.rank_schedule = plain(rank_phases(config.rank_schedule))
    config.freeze_schedule = plain(freeze_phases(config.freeze_schedule))
    check_budget(config)
    _check_cache(config)
    _check_rehearsal(config)
    if config.train_on not in ("response", "all"):
        raise _refuse(
            "train_on", config.train_on, '"response" or "all"', "it says which tokens are labels"
        )
    check_without_effect(config, own_loss=config.lwf_lambda > 0)
    if config.packing or config.padding_free or config.eval_packing:
        raise ConfigError(
            "packing and padding_free join rows, but KL and rehearsal act by row: leave them False."
        )
    if not 0 <= config.label_smoothing_factor < 1:
        raise _refuse(
            "label_smoothing_factor",
            config.label_smoothing_factor,
            "in 0 <= e < 1",
            "it is a share",
        )


def _check_rehearsal(config: LwFConfig) -> None:
    """Checks where too high a KL ends the run."""
    limit = config.lwf_stop_at_kl
    if limit is None:
        return
    if limit <= 0:
        why = "at 0 a run would end at its first step; None never ends it"
        raise _refuse("lwf_stop_at_kl", limit, "a number > 0, or None", why)
    if config.lwf_lambda == 0:
        raise ConfigError(
            f"lwf_stop_at_kl is {limit}, but lwf_lambda is 0, so no KL is measured and the run "
            "would never be ended by it. Set lwf_lambda above 0, or leave lwf_stop_at_kl out."
        )


def _check_cache(config: LwFConfig) -> None:
    """Checks the fields of the teacher cache."""
    if config.lwf_cache not in LWF_CACHE:
        why = "it says what is kept of the teacher"
        raise _refuse("lwf_cache", config.lwf_cache, f"one of {LWF_CACHE}", why)
    if config.lwf_cache == "topk" and config.lwf_kl != "forward":
        raise ConfigError(
            f'lwf_cache is "topk" and lwf_kl is {config.lwf_kl!r}: what the top k leaves out '
            'decides that direction, so only "forward" can be taken from it. Take '
            'lwf_cache="hidden", which serves every direction, or lwf_kl="forward".'
        )
