"""Anything at all as data, template, ratio, setting or file of settings: never a library's error.

    python -m tests.campaigns.fuzz [--cases 100000] [--out tests/campaigns/results/fuzz.json]

Each law takes its share of the cases. A case is right if it is answered, and rows in are rows kept
and rows dropped by name, or if the error is ours and says something. Anything else is counted as a
crash or a silent loss, and its smallest form is printed.
"""

import argparse
import collections
import dataclasses
import datetime
import io
import json
import logging
import math
import os
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lwf_unsloth.errors import LwfError

RESULT = Path(__file__).resolve().parent / "results" / "fuzz.json"
COUNTS: collections.Counter = collections.Counter()

TEXT = st.text(max_size=12) | st.sampled_from(
    ["</s>", "### Response:", "{instruction}", "None", "nan", "\u202eabc", "a\0b", "\u2028", "=1+1"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ["instruction", "input", "output", "text", "whole", "answer_contains", "messages"]
ROW = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, VALUES))
GOOD = st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": TEXT})
ROWS = st.lists(GOOD | ROW | VALUES, max_size=6)
FORMS = ["list", "json", "jsonl", "csv", "parquet", "dataset", "frame"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis"]


def cases(**strategies):
    """Marks a law with what its cases are drawn from."""

    def mark(law):
        law.drawn = strategies
        return law

    return mark


class SilentLoss(AssertionError):
    """Rows went in that neither came out nor were named."""


def balance(data, rows_in=None):
    """Raises if a row was lost without a word."""
    report = data.report
    dropped = sum(len(rows) for part in report.sources for rows in part.dropped.values())
    if report.rows_read != sum(part.kept for part in report.sources) + dropped:
        raise SilentLoss(f"{report.rows_read} read, {report.kept} kept, {dropped} dropped")
    if rows_in is not None and report.rows_read != rows_in:
        raise SilentLoss(f"{rows_in} rows given, {report.rows_read} read")
    if report.kept != len(data["train"]) + len(data["test"]):
        raise SilentLoss(f"{report.kept} kept, {len(data['train'])} + {len(data['test'])} given")
    for half in data.values():
        for row in half:
            assert all(isinstance(v, (str, bool)) for v in row.values()), row
            assert str(row.get("output", row.get("text"))).strip(), row


def as_source(rows, form):
    """(source, whether its rows can be counted): the rows in one of the forms; None: impossible."""
    if form == "list":
        return rows, bool(rows) and all(isinstance(row, dict) for row in rows)
    if form == "json":
        return json.dumps(rows).encode(), True
    if form == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode(), False  # a blank line is no row
    mappings = [row for row in rows if isinstance(row, dict)]
    try:
        if form == "csv":
            import csv

            out, names = io.StringIO(), sorted({key for row in mappings for key in row})
            writer = csv.DictWriter(out, names)
            writer.writeheader()
            writer.writerows(mappings)
            return out.getvalue().encode(), False
        if form == "frame":
            import pandas

            return pandas.DataFrame(mappings), True
        from datasets import Dataset

        made = Dataset.from_list(mappings)
        if form == "dataset":
            return made, True
        out = io.BytesIO()
        made.to_parquet(out)
        return out.getvalue(), True
    except Exception:  # a table that its own library cannot make is no case of ours
        return None, False


@cases(
    rows=ROWS,
    form=st.sampled_from(FORMS),
    text=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "test_size": st.sampled_from([0, 0.1, 0.5, 1, 2, None]),
            "limit": st.integers(1, 5),
            "seed": st.integers(-3, 3),
        },
    ),
)
def rows_in_any_form(rows, form, text, options):
    from lwf_unsloth import load_alpaca, load_text

    source, counted = as_source(rows, form)
    if source is None:
        return
    data = (load_text if text else load_alpaca)(source, **options)
    balance(data, len(rows) if counted and form in ("list", "json") and not text else None)


@cases(rows=ROWS, encoding=st.sampled_from(ENCODINGS), cut=st.integers(0, 60), more=st.binary())
def damaged_files(rows, encoding, cut, more):
    from lwf_unsloth import load_alpaca

    said = json.dumps(rows, ensure_ascii=False).encode(encoding, "ignore")
    balance(load_alpaca(said[: max(0, len(said) - cut)] + more[:4], test_size=None))


@cases(content=st.binary(max_size=80), text=st.booleans())
def any_bytes(content, text):
    from lwf_unsloth import load_alpaca, load_text

    balance((load_text if text else load_alpaca)(content, test_size=0.5))


@cases(values=st.lists(VALUES, min_size=8, max_size=8), name=st.integers(0, 7))
def arguments_of_the_loaders(values, name):
    from lwf_unsloth import load_alpaca

    names = "shares columns limit test_size seed split token source".split()
    rows = [{"instruction": f"Say {i}", "output": f"It is {i}"} for i in range(6)]
    balance(load_alpaca(**{"source": rows, names[name]: values[name]}))


@cases(n=st.integers(0, 12), m=st.integers(0, 8), ratio=VALUES | st.floats(0, 1), seed=VALUES)
def mixing(n, m, ratio, seed):
    from lwf_unsloth import mix_rehearsal

    task = [{"instruction": f"task {i}", "output": "x"} for i in range(n)]
    keep = [{"instruction": f"keep {i}", "output": "x"} for i in range(m)]
    mixed = mix_rehearsal(task, keep, ratio, seed=seed if isinstance(seed, int) else 0)
    roles = mixed["is_rehearsal"]
    wanted = round(ratio / (1 - ratio) * n)
    if roles.count(False) != n or abs(roles.count(True) - wanted) > 1:
        raise SilentLoss(f"{n} task rows, {wanted} wanted: {collections.Counter(roles)}")
    if sorted(r["instruction"] for r in mixed if not r["is_rehearsal"]) != sorted(
        r["instruction"] for r in task
    ):
        raise SilentLoss("a task row is lost or repeated")


@cases(row=GOOD | ROW, parts=st.lists(TEXT, min_size=3, max_size=3), length=st.integers(1, 80))
def templates_and_encoding(row, parts, length):
    from lwf_unsloth.records import PromptTemplate, encode_row

    template = PromptTemplate(
        "made", f"{parts[0]}{{instruction}}{parts[1]}{{input}}", f"{parts[2]}{{instruction}}"
    )
    tokenizer = _tokenizer()
    encoded = encode_row(tokenizer, row, max_length=length, template=template)
    eos = tokenizer.eos_token_id
    assert len(encoded.input_ids) == len(encoded.labels) <= length
    assert encoded.input_ids[1:].count(tokenizer.bos_token_id) == 0
    if not encoded.cut and encoded.labels[-1] != -100 and row.get("whole") is not False:
        assert encoded.labels[-1] == eos and encoded.labels.count(eos) == 1


def _tokenizer(made=[]):  # noqa: B006  (one for the whole run)
    if not made:
        from tests.conftest import build_tokenizer

        made.append(build_tokenizer())
    return made[0]


@cases(which=st.booleans(), place=st.integers(0, 10**6), value=VALUES)
def settings_of_any_value(which, place, value):
    from lwf_unsloth import LwFConfig, ModelConfig

    kind = LwFConfig if which else ModelConfig
    names = [f.name for f in dataclasses.fields(kind) if f.init and f.name != "device_map"]
    kind(**{names[place % len(names)]: value})


@cases(values=st.dictionaries(st.sampled_from(["model", "training", "data", "x"]), VALUES | ROW))
def training_files(values):
    from lwf_unsloth.train_file import checked_sections

    checked_sections(Path("my.yaml"), values)


@cases(values=VALUES | st.fixed_dictionaries({}, optional=dict.fromkeys(
    ["train", "space", "trials", "grid", "objectives", "seed", "evaluate"], VALUES)))  # fmt: skip
def sweep_files(values):
    from lwf_unsloth import read_sweep_file

    path = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    read_sweep_file(path)


LAWS = {
    rows_in_any_form: 0.08,
    damaged_files: 0.08,
    any_bytes: 0.3,
    arguments_of_the_loaders: 0.05,
    mixing: 0.03,
    templates_and_encoding: 0.21,
    settings_of_any_value: 0.15,
    training_files: 0.05,
    sweep_files: 0.05,
}
"""Law -> its share of the cases."""


def checked(law, count):
    """Runs a law; the failure in its smallest form, or None."""

    def counted(**case):
        COUNTS["cases"] += 1
        try:
            law(**case)
            COUNTS["answered"] += 1
        except LwfError as error:
            assert str(error).strip(), "an error that says nothing"
            COUNTS["refused"] += 1

    run = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(**law.drawn)(counted))
    try:
        run()
    except Exception as error:
        return error
    return None


def campaign(cases, laws=None):
    """Runs the laws.

    Args:
        cases: Cases in all.
        laws: Names of some of them; None runs all.

    Returns:
        The figures for the result file.
    """
    from lwf_unsloth.backend import prepare

    prepare()
    COUNTS.clear()
    logging.disable(logging.CRITICAL)
    crashes, losses, parts = [], [], {}
    try:
        for law, share in LAWS.items():
            if laws and law.__name__ not in laws:
                continue
            before, started = COUNTS["cases"], time.perf_counter()
            wrong = checked(law, max(1, math.ceil(cases * share)))
            parts[law.__name__] = COUNTS["cases"] - before
            took = time.perf_counter() - started
            print(f"{law.__name__}: {parts[law.__name__]} cases, {took:.0f} s", flush=True)
            if wrong is not None:
                kind = losses if isinstance(wrong, SilentLoss) else crashes
                kind.append(f"{law.__name__}: {type(wrong).__name__}: {wrong}"[:500])
                print("  ", kind[-1], *getattr(wrong, "__notes__", []), flush=True)
    finally:
        logging.disable(logging.NOTSET)
    return {
        **{name: COUNTS[name] for name in ("cases", "answered", "refused")},
        "crashes": len(crashes),
        "silent_losses": len(losses),
        "laws": parts,
        "wrong": crashes + losses,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--laws", nargs="+")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    from benchmarks._results import commit

    found = campaign(options.cases, options.laws)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"date": now, "commit": commit(), **found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(found["crashes"] or found["silent_losses"]))


if __name__ == "__main__":
    main()
