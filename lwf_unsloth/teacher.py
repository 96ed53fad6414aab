"""Where the teacher's targets come from: the same weights as they stood at the start, or a second
model.

The teacher is the model as it stood when training began (Learning without Forgetting, arXiv
1606.09282). With a fresh LoRA adapter that is the base model with the adapter off, at no memory.
With an adapter that is already trained, trained biases or embeddings it is a snapshot of the
trained tensors: else the second task would be pulled back to the base and forget the first.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lwf_unsloth.errors import TeacherError
from lwf_unsloth.hidden import causal_lm, model_hidden, model_logits, output_head, unwrap
from lwf_unsloth.losses import Head
from lwf_unsloth.switches import adapters_off, dropout_off, uncheckpointed

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """Gives the targets of a batch; never changes what it finds."""

    head: Head | None

    @property
    def kind(self) -> str:
        """One of "adapter_off", "snapshot", "model"."""

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final hidden states (B, T, H), no gradient."""

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Full logits (B, T, V), no gradient."""

    def __str__(self) -> str:
        """One sentence for the user."""


class OwnTeacher:
    """The student's own weights: adapter off, or a snapshot of the trained tensors swapped in."""

    def __init__(self, model: nn.Module, snapshot: dict[str, Tensor] | None = None) -> None:
        """Makes the teacher.

        Args:
            model: The student, unwrapped.
            snapshot: Trained tensors by parameter name as they stood at the start; None: adapter
                off.
        """
        self.model = model
        self.snapshot = snapshot
        self.head = output_head(model)

    @property
    def kind(self) -> str:
        """How the weights become the teacher: "adapter_off" or "snapshot"."""
        return "adapter_off" if self.snapshot is None else "snapshot"

    def __str__(self) -> str:
        """One sentence for the user."""
        if self.snapshot is None:
            return "The teacher is the base model: the same weights with the adapter off."
        size = sum(t.numel() * t.element_size() for t in self.snapshot.values()) / 2**20
        return (
            "The teacher is the model as it stands now, with what its adapter has learned "
            f"(a snapshot of the trained tensors, {size:.1f} MiB)."
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Turns the student into the teacher for the block; restores everything, also after an
        exception.

        Nothing is checkpointed inside: without gradients that would only copy activations away.
        """
        if self.snapshot is not None:
            way: Any = self._swapped()
        else:
            way = adapters_off(self.model) or self._adapter_off()
        with torch.no_grad(), uncheckpointed(self.model), dropout_off(self.model), way:
            yield

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """PEFT's own way, slow, for adapters without layers of their own (prompt tuning)."""
        disable = getattr(self.model, "disable_adapter", None)
        grads = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with nullcontext() if disable is None else disable():
                yield
        finally:
            for parameter, wanted in grads:
                parameter.requires_grad_(wanted)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Swaps the storages: autocast's cache of cast weights is cleared, since it goes by
        tensor.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """All or nothing: what may fail, bringing a resumed snapshot to the device, comes first."""
        assert self.snapshot is not None
        parameters = dict(self.model.named_parameters())
        kept = {name: t.to(parameters[name].device) for name, t in self.snapshot.items()}
        for name, tensor in kept.items():
            self.snapshot[name], parameters[name].data = parameters[name].data, tensor
        torch.clear_autocast_cache()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final hidden states (B, T, H), no gradient."""
        with self.in_place():
            return model_hidden(self.model, input_ids, attention_mask)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Full logits (B, T, V), no gradient."""
        with self.in_place():
            return model_logits(self.model, input_ids, attention_mask)


class ModelTeacher:
    """A second model, on its own device: more memory, any precision, the same vocabulary."""

    kind = "model"

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        """Checks the second model against the student.

        Args:
            model: The teacher, loaded; may sit on the CPU or another GPU.
            student: The model to train.

        Raises:
            TeacherError: No model, the student itself, or a vocabulary of another size.
        """
        _check_apart(model, student)
        ours, theirs = vocabulary(student), vocabulary(model)
        if ours != theirs:
            raise TeacherError(
                f"The teacher's head gives {theirs} tokens, the student's {ours}: their "
                f"distributions cannot be "
                "compared. Take a teacher of the same family and tokenizer, or leave `teacher` out."
            )
        self.model = model
        model.requires_grad_(False)  # first: a head that could be trained is none for the one pass
        model.eval()
        self.head = output_head(model)
        _positions_beside_input(model)

    def __str__(self) -> str:
        """One sentence for the user."""
        name = causal_lm(self.model).config.name_or_path
        return f"The teacher is a second model ({name}) on {self.device}."

    @property
    def device(self) -> torch.device:
        """Where the second model is."""
        return next(self.model.parameters()).device

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final hidden states (B, T, H) on the student's device, no gradient."""
        with torch.no_grad():
            at = self.device
            mask = None if attention_mask is None else attention_mask.to(at)
            return model_hidden(self.model, input_ids.to(at), mask).to(input_ids.device)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Full logits (B, T, V) on the student's device, no gradient."""
        with torch.no_grad():
            at = self.device
            mask = None if attention_mask is None else attention_mask.to(at)
            return model_logits(self.model, input_ids.to(at), mask).to(input_ids.device)


def _check_apart(teacher: Any, student: nn.Module) -> None:
    """Refuses what is no second model: the teacher is frozen, and so would be what it shares.

    Raises:
        TeacherError: Not a loaded model, or one that holds weights of the student.
    """
    if not isinstance(teacher, nn.Module):
        raise TeacherError(
            f"teacher is a {type(teacher).__name__}, but must be a loaded model: take "
            "load_model(...)[0], or leave `teacher` out and the model as it stands now is taken."
        )
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise TeacherError(
            "The teacher holds weights of the model that is to be trained (it is that model, or "
            "its base). A teacher is frozen, so nothing would be learned. Leave `teacher` out: the "
            "model as it stands now is the teacher then, at no memory."
        )


def _positions_beside_input(model: nn.Module) -> None:
    """Lets a model on the CPU take its rotary positions from the GPU, where Unsloth keeps them.

    Once Unsloth has loaded a model of an architecture, plain models of it are made with its rotary
    module too, which answers on the first GPU wherever the model is.
    """
    for module in model.modules():
        if hasattr(module, "multi_gpu_cos_cached"):
            module.register_forward_hook(_to_input)


def _to_input(module: nn.Module, given: tuple[Any, ...], found: tuple[Tensor, ...]) -> Any:
    """A forward hook: moves the output to the input's device, where it is not there yet."""
    return tuple(part.to(given[0].device) for part in found)


def vocabulary(model: Any) -> int:
    """Rows of the output head: the width of the logits."""
    layer = causal_lm(model).get_output_embeddings()
    return int(layer.weight.shape[0]) if layer.weight.dim() == 2 else int(layer.out_features)


def make_teacher(student: nn.Module, teacher: nn.Module | None = None) -> Teacher:
    """The teacher of a run: a second model if given, else the student as it stands now.

    Args:
        student: The model to train, LoRA added.
        teacher: A second model, or None.

    Raises:
        TeacherError: The second model is none, or has another vocabulary.
    """
    if teacher is not None:
        return ModelTeacher(teacher, student)
    student = unwrap(student)
    return OwnTeacher(student, None if adapter_is_fresh(student) else trained_tensors(student))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every tensor that will be trained, by parameter name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapter_is_fresh(model: nn.Module) -> bool:
    """Whether "adapter off" is the model as it stands: only LoRA is trained, and LoRA still adds
    nothing.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if any("lora_" not in name for name, _ in trained):
        return False
    return all(not p.detach().any() for name, p in model.named_parameters() if "lora_B" in name)
