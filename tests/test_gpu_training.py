"""Training through Unsloth's CUDA path: loading, hidden states, teacher, KL, precision."""

import math

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402
from conftest import SENTENCES  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from lwf_unsloth.hidden import head_matches, model_hidden, model_logits, output_head  # noqa: E402

BOTH = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def test_a_folder_is_loaded_in_4_bits_and_the_sentence_says_so(llama):
    model, _ = llama()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8
    assert layer.weight.numel() * 2 == 128 * 128, "two weights a byte"
    loaded = model.lwf_loaded
    assert (loaded.bits, loaded.quantized_layers, loaded.linear_layers) == (4, 14, 14)
    assert "4-bit weights (nf4, double quantisation)" in str(loaded)
    assert torch.cuda.get_device_name() in str(loaded)
    assert next(model.parameters()).is_cuda


def test_a_prequantised_folder_keeps_its_4_bit_weights_even_if_16_bits_are_asked_for(gpu_folders):
    from safetensors.torch import load_file

    model, _ = gpu.load(gpu_folders["prequantised"], load_in_4bit=False)
    saved = load_file(gpu_folders["prequantised"] / "model.safetensors")
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    assert torch.equal(weight.data.cpu(), saved["model.layers.1.mlp.up_proj.weight"])
    assert model.lwf_loaded.bits == 4
    assert "load_in_4bit=False was asked for" in str(model.lwf_loaded)


@BOTH
@pytest.mark.parametrize("kind", ["llama", "gemma", "prequantised"])
def test_hidden_states_times_the_head_are_the_models_logits(gpu_folders, kind, dtype):
    model, tokenizer = gpu.load(gpu_folders[kind], dtype)
    gpu.disturb(model)
    model.for_training()
    ids, mask = gpu.tokens(tokenizer, SENTENCES[:3])
    head = output_head(model)
    assert head is not None and head_matches(model, head, ids[:1])
    with torch.no_grad():
        hidden = model_hidden(model, ids, mask)
        logits = model_logits(model, ids, mask)
    assert hidden.shape == (*ids.shape, 128) and logits.shape[-1] == head.weight.shape[0]
    ours = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight)
    real = mask.bool()
    rounding = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    assert (ours - logits)[real].abs().max() <= rounding * logits[real].abs().max()


@BOTH
def test_the_teacher_is_the_base_before_and_after_training(llama, gpu_folders, tmp_path, dtype):
    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_base

    model, tokenizer = llama(dtype)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, learning_rate=0.05)
    ids, mask = gpu.tokens(tokenizer, SENTENCES[:3])
    real = mask.bool()

    def teacher():
        model.for_training()
        return trainer.teacher.hidden(ids, mask)[real].float()

    before = teacher()
    trainer.train()
    assert torch.equal(teacher(), before), "bit for bit, after training too"
    with torch.no_grad():
        student = model_hidden(model, ids, mask)[real].float()
        base, _, _ = load_base(
            ModelConfig(str(gpu_folders["llama"]), dtype=dtype, max_seq_length=512)
        )
        alone = base(input_ids=ids, attention_mask=mask).logits[real].float()
        head = trainer.objective.head.weight
        ours = torch.nn.functional.linear(before.to(head.dtype), head).float()
    rounding = {"float16": 1e-2, "bfloat16": 6e-2}[dtype]
    assert (ours - alone).abs().max() <= rounding * alone.abs().max()
    assert (student - before).abs().max() > 0.2 * before.abs().max()


@BOTH
def test_kl_is_exactly_0_at_the_first_step_and_above_0_after(llama, tmp_path, dtype):
    model, tokenizer = llama(dtype)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, rehearsal=0, lwf_rows="all")
    trainer.train()
    kl = gpu.logged(trainer, "kl")
    assert kl[0] == 0.0
    assert len(kl) == 3 and min(kl[1:]) > 0 and all(map(math.isfinite, kl))


def test_kl_on_rehearsal_rows_alone_starts_at_0_up_to_rounding(llama, tmp_path):
    """The teacher sees fewer rows than the student, and another shape is another cuBLAS kernel."""
    model, tokenizer = llama()
    trainer = gpu.make_trainer(model, tokenizer, tmp_path)
    trainer.train()
    kl = gpu.logged(trainer, "kl_rehearsal")
    assert 0 <= kl[0] < 1e-4 and kl[-1] > 10 * kl[0]


class Steps(TrainerCallback):
    """Notes at every optimizer step whether it was skipped, and the loss scale."""

    def __init__(self):
        self.skipped, self.scales = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.skipped.append(bool(self.trainer.accelerator.optimizer_step_was_skipped))
        scaler = self.trainer.accelerator.scaler
        self.scales.append(scaler.get_scale() if scaler is not None else 1.0)


def test_fp16_trains_under_a_gradscaler_without_nan(llama, tmp_path):
    model, tokenizer = llama("float16")
    steps = Steps()
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, callbacks=[steps], num_train_epochs=4)
    steps.trainer = trainer
    start = gpu.trained(model)
    trainer.train()
    losses = gpu.logged(trainer)
    assert trainer.accelerator.scaler is not None
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(math.isfinite(scale) and scale > 0 for scale in steps.scales)
    assert len(steps.skipped) == 16 and sum(steps.skipped) <= 4
    after = gpu.trained(model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(after[name], start[name]) for name in start)


def test_bf16_trains_without_a_scaler(llama, tmp_path):
    model, tokenizer = llama("bfloat16")
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, num_train_epochs=3)
    trainer.train()
    losses = gpu.logged(trainer)
    assert trainer.accelerator.scaler is None
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@BOTH
def test_exactly_one_of_fp16_and_bf16_is_on_and_it_is_the_models(llama, tmp_path, dtype):
    model, tokenizer = llama(dtype)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path)
    assert (trainer.args.fp16, trainer.args.bf16) == (dtype == "float16", dtype == "bfloat16")
    assert trainer.accelerator.mixed_precision == {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    assert not trainer.args.fp16_full_eval and not trainer.args.bf16_full_eval


def test_asking_for_the_other_precision_is_refused(llama, tmp_path):
    model, tokenizer = llama("float16")
    with pytest.raises((TypeError, ValueError), match="(?i)float16|fp16"):
        gpu.make_trainer(model, tokenizer, tmp_path, bf16=True)
