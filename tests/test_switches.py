"""What a teacher pass switches for a moment, and the way of hidden states through wrappers."""

import pytest
import torch
from torch import nn

from lwf_unsloth.switches import adapters_off, changed, dropout_off, parts_of, uncheckpointed
from lwf_unsloth.teacher import OwnTeacher

IDS = torch.arange(3, 15).reshape(2, 6)


def test_a_module_that_came_later_is_found_by_the_next_pass():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    with dropout_off(model):
        assert not model[1].training
    model.append(nn.Sequential(nn.Dropout(0.5)))
    with dropout_off(model):
        assert not model[2][0].training
    assert model[1].training and model[2][0].training


def test_the_modules_are_walked_once_for_many_passes(tiny_peft, monkeypatch):
    model, _ = tiny_peft()
    teacher = OwnTeacher(model)
    teacher.hidden(IDS, None)  # whose forward makes module lists of its own
    monkeypatch.setattr(type(model), "modules", lambda self: pytest.fail("walked again"))
    teacher.hidden(IDS, None)


def test_attributes_come_back_also_after_an_error_and_where_the_class_gave_them():
    class Part(nn.Module):
        switch = False

    part, other = Part(), nn.Module()
    other.size = 3
    with pytest.raises(KeyError), changed([(part, "switch", True), (other, "size", 4)]):
        assert part.switch and other.size == 4
        raise KeyError
    assert "switch" not in vars(part) and part.switch is False and other.size == 3


def test_adapters_off_is_pefts_disable_adapter_but_leaves_what_is_trainable(tiny_peft):
    model, _ = tiny_peft()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.3)
    wanted = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        with adapters_off(model):
            assert [p.requires_grad for p in model.parameters()] == wanted
            ours = model(input_ids=IDS).logits
        again = model(input_ids=IDS).logits
    assert torch.equal(ours, base) and torch.equal(again, tuned) and not torch.equal(ours, tuned)


def test_a_model_without_adapter_layers_is_turned_off_by_its_own_disable_adapter():
    class Prompted(nn.Linear):
        off = False

        def disable_adapter(self):
            self.weight.requires_grad_(False)
            return changed([(self, "off", True)])

    model = Prompted(2, 2)
    assert adapters_off(model) is None
    teacher = OwnTeacher.__new__(OwnTeacher)
    teacher.model, teacher.snapshot = model, None
    with teacher.in_place():
        assert model.off
    assert not model.off and model.weight.requires_grad


def test_a_teacher_pass_checkpoints_nothing_and_the_students_forward_still_does(tiny_peft):
    model, _ = tiny_peft(use_gradient_checkpointing=True)
    model.train()
    found = [m for m in parts_of(model).checkpointed if m.gradient_checkpointing]
    assert found, "this model checkpoints"
    found[0].gradient_checkpointing = "unsloth"  # what its for_training() leaves
    with uncheckpointed(model):
        assert not any(m.gradient_checkpointing for m in found)
    assert [m.gradient_checkpointing for m in found] == ["unsloth"] + [True] * (len(found) - 1)


def test_hidden_states_stay_in_half_precision_under_mixed_precisions_wrapper(tiny_peft):
    from accelerate.utils import convert_outputs_to_fp32

    from lwf_unsloth.hidden import model_hidden

    model, _ = tiny_peft()
    plain = model_hidden(model, IDS, None)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.get_base_model().model(input_ids=IDS).last_hidden_state

    def halved(*args, **kwargs):
        out = own(*args, **kwargs)
        out.states = out.states.bfloat16()
        return out

    own = model.forward
    model.forward = convert_outputs_to_fp32(halved)
    try:
        hidden = model_hidden(model, IDS, None)
    finally:
        model.forward = own
    assert hidden.dtype == torch.bfloat16 and plain.dtype == expected.dtype == torch.float32
    assert torch.equal(hidden, plain.bfloat16())
    hidden.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_a_right_padded_batch_needs_no_mask(tiny_peft):
    from lwf_unsloth.hidden import model_hidden

    model, _ = tiny_peft()
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (torch.arange(9) < 6).long().expand(2, 9)
    with torch.no_grad():
        alone = model_hidden(model, IDS, torch.ones_like(IDS))
        for given in (None, mask):
            assert torch.allclose(model_hidden(model, padded, given)[:, :6], alone, atol=1e-5)
