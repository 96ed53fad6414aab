# %% [markdown]
# # Which settings learn most and forget least?
#
# <!-- badge -->
# Three settings decide most of it: the weight of the KL to the teacher (`lwf_lambda`), the share of rehearsal rows
# (`rehearsal_ratio`) and the size of the adapter (`r`). This notebook trains one adapter for every combination, each in a
# process of its own, and measures what it **gained** on held-out rows of the task and what it **forgot** elsewhere.
# It ends in a figure of the trade-off, and in the best settings as a file that can be trained from.
#
# The sweep can be stopped at any time, also by a lost connection: run it again and it goes on with what is unfinished.
#
# A quarter of an hour on a T4, one to two hours on two CPU cores (estimates). Runtime > Run all.

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
# As they stand, a small model that comes with the package learns the facts of a company that does not exist. `None` takes
# the sample rows. Every value that a list gets more multiplies the number of trials.

# %% tags=["parameters"]
MODEL = "smollm2-135m-instruct"  # or a hub id or folder, e.g. "unsloth/gemma-2b-bnb-4bit"
TASK = None  # rows to learn: .json, .jsonl, .csv, .parquet or a hub id; a part is held out
GENERAL = None  # general instructions with answers: half to rehearse, half to measure forgetting on
LAMBDAS = [0.5, 2.0, 8.0]
RATIOS = [0.05, 0.2]
RANKS = [4, 16]
STEPS = 60  # optimizer steps of a trial
LEARNING_RATE = 2e-3  # take 5e-4 for a model of more than a billion weights
ROWS = 64  # rows measured, at most, of each set
MAX_NEW_TOKENS = 64  # of the answers at the end
MOST_FORGETTING = 0.02  # KL in nats per token that may be lost for the gain
OUTPUT = "runs/sweep"

# %% [markdown]
# ## The rows
# Held out are rows of the task, which say what was learned, and general rows that nothing was trained on, which say what was
# forgotten. The general instructions are split in two: one half to rehearse, one to measure.

# %%
from pathlib import Path

import lwf_unsloth as lwf
from lwf_unsloth.samples import sample_path

folder = Path(OUTPUT).resolve()
folder.mkdir(parents=True, exist_ok=True)
halves = lwf.load_alpaca(GENERAL or sample_path("general"), test_size=0.5)
halves["train"].to_json(folder / "rehearsal.jsonl", force_ascii=False)
halves["test"].to_json(folder / "general.jsonl", force_ascii=False)
print(halves.report)

# %% [markdown]
# ## The sweep as a file
# It is a training file with two more sections: `grid`, of which every combination is run, and `evaluate`, which says how a
# trial is judged. The same file serves the command line: `lwf-unsloth sweep grid.yaml --workers 2`.

# %%
task = TASK or sample_path("faq_task")
training = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "max_length": 256}
training |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
settings = {
    "model": {"model_name": MODEL},
    "training": training,
    "data": {"task": str(task), "rehearsal": str(folder / "rehearsal.jsonl")},
    "grid": {"lwf_lambda": LAMBDAS, "rehearsal_ratio": RATIOS, "r": RANKS},
    "evaluate": {"general": str(folder / "general.jsonl"), "limit": ROWS},
}

# %% [markdown]
# Written down, it is what a trial is made from.

# %%
import yaml

file = folder / "grid.yaml"
file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
print(file.read_text(encoding="utf-8"))

# %% [markdown]
# ## Run it
# Before the first trial all values are looked at, so that a typing error costs seconds and not an hour. Every trial's
# settings, scores, versions and adapter are kept in `study.db` and, a line each, in `trials.jsonl`. `workers=2` runs two
# trials at a time, where memory and cores allow it.

# %%
result = lwf.run_sweep(lwf.read_sweep_file(file), output=folder)
result.save(folder / "sweep.json")
result

# %% [markdown]
# ## The trade-off
# Up is learned, left is kept. The filled markers are the **front**: no other trial has more gain with less forgetting. The
# dashed line is `MOST_FORGETTING`, and the ring the most gain on its left. Whiskers are 95 % intervals over the measured
# rows of one training; where they overlap, another seed may turn the order round.

# %%
figure = lwf.plot_sweep(result, MOST_FORGETTING)
figure.save(folder / "trade_off")
figure

# %% [markdown]
# ## The best settings, to copy
# The most gain within the limit; where no trial keeps it, the one that forgets least. It is a whole training file.

# %%
best = result.best(MOST_FORGETTING) or result.front[-1]
(folder / "best.yaml").write_text(best.train_file(), encoding="utf-8")
print(best.train_file())

# %% [markdown]
# Train with it, longer or on more rows: `lwf-unsloth train best.yaml`. The trial's own adapter is there already. Held-out
# questions of the task, before and after:

# %%
model, tokenizer = lwf.load_adapter(best.details["adapter"], base=MODEL)
asked = lwf.load_alpaca(task)["test"].select(range(3))
before = lwf.generate(model, tokenizer, asked, adapter=False, max_new_tokens=MAX_NEW_TOKENS)
after = lwf.generate(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)
lwf.compare(before, after)

# %% [markdown]
# ## Next
# - Look at the study in a browser: `pip install optuna-dashboard`, then `optuna-dashboard sqlite:///study.db` in the folder.
# - More settings than a grid can hold? `space` and `trials` in the place of `grid` let Optuna choose so many trials by what
#   the earlier ones gave: `lwf-unsloth sweep --help` shows the file.
# - Put more numbers into the lists and run again: only what is new is trained. Trials that failed are run again with
#   `run_sweep(..., retry_failed=True)`.
# - Before you trust a small difference, put `seed: [1, 2, 3]` into the grid of another `OUTPUT`.
# - An adapter that grows: `r: 16` in the file's `model`, `rank_schedule: ["0:16", "0:4, 0.5:16"]` in its `grid`.
