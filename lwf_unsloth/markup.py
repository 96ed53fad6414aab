"""Model text as safe HTML and markdown, and the table that a comparison shows.

Text of a model or of data is never markup: every character that HTML or markdown would act on is
escaped, and characters that a reader cannot see (control codes, direction marks) are named.
"""

import html
import re
from collections.abc import Sequence

from lwf_unsloth.answers import Answer, Generations
from lwf_unsloth.unseen import UNSEEN, name_of, shown

_ALIGNED = re.compile(r"^(?:\||```|\t| {4}|def |class |import |from \w+ import |#include)", re.M)
"""Lines of code or of a table, which read best in a fixed-width font."""

STYLE = """
.lwf{--line:rgba(128,128,128,.32);--soft:rgba(128,128,128,.08);--good:rgba(22,163,96,.16);
--good-line:rgba(22,163,96,.6);--warn:rgba(217,119,6,.17);--warn-line:rgba(217,119,6,.65);
color:inherit;font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
container-type:inline-size;max-width:1200px}
.lwf table.lwf-t{width:100%;table-layout:fixed;border-collapse:separate;border-spacing:0;margin:0;
border:1px solid var(--line);border-radius:10px;font:inherit;color:inherit}
.lwf .lwf-t caption{caption-side:top;text-align:left;padding:0 2px 10px;color:inherit}
.lwf .lwf-sub{display:block;font-size:12px;opacity:.72;font-weight:400;overflow-wrap:anywhere}
.lwf .lwf-note{display:block;margin-top:8px;padding:6px 10px;border-left:3px solid var(--warn-line);
background:var(--warn);border-radius:0 6px 6px 0;font-size:13px}
.lwf .lwf-t tr.lwf-r.lwf-r,.lwf .lwf-t tr.lwf-r.lwf-r:hover{background:none}
.lwf .lwf-t tr.lwf-r>th,.lwf .lwf-t tr.lwf-r>td{text-align:left;vertical-align:top;border:0;
padding:12px 14px;white-space:normal;max-width:none;font-size:14px;line-height:1.5;color:inherit}
.lwf .lwf-t tbody tr.lwf-r>*{border-top:1px solid var(--line)}
.lwf .lwf-t tr.lwf-r>td,.lwf .lwf-t thead tr.lwf-r>th+th{border-left:1px solid var(--line)}
.lwf .lwf-t thead tr.lwf-r>th{background:var(--soft);font-weight:600;overflow-wrap:anywhere}
.lwf .lwf-t tbody tr.lwf-r>th{font-weight:500;background:var(--soft)}
.lwf .lwf-t col.lwf-p{width:23%}
.lwf pre.lwf-x{margin:0;padding:0;border:0;background:none;color:inherit;font:inherit;
text-align:start;white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;unicode-bidi:isolate;
max-height:26em;overflow:auto;tab-size:4}
.lwf pre.lwf-code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",
monospace}
.lwf pre.lwf-in{margin-top:8px;padding-left:8px;border-left:2px solid var(--line);font-weight:400;
font-size:13px}
.lwf .lwf-b{display:inline-block;margin:0 0 8px;padding:1px 9px;border:1px solid;border-radius:99px;
font-size:12px;line-height:18px;font-weight:500;white-space:nowrap}
.lwf .lwf-eos{background:var(--good);border-color:var(--good-line)}
.lwf .lwf-length{background:var(--warn);border-color:var(--warn-line)}
.lwf .lwf-fault{background:none;border-color:var(--warn-line);border-style:dashed;
white-space:normal;overflow-wrap:anywhere;margin:0 0 8px;border-radius:10px}
.lwf .lwf-b+.lwf-fault{margin-right:4px}
.lwf .lwf-s{margin:10px 2px 0;font-size:13px}
.lwf .lwf-s span{display:inline-block;margin:0 14px 4px 0}
.lwf .lwf-m{display:block;height:5px;margin:8px 0 4px;border-radius:3px;background:var(--line)}
.lwf .lwf-m i{display:block;height:5px;border-radius:3px;background:rgb(22,163,96)}
.lwf .lwf-u{font:600 11px/1 ui-monospace,monospace;padding:0 3px;border-radius:3px;
background:var(--warn);unicode-bidi:isolate}
.lwf .lwf-none{display:block;opacity:.6;font-style:italic}
@container (max-width:640px){
.lwf .lwf-t,.lwf .lwf-t caption,.lwf .lwf-t thead,.lwf .lwf-t tbody,.lwf .lwf-t tr.lwf-r,
.lwf .lwf-t tr.lwf-r>th,.lwf .lwf-t tr.lwf-r>td{display:block}
.lwf .lwf-t caption{padding:10px 14px}
.lwf .lwf-t thead tr.lwf-r{display:grid;grid-template-columns:1fr 1fr}
.lwf .lwf-t thead tr.lwf-r>th:first-child{display:none}
.lwf .lwf-t thead tr.lwf-r>th:nth-child(2),.lwf .lwf-t tr.lwf-r>td{border-left:0}
.lwf .lwf-t tr.lwf-r>td::before{content:attr(data-side);float:right;font-size:12px;opacity:.65}
}
"""
"""Colours are tints over whatever background the notebook has, and text keeps the notebook's own
colour, so the table reads in light and dark themes alike."""


def html_text(text: str) -> str:
    """Text as HTML that shows exactly that text; invisible characters are marked and named."""
    parts, at = [], 0
    for match in UNSEEN.finditer(text):
        parts.append(html.escape(text[at : match.start()]))
        parts.append(f'<span class="lwf-u">{name_of(match.group())}</span>')
        at = match.end()
    return "".join([*parts, html.escape(text[at:])])


def markdown_text(text: str) -> str:
    """Text as the content of one markdown table cell, with line breaks and indents kept."""
    lines = []
    for line in shown(text).split("\n"):
        bare = line.lstrip(" \t")
        indent = line[: len(line) - len(bare)].replace("\t", "    ")
        bare = re.sub(r"[&<>|`*_\[\]~$\\@]", _entity, bare)
        bare = bare.replace("://", "&#58;//")  # addresses are no links either
        lines.append("&nbsp;" * len(indent) + re.sub(r"(?i)\b(www)\.", r"\1&#46;", bare))
    return "<br>".join(lines)


def _entity(match: re.Match[str]) -> str:
    """A character as an entity; what begins a formula for MathJax or KaTeX, which read the finished
    page, in an element of its own, over whose border they do not look.
    """
    entity = f"&#{ord(match.group())};"
    return f"<span>{entity}</span>" if match.group() in "$\\" else entity


def _text_box(text: str, extra: str = "") -> str:
    """A block that keeps spaces, lines and direction to itself; MathJax and KaTeX skip a <pre>."""
    kind = "lwf-x" + " lwf-code" * bool(_ALIGNED.search(text)) + extra
    # The parser drops one newline after <pre>: this one, so a text's own first newline stays.
    return f'<pre class="{kind}" dir="auto">\n{html_text(text)}</pre>'


def _answer_cell(answer: Answer, label: str, faults: Sequence[str]) -> str:
    """One answer with its stop badge and what is wrong with it."""
    size = f"{answer.tokens} token{'s' * (answer.tokens != 1)}"
    words = f"✓ eos · {size}" if answer.stop == "eos" else f"✂ length · cut at {size}"
    kind = "eos" if answer.stop == "eos" else "length"
    text = (
        _text_box(answer.text) if answer.text.strip() else '<span class="lwf-none">no text</span>'
    )
    side = html.escape(shown(label))
    marks = "".join(
        f'<span class="lwf-b lwf-fault">⚠ {html_text(fault)}</span>' for fault in faults
    )
    return f'<td data-side="{side}"><span class="lwf-b lwf-{kind}">{words}</span>{marks}{text}</td>'


def _head_cell(side: Generations, label: str) -> str:
    """The name of a side over its rate of finished answers and mean length."""
    rate = f"{side.eos_rate:.0%}"
    return (
        f'<th scope="col">{html_text(label)} <span class="lwf-sub">{html_text(side.source)}</span>'
        f'<span class="lwf-m"><i style="width:{side.eos_rate:.1%}"></i></span>'
        f'<span class="lwf-sub">EOS rate {rate} · mean {side.mean_tokens:.0f} tokens</span></th>'
    )


def table(
    sides: Sequence[Generations],
    labels: Sequence[str],
    caption: str,
    notes: Sequence[str],
    faults: Sequence[Sequence[Sequence[str]]] = (),
    summary: Sequence[str] = (),
) -> str:
    """The comparison as one HTML table, one row a prompt, one column a side.

    Args:
        sides: Answers to the same prompts, from left to right.
        labels: Names of the sides.
        caption: Settings in a line.
        notes: Warnings shown above the table.
        faults: What is wrong with each answer, by side, then prompt; none where not given.
        summary: Lines under the table.

    Returns:
        HTML without scripts or outside resources, styled for its own class alone.
    """
    rows = []
    wrong = faults or [[()] * len(side) for side in sides]
    for answers, marks in zip(zip(*sides, strict=True), zip(*wrong, strict=True), strict=True):
        asked = answers[0]
        given = _text_box(asked.input, " lwf-in") if asked.input else ""
        cells = "".join(map(_answer_cell, answers, labels, marks))
        rows.append(
            f'<tr class="lwf-r"><th scope="row">{_text_box(asked.prompt)}{given}</th>{cells}</tr>'
        )
    heads = "".join(map(_head_cell, sides, labels))
    warnings = "".join(f'<span class="lwf-note">{html_text(note)}</span>' for note in notes)
    below = "".join(f"<span>{html_text(line)}</span>" for line in summary)
    return (
        f'<div class="lwf tex2jax_ignore mathjax_ignore"><style>{STYLE}</style>'
        '<table class="lwf-t">'
        f'<caption><span class="lwf-sub">{html_text(caption)}</span>{warnings}</caption>'
        f'<colgroup><col class="lwf-p">{"<col>" * len(sides)}</colgroup>'
        f'<thead><tr class="lwf-r"><th scope="col">prompt</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        + (f'<div class="lwf-s">{below}</div>' if below else "")
        + "</div>"
    )


def page(body: str, title: str) -> str:
    """A page around a table that follows the reader's light or dark theme and loads nothing."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        'style-src \'unsafe-inline\'"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(shown(title))}</title><style>:root{{color-scheme:light dark}}"
        "body{margin:24px auto;max-width:1200px;padding:0 16px;background:Canvas;color:CanvasText}"
        f"</style></head><body>{body}</body></html>\n"
    )
