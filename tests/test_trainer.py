"""LwFTrainer: what it promises, on the tiny model through the real FastLanguageModel in 4-bit."""

import logging

import pytest
import torch
from datasets import Dataset

from lwf_unsloth.errors import ConfigError, DataError, LwfError, ModelError


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients(trainer, rows, micro):
    """Gradients of one accumulated step over `rows`, in micro-batches of `micro`, as the Trainer
    takes them."""
    model = trainer.model
    model.zero_grad()
    batches = [trainer.data_collator(rows[i : i + micro]) for i in range(0, len(rows), micro)]
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    model.train()
    total = sum(trainer.training_step(model, batch, items) for batch in samples)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, float(
        total
    )


def mixed_rows(trainer, count=8):
    order = list(trainer._get_train_sampler())
    return [trainer.train_dataset[i] for i in order[:count]]


def disturb(model, scale=0.5):
    """Gives LoRA a random state, as if it had been trained."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * scale)


@pytest.mark.parametrize("four_bit", [False, True])
def test_lambda_0_without_rehearsal_equals_sfttrainer_step_for_step(
    tiny_peft, settings, make_trainer, four_bit
):
    model, tokenizer = tiny_peft(load_in_4bit=four_bit)
    trainer = make_trainer(model, tokenizer, rehearsal=0, lwf_lambda=0.0)
    trainer.train()
    from trl import SFTTrainer

    model, tokenizer = tiny_peft(load_in_4bit=four_bit)
    start = trained(model)
    plain = SFTTrainer(
        model,
        args=settings(lwf_lambda=0.0),
        processing_class=tokenizer,
        train_dataset=trainer.train_dataset.remove_columns(["is_rehearsal", "prompt_length"]),
    )
    for name, p in plain.model.named_parameters():
        if name in start:  # TRL casts a 4-bit model's adapter to bf16; ours stays fp32, as on CUDA
            p.data = start[name]
    plain.train()
    ours, theirs = (
        [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        for run in (trainer, plain)
    )
    assert len(ours) == 3 and ours == theirs
    for name, value in trained(trainer.model).items():
        assert torch.equal(value, trained(plain.model)[name]), name


def test_the_adapter_stays_in_fp32(make_trainer):
    assert {p.dtype for p in trained(make_trainer().model).values()} == {torch.float32}


@pytest.mark.parametrize("rows", ["rehearsal", "all", "response", "prompt"])
@pytest.mark.parametrize("rehearsal_ce", [False, True])
def test_batch_8x1_equals_2x4_and_1x8_in_gradient_with_rehearsal_mixed_in(
    make_trainer, rows, rehearsal_ce
):
    trainer = make_trainer(lwf_rows=rows, rehearsal_ce=rehearsal_ce)
    disturb(trainer.model)
    batch = mixed_rows(trainer)
    assert sum(row["is_rehearsal"] for row in batch) == 2
    whole, loss = gradients(trainer, batch, 8)
    for micro in (4, 2, 1):
        parts, parts_loss = gradients(trainer, batch, micro)
        assert parts_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            assert torch.allclose(
                parts[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max()
            ), name


def test_kl_is_exactly_0_at_the_first_step_and_above_0_after(make_trainer):
    trainer = make_trainer()
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0
    assert min(kl[1:]) > 0


def test_padding_does_not_change_loss_or_kl(make_trainer):
    trainer = make_trainer(lwf_rows="all")
    disturb(trainer.model)
    rows = mixed_rows(trainer)
    _, alone = gradients(trainer, rows, 8)
    trainer._meters["train"].take()
    trainer.data_collator.multiple = 96
    _, padded = gradients(trainer, rows, 8)
    assert padded == pytest.approx(alone, rel=1e-5)


def test_only_lora_weights_get_gradients(make_trainer):
    trainer = make_trainer()
    grads, _ = gradients(trainer, mixed_rows(trainer), 8)
    assert grads and all("lora_" in name for name in grads)
    assert all(
        p.grad is None for name, p in trainer.model.named_parameters() if "lora_" not in name
    )


def test_every_log_line_carries_the_terms_in_nats_per_token(make_trainer):
    trainer = make_trainer(lwf_lambda=3.0)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == trainer.state.global_step == 4
    for line in lines:
        assert line["loss"] == pytest.approx(
            line["task_loss"] + 3.0 * line["kl_rehearsal"], rel=1e-4
        )
        assert line["kl"] == line["kl_rehearsal"] and "kl_task" not in line


def test_no_rehearsal_row_is_lost_on_its_way_to_the_loss(make_trainer, monkeypatch):
    trainer = make_trainer(num_train_epochs=2)
    seen = []
    original = trainer.objective

    def spy(model, batch, roles, *counts):
        seen.extend(
            tuple(ids.tolist())
            for ids, flag in zip(batch["input_ids"], batch["is_rehearsal"], strict=True)
            if flag
        )
        assert roles.kl[batch["is_rehearsal"]].any(1).all(), "a rehearsal row carries KL"
        assert not roles.kl[~batch["is_rehearsal"]].any()
        return original(model, batch, roles, *counts)

    spy.teacher = original.teacher
    monkeypatch.setattr(trainer, "objective", spy)
    trainer.train()
    assert len(seen) == 8  # 12 task rows at ratio 0.25: 4 an epoch
    stripped = {tuple(i for i in ids if i != 0) for ids in seen}
    assert len(stripped) == 6, "two epochs of 4 show each of the 6 rehearsal rows"


def test_the_ratio_holds_in_every_optimizer_batch(make_trainer):
    trainer = make_trainer(
        task=30, rehearsal=10, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    shares = []
    original = trainer.get_batch_samples

    def spy(*args, **kwargs):
        samples, items = original(*args, **kwargs)
        flags = torch.cat([batch["is_rehearsal"] for batch in samples])
        shares.append((int(flags.sum()), len(flags)))
        return samples, items

    trainer.get_batch_samples = spy
    trainer.train()
    assert sum(n for _, n in shares) == 40
    assert all(abs(found - round(0.25 * n)) <= 1 for found, n in shares)


def test_teacher_equals_the_base_before_and_after_training(make_trainer, tiny_model_dir):
    trainer = make_trainer(learning_rate=0.05)
    batch = trainer.data_collator(mixed_rows(trainer, 4))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with trainer.model.disable_adapter(), torch.no_grad():
        before = trainer.model(input_ids=ids, attention_mask=mask).logits
    head = trainer.objective.head.weight
    assert torch.equal(
        torch.nn.functional.linear(trainer.teacher.hidden(ids, mask), head)[0], before[0]
    )
    trainer.train()
    with torch.no_grad():
        student = trainer.model(input_ids=ids, attention_mask=mask).logits
    after = torch.nn.functional.linear(trainer.teacher.hidden(ids, mask), head)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(student, before)


def test_resume_after_a_kill_equals_the_uninterrupted_run(make_trainer, tiny_peft, tmp_path):
    run = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(**run)
    whole.train()

    class Killed(RuntimeError):
        pass

    from transformers import TrainerCallback

    class KillAt7(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise Killed

    first = make_trainer(**run)
    first.args.output_dir = str(tmp_path / "killed")
    first.add_callback(KillAt7)
    with pytest.raises(Killed):
        first.train()
    second = make_trainer(**run)
    second.args.output_dir = str(tmp_path / "killed")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step == 12
    for name, value in trained(whole.model).items():
        assert torch.equal(value, trained(second.model)[name]), name


def test_resume_without_a_checkpoint_starts_anew(make_trainer):
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_a_trained_adapter_is_the_teacher_of_the_next_task(make_trainer, tiny_peft):
    model, tokenizer = tiny_peft()
    disturb(model)
    trainer = make_trainer(model, tokenizer)
    assert trainer.teacher.kind == "snapshot"
    assert "what its adapter has learned" in str(trainer.teacher)
    batch = trainer.data_collator(mixed_rows(trainer, 4))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        start = model(input_ids=ids, attention_mask=mask).logits[0]
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0 and kl[-1] > 0
    hidden = trainer.teacher.hidden(ids, mask)
    after = torch.nn.functional.linear(hidden, trainer.objective.head.weight)[0]
    assert torch.equal(after, start)


@pytest.mark.slow
def test_the_snapshot_teacher_survives_a_resume(make_trainer, tiny_peft, tmp_path):
    model, tokenizer = tiny_peft()
    disturb(model)
    trainer = make_trainer(model, tokenizer, save_strategy="steps", save_steps=2)
    start = {name: value.clone() for name, value in trainer.teacher.snapshot.items()}
    trainer.train()
    fresh, tokenizer = tiny_peft()
    again = make_trainer(fresh, tokenizer, num_train_epochs=2, save_strategy="steps", save_steps=2)
    assert again.teacher.kind == "adapter_off"
    again.train(resume_from_checkpoint=True)
    assert again.teacher.kind == "snapshot"
    assert all(torch.equal(again.teacher.snapshot[name], value) for name, value in start.items())


def test_a_second_model_can_be_the_teacher(make_trainer, tiny_peft):
    other, _ = tiny_peft(load_in_4bit=False)
    trainer = make_trainer(teacher=other)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert trainer.teacher.kind == "model" and kl[0] > 0


def test_the_teacher_pass_restores_everything_also_after_an_exception(make_trainer):
    trainer = make_trainer()
    model = trainer.model
    model.train()
    frozen = [n for n, p in model.named_parameters() if "lora_A" in n][0]
    dict(model.named_parameters())[frozen].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="inside"), trainer.teacher.in_place():
        raise RuntimeError("inside")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not any(m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters"))


def test_teacher_passes_are_the_same_under_dropout_and_the_student_stays_stochastic(
    make_trainer, tiny_peft
):
    model, tokenizer = tiny_peft(lora_dropout=0.5)
    disturb(model)
    trainer = make_trainer(model, tokenizer)
    batch = trainer.data_collator(mixed_rows(trainer, 4))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.train()
    assert torch.equal(trainer.teacher.hidden(ids, mask), trainer.teacher.hidden(ids, mask))
    from lwf_unsloth.hidden import model_hidden

    assert not torch.equal(model_hidden(model, ids, mask), model_hidden(model, ids, mask))


def test_full_logits_give_the_same_loss_and_gradient_as_the_one_pass(make_trainer):
    trainer = make_trainer(lwf_rows="all", lwf_temperature=2.0)
    disturb(trainer.model)
    rows = mixed_rows(trainer)
    one_pass, loss = gradients(trainer, rows, 4)
    trainer.objective.head = None
    full, full_loss = gradients(trainer, rows, 4)
    assert full_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in one_pass.items():
        assert torch.allclose(full[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max()), (
            name
        )


def test_evaluation_weighs_by_tokens_and_reports_task_loss_and_kl(make_trainer, alpaca_rows):
    held_out = Dataset.from_list(alpaca_rows(7, "held out"))
    trainer = make_trainer(eval_dataset=held_out, per_device_eval_batch_size=2)
    disturb(trainer.model)
    small = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 7
    whole = trainer.evaluate()
    assert small["eval_task_loss"] == pytest.approx(whole["eval_task_loss"], rel=1e-5)
    assert small["eval_kl"] == pytest.approx(whole["eval_kl"], rel=1e-5)
    assert small["eval_kl"] > 0 and small["eval_loss"] == small["eval_task_loss"]


@pytest.mark.parametrize("form", ["positional", "outputs", "int", "tensor"])
def test_compute_loss_takes_every_call_form_and_leaves_the_inputs_alone(make_trainer, form):
    trainer = make_trainer()
    batch = trainer.data_collator(mixed_rows(trainer, 4))
    keys = set(batch)
    if form == "positional":
        loss = trainer.compute_loss(trainer.model, batch)
    elif form == "outputs":
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert outputs["logits"].shape[:2] == batch["input_ids"].shape
    elif form == "int":
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=7)
    else:
        loss = trainer.compute_loss(trainer.model, batch, False, torch.tensor(7))
    assert loss.ndim == 0 and torch.isfinite(loss) and set(batch) == keys


def test_the_callers_config_is_never_written_into(make_trainer, tiny_peft, settings, alpaca_rows):
    from lwf_unsloth.trainer import LwFTrainer

    args = settings(label_smoothing_factor=0.1)
    before = args.to_dict()
    model, tokenizer = tiny_peft()
    LwFTrainer(model, args=args, processing_class=tokenizer, train_dataset=alpaca_rows(8)).train()
    assert args.to_dict() == before


def test_label_smoothing_acts_on_the_task_term(make_trainer):
    losses = []
    for smoothing in (0.0, 0.2):
        trainer = make_trainer(label_smoothing_factor=smoothing)
        rows = mixed_rows(trainer)
        losses.append(gradients(trainer, rows, 8)[1])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_lambda_0_with_rehearsal_rows_that_would_have_no_effect_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="no effect"):
        make_trainer(lwf_lambda=0.0)


def test_kl_on_rehearsal_rows_that_are_not_there_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="no rehearsal rows"):
        make_trainer(rehearsal=0, lwf_rows="rehearsal")


def test_nothing_trainable_is_refused(make_trainer, tiny_peft):
    model, tokenizer = tiny_peft()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="Nothing is trainable"):
        make_trainer(model, tokenizer)


def test_rows_that_yield_no_labels_are_refused_with_max_length_named(make_trainer):
    with pytest.raises(DataError, match="max_length"):
        make_trainer(max_length=8)


def test_an_empty_task_set_is_refused(make_trainer):
    with pytest.raises(LwfError, match="empty"):
        make_trainer(task=Dataset.from_list([]))


def test_a_warm_up_longer_than_half_the_run_is_told(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        make_trainer(warmup_steps=100).train()
    assert any(
        "Warm-up takes 100 of the run's 4 steps" in record.message for record in caplog.records
    )


def test_a_teacher_that_never_stops_on_the_rehearsal_prompts_is_told(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        make_trainer()
    assert any("hardly ever stops" in record.message for record in caplog.records)


def test_text_rows_as_rehearsal_give_no_word_about_stopping(
    tiny_peft, settings, alpaca_rows, caplog
):
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    passages = [{"text": f"Passage {i} tells of the river and the fox."} for i in range(6)]
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        trainer = LwFTrainer(
            model,
            args=settings(),
            processing_class=tokenizer,
            train_dataset=alpaca_rows(12),
            rehearsal_dataset=passages,
        )
    trainer.train()
    assert not any("hardly ever stops" in record.message for record in caplog.records)
    assert trainer.state.log_history[-2]["kl_rehearsal"] > 0


def test_rehearsal_rows_that_are_held_out_are_left_out_and_told(make_trainer, alpaca_rows, caplog):
    held_out = Dataset.from_list(alpaca_rows(2, "keep"))
    with caplog.at_level(logging.WARNING, logger="lwf_unsloth"):
        trainer = make_trainer(rehearsal=6, eval_dataset=held_out)
    assert trainer.rows.n_rehearsal == 4
    assert "2 rehearsal rows are left out" in caplog.text


def test_the_prompts_token_ids_are_the_same_in_training_generation_and_evaluation(
    make_trainer, alpaca_rows, monkeypatch
):
    from lwf_unsloth import scoring
    from lwf_unsloth.generation import generate

    rows = alpaca_rows(4)
    trainer = make_trainer(task=Dataset.from_list(rows))
    model, tokenizer = trainer.model, trainer.processing_class

    def prompts(encoded):
        return {tuple(row["input_ids"][: row["prompt_length"]]) for row in encoded}

    asked, scored = set(), set()
    answer, encode = model.generate, scoring.encode_rows

    def generating(*args, **kwargs):
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            asked.add(tuple(ids[mask.bool()].tolist()))
        return answer(*args, **kwargs)

    def encoding(*args, **kwargs):
        found = encode(*args, **kwargs)
        scored.update(prompts(found[0]))
        return found

    monkeypatch.setattr(model, "generate", generating)
    monkeypatch.setattr(scoring, "encode_rows", encoding)
    generate(model, tokenizer, rows, max_new_tokens=2)
    scoring.score(model, tokenizer, rows)
    trained_on = prompts(row for row in trainer.rows.dataset if not row["is_rehearsal"])
    assert len(trained_on) == 4 and asked == trained_on and scored == trained_on


def test_the_bar_shows_both_terms(make_trainer, capfd):
    make_trainer(disable_tqdm=False).train()
    shown = capfd.readouterr()
    assert "4/4" in shown.err and "task_loss=" in shown.err and "kl_rehearsal=" in shown.err
    assert "grad_norm" not in shown.out, "no printed dict a step"


def test_an_empty_eval_set_is_no_eval_set(make_trainer, alpaca_rows):
    empty = Dataset.from_list(alpaca_rows(1)).select([])
    trainer = make_trainer(eval_dataset=empty)
    trainer.train()
    assert trainer.eval_dataset is None


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(make_trainer, tmp_path, caplog):
    from lwf_unsloth.checkpoints import latest_checkpoint

    trainer = make_trainer(num_train_epochs=2, save_strategy="steps", save_steps=4)
    trainer.train()
    newest = tmp_path / "run" / "checkpoint-8"
    path = newest / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert "not complete" in caplog.text


def test_checkpoints_hold_no_pickled_arguments(make_trainer, tmp_path):
    make_trainer(save_strategy="epoch").train()
    saved = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in saved and "training_args.bin" not in saved


def test_predict_and_a_cut_off_evaluation_leave_nothing_in_the_next_one(
    make_trainer, alpaca_rows, monkeypatch
):
    held = Dataset.from_list(alpaca_rows(7, "held out"))
    trainer = make_trainer(eval_dataset=held, per_device_eval_batch_size=2)
    disturb(trainer.model)
    first = trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    compute, calls = trainer.compute_loss, []

    def cut_off(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(trainer.train_dataset)
    monkeypatch.undo()
    second = trainer.evaluate()
    assert second["eval_task_loss"] == first["eval_task_loss"]
    assert second["eval_kl"] == first["eval_kl"]


@pytest.mark.parametrize(
    "name", ["data_collator", "formatting_func", "compute_loss_func", "peft_config"]
)
def test_what_would_have_no_effect_is_refused(tiny_peft, settings, alpaca_rows, name):
    from lwf_unsloth.trainer import LwFTrainer

    model, tokenizer = tiny_peft()
    with pytest.raises(ConfigError, match=f"{name} was given"):
        LwFTrainer(
            model,
            args=settings(),
            processing_class=tokenizer,
            train_dataset=alpaca_rows(4),
            **{name: torch.nn.Identity()},
        )
