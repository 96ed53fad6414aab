"""The panel's widgets and where they stand; what they do is wired in widgets.py."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as ipw

from lwf_unsloth.markup import html_text
from lwf_unsloth.panel_code import REHEARSALS

MODELS = ("smollm2-135m-instruct", "gemma-3-270m", "unsloth/gemma-2b-bnb-4bit")
"""Offered; any other hub id or folder can be written in."""
FILES = ".json,.jsonl,.ndjson,.csv,.tsv,.parquet"
NUMBERS = {
    "lwf_lambda": ("lambda", 2.0, "Weight of the KL term: higher keeps more, learns less"),
    "lwf_temperature": ("temperature", 1.0, "Softmax temperature of teacher and student"),
    "rehearsal_ratio": ("rehearsal ratio", 0.1, "Share of rehearsal rows in the mix, below 1"),
    "max_steps": ("steps", 60, "Optimizer steps of 8 rows or more; 0 is one pass over all rows"),
    "learning_rate": ("learning rate", 2e-4, "Peak rate; small models take up to 2e-3"),
    "per_device_train_batch_size": ("rows a forward", 2, "Fewer need less memory"),
}
"""Setting -> how it is called, its value at first, and what it does."""

STYLE = """<style>
.lwf-panel{max-width:1000px;font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.lwf-panel .lwf-card{border:1px solid rgba(128,128,128,.35);border-radius:10px;padding:10px 14px;
margin:0 0 12px;overflow:hidden}
.lwf-panel .lwf-h{font-size:15px;font-weight:600;line-height:1.6}
.lwf-panel .lwf-h small{font-weight:400;opacity:.7;font-size:12.5px}
.lwf-panel .lwf-say{display:block;padding:6px 10px;border-left:3px solid rgba(128,128,128,.5);
background:rgba(128,128,128,.08);border-radius:0 6px 6px 0;font-size:13px;line-height:1.45;
overflow-wrap:anywhere;max-height:24em;overflow:auto}
.lwf-panel .lwf-say pre,.lwf-panel pre.lwf-script{margin:0;padding:0;background:none;border:0;
color:inherit;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.lwf-panel .lwf-say+.lwf-say{margin-top:6px}
.lwf-panel .lwf-say details{margin-top:4px}
.lwf-panel .lwf-say summary{cursor:pointer;opacity:.75}
.lwf-panel .lwf-ok{border-color:rgba(22,163,96,.7);background:rgba(22,163,96,.12)}
.lwf-panel .lwf-wait{border-color:rgba(0,114,178,.7);background:rgba(0,114,178,.1)}
.lwf-panel .lwf-bad{border-color:rgba(217,60,6,.75);background:rgba(217,60,6,.12)}
.lwf-panel .lwf-warn{border-color:rgba(217,119,6,.7);background:rgba(217,119,6,.13)}
.lwf-panel pre.lwf-script{padding:8px 10px;background:rgba(128,128,128,.08);border-radius:6px;
user-select:all;max-height:70em;overflow:auto}
.lwf-panel .widget-label{color:inherit}
.lwf-panel textarea{font:inherit}
.lwf-panel img{max-width:100%;background:#fff;border-radius:6px}
</style>"""


def message(
    text: str, kind: str = "", *, notes: Sequence[str] = (), details: str = "", fixed: bool = False
) -> str:
    """A message as HTML; no text in it is markup.

    Args:
        text: What is said.
        kind: "ok", "wait", "warn", "bad" or empty.
        notes: Further lines, each a warning of the library.
        details: Folded in under it, in a fixed-width font.
        fixed: Whether the text keeps its lines and spaces.

    Returns:
        The HTML, empty where there is nothing to say.
    """
    if not text and not notes:
        return ""
    body = f"<pre>{html_text(text)}</pre>" if fixed else html_text(text)
    body += "".join(f'<div style="margin-top:4px">⚠ {html_text(note)}</div>' for note in notes)
    if details:
        body += f"<details><summary>details</summary><pre>{html_text(details)}</pre></details>"
    return f'<div class="lwf-say lwf-{kind or "plain"} tex2jax_ignore mathjax_ignore">{body}</div>'


def code_box(code: str) -> str:
    """Code as HTML, selected whole by one click."""
    return f'<pre class="lwf-script tex2jax_ignore">{html.escape(code)}</pre>'


def uploads(value: Any) -> list[tuple[str, bytes]]:
    """Name and content of each uploaded file, from ipywidgets 8's value or 7's."""
    if isinstance(value, Mapping):
        return [(name, bytes(one["content"])) for name, one in value.items()]
    return [(one["name"], bytes(one["content"])) for one in value]


def _button(text: str, hint: str, style: str = "") -> ipw.Button:
    return ipw.Button(description=text, tooltip=hint, button_style=style, layout={"width": "auto"})


def _row(*children: ipw.Widget) -> ipw.HBox:
    return ipw.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center"})


def _card(title: str, hint: str, *children: ipw.Widget) -> ipw.VBox:
    head = ipw.HTML(f'<div class="lwf-h">{title} <small>{hint}</small></div>')
    box = ipw.VBox([head, *children])
    box.add_class("lwf-card")
    return box


class Parts:
    """Every widget of the panel, laid out; none does anything yet."""

    def __init__(self) -> None:
        """Makes them."""
        self.said = {name: ipw.HTML() for name in ("rows", "model", "fit", "training", "answers")}
        """The messages, by section."""
        self._rows_and_model()
        self._settings()
        self._training()
        self._answers()
        self.code = ipw.HTML()

    def _rows_and_model(self) -> None:
        wide = {"width": "380px", "max_width": "100%"}
        self.source = ipw.Text(
            placeholder="file, folder or hub id", layout=wide, continuous_update=False
        )
        self.upload = ipw.FileUpload(accept=FILES, multiple=False, layout={"width": "auto"})
        self.check = _button("Check", "Read the rows and report what was kept", "primary")
        self.model = ipw.Combobox(
            options=MODELS, placeholder="model", layout=wide, continuous_update=False
        )
        self.load = _button("Load", "Load the model in 4 bits", "primary")

    def _settings(self) -> None:
        style, layout = {"description_width": "110px"}, {"width": "230px"}
        self.rehearsal = ipw.Dropdown(
            options=list(REHEARSALS.items()),
            description="rehearsal",
            style={"description_width": "110px"},
            layout={"width": "376px", "max_width": "100%"},
        )
        self.rehearsal_path = ipw.Text(
            placeholder="file of yours", layout={"width": "376px", "max_width": "100%"}
        )
        self.numbers: dict[str, Any] = {}
        for name, (text, value, hint) in NUMBERS.items():
            kind = ipw.IntText if isinstance(value, int) else ipw.FloatText
            self.numbers[name] = kind(
                value, description=text, tooltip=hint, style=style, layout=layout
            )

    def _training(self) -> None:
        self.train = _button("Train", "From the model as it was loaded", "success")
        self.stop = _button("Stop", "End after this step, with a checkpoint", "warning")
        self.resume = _button("Go on", "Go on from the checkpoint of the stopped run")
        self.bar = ipw.IntProgress(min=0, max=1, layout={"width": "220px"})
        self.at = ipw.HTML()
        self.chart = ipw.Image(format="png", layout={"display": "none"})

    def _answers(self) -> None:
        full = {"width": "auto"}
        self.prompt = ipw.Textarea(placeholder="Ask something", rows=2, layout=full)
        self.given = ipw.Textarea(placeholder="input, where there is one", rows=1, layout=full)
        self.held_out = _button("A held-out row", "Ask a row of your file that is not trained on")
        self.ask = _button("Ask before and after", "With the adapter off, then on", "primary")
        self.dial = ipw.FloatSlider(
            1.0,
            min=0,
            max=1.5,
            step=0.05,
            description="dial",
            continuous_update=False,
            readout_format=".2f",
            style={"description_width": "40px"},
        )
        self.save = _button("Save the adapter", "An ordinary adapter, with the dial's scale in it")
        self.table = ipw.HTML()

    def box(self) -> tuple[ipw.Widget, ...]:
        """The sections from top to bottom."""
        numbers = list(self.numbers.values())
        settings = ipw.VBox(
            [self.rehearsal, self.rehearsal_path, *map(_pair, numbers[::2], numbers[1::2])]
        )
        beside = ipw.VBox([self.said["fit"]], layout={"flex": "1 1 280px", "min_width": "260px"})
        return (
            ipw.HTML(STYLE),
            _card(
                "1 Rows",
                "instruction, input, output as JSON, JSONL, CSV or parquet; over 10 MB: name it",
                _row(self.upload, self.source, self.check),
                self.said["rows"],
            ),
            _card(
                "2 Model and settings",
                "any name of the hub, or a folder",
                _row(self.model, self.load),
                self.said["model"],
                ipw.HBox([settings, beside], layout={"flex_flow": "row wrap", "grid_gap": "12px"}),
            ),
            _card(
                "3 Train",
                "nats per token; the KL says how far the model has moved",
                _row(self.train, self.stop, self.resume, self.bar, self.at),
                self.chart,
                self.said["training"],
            ),
            _card(
                "4 Before and after",
                "dial: 0 is the base, 1 the adapter as trained; nothing is trained again",
                self.prompt,
                self.given,
                _row(self.held_out, self.ask, self.dial, self.save),
                self.said["answers"],
                self.table,
            ),
            _card("The same as code", "one click selects it all", self.code),
        )


def _pair(left: ipw.Widget, right: ipw.Widget) -> ipw.HBox:
    return ipw.HBox([left, right], layout={"flex_flow": "row wrap"})
