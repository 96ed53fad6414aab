# %% [markdown]
# # What did this adapter learn, and what did it cost?
#
# <!-- badge -->
# You have a saved adapter. This notebook measures it on your own sets, beside the model that it belongs to, in one load:
#
# 1. **per set**: how well it predicts (NLL), how far it moved from its base (KL), right answers, how often it stops;
# 2. **leak**: general questions that it now answers in the new task's form;
# 3. **the dial**: the adapter turned down, without training, for less forgetting at less gain;
# 4. **benchmarks** of lm-evaluation-harness, adapter off and on, paired item by item;
# 5. all of it in the **model card** of the adapter.
#
# Every number comes with its 95 % interval. A few minutes on a T4, a quarter of an hour on two CPU cores (estimates). Runtime > Run all.

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
# Without an `ADAPTER`, a short training on sample rows makes one, without any help against forgetting, so that there is
# something to see. `None` for the rows takes the sample rows that belong to it.

# %% tags=["parameters"]
ADAPTER = None  # folder of a saved adapter, e.g. "runs/alpaca_demo/adapter"
BASE = None  # its base, where the adapter does not say it: a hub id or a folder
STEPS = 40  # of the short training
TASK = None  # held-out rows of the adapter's task, perhaps with "answer_contains": what makes one right
GENERAL = None  # instructions that the model should answer as before
PASSAGES = None  # plain text that it should know as well as before: .jsonl with "text", or .txt
ROWS = 64  # rows measured, at most, of each set, and items of each benchmark
ANSWERS = 32  # prompts answered, at most, of each set by base and tuned model
MAX_NEW_TOKENS = 64
SCALES = [0, 0.25, 0.5, 0.75, 1]  # of the dial
BENCHMARKS = []  # e.g. ["local_instructions", "local_piqa"]; with the hub also "winogrande", "ifeval"
OUTPUT = "runs/evaluate"

# %% [markdown]
# ## An adapter to measure
# Cross entropy on the task alone, at a high rate: the recipe that forgets most.

# %%
import lwf_unsloth as lwf
from lwf_unsloth.samples import sample_path

if ADAPTER is None:
    model, tokenizer = lwf.load_model(lwf.ModelConfig("smollm2-135m-instruct"))
    rows = lwf.load_alpaca(sample_path("faq_task"), test_size=None)["train"]
    plain = {"lwf_lambda": 0.0, "rehearsal_ratio": 0.0, "learning_rate": 2e-3}
    args = lwf.LwFConfig(OUTPUT, max_steps=STEPS, save_strategy="no", **plain)
    lwf.LwFTrainer(model, args=args, processing_class=tokenizer, train_dataset=rows).train()
    ADAPTER = lwf.save_adapter(model, tokenizer, f"{OUTPUT}/trained")

# %% [markdown]
# ## Load it
# The adapter remembers its base, the precision and the prompt template; a base that is not the one it was trained on is
# refused.

# %%
model, tokenizer = lwf.load_adapter(ADAPTER, base=BASE)
print(model.lwf_loaded)

# %% [markdown]
# ## Your sets
# Any number of them, by name, none of whose rows was trained on. The first one is the task; the others are what should be
# kept. `lwf.EvalSet(rows, metric=...)` takes a function of your own from an answer and its row to a number.

# %%
task = lwf.load_alpaca(TASK or sample_path("faq_heldout"), test_size=None)
general = lwf.load_alpaca(GENERAL or sample_path("general"), test_size=None)
passages = lwf.load_text(PASSAGES or sample_path("passages"), test_size=None)
sets = {"task": task["train"], "general": general["train"], "passages": passages["train"]}
{name: len(rows) for name, rows in sets.items()}

# %% [markdown]
# ## Measure
# *can detect* is the smallest change that a sample of this size would show in 8 of 10 cases: where it is large, take more
# rows before you say that nothing was lost. A KL under 0.02 meant no visible leak on the models we measured.

# %%
asked = {"answers_limit": ANSWERS, "max_new_tokens": MAX_NEW_TOKENS}
scores = lwf.evaluate(model, tokenizer, sets, limit=ROWS, **asked)
scores.save(f"{OUTPUT}/scores.json")
scores

# %% [markdown]
# ## Look at the leak
# The form was learned from the task's answers. These are general questions, before and after; a leak is an answer on the
# right that looks like the new task and not like an answer to the question.

# %%
from dataclasses import replace

print("The task's form:", scores.settings["leak"] or "none was found; give one with leak=r'...'")
sides = scores["general"].answers
few = {side: replace(whole, answers=whole[:5]) for side, whole in sides.items()}
lwf.compare(few["base"], few["tuned"])

# %% [markdown]
# ## The dial
# The adapter's update is multiplied by a scale: 0 is the base, 1 the adapter as trained. Often a scale below 1 keeps most
# of the gain and loses little.

# %%
dialled = lwf.dial(model, tokenizer, sets, SCALES, limit=ROWS)
dialled.save(f"{OUTPUT}/dial.json")
lwf.plot_dial(dialled)

# %% [markdown]
# The scale with the most gain whose KL on every general set stays within the budget, in nats per token. It is saved as an
# ordinary adapter, which needs no dial; the one that you brought stays as it is.

# %%
scale = dialled.choose(budget=0.05)
with lwf.scale_adapter(model, scale):
    lwf.save_adapter(model, tokenizer, f"{OUTPUT}/turned_down", card={"scale": {"scale": scale}})
print("chosen scale:", scale)

# %% [markdown]
# ## Benchmarks
# Is what is generally asked of models still there? `BENCHMARKS` names tasks of lm-evaluation-harness
# (`pip install 'lm_eval[ifeval]>=0.4.12'`). Those that begin with `local_` need no hub: `local_instructions` comes with this
# package, and `local_mmlu`, `local_piqa`, `local_siqa` and `local_commonsenseqa` are fetched once. An empty list asks none.

# %%
harness = {"limit": ROWS, "max_new_tokens": 4 * MAX_NEW_TOKENS}
found = lwf.evaluate_benchmarks(model, tokenizer, BENCHMARKS, **harness) if BENCHMARKS else None
found or "No benchmark was asked: BENCHMARKS is empty."

# %% [markdown]
# ## The report
# What the task gained, beside what everything else lost; below it the same as a figure.

# %%
report = lwf.forgetting_report(scores)
report.save(f"{OUTPUT}/report.json")
report

# %%
figure = lwf.plot_forgetting(report)
figure.save(f"{OUTPUT}/forgetting")
figure

# %% [markdown]
# ## Into the model card
# The adapter is saved once more, with the report in its README, so that whoever takes it sees what it costs.

# %%
from IPython.display import Markdown

card = {"evaluation": report.card()}
card |= {"benchmarks": {f"{one.task}, {one.metric}": str(one) for one in found}} if found else {}
folder = lwf.save_adapter(model, tokenizer, f"{OUTPUT}/adapter", card=card)
text = (folder / "README.md").read_text(encoding="utf-8")
Markdown(text[text.index("## Evaluation") : text.index("## Prompt template")])

# %% [markdown]
# ## Next
# - Forgot too much? Train with rehearsal rows (notebook 02 shows what that does), or take the turned-down adapter.
# - A second task on top of the first? Evaluate after each and give both to
#   `forgetting_report(after_first, after_second, tasks=["first", "second"])`: it says what the first one lost.
# - On the command line: `lwf-unsloth evaluate ADAPTER task=held_out.jsonl general=general.jsonl`.
