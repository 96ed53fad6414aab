"""Which model teaches, and that a teacher pass leaves the student whole."""

import pytest
import torch

from lwf_unsloth.errors import TeacherError
from lwf_unsloth.objective import Objective
from lwf_unsloth.teacher import OwnTeacher, make_teacher, trained_tensors


def disturb(model, seed):
    """Gives LoRA a random state, as if it had been trained."""
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=draw))


@pytest.mark.parametrize("which", ["itself", "its base", "a copy of the wrapper"])
def test_the_student_is_no_second_model_and_stays_trainable(tiny_peft, which):
    model, _ = tiny_peft()
    wanted = [p.requires_grad for p in model.parameters()]
    teacher = {
        "itself": model,
        "its base": model.get_base_model(),
        "a copy of the wrapper": torch.nn.Sequential(model),
    }[which]
    with pytest.raises(TeacherError, match="Leave `teacher` out"):
        make_teacher(model, teacher)
    assert [p.requires_grad for p in model.parameters()] == wanted and any(wanted)


def test_a_name_is_no_teacher(tiny_peft):
    model, _ = tiny_peft()
    with pytest.raises(TeacherError, match="teacher is a str.*load_model"):
        make_teacher(model, "unsloth/gemma-2b-bnb-4bit")


@pytest.fixture()
def plain_model(tiny_model_dir):
    """The base as transformers loads it, with every weight trainable."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def test_a_plain_second_model_is_read_through_its_head_and_not_by_full_logits(
    tiny_peft, plain_model
):
    model, _ = tiny_peft(load_in_4bit=False)
    assert plain_model.lm_head.weight.requires_grad
    teacher = make_teacher(model, plain_model)
    objective = Objective.of(model, teacher, torch.arange(3, 9)[None])
    assert teacher.head is not None and not objective.full_logits


def test_a_second_model_that_changes_its_logits_falls_back_to_full_logits(
    tiny_peft, plain_model, caplog
):
    model, _ = tiny_peft(load_in_4bit=False)
    plain_model.lm_head.register_forward_hook(lambda module, given, logits: logits * 0.25)
    objective = Objective.of(model, make_teacher(model, plain_model), torch.arange(3, 9)[None])
    assert objective.head is not None and objective.full_logits
    assert "The teacher transforms its logits" in caplog.text


def test_a_swap_that_fails_halfway_leaves_the_student_whole(tiny_peft):
    class FirstTooLarge:
        def __init__(self, tensor):
            self.tensor, self.asked = tensor, 0

        def to(self, device):
            self.asked += 1
            if self.asked == 1:
                raise torch.OutOfMemoryError("no room for the snapshot")
            return self.tensor

    model, _ = tiny_peft()
    disturb(model, 1)
    snapshot = trained_tensors(model)
    disturb(model, 2)
    student = trained_tensors(model)
    teacher = OwnTeacher(model, snapshot)
    name = list(snapshot)[5]
    kept, snapshot[name] = snapshot[name], FirstTooLarge(snapshot[name])
    with pytest.raises(torch.OutOfMemoryError), teacher.in_place():
        pass
    assert all(torch.equal(t, student[n]) for n, t in trained_tensors(model).items())
    snapshot[name] = kept
    with teacher.in_place():
        assert not any(
            torch.equal(t, student[n]) for n, t in trained_tensors(model).items() if "lora_B" in n
        )
    assert all(torch.equal(t, student[n]) for n, t in trained_tensors(model).items())
