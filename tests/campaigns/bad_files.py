"""Writes tests/data/bad: small files as people bring them, each wrong in one way.

    python -m tests.campaigns.bad_files            writes the files anew
    python -m tests.campaigns.bad_files --show     what load_alpaca says of each

What is right for each stands in tests/data/bad/expected.json, looked at by a person.
"""

import argparse
import csv
import gzip
import io
import json
import logging
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "data" / "bad"
GOOD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
MORE = {"instruction": "Count to three.", "input": "", "output": "1 2 3"}


def dump(*rows, **settings):
    """A JSON list."""
    return json.dumps(list(rows), **{"ensure_ascii": False, **settings}).encode("utf-8")


def lines(*rows, end="\n"):
    """JSONL of rows, or of text as it stands."""
    said = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    return (end.join(said) + end).encode("utf-8")


def table(*rows, **settings):
    """CSV."""
    out = io.StringIO()
    csv.writer(out, **settings).writerows(rows)
    return out.getvalue().encode("utf-8")


def parquet(**columns):
    """A parquet file."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def with_value(value, field="output"):
    """One good row, and one whose field is the value."""
    return dump(GOOD, {**GOOD, "instruction": "Other?", field: value})


def without(field):
    return {name: value for name, value in GOOD.items() if name != field}


def files():
    """Name -> content."""
    two = [GOOD, MORE]
    text = dump(*two).decode()
    found = {
        "empty.json": b"",
        "blank.json": b" \n\t\n",
        "nul.json": b"\0" * 40,
        "null.json": b"null",
        "number.json": b"42",
        "string.json": b'"rows"',
        "true.json": b"true",
        "empty_list.json": b"[]",
        "empty_dict.json": b"{}",
        "list_of_null.json": b"[null, null]",
        "list_of_numbers.json": b"[1, 2, 3]",
        "list_of_strings.json": b'["a", "b"]',
        "list_of_lists.json": b'[["Name a colour.", "Blue."]]',
        "empty_rows.json": b"[{}, {}]",
        "one_object.json": json.dumps(GOOD).encode(),
        "wrapped.json": json.dumps({"data": two}).encode(),
        "wrapped_twice.json": json.dumps({"train": two, "test": two}).encode(),
        "columns.json": json.dumps({"instruction": ["a", "b"], "output": ["c", "d"]}).encode(),
        "cut_in_string.json": text[:60].encode(),
        "cut_after_row.json": text[: text.index("}") + 1].encode(),
        "trailing_comma.json": (text[:-1] + ",]").encode(),
        "two_lists.json": (text + text).encode(),
        "comment.json": ("// my rows\n" + text).encode(),
        "single_quotes.json": text.replace('"', "'").encode(),
        "python_none.json": text.replace('""', "None").encode(),
        "unquoted_keys.json": text.replace('"instruction"', "instruction").encode(),
        "nan.json": text.replace('"1 2 3"', "NaN").encode(),
        "infinity.json": text.replace('"1 2 3"', "Infinity").encode(),
        "huge_number.json": text.replace('"1 2 3"', "9" * 5000).encode(),
        "deep.json": (b"[" * 3000) + (b"]" * 3000),
        "deep_value.json": text.replace('"1 2 3"', "[" * 900 + "]" * 900).encode(),
        "repeated_key.json": b'[{"instruction": "a", "output": "b", "output": "c"}]',
        "control_character.json": b'[{"instruction": "a\x01b", "output": "c"}]',
        "lone_surrogate.json": b'[{"instruction": "a\\ud800b", "output": "c"}]',
        "nul_in_text.json": b'[{"instruction": "a\\u0000b", "output": "c"}]',
        "bom.json": b"\xef\xbb\xbf" + text.encode(),
        "utf16.json": text.encode("utf-16"),
        "utf16_without_bom.json": text.encode("utf-16-le"),
        "utf32.json": text.encode("utf-32"),
        "latin1.json": dump({**GOOD, "output": "café"}).decode().encode("latin-1"),
        "cp1252.json": dump({**GOOD, "output": "“œuvre” €"}).decode().encode("cp1252"),
        "shift_jis.json": dump({**GOOD, "output": "青い空"}).decode().encode("shift_jis"),
        "broken_utf8.json": text.encode().replace(b"Blue", b"Bl\xff\xfee"),
        "gzip.json": gzip.compress(text.encode(), mtime=0),
        "gzip.jsonl.gz": gzip.compress(lines(*two), mtime=0),
        "zip.json": b"PK\x03\x04" + b"\0" * 30,
        "pickle.json": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00]\x94.",
        "png.json": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        "html.json": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
        "lfs_pointer.json": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "yaml.json": b"- instruction: a\n  output: b\n",
        "python.json": b"rows = [dict(instruction='a', output='b')]\n",
        "sharegpt.json": dump({"conversations": [{"from": "human", "value": "a"}] * 2}),
        "sharegpt_lists.json": b'[[{"from": "human", "value": "a"}]]',
        "messages.json": dump({"messages": [{"role": "user", "content": "a"}]}),
        "prompt_completion.json": dump({"prompt": "a", "completion": "b"}),
        "question_answer.json": dump({"question": "a", "answer": "b"}),
        "glued_header.json": dump({"instruction,output": "x"}),
        "upper_case.json": dump({"Instruction": "a", "Output": "b"}),
        "space_in_key.json": dump({" instruction": "a", "output ": "b"}),
        "no_output.json": dump(without("output")),
        "no_instruction.json": dump(without("instruction")),
        "no_input.json": dump(without("input")),
        "some_without_output.json": dump(GOOD, without("output")),
        "text_rows.json": dump({"text": "A passage."}),
        "row_with_null_between.json": dump(GOOD, None, MORE),
        "row_with_text_between.json": dump(GOOD, "a row?", MORE),
    }
    for name, value in {
        "null": None,
        "blank": "  \n ",
        "empty": "",
        "true": True,
        "integer": 7,
        "float": 2.5,
        "list": ["a"],
        "dict": {"a": 1},
        "text_none": "None",
        "text_nan": "nan",
        "zero_width": "\u200b\u200b",
        "rtl": "\u202eabc",
        "emoji": "🦥" * 50,
        "long": "word " * 4000,
        "eos": "done</s>",
        "markers": "### Response:\nagain",
    }.items():
        found[f"output_{name}.json"] = with_value(value)
        found[f"instruction_{name}.json"] = with_value(value, "instruction")
    found |= {
        "input_null.json": with_value(None, "input"),
        "input_number.json": with_value(3, "input"),
        "input_list.json": with_value(["a"], "input"),
        "jsonl_in_json.json": lines(*two),
        "json_in_jsonl.jsonl": dump(*two, indent=2),
        "crlf.jsonl": lines(*two, end="\r\n"),
        "cr.jsonl": lines(*two, end="\r"),
        "blank_lines.jsonl": b"\n\n" + lines(*two) + b"\n \n",
        "bom.jsonl": b"\xef\xbb\xbf" + lines(*two),
        "bom_in_the_middle.jsonl": lines(GOOD) + b"\xef\xbb\xbf" + lines(MORE),
        "one_bad_line.jsonl": lines(GOOD, '{"instruction": "a", "output": ', MORE),
        "one_text_line.jsonl": lines(GOOD, "and then", MORE),
        "last_line_cut.jsonl": lines(*two)[:-9],
        "null_line.jsonl": lines(GOOD, "null", MORE),
        "list_line.jsonl": lines(GOOD, "[1, 2]", MORE),
        "comma_lines.jsonl": lines(json.dumps(GOOD) + ",", json.dumps(MORE) + ","),
        "two_in_a_line.jsonl": lines(json.dumps(GOOD) + json.dumps(MORE)),
        "unicode_line_end.jsonl": lines({**GOOD, "output": "a\u2028b"}, MORE),
        "other_columns_later.jsonl": lines(GOOD, {"prompt": "a", "completion": "b"}),
        "types_change.jsonl": lines(GOOD, {**MORE, "output": ["1", "2"]}, {**MORE, "output": 3}),
        "repeats.jsonl": lines(GOOD, GOOD, GOOD, MORE),
        "repeats_in_other_case.jsonl": lines(GOOD, {**GOOD, "instruction": "NAME  A COLOUR."}),
        "good.csv": table(["instruction", "input", "output"], ["a", "", "b"]),
        "bom.csv": b"\xef\xbb\xbf" + table(["instruction", "output"], ["a", "b"]),
        "semicolon.csv": table(["instruction", "output"], ["a", "b"], delimiter=";"),
        "tab.csv": table(["instruction", "output"], ["a", "b"], delimiter="\t"),
        "header_alone.csv": table(["instruction", "output"]),
        "no_header.csv": table(["a", "b"], ["c", "d"]),
        "too_few_cells.csv": table(["instruction", "input", "output"], ["a"], ["a", "", "b"]),
        "too_many_cells.csv": table(["instruction", "output"], ["a", "b", "c", "d"], ["e", "f"]),
        "open_quote.csv": b'instruction,output\n"a,b\nc,d\n',
        "quote_inside.csv": b'instruction,output\na "b" c,d\n',
        "line_end_inside.csv": table(["instruction", "output"], ["a\nb", "c\r\nd"]),
        "numbers.csv": table(["instruction", "output"], ["1234?", "456"], ["1234?", "456"]),
        "header_twice.csv": table(["instruction", "output", "output"], ["a", "b", "c"]),
        "header_blank.csv": table(["", "", ""], ["a", "b", "c"]),
        "header_upper.csv": table(["Instruction", "Output"], ["a", "b"]),
        "blank_lines.csv": b"instruction,output\n\n\na,b\n\n",
        "nul.csv": b"instruction,output\na\0b,c\n",
        "latin1.csv": "instruction,output\na,café\n".encode("latin-1"),
        "utf16.csv": "instruction,output\na,b\n".encode("utf-16"),
        "formula.csv": table(["instruction", "output"], ["=1+1", "@SUM(A1)"]),
        "long_cell.csv": table(["instruction", "output"], ["a", "b" * 140_000]),
        "null_column.parquet": parquet(instruction=["a", "b"], output=[None, None]),
        "numbers.parquet": parquet(instruction=["a", "b"], output=[1, 2]),
        "lists.parquet": parquet(instruction=["a"], output=[["b"]]),
        "bytes.parquet": parquet(instruction=[b"a"], output=[b"b"]),
        "no_rows.parquet": parquet(instruction=[], output=[]),
        "other_columns.parquet": parquet(question=["a"], answer=["b"]),
        "cut.parquet": parquet(instruction=["a"], output=["b"])[:-20],
        "magic_alone.parquet": b"PAR1",
        "text.parquet": b"instruction,output\na,b\n",
    }
    return found


def outcome(path):
    """What load_alpaca makes of a file: rows kept, and dropped by reason; or the error."""
    from lwf_unsloth import LwfError, load_alpaca

    logging.disable(logging.WARNING)
    try:
        data = load_alpaca(path, test_size=None)
    except LwfError as error:
        return {"error": str(error).removeprefix(path.name).strip()[:100]}
    part = data.report.sources[0]
    outputs = [row["output"][:40] for row in data["train"]]
    return {"read": part.rows_read, "dropped": part.dropped, "outputs": outputs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print what is said of each")
    if parser.parse_args().show:
        for path in sorted(FOLDER.iterdir()):
            if path.name != "expected.json":
                print(path.name, json.dumps(outcome(path), ensure_ascii=False)[:400])
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_bytes(content)
    print(f"{len(files())} files in {FOLDER}")


if __name__ == "__main__":
    main()
