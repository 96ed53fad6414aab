"""compare(): what it refuses, what it shows, and that model text never becomes markup."""

import errno
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lwf_unsloth import comparison as comparison_file
from lwf_unsloth.advice import Advice, Hint
from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.comparison import Comparison, compare
from lwf_unsloth.decoding import Decoding
from lwf_unsloth.errors import DataError

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></tr></table><h1>x",
    "&lt;b&gt; stays &lt;b&gt;",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "```python\nprint('`x`')\n```\n    indented\n\ttab",
    "# head\n* item **bold** _it_ ~~gone~~ [link](https://example.org) <https://example.org>",
    "costs $5 and $10, $$\\frac{a}{b}$$ \\(x\\) \\| \\\\",
    "\n\n leading and trailing \n\n",
    '"double" \'single\' ="x" onmouseover=',
    "/etc/passwd",
    "first\r\nsecond",
    "<i>early\r</i> &amp; late",
    "日本語の答え。🙂 \U0001f468\u200d\U0001f469\u200d\U0001f467",  # joined by zero-width joiners
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian with a zero-width non-joiner
    "{instruction} {{x}} %s %d {0}",
    "\\begin{align}x\\end{align} and \\[y\\]",
    "see www.example.org or write to someone@example.org",
    "x" * 50_000,
]


def side(texts, **changes):
    answers = [
        Answer(f"prompt {i}", text, "eos" if i % 2 else "length", len(text.split()))
        for i, text in enumerate(texts)
    ]
    values = {"answers": tuple(answers), "settings": Decoding(), "template": "alpaca", "model": "m"}
    return Generations(**{**values, **changes})


def pair(before, after):
    return compare(side(before), side(after, adapter="on", weights="abcdef0123456789"))


class Reader(HTMLParser):
    """Collects every tag and, of each <pre>, the text as a browser would show it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.text, self.inside = [], [], [], "", False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "pre":
            self.inside, self.text = True, ""

    def handle_endtag(self, tag):
        if tag == "pre":
            self.inside = False
            self.texts.append(self.text.removeprefix("\n"))  # as an HTML parser does after <pre>

    def handle_data(self, data):
        if self.inside:
            self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def test_the_visible_text_is_exactly_the_models_text():
    prompts = [f"prompt {i}" for i in range(len(NASTY))]
    shown = read(pair(NASTY, NASTY[::-1])._repr_html_()).texts
    wanted = [
        text.replace("\r", "[CR]")
        for row in zip(prompts, NASTY, NASTY[::-1], strict=True)
        for text in row
    ]
    assert shown == wanted


def test_no_tag_or_attribute_comes_from_text():
    plain = pair(["a"] * len(NASTY), ["b"] * len(NASTY))
    nasty = pair(NASTY, NASTY)
    named = replace(
        nasty,
        before=replace(nasty.before, label='"><script>', model="<b>", template="<i>"),
        notes=("<u>note</u>",),
    )
    extra = {"pre", "span"}
    for html in (named._repr_html_(), named.to_html()):
        found = read(html)
        assert {"script", "img", "h1", "b", "u"}.isdisjoint(found.tags)
        assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    inner = [tag for tag in read(nasty._repr_html_()).tags if tag not in extra]
    assert inner == [tag for tag in read(plain._repr_html_()).tags if tag not in extra]


def test_printed_it_carries_no_code_that_a_terminal_acts_on():
    named = pair(["a"], ["b"])
    named = replace(named, after=replace(named.after, label="\x1b[31mred", template="\u202eleft"))
    assert "\x1b" not in str(named) and "[ESC][31mred" in str(named)
    assert "\x1b" not in str(Advice((Hint("form", "\x1b[2J"),)))


def test_no_outside_resource_and_no_script_is_in_the_page():
    html = pair(NASTY, NASTY).to_html()
    found = read(html)
    assert {"script", "link", "img", "iframe", "object", "base", "a"}.isdisjoint(found.tags)
    assert not [name for _, name, _ in found.attributes if name in ("src", "href", "srcset")]
    style = re.search("<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\x1b", "[ESC]"),
        ("\x00", "[NUL]"),
        ("\u202e", "[U+202E]"),
        ("\u2066", "[U+2066]"),
        ("\u200f", "[U+200F]"),
        ("\u200b", "[U+200B]"),
        ("\x85", "[U+0085]"),
        ("\ud800", "[U+D800]"),
    ],
)
def test_invisible_characters_are_shown_by_name_and_kept_in_the_json(character, name, tmp_path):
    text = f"a{character}b"
    made = pair([text], [text])
    assert read(made._repr_html_()).texts[1] == f"a{name}b"
    assert character not in made.to_html() + made.to_markdown()
    saved = json.loads((made.save(tmp_path) / "comparison.json").read_text("utf-8"))
    assert saved["after"]["answers"][0]["text"] == text


def test_texts_are_isolated_in_direction_and_keep_their_spaces():
    html = pair(["مرحبا"], ["a  b"])._repr_html_()
    assert "unicode-bidi:isolate" in html and "white-space:pre-wrap" in html
    boxes = [value for tag, name, value in read(html).attributes if (tag, name) == ("pre", "dir")]
    assert boxes == ["auto"] * 3


def test_mathjax_and_katex_leave_the_table_alone():
    found = read(pair(["$x$"], ["$$y$$"])._repr_html_())
    classes = [value for tag, name, value in found.attributes if (tag, name) == ("div", "class")]
    assert {"tex2jax_ignore", "mathjax_ignore"} <= set(classes[0].split())


def test_an_answer_that_was_cut_and_one_that_ended_have_different_badges():
    html = pair(["cut answer", ""], ["cut", "ended well"])._repr_html_()
    assert html.count("✂ length · cut at") == 2
    assert "✓ eos · 2 tokens" in html
    assert html.count("no text") == 1


def test_settings_seed_sources_and_rates_are_in_the_table():
    html = pair(["a", "b", "c", "d"], ["a", "b", "c", "d e"])._repr_html_()
    for part in (
        "4 prompts · greedy, max_new_tokens 256, seed 0 · template alpaca · model m",
        "no adapter",
        "adapter abcdef01",
        "EOS rate 50%",
        "mean 1 tokens",
    ):
        assert part in html


def cells_of(markdown):
    """Rows of the last table as a markdown renderer sees them, each cell as its text."""
    from markdown_it import MarkdownIt

    html = (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    )
    assert not re.search("<(script|img|h2|strong|em|del|code|a|math)[ >]", html)
    body = html.rsplit("<tbody>", 1)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in rows]


def test_markdown_has_one_row_a_prompt_and_shows_the_text_as_text():
    import html as html_library

    texts = [text for text in NASTY if len(text) < 1000]
    rows = cells_of(pair(texts, texts).to_markdown())
    assert len(rows) == len(texts)
    for text, row in zip(texts, rows, strict=True):
        assert len(row) == 3
        seen = re.sub(r"<br\s*/?>", "\n", row[1])
        seen = re.sub(r"</?span>", "", seen)
        seen = html_library.unescape(seen).replace("\xa0", " ")
        wanted = text.replace("\r", "[CR]").replace("\t", "    ")
        assert seen.rsplit("\n\n(", 1)[0].strip() == wanted.strip()


def test_saving_writes_three_files_that_say_the_same(tmp_path):
    made = pair(NASTY, NASTY)
    folder = made.save(tmp_path / "new" / "folder")
    assert sorted(os.listdir(folder)) == [
        "comparison.html",
        "comparison.json",
        "comparison.md",
    ]
    values = json.loads((folder / "comparison.json").read_text("utf-8"))
    assert Comparison.from_dict(values) == made
    assert values["eos_rate"] == {"before": made.eos_rate_before, "after": made.eos_rate_after}
    assert values["mean_tokens"]["after"] == made.mean_tokens_after
    assert (folder / "comparison.html").read_text("utf-8") == made.to_html()


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    pair(["old"], ["old"]).save(tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(comparison_file.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pair(["new"], ["new"]).save(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


def test_other_prompts_or_another_order_are_refused():
    both = side(["a", "b"])
    with pytest.raises(DataError, match="2 answers and after 1"):
        compare(both, side(["a"]))
    with pytest.raises(DataError, match="Prompt 0 is 'prompt 0' before and 'prompt 1' after"):
        compare(both, replace(both, answers=both.answers[::-1]))
    other_input = (replace(both.answers[0], input="x"), both.answers[1])
    with pytest.raises(DataError, match="inputs"):
        compare(both, replace(both, answers=other_input))


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 96},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 3},
        {"temperature": 0.7},
    ],
)
def test_other_decoding_settings_are_refused_by_name(change):
    with pytest.raises(DataError, match=next(iter(change))):
        compare(side(["a"]), side(["a"], settings=Decoding(**change)))


def test_the_seed_matters_where_it_is_used():
    compare(side(["a"], settings=Decoding(seed=1)), side(["a"], settings=Decoding(seed=2)))
    sampled = [side(["a"], settings=Decoding(temperature=0.7, seed=seed)) for seed in (1, 2)]
    with pytest.raises(DataError, match="seed"):
        compare(*sampled)


def test_another_template_is_refused():
    with pytest.raises(DataError, match="template"):
        compare(side(["a"]), side(["a"], template="plain"))


def test_something_else_than_generations_is_refused():
    with pytest.raises(DataError, match="`after` is a list"):
        compare(side(["a"]), ["a"])


def test_a_before_made_with_the_trained_adapter_is_refused():
    trained = side(["a"], adapter="on", weights="abcdef0123456789")
    with pytest.raises(DataError, match="adapter=False"):
        compare(trained, trained)


def test_two_sides_of_the_base_model_compare_and_the_table_says_so():
    made = compare(side(["a"], adapter="off"), side(["a"], adapter="untrained"))
    assert "no trained adapter was on" in made.notes[0]
    assert "no trained adapter was on" in made._repr_html_()
    assert "no trained adapter was on" in made.to_markdown()
    assert pair(["a"], ["b"]).notes == ()


def test_a_first_side_with_an_adapter_and_another_model_are_noted():
    after = side(["a"], adapter="on", weights="b" * 16, model="other")
    notes = compare(side(["a"], adapter="on", weights="a" * 16), after).notes
    assert len(notes) == 2
    assert "aaaaaaaa" in notes[0] and "other" in notes[1]


def test_labels_given_by_the_caller_name_the_columns():
    made = compare(side(["a"], label="lambda 0"), side(["a"], label="lambda 2"))
    assert made.labels == ("lambda 0", "lambda 2")
    assert "lambda 2" in made._repr_html_() and "lambda 0" in made.to_markdown()
    assert pair(["a"], ["b"]).labels == ("before", "after")


def test_its_text_form_is_one_line_with_the_figures():
    line = repr(pair(["a", "b"], ["a", "b c"]))
    assert "\n" not in line
    assert "EOS rate 50% before -> 50% after" in line


def notebook_page(output):
    """An output as the page that nbconvert makes of a notebook with it, parsed."""
    import nbformat
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", output)])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    page, _ = HTMLExporter().from_notebook_node(notebook)
    return BeautifulSoup(page, "html.parser")


UNSAFE = ["script", "img", "link", "iframe", "h1", "strong", "em", "del", "a", "math", "i"]


def test_in_a_notebooks_html_page_model_text_is_text_alone():
    texts = [*NASTY, "\x1b[31mred\x1b[0m", "a\u202eb\u200fc", "x" * 50_000]
    plain = notebook_page({"text/html": pair(["a"], ["b"])._repr_html_()})
    page = notebook_page({"text/html": pair(texts, texts)._repr_html_()})
    counts = [{name: len(one.find_all(name)) for name in UNSAFE[:-1]} for one in (plain, page)]
    assert counts[0] == counts[1]
    wanted = [re.sub("\r", "[CR]", text) for text in texts]
    for character, name in (("\x1b", "ESC"), ("\u202e", "U+202E"), ("\u200f", "U+200F")):
        wanted = [text.replace(character, f"[{name}]") for text in wanted]
    cells = page.select("table.lwf-t tbody td")
    assert [cell.pre.text.removeprefix("\n") for cell in cells[::2]] == wanted
    assert page.select_one("div.tex2jax_ignore table.lwf-t")


def test_in_a_notebooks_html_page_the_markdown_shows_text_and_starts_no_formula():
    from bs4 import NavigableString

    texts = [text for text in NASTY if len(text) < 1000]
    page = notebook_page({"text/markdown": pair(texts, texts).to_markdown()})
    (area,) = page.select(".jp-RenderedMarkdown, .jp-RenderedHTMLCommon.jp-OutputArea-output")
    assert not area.find_all([name for name in UNSAFE if name not in ("h1", "a")])
    assert len(area.find_all("h1")) == 1, "the title"
    assert not [link for link in area.find_all("a") if "anchor-link" not in link.get("class", [])]
    rows = area.find_all("tbody")[-1].find_all("tr")
    assert [len(row.find_all("td")) for row in rows] == [3] * len(texts)
    for node in area.find_all(string=True):
        # What a formula begins and ends with is never in one run of text with anything else.
        alone = isinstance(node, NavigableString) and node.strip() in ("$", "\\")
        assert alone or not re.search(r"[$\\]", node)
