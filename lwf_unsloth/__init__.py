"""Fine-tune a 4-bit model on Alpaca-format data and keep what it knew.

The public names are loaded on first use (PEP 562), so `import lwf_unsloth` and `lwf-unsloth --help`
do not wait for torch, and Unsloth is always imported before the libraries that it patches.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_dial import DialResult, dial, scale_adapter, set_adapter_scale
    from .adapters import save_adapter
    from .advice import Advice, advise
    from .alpaca import AlpacaData, LoadReport, load_alpaca, load_text
    from .best_adapter import BestAdapter
    from .checkup import doctor
    from .comparison import Comparison, compare
    from .config import LwFConfig, ModelConfig
    from .diagnosis import Diagnoses, Diagnosis, diagnose
    from .errors import ConfigError, DataError, DiskError, LwfError, ModelError, TeacherError
    from .eval_sets import EvalSet
    from .evaluation import evaluate
    from .facts import TrainingFacts
    from .forgetting import ForgettingReport, forgetting_report
    from .forms import FORMS, Form
    from .generation import DEMO_PROMPTS, generate
    from .harness import evaluate_benchmarks
    from .losses import Head, lwf_loss
    from .merging import merge_model
    from .model import default_model, load_adapter, load_model
    from .plots import plot_dial, plot_forgetting, plot_recipes, plot_training
    from .preflight import Fit, fits
    from .recipes import Recipes, compare_recipes
    from .records import PromptTemplate, set_template
    from .rehearsal import mix_rehearsal
    from .row_writer import self_rehearsal
    from .samples import sample_path
    from .scores import Scores
    from .scoring import score
    from .sweep import read_sweep, run_sweep
    from .sweep_file import SweepPlan, read_sweep_file
    from .sweep_plot import plot_sweep
    from .sweep_result import SweepResult
    from .trainer import LwFTrainer
    from .widgets import panel

__version__ = "0.1.0"

_HOME = {
    "Advice": "advice",
    "AlpacaData": "alpaca",
    "BestAdapter": "best_adapter",
    "Comparison": "comparison",
    "ConfigError": "errors",
    "DEMO_PROMPTS": "generation",
    "DataError": "errors",
    "DiskError": "errors",
    "Diagnoses": "diagnosis",
    "Diagnosis": "diagnosis",
    "DialResult": "adapter_dial",
    "EvalSet": "eval_sets",
    "FORMS": "forms",
    "Fit": "preflight",
    "ForgettingReport": "forgetting",
    "Form": "forms",
    "Head": "losses",
    "LoadReport": "alpaca",
    "LwFConfig": "config",
    "LwFTrainer": "trainer",
    "LwfError": "errors",
    "ModelConfig": "config",
    "ModelError": "errors",
    "PromptTemplate": "records",
    "Recipes": "recipes",
    "Scores": "scores",
    "SweepPlan": "sweep_file",
    "SweepResult": "sweep_result",
    "TeacherError": "errors",
    "TrainingFacts": "facts",
    "advise": "advice",
    "compare": "comparison",
    "compare_recipes": "recipes",
    "default_model": "model",
    "diagnose": "diagnosis",
    "dial": "adapter_dial",
    "doctor": "checkup",
    "evaluate": "evaluation",
    "evaluate_benchmarks": "harness",
    "fits": "preflight",
    "forgetting_report": "forgetting",
    "generate": "generation",
    "load_adapter": "model",
    "load_alpaca": "alpaca",
    "load_model": "model",
    "load_text": "alpaca",
    "lwf_loss": "losses",
    "merge_model": "merging",
    "mix_rehearsal": "rehearsal",
    "panel": "widgets",
    "plot_dial": "plots",
    "plot_forgetting": "plots",
    "plot_recipes": "plots",
    "plot_sweep": "sweep_plot",
    "plot_training": "plots",
    "read_sweep": "sweep",
    "read_sweep_file": "sweep_file",
    "run_sweep": "sweep",
    "sample_path": "samples",
    "save_adapter": "adapters",
    "scale_adapter": "adapter_dial",
    "score": "scoring",
    "self_rehearsal": "row_writer",
    "set_adapter_scale": "adapter_dial",
    "set_template": "records",
}
"""Public name -> the module of this package that defines it."""

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, on its first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __name__):
            raise
        from lwf_unsloth.errors import InstallError

        raise InstallError(
            f"{__name__}.{name} needs the package {package!r}, which is not installed here. "
            f"Install it: pip install {package}. What does not use it works without."
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
