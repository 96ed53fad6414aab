"""A table of figures in three clothes: plain text, markdown and HTML, every cell escaped."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import DataError
from lwf_unsloth.markup import html_text, markdown_text, shown
from lwf_unsloth.whole_files import write_whole_text, writing

_STYLE = """
.lwf-n{color:inherit;font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
max-width:1200px;overflow-x:auto}
.lwf-n table{border-collapse:collapse;margin:0;color:inherit;font:inherit}
.lwf-n caption{caption-side:top;text-align:left;padding:0 2px 8px;color:inherit;font-size:12px;
opacity:.75}
.lwf-n tr.lwf-nr.lwf-nr,.lwf-n tr.lwf-nr.lwf-nr:hover{background:none}
.lwf-n tr.lwf-nr>*{padding:5px 12px;text-align:left;vertical-align:top;border:0;color:inherit;
border-bottom:1px solid rgba(128,128,128,.32);font-variant-numeric:tabular-nums}
.lwf-n thead tr.lwf-nr>th{background:rgba(128,128,128,.1);font-weight:600}
.lwf-n tbody tr.lwf-nr>th{font-weight:500}
.lwf-n p{margin:8px 0 0;padding:6px 10px;border-left:3px solid rgba(217,119,6,.65);
background:rgba(217,119,6,.14);font-size:13px}
"""


@dataclass(frozen=True)
class ResultTable:
    """Rows of text under heads; the first column names the row."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the figures right."""

    def to_text(self) -> str:
        """For a terminal: columns aligned."""
        lines = [tuple(map(_one_line, line)) for line in (self.heads, *self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heads))]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        notes = [f"! {_one_line(note)}" for note in self.notes]
        caption = [_one_line(self.caption)] if self.caption else []
        return "\n".join([*caption, body[0], rule, *body[1:], *notes])

    def to_markdown(self) -> str:
        """For a model card or an issue."""
        lines = [" | ".join(markdown_text(cell) for cell in line) for line in self.rows]
        table = [
            f"| {' | '.join(map(markdown_text, self.heads))} |",
            "|" + "---|" * len(self.heads),
            *(f"| {line} |" for line in lines),
        ]
        notes = [f"> {markdown_text(note)}\n" for note in self.notes]
        caption = [markdown_text(self.caption), ""] if self.caption else []
        return "\n".join([*caption, *table, "", *notes]) + "\n"

    def to_html(self) -> str:
        """For a notebook: no scripts, no outside resources, readable in light and dark themes."""
        heads = "".join(f'<th scope="col">{html_text(head)}</th>' for head in self.heads)
        rows = []
        for first, *others in self.rows:
            cells = "".join(f"<td>{html_text(cell)}</td>" for cell in others)
            rows.append(f'<tr class="lwf-nr"><th scope="row">{html_text(first)}</th>{cells}</tr>')
        notes = "".join(f"<p>{html_text(note)}</p>" for note in self.notes)
        return (
            f'<div class="lwf-n tex2jax_ignore mathjax_ignore"><style>{_STYLE}</style><table>'
            f'<caption>{html_text(self.caption)}</caption><thead><tr class="lwf-nr">{heads}</tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table>{notes}</div>"
        )


class Tabled:
    """What shows itself as its `table()` everywhere, and is saved as its `to_dict()`.

    A dataclass of this kind is declared with `repr=False`.
    """

    def table(self) -> ResultTable:
        """The figures as a table."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The table for a terminal."""
        return self.table().to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return self.table().to_html()

    def to_markdown(self) -> str:
        """The table as markdown."""
        return self.table().to_markdown()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `to_dict` as a JSON file, whole or not at all.

        Returns:
            Its path.
        """
        return save_json(path, self.to_dict())


def _one_line(text: str) -> str:
    """A cell for a terminal: a line break in a name would tear the columns apart."""
    return " ".join(shown(text).split("\n"))


def figure(value: float | None, unit: str, signed: bool = False) -> str:
    """A number as a table shows it: shares in percent, nats with three or four digits."""
    if value is None or math.isnan(value):
        return "–"
    sign = "+" if signed else ""
    if unit == "share":
        return f"{100 * value:{sign}.1f} %" if not signed else f"{100 * value:+.1f} pp"
    small = 0 < abs(value) < 0.1
    return f"{value:{sign}.{4 if small else 3}f}"


def span(value: float, low: float, high: float, unit: str, signed: bool = True) -> str:
    """A number with its interval; the unit stands once."""
    edges = [figure(edge, unit, signed).rstrip(" %p") for edge in (low, high)]
    return f"{figure(value, unit, signed)} [{edges[0]}, {edges[1]}]"


def save_json(path: str | os.PathLike[str], values: dict[str, Any]) -> Path:
    """Writes JSON whole or not at all; makes the folder.

    Returns:
        The path.

    Raises:
        DiskError: The disk is full, or the folder may not be written.
    """
    path = Path(path)
    with writing(path.parent):
        write_whole_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
    return path


def load_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Reads what `save_json` wrote.

    Raises:
        DataError: No such file, or no JSON object of that kind in it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} could not be read as {what}: {error}.") from error
    if not isinstance(values, dict) or values.get("what") != what:
        found = values.get("what") if isinstance(values, dict) else type(values).__name__
        raise DataError(
            f"{str(path)!r} holds {found!r}, but {what!r} is needed: give the file that "
            "save() wrote."
        )
    return values
