"""Training through Unsloth's CUDA path: gradients, lambda 0, resume, and other teachers."""

import math

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from lwf_unsloth.backend import prepare  # noqa: E402

prepare()

import gpu_shapes as gpu  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

BOTH = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@BOTH
@pytest.mark.parametrize("rows", ["rehearsal", "all"])
def test_batch_8x1_equals_1x8_and_2x4_in_gradient(llama, tmp_path, rows, dtype):
    model, tokenizer = llama(dtype)
    gpu.disturb(model)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, lwf_rows=rows)
    batch = gpu.mixed_rows(trainer)
    assert sum(row["is_rehearsal"] for row in batch) == 2
    whole, loss = gpu.gradients(trainer, batch, 8)
    rounding = {"float16": 0.01, "bfloat16": 0.06}[dtype]
    for micro in (4, 2, 1):
        parts, parts_loss = gpu.gradients(trainer, batch, micro)
        assert parts_loss == pytest.approx(loss, rel=rounding)
        assert gpu.distance(parts, whole) < rounding, micro


def test_checkpointing_unsloth_true_and_false_give_the_same_gradients(llama, tmp_path):
    found = {}
    for way in (False, True, "unsloth"):
        model, tokenizer = llama("float16", use_gradient_checkpointing=way)
        gpu.disturb(model)
        trainer = gpu.make_trainer(model, tokenizer, tmp_path, lwf_rows="all")
        found[way] = gpu.gradients(trainer, gpu.mixed_rows(trainer), 4)
        model.zero_grad()
    for way in (True, "unsloth"):
        assert found[way][1] == pytest.approx(found[False][1], rel=1e-4)
        assert gpu.distance(found[way][0], found[False][0]) < 3e-3, way


def test_the_one_pass_gives_the_gradient_of_full_logits(llama, tmp_path):
    model, tokenizer = llama("float16")
    gpu.disturb(model)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, lwf_rows="all", lwf_temperature=2.0)
    rows = gpu.mixed_rows(trainer)
    one_pass, loss = gpu.gradients(trainer, rows, 4)
    trainer.objective.head = None
    full, full_loss = gpu.gradients(trainer, rows, 4)
    assert full_loss == pytest.approx(loss, rel=5e-3)
    assert gpu.distance(full, one_pass) < 0.02


def test_only_lora_gets_gradients_and_stays_in_fp32(llama, tmp_path):
    model, tokenizer = llama("float16")
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, eval_dataset=gpu.numbered(4, "held"))
    found, _ = gpu.gradients(trainer, gpu.mixed_rows(trainer), 4)
    assert len(found) == 28 and all("lora_" in name for name in found)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert {p.dtype for p in gpu.trained(model).values()} == {torch.float32}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_lambda_0_without_rehearsal_has_the_losses_of_sfttrainer(llama, tmp_path):
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTTrainer

    model, tokenizer = llama("bfloat16")
    ours = gpu.make_trainer(model, tokenizer, tmp_path, rehearsal=0, lwf_lambda=0.0)
    ours.train()
    model, tokenizer = llama("bfloat16")
    plain = SFTTrainer(
        model,
        args=ours.args,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # else Unsloth joins rows without padding
        train_dataset=ours.train_dataset.remove_columns(["is_rehearsal", "prompt_length"]),
    )
    plain.train()
    assert len(gpu.logged(ours)) == 3
    assert gpu.logged(ours) == pytest.approx(gpu.logged(plain), rel=5e-3)


def test_resume_after_a_kill_equals_the_uninterrupted_run(llama, tmp_path):
    class Killed(RuntimeError):
        pass

    class KillAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise Killed

    run = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = gpu.make_trainer(*llama("bfloat16"), tmp_path / "whole", **run)
    whole.train()
    first = gpu.make_trainer(*llama("bfloat16"), tmp_path / "cut", callbacks=[KillAt()], **run)
    with pytest.raises(Killed):
        first.train()
    second = gpu.make_trainer(*llama("bfloat16"), tmp_path / "cut", **run)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step == 8
    assert gpu.logged(second)[4:] == pytest.approx(gpu.logged(whole)[4:], rel=5e-3)
    start = gpu.trained(llama("bfloat16")[0])
    moved = {n: v - start[n] for n, v in gpu.trained(whole.model).items()}
    again = {n: v - start[n] for n, v in gpu.trained(second.model).items()}
    assert gpu.distance(again, moved) < 0.05


def test_an_adapter_already_trained_is_the_teacher_of_the_next_task(llama, tmp_path):
    model, tokenizer = llama("float16")
    gpu.disturb(model)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, rehearsal=0, lwf_rows="all")
    assert trainer.teacher.kind == "snapshot"
    start = gpu.trained(model)
    trainer.train()
    kl = gpu.logged(trainer, "kl")
    assert kl[0] == 0.0 and min(kl[1:]) > 0
    assert all(torch.equal(trainer.teacher.snapshot[n], v) for n, v in start.items())


def test_a_second_model_on_the_gpu_can_be_the_teacher(llama, gpu_folders, tmp_path):
    other, _ = gpu.load(gpu_folders["llama"], "float16", load_in_4bit=False)
    model, tokenizer = llama("float16")
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, teacher=other)
    assert trainer.teacher.kind == "model" and "cuda" in str(trainer.teacher)
    trainer.train()
    kl = gpu.logged(trainer, "kl")
    assert 0 < kl[0] < 1 and all(map(math.isfinite, kl)), "16-bit against 4-bit weights"


def test_a_second_model_on_the_cpu_can_be_the_teacher(llama, gpu_folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = llama("float16")  # Unsloth's patches come first: the harder order
    other = AutoModelForCausalLM.from_pretrained(gpu_folders["llama"], dtype=torch.float32)
    trainer = gpu.make_trainer(model, tokenizer, tmp_path, teacher=other)
    assert "cpu" in str(trainer.teacher)
    trainer.train()
    kl = gpu.logged(trainer, "kl")
    assert 0 < kl[0] < 1 and all(map(math.isfinite, kl)), "16-bit against 4-bit weights"


def test_a_second_trainer_on_the_same_model_checkpoints_and_trains_as_the_first(llama, tmp_path):
    model, tokenizer = llama("float16")
    start = gpu.trained(model)
    first = gpu.make_trainer(model, tokenizer, tmp_path)
    first.train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start:
                p.copy_(start[name])
    second = gpu.make_trainer(model, tokenizer, tmp_path)
    assert second.teacher.kind == "adapter_off"
    second.train()
    assert gpu.logged(second) == pytest.approx(gpu.logged(first), rel=2e-3)
