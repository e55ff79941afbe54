"""The clip2fl command: wires its subcommands together.

What a subcommand needs is imported when it runs, since torch and matplotlib take
seconds.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip2fl_common.shown import shown

app = typer.Typer(
    name="clip2fl",
    help="Compare, look at and take away what CLIP2FL on Flower has trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Answers go to standard output, everything else to standard error. Names from outside
# are text: neither markup nor emoji.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

# Longer messages than this hide what they say; values in them may have any length.
MAX_MESSAGE = 2000

Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="'KEY=VALUE ...'",
        help="Run configuration keys that win over the file; may be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Model = Annotated[
    Path,
    typer.Option("--model", help="A run's folder, or its model.safetensors."),
]


@app.command()
def compare(
    comparison: Annotated[
        Path, typer.Argument(help="TOML file, such as conf/demo-compare.toml.")
    ],
    runs: Annotated[
        Path, typer.Option(help="Folder under which the comparison has its own.")
    ] = Path("runs"),
    settings: Settings = [],  # noqa: B006
    seeds: Annotated[
        list[int],
        typer.Option("--seed", help="Instead of the file's; may be repeated."),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Run variants over seeds; write their table and report.

    Runs that are complete are not repeated: after an interruption, the same command
    goes on where it stopped.
    """
    from clip2fl_cli import comparison as comparisons
    from clip2fl_cli.progress import ComparisonProgress
    from clip2fl_cli.results import write_results

    compared = comparisons.Comparison.read(comparison, runs, settings, seeds)
    missing = compared.missing()
    there = len(compared.plan) - len(missing)
    _tell(f"{compared.name}: {there} of {len(compared.plan)} runs are there")
    try:
        with ComparisonProgress(missing, there, err) as progress:
            failed = list(comparisons.complete(compared, progress))
    except KeyboardInterrupt as interruption:
        # Between two simulations, Python's own handler raises it.
        signum: int = getattr(interruption, "signum", signal.SIGINT)
        _tell("interrupted; the same command goes on where this one stopped")
        raise typer.Exit(128 + signum) from None
    if finished := compared.finished():
        command = shlex.join(["clip2fl", *sys.argv[1:]])
        _tell("Drawing the reports of all runs")
        written = write_results(compared, finished, command, failed)
        out.print(written.results.answer(as_json), soft_wrap=True)
        _tell(f"Report: {written.report}")
    else:
        _tell("no run has completed, so there is nothing to report")
    for run in failed:
        _tell(f"failed: {run.variant}, seed {run.seed}: {run.reason}", "bold red")
    raise typer.Exit(1 if failed else 0)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def doctor(context: typer.Context) -> None:
    """Check a site before it takes part in a federation, and say what to fix.

    ``clip2fl doctor --help`` lists the options. Nodes, on which this command need not
    be installed, have the same as ``python -m client_app.doctor``.
    """
    from client_app import doctor as check

    raise typer.Exit(check.main(context.args, prog="clip2fl doctor"))


@app.command()
def partition(
    run_config: Annotated[
        Path | None, typer.Option(help="TOML file of an experiment; none: the demo.")
    ] = None,
    settings: Settings = [],  # noqa: B006
    figure: Annotated[
        Path | None, typer.Option(help="Also draw a heat map here (.png, .svg, .pdf).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which client would hold how many images of which class."""
    from clip2fl_cli.configuration import resolve
    from clip2fl_cli.holdings import Holdings

    held = Holdings.of(resolve(run_config, settings))
    if figure is not None:
        held.draw(figure)
        _tell(f"Heat map: {figure}")
    if as_json:
        _print_json({"classes": held.class_names, "images": held.counts.tolist()})
        return
    rows = [[str(client), *row, sum(row)] for client, row in enumerate(held.counts)]
    totals = held.counts.sum(axis=0)
    rows.append(["all", *totals, totals.sum()])
    _print_table(["client", *held.class_names, "all"], rows)


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A complete run's folder, or a comparison's; or the .csv table that a "
            "comparison has left."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="Run of FedAvg to set a run's classes against."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html, with its pictures also as PNG and SVG, into the folder.

    Of a comparison's table, print the page that the comparison has left.
    """
    from clip2fl_cli.report import write_run_report
    from clip2fl_cli.results import SUMMARY_FILE, redraw, rewrite_report
    from clip2fl_cli.runs import FinishedRun

    if folder.suffix == ".csv" and not folder.is_dir():
        out.print(redraw(folder).answer(as_json), soft_wrap=True)
        return
    if os.path.lexists(folder / SUMMARY_FILE):
        page = rewrite_report(folder)
    else:
        other = None if against is None else FinishedRun.read(against)
        page = write_run_report(FinishedRun.read(folder), other)
    _print_json({"report": str(page)}) if as_json else _answer(str(page))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Model,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what is on images, by a delivered model."""
    from clip2fl_cli.prediction import predict as classify

    found = classify(model, images, top)
    if as_json:
        answer = [
            {
                "image": str(prediction.file),
                "classes": [
                    {"name": name, "probability": round(probability, 6)}
                    for name, probability in prediction.classes
                ],
            }
            for prediction in found
        ]
        _print_json(answer)
        return
    for prediction in found:
        named = ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes)
        _answer(f"{prediction.file}: {named}")


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the files.")],
    costs: Annotated[
        bool, typer.Option(help="Measure size and CPU latency of the model.")
    ] = True,
    teacher_cost: Annotated[
        bool,
        typer.Option(
            "--teacher-cost",
            help="Also of the run's teacher, whatever folder or hub its configuration "
            "names; the built-in one is always measured.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a delivered model as safetensors and ONNX, and say what it costs."""
    from clip2fl_cli import exporting
    from clip2fl_cli.prediction import model_file
    from clip2fl_common.shown import short

    file = model_file(model)
    # What is wrong is found before anything is written.
    teacher = exporting.run_teacher(file) if costs else None
    written = exporting.export(file, output)
    loaded = teacher if teacher and (teacher_cost or teacher.is_built_in) else None
    measured = exporting.costs(file, loaded) if costs else []
    if teacher and not loaded:
        _tell(
            f"the run's teacher, {short(teacher.name)}, is not measured; "
            "--teacher-cost loads and measures it: give it if you trust this run's "
            "configuration"
        )
    if as_json:
        _print_json(
            {
                "files": [str(path) for path in written],
                "costs": [vars(cost) for cost in measured],
            }
        )
        return
    for path in written:
        _answer(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    if measured:
        _print_table(
            ["model", "parameters", "MB", "ms an image, 1 thread"],
            [
                [
                    cost.name,
                    f"{cost.parameters:,}",
                    f"{cost.megabytes:.2f}",
                    f"{cost.milliseconds:.2f}",
                ]
                for cost in measured
            ],
        )


def main() -> None:
    """Run the command; what a user can mend is one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        problem = error.format_message().rstrip(".")
        _fail(f"{problem}; --help lists what there is", error.exit_code)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        _fail(_message(error), 2)
    except RuntimeError as error:
        from clip2fl_cli.simulation import SimulationError
        from clip2fl_common.teacher import TeacherError

        if not isinstance(error, TeacherError | SimulationError):
            raise
        _fail(_message(error), 1)
    sys.exit(status if isinstance(status, int) else 0)


def _message(error: Exception) -> str:
    """Return an error's text: one line, but for the list of a configuration's keys."""
    from clip2fl_common.config import ConfigError

    text = str(error)
    lines = text.split("\n") if isinstance(error, ConfigError) else [text]
    return "\n".join(map(shown, lines))


def _fail(message: str, status: int) -> NoReturn:
    if len(message) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        message = f"{message[:half]} ... {message[-half:]}"
    err.print(f"clip2fl: {message}", style="bold red", soft_wrap=True)
    sys.exit(status)


def _answer(text: str) -> None:
    """Print a line of the answer."""
    out.print(shown(text), soft_wrap=True)


def _tell(text: str, style: str | None = None) -> None:
    """Print a line that is no part of the answer."""
    err.print(shown(text), style=style, soft_wrap=True)


def _print_json(content: Any) -> None:
    out.print(json.dumps(content), soft_wrap=True)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table()
    for number, name in enumerate(header):
        table.add_column(
            Text(shown(name)), justify="right" if number else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    # A table that is wider than the terminal, or goes to a file, is not cut.
    unlimited = out.options.update(max_width=100_000)
    width = out.measure(table, options=unlimited).maximum
    Console(highlight=False, width=max(width, out.width)).print(table)


if __name__ == "__main__":
    main()
