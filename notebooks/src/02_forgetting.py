# %% [markdown]
# # How much is forgotten, and what helps?
#
# <!-- badge -->
# The same model learns the same new task three times, each time from a fresh adapter, with the same task rows, steps and
# learning rate. Only what is done against forgetting differs:
#
# | recipe | loss | other rows in the batch |
# |---|---|---|
# | **no help** | cross entropy on the task | none |
# | **the document** | cross entropy on all rows + 0.5 x KL to the teacher on all tokens | 20 % general instructions |
# | **ours, the default** | cross entropy on the task + 2 x KL to the teacher on the general rows alone | 1 row in 9 |
#
# *The document* is the recipe that this project started from (`LwFConfig.document`). The notebook ends in one table and one
# figure: what each recipe **gained** on the task against what it **forgot** elsewhere.
#
# A few minutes on a T4 (an estimate), half an hour or more on two CPU cores (less with `STEPS = 40`).
# Runtime > Run all.

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
# As they stand, a small model that comes with the package learns the facts of a company that does not exist, so nobody can
# have known them. `None` takes the sample rows.

# %% tags=["parameters"]
MODEL = "smollm2-135m-instruct"  # or a hub id or folder, e.g. "unsloth/gemma-2b-bnb-4bit"
TASK = None  # rows to learn: .json, .jsonl, .csv, .parquet or a hub id
HELD_OUT = None  # the same task in other words, perhaps with "answer_contains": what makes it right
GENERAL = None  # general instructions with answers: for rehearsal, and 3 in 10 to measure on
STEPS = 110  # optimizer steps a recipe
TASK_ROWS = 8  # task rows a step, in every recipe
LEARNING_RATE = 2e-3  # take 5e-4 for a model of more than a billion weights
ROWS = 200  # rows measured, at most, of each held-out set
ANSWERS = 64  # prompts answered, at most, of each set by base and tuned model
MAX_NEW_TOKENS = 64
SEED = 42
OUTPUT = "runs/forgetting"

# %% [markdown]
# ## The rows
# Nothing that is measured was trained on: the task is asked in other words than it was taught in, and a part of the general
# instructions is held out. They stand for all that the model could do before.

# %%
import lwf_unsloth as lwf
from lwf_unsloth.samples import sample_path

task = lwf.load_alpaca(TASK or sample_path("faq_task"), test_size=None)["train"]
held_out = lwf.load_alpaca(HELD_OUT or sample_path("faq_heldout"), test_size=None)["train"]
general = lwf.load_alpaca(GENERAL or sample_path("general"), test_size=0.3)
sets = {"task": held_out, "general": general["test"]}
print(f"{len(task)} task rows, {len(held_out)} held-out questions;", general.report)

# %% [markdown]
# ## The recipes
# First what is the same for all, then what differs. Rehearsal rows come on top of the task rows, so every recipe
# learns from the same answers. For LoRA on a small model the rate is high, but not unusual.

# %%
same = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "warmup_steps": STEPS // 10}
same |= {"gradient_accumulation_steps": 1, "save_strategy": "no", "seed": SEED}
document = {"per_device_train_batch_size": TASK_ROWS * 5 // 4}  # its ratio is 0.2
ours = {"per_device_train_batch_size": TASK_ROWS + 1, "rehearsal_ratio": 1 / (TASK_ROWS + 1)}
no_help = {"per_device_train_batch_size": TASK_ROWS, "rehearsal_ratio": 0.0, "lwf_lambda": 0.0}
recipes = {
    "no help": lwf.LwFConfig(OUTPUT, **same, **no_help),
    "the document": lwf.LwFConfig.document(OUTPUT, **{**same, **document}),
    "ours, the default": lwf.LwFConfig(OUTPUT, **same, **ours),
}

# %% [markdown]
# The settings that differ. `lwf_rows` says on which tokens the KL acts, `rehearsal_ce` whether the
# answers of rehearsal rows are learned too, and not only kept as they were.

# %%
import pandas

names = ["lwf_lambda", "lwf_rows", "rehearsal_ratio", "rehearsal_ce", "per_device_train_batch_size"]
shown = {name: [getattr(args, key) for key in names] for name, args in recipes.items()}
pandas.DataFrame(shown, index=names)

# %% [markdown]
# ## Train and measure
# For each recipe the model is loaded anew, trained, and compared with itself, adapter off against adapter on:
# how well it predicts held-out answers (NLL), how far it moved (KL), which answers are right, and how many **general**
# questions it now answers in the task's form (*leak*).

# %%
scores = {}
for name, args in recipes.items():
    model, tokenizer = lwf.load_model(MODEL)
    rehearsal = general["train"] if args.rehearsal_ratio else None
    data = {"train_dataset": task, "rehearsal_dataset": rehearsal}
    lwf.LwFTrainer(model, args=args, processing_class=tokenizer, **data).train()
    asked = {"limit": ROWS, "answers_limit": ANSWERS, "max_new_tokens": MAX_NEW_TOKENS}
    scores[name] = lwf.evaluate(model, tokenizer, sets, train_rows=task, label=name, **asked)
    scores[name].save(f"{OUTPUT}/{name.replace(' ', '_')}.json")

# %% [markdown]
# ## How forgetting looks
# A few of the general questions, answered by the base model and by the one that was trained without help.

# %%
from dataclasses import replace

sides = scores["no help"]["general"].answers
few = {side: replace(whole, answers=whole[:5]) for side, whole in sides.items()}
lwf.compare(few["base"], few["tuned"])

# %% [markdown]
# ## The table
# Gains of the task should be large, losses of the general set near 0. Look at **KL and leak** too and not at the NLL
# alone: a recipe that *learns* the general answers can lower their NLL and still move far from the model that it was.

# %%
comparison = lwf.compare_recipes(scores)
comparison.save(f"{OUTPUT}/recipes.json")
comparison

# %% [markdown]
# ## The figure
# High is learned, left is kept; the best recipe stands in the upper left corner. Whiskers are 95 % intervals over the rows
# of this one training. Another `SEED` moves the points too: run again before you trust a small difference.

# %%
figure = lwf.plot_recipes(comparison)
figure.save(f"{OUTPUT}/gain_against_forgetting")
figure

# %% [markdown]
# ## Next
# - No rows to rehearse with? `rehearsal_dataset="self"` lets the model write its own.
# - Your own task: set `TASK` and `HELD_OUT`. A base model that never stops by itself keeps more with passages
#   (`lwf.load_text`) as rehearsal than with instructions.
# - A lower `LEARNING_RATE` forgets less in every recipe, and learns less.
# - An adapter that is there already: notebook 04 measures it, and turns it down where it forgot too much.
