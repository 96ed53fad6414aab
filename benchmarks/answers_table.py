"""The demo prompts answered before and after, for README.md: as text and as a picture.

    python -m benchmarks.answers_table     draws the picture with the machine's Chromium

The text is made by `python benchmarks/tables.py` from the comparison that main_job_gpu saved.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = "alpaca_gemma3_270m"
SHOWN = 280  # characters of an answer that a page shows; the file beside it holds all of it
WIDTH, HEIGHT = 1280, 4000  # of the window that the picture is taken of, in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def answers(results: Path) -> str | None:
    """The table of the prompts as markdown, with the picture if there is one.

    Args:
        results: The folder of the result files.

    Returns:
        None where the run has left no comparison.
    """
    from lwf_unsloth.markup import markdown_text

    path = results / RUN / "comparison.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    sides = [found[side]["answers"] for side in ("before", "after")]
    lines = ["| prompt | before | after |", "|---|---|---|"]
    for one, other in zip(*sides, strict=True):
        cells = [one["prompt"], *(_answer(answer) for answer in (one, other))]
        lines.append("| " + " | ".join(markdown_text(cell) for cell in cells) + " |")
    ends = " → ".join(f"{found['eos_rate'][side]:.0%}" for side in ("before", "after"))
    folder = f"benchmarks/results/{RUN}"
    lines += ["", f"Answers that end by themselves: {ends}. Whole answers: [{folder}]({folder}/)."]
    if (results / RUN / "comparison.png").is_file():
        lines += ["", f"![The five prompts before and after]({folder}/comparison.png)"]
    return "\n".join(lines) + "\n"


def demo_answers(result: dict[str, Any], count: int = 6) -> str:
    """The first held-out questions of the demo, right answers and wrong ones as they come.

    Args:
        result: demo_cpu_answers.json.
        count: Questions shown.

    Returns:
        The table as markdown.
    """
    from lwf_unsloth.markup import markdown_text

    lines = ["| asked in words that were not trained | before | after |", "|---|---|---|"]
    for row in result["rows"][:count]:
        cells = [row["prompt"]]
        for side in ("before", "after"):
            text = row[side].strip().split("\n")[0]
            text = text if len(text) <= 110 else text[:110].rsplit(" ", 1)[0] + " …"
            cells.append(text + " (cut by length)" * (row[f"{side}_stop"] != "eos"))
        lines.append("| " + " | ".join(markdown_text(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _answer(answer: dict[str, Any]) -> str:
    """The beginning of an answer and how it ended."""
    text = answer["text"].strip() or "(no text)"
    text = text if len(text) <= SHOWN else text[:SHOWN].rstrip() + " …"
    ended = "ended by itself" if answer["stop"] == "eos" else "cut by length"
    return f"{text}\n({ended}, {answer['tokens']} tokens)"


def picture(folder: Path) -> Path:
    """Takes a picture of comparison.html, cut to what the page fills.

    Args:
        folder: Where the comparison lies; comparison.png is put beside it.

    Returns:
        The picture.

    Raises:
        SystemExit: No Chromium on this machine, or it made no picture.
    """
    from PIL import Image, ImageChops

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"No browser here: one of {', '.join(BROWSERS)} takes the picture.")
    made = folder / "comparison.png"
    page = (folder / "comparison.html").resolve().as_uri()
    settings = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={made}"]
    subprocess.run(
        [browser, *settings, f"--window-size={WIDTH},{HEIGHT}", page], check=False, timeout=120
    )
    if not made.is_file():
        raise SystemExit(f"{browser} took no picture of {page}.")
    with Image.open(made) as image:
        whole = image.convert("RGB")
    empty = Image.new("RGB", whole.size, whole.getpixel((WIDTH - 1, HEIGHT - 1)))
    filled = ImageChops.difference(whole, empty).getbbox() or (0, 0, WIDTH, HEIGHT)
    whole.crop((0, 0, WIDTH, min(HEIGHT, filled[3] + 16))).save(made, optimize=True)
    return made


if __name__ == "__main__":
    results = Path(__file__).resolve().parent / "results"
    print(picture(Path(sys.argv[1]) if len(sys.argv) > 1 else results / RUN))
