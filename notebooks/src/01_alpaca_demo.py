# %% [markdown]
# # Teach a model to answer, and keep what it knew
#
# <!-- badge -->
# You take a model that only continues text, fine-tune it on Alpaca's instructions, and see three things:
#
# 1. five prompts **before and after**, side by side;
# 2. whether it now **stops** by itself;
# 3. what it **forgot**: how much worse it became at plain text that has nothing to do with the task.
#
# The model is loaded in 4 bits by Unsloth and only a small LoRA adapter is trained. At every step a frozen
# *teacher*, the same weights with the adapter off, says what the model used to think of a few plain passages
# (*rehearsal* rows), and a KL term holds the model to it. That is Learning without Forgetting.
#
# On a free T4: about 15 minutes (an estimate, see benchmarks/README.md), 5 GB of GPU memory. Runtime > Run all.

# %% [markdown]
# ## Set up
# On Colab this installs what is missing and keeps the runtime's own torch. Where `lwf_unsloth` is there already,
# nothing happens. Opened from an uploaded archive? Upload the project's `.zip` or `.tar.gz` next to the notebook.

# %%
import importlib.util

if importlib.util.find_spec("lwf_unsloth") is None:
    # clone here
    # !for a in lwf_unsloth*.zip; do test -f "$a" && unzip -qn "$a"; done
    # !for a in lwf_unsloth*.tar.gz; do test -f "$a" && tar xzf "$a"; done
    # !PYTHON={sys.executable} bash "$(ls ../colab_setup.sh colab_setup.sh */colab_setup.sh 2>/dev/null | head -1)"
    importlib.invalidate_caches()

# %% [markdown]
# ## Settings
# Everything that you may want to change. `None` takes what fits the machine: with a GPU and the hub
# `unsloth/gemma-2b-bnb-4bit` and `yahma/alpaca-cleaned`, else a small model and sample rows that come with the package.

# %% tags=["parameters"]
MODEL = None  # hub id, folder, or "smollm2-135m-instruct", "gemma-3-270m"
TASK = None  # hub id, or your own .json, .jsonl, .csv or .parquet
PASSAGES = None  # plain text that the model should not get worse at: .jsonl with "text", or .txt
TASK_ROWS = 2000
STEPS = 60  # optimizer steps
ROWS_A_STEP = 8
LEARNING_RATE = 2e-4
MAX_NEW_TOKENS = 256
OUTPUT = "runs/alpaca_demo"

# %%
import lwf_unsloth as lwf
from lwf_unsloth.samples import sample_path

config = lwf.ModelConfig(MODEL) if MODEL else lwf.default_model()
small = not config.model_name.startswith("unsloth/")
samples = [sample_path("general.jsonl"), sample_path("code_task.jsonl")]
TASK = TASK or (samples if small else "yahma/alpaca-cleaned")
PASSAGES = PASSAGES or sample_path("passages.jsonl")
config

# %% [markdown]
# ## The model
# The message says what was really loaded: base, bits, dtype, device.

# %%
model, tokenizer = lwf.load_model(config)
model.lwf_loaded

# %% [markdown]
# ## The rows
# Each source is read and checked before anything is trained; the report counts what was kept and what was dropped, and why.
# A tenth is held out. Task rows teach the answers, in Alpaca's template, each ending in an explicit EOS.

# %%
task = lwf.load_alpaca(TASK, limit=TASK_ROWS)
print(task.report)
passages = lwf.load_text(PASSAGES)
print(passages.report)

# %% [markdown]
# ## Before
# Greedy answers of the untouched model, and how well it predicts passages it will not be trained on
# (NLL, nats per token: lower is better).

# %%
before = lwf.generate(model, tokenizer, lwf.DEMO_PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
before

# %% [markdown]
# ## Train
# `loss = CE(task rows) + lambda * KL(teacher || model, rehearsal rows)`, both in nats per token. `task_loss` should fall,
# `kl_rehearsal` starts at exactly 0 and should stay small: under 0.02 no forgetting was visible on the models we measured.

# %%
args = lwf.LwFConfig(OUTPUT, max_steps=STEPS, learning_rate=LEARNING_RATE, rehearsal_ratio=0.1)
args.gradient_accumulation_steps = max(1, ROWS_A_STEP // args.per_device_train_batch_size)
trainer = lwf.LwFTrainer(
    model,
    args=args,
    processing_class=tokenizer,
    train_dataset=task["train"],
    rehearsal_dataset=passages["train"],
)
trainer.train()
lwf.plot_training(trainer.state.log_history)

# %% [markdown]
# ## After, beside before
# The same prompts, the same settings. **eos** means the model ended by itself, **length** that it was cut off.

# %%
after = lwf.generate(model, tokenizer, lwf.DEMO_PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
comparison = lwf.compare(before, after)
comparison.save(OUTPUT)
comparison

# %% [markdown]
# ## What is wrong with the answers, and what to change
# The badges in the table name faults: cut off, repeating, without the asked form. From them and from the training
# follow settings, each with the figure it rests on; `advice.apply(args)` gives the changed settings.

# %%
advice = comparison.advice(lwf.TrainingFacts.of(trainer))
advice

# %% [markdown]
# ## A form for the answer
# Prompt 4 asks for code, prompt 5 for a table. A *form* says so in words and begins the answer, so that a small model
# keeps to it: here the base's answer beside the trained one's, both begun that way.

# %%
asked = [
    {"instruction": lwf.DEMO_PROMPTS[3], "form": "code"},
    {"instruction": lwf.DEMO_PROMPTS[4], "form": "table"},
]
answers = {"max_new_tokens": MAX_NEW_TOKENS}
base = lwf.generate(model, tokenizer, asked, adapter=False, label="base", **answers)
lwf.compare(base, lwf.generate(model, tokenizer, asked, label="trained", **answers))

# %% [markdown]
# ## What was learned, what was forgotten
# Held-out answers of the task should have become more likely (NLL falls), held-out passages should not have become
# less likely (NLL stays), and the KL says how far the model moved on them.

# %%
gain = lwf.score(model, tokenizer, task["test"])
forgetting = lwf.score(model, tokenizer, passages["test"])
print("held-out answers: ", gain)
print("held-out passages:", forgetting)

# %% [markdown]
# ## Keep it
# The adapter is a few MB: LoRA weights (safetensors), tokenizer, template and a model card with the settings.

# %%
lwf.save_adapter(model, tokenizer, f"{OUTPUT}/adapter")

# %% [markdown]
# ## Next
# - Answers cut off? Raise `MAX_NEW_TOKENS`, or train longer so that EOS is learned.
# - Your own rows: set `TASK` to your file, with `instruction`, `input`, `output`.
# - A model that already follows instructions, and a new skill: take general *instructions* as rehearsal, not passages.
# - Repetition: `lwf.generate(..., repetition_penalty=1.1)`.
