"""Text as hostile as a model's can be, in all that shows model text; imported by a kernel."""

from typing import Any

NASTY = [
    "<script>window.evil = 1; alert(1)</script>",
    '<img src=x onerror="window.evil = 2; alert(2)"> <svg onload=alert(3)>',
    "</pre></td></tr></table><h1>x</h1><style>.lwf{display:none}</style>",
    "# head\n* item **bold** _it_ ~~gone~~ [link](https://example.org) ![p](https://example.org/p)",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('`x`')\n```\n    indented\n\ttab",
    "costs $5 and $10, $$\\frac{a}{b}$$ \\(x\\) \\[y\\] \\begin{align}z\\end{align}",
    "\x1b[31mred\x1b[0m \x1b]8;;https://example.org\x07link\x1b]8;;\x07 \x1b[2J\x08\x08",
    "\u202egnihtyreve \u2066isolated \u200fmark",  # never closed
    "\u05e9\u05dc\u05d5\u05dd (1, 2) \u05e2\u05d5\u05dc\u05dd!",
    "https://example.org www.example.org someone@example.org javascript:alert(4)",
    '{instruction} {{x}} %s &lt;b&gt; &amp; "double" \'single\' ="x" onmouseover=',
    "\u65e5\u672c\u8a9e\u306e\u7b54\u3048\u3002" * 20,
    "x" * 50_000,
    "word " * 10_000,
]
EVIL = " ".join(NASTY[:11]).replace("\n", " ")
"""All in one line, for names and messages."""


def comparison() -> Any:
    """The nasty texts as prompts, inputs and answers of both sides, and as names."""
    from lwf_unsloth.answers import Answer, Generations
    from lwf_unsloth.comparison import Comparison
    from lwf_unsloth.decoding import Decoding

    sides = [
        Generations(
            answers=tuple(
                Answer(prompt[:900], text, stop, 7, input=prompt[:300])
                for prompt, text in zip(NASTY, texts, strict=True)
            ),
            settings=Decoding(),
            model=EVIL,
            template=EVIL,
            weights="0123456789",
            label=label,
        )
        for texts, stop, label in ((NASTY, "eos", ""), (NASTY[::-1], "length", EVIL))
    ]
    return Comparison(*sides, notes=(EVIL,))


def forgetting() -> Any:
    """A report whose sets, stages and notes have such names."""
    from lwf_unsloth.forgetting import ForgettingReport, Line

    lines = [
        Line(name, "nll", "NLL", 1, (3.0, 2.0), None, None, None) for name in (*NASTY[:11], EVIL)
    ]
    return ForgettingReport(("base", EVIL), tuple(lines), {}, (EVIL,))


def advice() -> Any:
    """Advice with such sentences."""
    from lwf_unsloth.advice import Advice, Hint

    return Advice(tuple(Hint("form", text) for text in (*NASTY[:11], EVIL)))


def panel(folder: str) -> Any:
    """The panel, each of its outputs filled."""
    import lwf_unsloth as lwf
    from lwf_unsloth.panel_parts import message

    made = lwf.panel(output_dir=folder)
    made.parts.source.value = made.parts.model.value = made.parts.prompt.value = EVIL
    kinds = ("ok", "bad", "warn", "wait", "")
    for (name, place), kind in zip(made.parts.said.items(), kinds, strict=True):
        place.value = message(EVIL, kind, notes=[NASTY[-2]], details=EVIL, fixed=name == "rows")
    made.parts.at.value = message(EVIL)
    made.parts.table.value = comparison()._repr_html_()
    return made
