"""A step whose gradient is not finite, on a GPU: passed over there, and nothing waits for it."""

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402

from lwf_unsloth.teacher import trained_tensors  # noqa: E402


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bad_step_is_passed_over_on_the_device_as_it_is_when_waited_for(llama, tmp_path, dtype):
    found = []
    for late in (None, False):
        model, tokenizer = llama(dtype)
        start = trained_tensors(model)
        trainer = gpu.make_trainer(model, tokenizer, tmp_path / str(late), max_steps=8)
        trainer.guard.late = late
        compute, calls = trainer.compute_loss, []

        def loss(*args, compute=compute, calls=calls, **kwargs):
            calls.append(1)
            return compute(*args, **kwargs) * (float("nan") if len(calls) == 5 else 1.0)

        trainer.compute_loss = loss
        trainer.train()
        assert trainer.guard.skipped >= 1
        values = trained_tensors(trainer.model)
        assert all(bool(value.isfinite().all()) for value in values.values())
        found.append({name: value - start[name] for name, value in values.items()})
    assert gpu.distance(found[0], found[1]) < 0.05, "a step more or less is a tenth"
