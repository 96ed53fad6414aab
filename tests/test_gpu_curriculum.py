"""LoRA in phases through Unsloth's CUDA kernels: what a phase does not train does not move."""

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

PHASES = {"rank_schedule": [(0, 2), (0.5, 8)], "freeze_schedule": [(0, "mlp"), (0.25, "")]}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_columns_and_modules_of_a_later_phase_wait_for_it(llama, tmp_path, dtype, optim):
    model, tokenizer = llama(dtype)
    settings = {"max_steps": 8, "weight_decay": 0.1, "optim": optim, **PHASES}
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, **settings)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(gpu.trained(model))

    trainer.add_callback(Watch())
    trainer.train()
    seen.append(gpu.trained(model))
    assert gpu.logged(trainer, "lora_rank") == [2] * 4 + [8] * 4
    for name, first in seen[0].items():
        waiting = (slice(2, None),) if "lora_A" in name else (slice(None), slice(2, None))
        assert all(torch.equal(seen[step][name][waiting], first[waiting]) for step in range(5))
        assert "lora_A" in name or not seen[4][name][waiting].any()
        assert (seen[8][name] - first)[waiting].any(), f"{name}: it trains in the end"
        if "mlp" in name:
            assert all(torch.equal(seen[step][name], first) for step in range(3)), name


def test_one_phase_is_the_plain_run(llama, tmp_path):
    """Up to the order of sums, which may change from run to run; on a CPU it is bit for bit."""
    found = []
    for name, changes in {"plain": {}, "one": {"rank_schedule": [(0, 8)]}}.items():
        model, tokenizer = llama()
        start = gpu.trained(model)
        trainer = gpu.make_trainer(model, tokenizer, tmp_path / name, max_steps=4, **changes)
        trainer.train()
        found.append({name: value - start[name] for name, value in gpu.trained(model).items()})
    assert gpu.distance(found[1], found[0]) < 0.05
