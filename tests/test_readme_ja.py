"""README.ja.md says what README.md says: the same commands, code, tables, links and figures."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
JAPANESE = (ROOT / "README.ja.md").read_text(encoding="utf-8")
BOTH = (ENGLISH, JAPANESE)

KANA = re.compile("[\u3040-\u30ff]")


def blocks(text):
    """(language, lines without their comments and trailing spaces) of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [
        (name, [re.sub(r"\s*#.*", "", line) for line in body.splitlines()]) for name, body in found
    ]


def generated(text):
    """The tables that are written from result files."""
    return dict(re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", text, re.S))


def by_hand(text):
    """The text without fenced blocks and generated tables."""
    text = re.sub(r"<!-- table: \w+ -->.*?<!-- end -->", "", text, flags=re.S)
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def sections(text):
    return re.split(r"^#+ .*$", by_hand(text), flags=re.M)[1:]


def rows(section):
    """Cells of every table row of a section."""
    lines = re.findall(r"^\|(.*)\|$", section, re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def spans(text):
    return Counter(re.findall(r"`([^`\n]+)`", text))


def figures(text):
    """Numbers written in digits, outside of code spans and links."""
    text = re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", text)
    return {float(number) for number in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-\d+)?", text)}


def test_code_blocks_differ_in_their_comments_alone():
    english, japanese = map(blocks, BOTH)
    assert [name for name, _ in english] == [name for name, _ in japanese]
    for (name, ours), (_, theirs) in zip(english, japanese, strict=True):
        if name:
            assert theirs == ours
        else:  # a formula, or a list of folders and what is in them
            paths = [
                [re.findall(r"^[\w./]+/(?=\s)", line) for line in one] for one in (ours, theirs)
            ]
            assert paths[0] == paths[1] and len(ours) == len(theirs)
    formula = next(lines for name, lines in japanese if not name)
    assert formula == next(lines for name, lines in english if not name)


def test_comments_of_the_code_are_translated():
    for name, body in re.findall(r"^```(\w+)\n(.*?)^```", JAPANESE, re.M | re.S):
        comments = re.findall(r"#(.*)", body)
        assert comments, name
        assert all(KANA.search(comment) or "の" in comment for comment in comments)


def test_generated_tables_are_the_same():
    assert generated(JAPANESE) == generated(ENGLISH)
    assert set(generated(JAPANESE)) >= {"demo", "hardware"}


def test_sections_stand_in_the_same_order_with_the_same_code_spans():
    english, japanese = map(sections, BOTH)
    assert len(english) == len(japanese) >= 8
    for ours, theirs in zip(english, japanese, strict=True):
        assert spans(theirs) == spans(ours)
        assert ours.count("\n- ") == theirs.count("\n- "), "as many points"
        assert ours.count("**") == theirs.count("**") or "**" in theirs


def test_tables_have_the_same_settings_and_numbers():
    for ours, theirs in zip(*map(sections, BOTH), strict=True):
        english, japanese = rows(ours), rows(theirs)
        assert len(english) == len(japanese)
        for left, right in zip(english, japanese, strict=True):
            assert len(left) == len(right)
            if "`" in left[0]:  # a setting: name and default stay as they are
                assert left[:2] == right[:2]
            for one, two in zip(left, right, strict=True):
                assert spans(one) == spans(two) and figures(one) <= figures(two)
                assert set(re.findall(r'"\w+"', one)) == set(re.findall(r'"\w+"', two))


def test_every_figure_of_the_text_is_there():
    for ours, theirs in zip(*map(sections, BOTH), strict=True):
        assert figures(ours) <= figures(theirs)


def test_links_lead_to_the_same_places_and_to_each_other():
    english, japanese = (
        set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.ja.md"} for text in BOTH
    )
    assert english == japanese
    assert "(README.md)" in JAPANESE
    for target in japanese:
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("section", range(len(sections(JAPANESE))))
def test_every_section_is_in_japanese(section):
    text = re.sub(r"`[^`]*`|\([^)]*\)", "", sections(JAPANESE)[section])
    prose = [block for block in re.split(r"\n\s*\n|\n- |\n\|", text) if len(block.strip()) > 30]
    assert all(KANA.search(block) for block in prose)


def test_it_is_no_longer_than_the_other():
    assert len(JAPANESE.splitlines()) <= 210
