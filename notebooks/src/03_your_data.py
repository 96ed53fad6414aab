# %% [markdown]
# # Does my own file work?
#
# <!-- badge -->
# You have a file of instructions and answers. This notebook checks it row by row, trains a 4-bit model on it, and
# puts answers **before and after** side by side: first in a panel, by clicking, then the same steps as plain cells.
#
# A row is an `instruction`, an optional `input` and the `output` that you want, as JSON, JSONL, CSV or parquet:
#
# ```json
# {"instruction": "How long is the warranty?", "input": "", "output": "Two years, for parts and work."}
# ```
#
# On a free T4: about 5 minutes (an estimate, see the README) for 60 steps, 5 GB of GPU memory; on two CPU cores with
# the small model that comes along about as long. Nothing leaves the machine that the notebook runs on.

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
# `FILE = None` takes a sample: the questions and answers of an invented company, of which no model can know anything.
# `MODEL = None` takes what fits the machine.

# %% tags=["parameters"]
FILE = None  # your file, a folder of files, or a hub id
MODEL = None  # hub id, folder, or "smollm2-135m-instruct", "gemma-3-270m"
STEPS = 60  # optimizer steps of 8 rows
LEARNING_RATE = 1e-3  # 2e-4 for models of several billion weights
REHEARSAL_RATIO = 0.1  # share of rows that keep what the model knew
ROWS = None  # at most so many rows of the file, None for all
MAX_NEW_TOKENS = 96
OUTPUT = "runs/your_data"

# %% [markdown]
# ## The model
# The panel and the cells below it share one model, so that it is in memory once.

# %%
import lwf_unsloth as lwf

FILE = FILE or lwf.sample_path("faq_task.jsonl")
model, tokenizer = lwf.load_model(lwf.ModelConfig(MODEL) if MODEL else lwf.default_model())
model.lwf_loaded

# %% [markdown]
# ## The panel
# From top to bottom: upload or name a file and read the report; set the strength of the KL and the rehearsal, with the
# memory's verdict beside them; train, and stop whenever you like (a checkpoint stays, *Go on* takes it up); ask before
# and after, and turn the dial. At the end stands the code of all that you have set.

# %%
panel = lwf.panel(
    model,
    tokenizer,
    source=FILE,
    output_dir=f"{OUTPUT}/panel",
    max_new_tokens=MAX_NEW_TOKENS,
    max_steps=STEPS,
    learning_rate=LEARNING_RATE,
    rehearsal_ratio=REHEARSAL_RATIO,
)
panel

# %% [markdown]
# The rest does the same without clicking. It uses the panel's model, so let the panel finish first.
#
# ## Check
# Every row is kept, or dropped under a named reason with its number. Repeats are counted and stay on one side of the
# split; a tenth is held out.

# %%
task = lwf.load_alpaca(FILE, limit=ROWS)
print(task.report)
task["train"][0]

# %% [markdown]
# ## Does it fit?
# The preflight adds up what a step needs and holds it against the memory that is free.

# %%
args = lwf.LwFConfig(
    OUTPUT,
    max_steps=STEPS,
    learning_rate=LEARNING_RATE,
    rehearsal_ratio=REHEARSAL_RATIO,
    max_length=256,
)
print(lwf.fits(model, args.per_device_train_batch_size, args.max_length, args=args))

# %% [markdown]
# ## Train
# General instructions are the rehearsal: on them a KL term holds the model to what it answered before. Where the file
# is to teach a model that only continues text to answer at all, take plain passages instead (notebook 01).

# %%
rehearsal = lwf.load_alpaca(lwf.sample_path("general.jsonl"), test_size=None)
trainer = lwf.LwFTrainer(
    model,
    args=args,
    processing_class=tokenizer,
    train_dataset=task["train"],
    rehearsal_dataset=rehearsal["train"],
)
trainer.train()
lwf.plot_training(trainer.state.log_history)

# %% [markdown]
# ## Compare
# Held-out rows of your file and a general question. *Before* is the same model with its adapter off.

# %%
asked = [*task["test"].select(range(min(3, len(task["test"])))), lwf.DEMO_PROMPTS[0]]
answers = {"max_new_tokens": MAX_NEW_TOKENS}
before = lwf.generate(model, tokenizer, asked, adapter=False, label="before", **answers)
after = lwf.generate(model, tokenizer, asked, label="after", **answers)
comparison = lwf.compare(before, after)
comparison.save(OUTPUT)
comparison

# %% [markdown]
# ## Keep it
# A few MB: LoRA weights, tokenizer, template and a card with the settings.

# %%
lwf.save_adapter(model, tokenizer, f"{OUTPUT}/adapter")

# %% [markdown]
# ## Next
# - Rows were dropped? The report names them by number; `lwf-unsloth template` writes a file to start from.
# - Answers still as before? More `STEPS`, or a higher `LEARNING_RATE`; the KL says what that costs.
# - Other questions answered in your file's manner? Raise the ratio or lambda, or turn the dial below 1.
# - How much was forgotten, with intervals: notebook 02.
