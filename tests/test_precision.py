"""Mixed precision comes off a model with its trainer, and on again with the next one."""

import torch

from lwf_unsloth.precision import autocast_off


def test_a_second_trainer_on_the_same_model_has_its_autocast_too(short_run, tiny_peft):
    model, tokenizer = tiny_peft()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu") and torch.is_grad_enabled())
    )
    forward = model.forward
    for number in range(2):
        trainer = short_run(f"run{number}", (model, tokenizer), max_steps=1)
        trainer.accelerator.native_amp = True  # as with bf16=True
        seen.clear()
        trainer.train()
        assert any(seen), f"run {number} trains without mixed precision"
        autocast_off(trainer)
        seen.clear()
        model(input_ids=torch.tensor([[1, 5, 6]]))
        assert seen and not any(seen) and model.forward == forward
    model.forward = own = lambda *args, **kwargs: forward(*args, **kwargs)
    trainer = short_run("own", (model, tokenizer), max_steps=1)
    trainer.accelerator.native_amp = True
    trainer.train()
    autocast_off(trainer)
    autocast_off(trainer)
    assert model.forward is own, "what a user has put there stays"
