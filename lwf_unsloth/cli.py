"""The command line: demo, template, train, sweep, compare, evaluate, doctor.

Each command is a few calls of the library. Heavy imports live inside the commands, so that `--help`
is instant.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lwf_unsloth.errors import ConfigError, DataError, LwfError
from lwf_unsloth.ranks import rank, wait_to_end, world
from lwf_unsloth.secret_texts import without_secrets
from lwf_unsloth.unseen import PlainFormatter, shown

app = typer.Typer(
    name="lwf-unsloth",
    help="Fine-tune a 4-bit model on Alpaca-format data and keep what it knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN_HELP = """Train as a YAML file says.

\b
model:                       # ModelConfig
  model_name: smollm2-135m-instruct
training:                    # LwFConfig
  output_dir: runs/mine
  lwf_lambda: 2.0
data:
  task: my_task.jsonl        # what load_alpaca takes; a list with shares: [0.8, 0.2]
  rehearsal: general.jsonl   # Alpaca rows; or self, or rehearsal_text: passages.jsonl

\b
The same file on several GPUs, per_device_train_batch_size rows on each:
  torchrun --nproc_per_node 2 -m lwf_unsloth train FILE
  accelerate launch --num_processes 2 -m lwf_unsloth train FILE
"""
"""\\b keeps the lines below it as they are."""
SWEEP_HELP = """Try settings against each other, as a YAML file says; run it again to go on,
also with more numbers in the grid.

\b
model: ...                   # model, training, data: as in a training file
training:
  max_steps: 200
data:
  task: my_task.jsonl
  rehearsal: general.jsonl
grid:                        # every combination
  lwf_lambda: [0.5, 2, 5]
  rehearsal_ratio: [0.05, 0.2]
  r: [8, 16]
evaluate:
  general: kept.jsonl        # rows that are not trained on: what must not be forgotten
  gain: nll                  # or right
  forgetting: kl             # or nll, leak

\b
In place of grid, a budget of trials, each chosen by what the earlier ones gave:
trials: 20
space:
  learning_rate: {low: 1e-4, high: 4e-3, log: true}
  lwf_lambda: [0.5, 2, 5]
"""

Adapter = Annotated[Path, typer.Argument(help="Folder of a saved adapter.", show_default=False)]
Base = Annotated[
    str | None, typer.Option(help="Where the adapter's base model is, if it was a folder.")
]
Tokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows at a time: speed and memory.")]


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and every log line.")] = False,
) -> None:
    """Sets logging up; the library itself never does."""
    quiet = logging.WARNING if rank() == 0 else logging.ERROR  # of several processes one tells
    logging.basicConfig(format="%(message)s", level=logging.INFO if debug else quiet)
    for handler in logging.getLogger().handlers:  # text of models and data is no command here
        if type(handler.formatter) is logging.Formatter:
            handler.setFormatter(PlainFormatter("%(message)s"))
    logging.getLogger("lwf_unsloth").setLevel(logging.DEBUG if debug else quiet)
    if world() > 1 and context.invoked_subcommand != "train":
        refusal = ConfigError(
            f"{world()} processes were started for `{context.invoked_subcommand}`, which is the "
            "work of one: each would write the same files. Start it without torchrun or "
            "accelerate launch; only `train` runs on several."
        )
        refusal.told = rank() > 0
        raise refusal


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path(
        "runs/demo"
    ),
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or embedded name.", show_default="by machine")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 42,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 110,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Ask only so many.", show_default="all")
    ] = None,
    lambda0: Annotated[
        bool, typer.Option(help="After the report, also train without KL and rehearsal.")
    ] = True,
) -> None:
    """Teach a small model an invented FAQ: before and after."""
    from lwf_unsloth.demo import run_demo

    run_demo(output, model, seed=seed, steps=steps, questions=questions, lambda0=lambda0)


@app.command()
def template() -> None:
    """Print a JSONL file to start your own from."""
    from lwf_unsloth.alpaca import template_jsonl

    sys.stdout.write(template_jsonl())


@app.command(help=TRAIN_HELP)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)],
    resume: Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint.")] = False,
) -> None:
    """Trains as a YAML file says; in every process of torchrun or accelerate launch."""
    from lwf_unsloth import ranks
    from lwf_unsloth.train_file import read_train_file, train_from

    ranks.check_launch()
    with ranks.together("read the file"):
        file = read_train_file(config)
    folder = train_from(file, resume=resume)
    if rank() == 0:
        typer.echo(f"The adapter: {folder}")
    ranks.leave()


@app.command(help=SWEEP_HELP)
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)],
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time on this machine.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder.", show_default="runs/ and the file's name"),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Database that several machines share, postgresql+psycopg://...",
            show_default="study.db in the folder",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed trials again, once.")
    ] = False,
) -> None:
    """Runs what is unfinished of a sweep."""
    from lwf_unsloth.sweep import run_sweep
    from lwf_unsloth.sweep_file import read_sweep_file

    plan = read_sweep_file(grid)
    folder = output or Path("runs") / plan.path.stem
    typer.echo(plain(str(run_sweep(plan, workers=workers, output=folder, storage=storage))))
    typer.echo(f"All trials: {folder / 'trials.jsonl'}")


@app.command()
def compare(
    adapter: Adapter,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL or JSON of rows with instruction, or text, a prompt a line."),
    ] = None,
    base: Base = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the comparison.")
    ] = Path("runs/compare"),
    max_new_tokens: Tokens = 256,
    batch_size: Batch = 8,
) -> None:
    """Show answers of base and adapter side by side."""
    from rich.console import Console

    rows = None if prompts is None else read_prompt_file(prompts)
    from lwf_unsloth.comparison import compare as compared
    from lwf_unsloth.demo_view import answer_table
    from lwf_unsloth.generation import DEMO_PROMPTS, generate
    from lwf_unsloth.model import load_adapter

    model, tokenizer = load_adapter(adapter, base=base)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    asked = DEMO_PROMPTS if rows is None else rows
    before = generate(model, tokenizer, asked, adapter=False, label="base", **settings)
    after = generate(model, tokenizer, asked, label="tuned", **settings)
    result = compared(before, after)
    folder = result.save(output)
    Console().print(answer_table(result.rows[:6], *result.labels))
    typer.echo(f"{plain(str(result))}\nAll answers: {folder / 'comparison.html'} (and .md, .json)")


@app.command()
def evaluate(
    adapter: Adapter,
    data: Annotated[
        list[str],
        typer.Argument(help="NAME=FILE or FILE, the task's first: Alpaca rows or passages."),
    ],
    base: Base = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Name of a task's set; others are to be kept.")
    ] = None,
    leak: Annotated[str, typer.Option(help="Pattern of an answer in the task's form.")] = "learned",
    answers: Annotated[bool, typer.Option(help="Ask for answers too, which takes time.")] = True,
    answers_limit: Annotated[int | None, typer.Option(min=1, help="Answers a set.")] = None,
    text: Annotated[bool, typer.Option("--text", help="The data are plain passages.")] = False,
    prompt_too: Annotated[
        bool, typer.Option("--prompt-too", help="Score the prompt's tokens too.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows a set.")] = 500,
    max_new_tokens: Tokens = 96,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 512,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows at a time.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the numbers to this file.")
    ] = None,
) -> None:
    """Measure what base and adapter know, set by set: NLL, KL, right answers, leak."""
    rows = read_sets(data, text=text)
    from lwf_unsloth.evaluation import EvalSet
    from lwf_unsloth.evaluation import evaluate as evaluated
    from lwf_unsloth.model import load_adapter

    model, tokenizer = load_adapter(adapter, base=base)
    found = evaluated(
        model,
        tokenizer,
        {name: EvalSet(one, response_only=not prompt_too) for name, one in rows.items()},
        task=task or None,
        leak=leak,
        answers=answers,
        answers_limit=answers_limit,
        limit=limit,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        batch_size=batch_size,
    )
    if output is not None:
        found.save(output)
    typer.echo(plain(str(found)))


def read_sets(data: list[str], text: bool = False) -> dict[str, Any]:
    """The rows of each named source: Alpaca rows, or plain passages where it holds these.

    Args:
        data: NAME=SOURCE, or a source that is named after its file.
        text: Every source holds plain passages.

    Raises:
        DataError: A source cannot be read, or two have one name.
    """
    found: dict[str, Any] = {}
    for one in data:
        name, sign, source = one.partition("=")
        if not sign or Path(one).exists():
            name, source = Path(one).stem, one
        if name in found:
            raise DataError(f"Two sets are called {name!r}: name them apart, NAME={source}.")
        found[name] = _read_set(source, text)
    return found


def _read_set(source: str, text: bool) -> Any:
    from lwf_unsloth.alpaca import load_alpaca, load_text

    if text:
        return load_text(source, test_size=None)["train"]
    try:
        return load_alpaca(source, test_size=None)["train"]
    except DataError as no_alpaca:
        try:
            return load_text(source, test_size=None)["train"]
        except DataError:
            raise no_alpaca from None


@app.command()
def doctor() -> None:
    """Show versions, device, memory, disk, switches, and what is known to fail."""
    from lwf_unsloth.checkup import examine

    found = examine()
    typer.echo(plain(str(found)))
    if found.problems:
        raise ConfigError(" ".join(found.problems))


def read_prompt_file(path: Path) -> list[dict[str, str] | str]:
    """Prompts of a file: JSON or JSONL of rows with `instruction`, else a prompt a line.

    Raises:
        DataError: It cannot be read, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return list(json.loads(text))
        lines = [line for line in text.splitlines() if line.strip()]
        rows: list[Any] = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} could not be read as prompts: {error}. Give JSON or JSONL of rows with "
            "`instruction` (and `input`), or a text file with a prompt a line."
        ) from error
    if not rows:
        raise DataError(f"{path} holds no prompt: there is nothing to answer.")
    return rows


def plain(text: str) -> str:
    """Text for the terminal: no secrets, and nothing in it is a command to the terminal."""
    return shown(without_secrets(text))


def main() -> None:
    """Runs a command; an error of ours is a message and exit code 2, without a traceback."""
    given = sys.argv[1:]
    debug = "--debug" in given
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # answers may hold any character, terminals may not
            stream.reconfigure(errors="replace")
    try:
        # The switch may stand anywhere, also after the command.
        app(args=["--debug"] * debug + [word for word in given if word != "--debug"])
    except (LwfError, ImportError) as error:
        if debug:
            raise
        if not getattr(error, "told", False):
            where = "Error" if world() == 1 else f"Error in process {rank()} of {world()}"
            typer.echo(
                f"{where}: {plain(str(error))}\n(--debug shows where it happened.)", err=True
            )
        wait_to_end(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
