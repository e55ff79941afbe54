"""The clip2fl command with its subcommands.

Each subcommand imports its modules when it runs, since the import of torch and
matplotlib takes seconds.
"""

import contextlib
import io
import os
import shlex
import signal
import sys
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Annotated

import click
import typer

from clip2fl_cli import console
from clip2fl_cli.delivering import deliver, signing_key
from clip2fl_cli.options import (
    CONTROL_ADDRESS,
    MOST_NODES,
    AsJson,
    ControlAddress,
    ModelPath,
    Patience,
    PublicKey,
    RootCertificates,
    RunConfigFile,
    RunFolder,
    RunId,
    Settings,
    ShownImages,
    Verbose,
    finite,
    positive,
)
from clip2fl_cli.site_commands import site
from clip2fl_common.shown import shown

RESUMING = (
    "clip2fl: to go on after its last checkpoint, start a run with the same "
    "configuration and --set 'run.resume=\"FOLDER\"', the folder that its log names"
)

app = typer.Typer(
    name="clip2fl",
    help="Train with CLIP2FL on Flower; compare, look at and take away the results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(site)


def _print_version(wanted: bool) -> None:
    if wanted:
        from clip2fl_common.project import version

        console.out.print(f"clip2fl {version()}")
        raise typer.Exit()


@app.callback()
def _general(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Say which it is."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    run_config: RunConfigFile = None,
    settings: Settings = [],  # noqa: B006
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Go on with the interrupted run in this folder, with its settings.",
        ),
    ] = None,
    supernodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_NODES,
            help="Simulated nodes; one per CPU core, at least 2, if not given.",
        ),
    ] = None,
    cpus_per_client: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_NODES,
            help="CPU cores that a client occupies and computes with.",
        ),
    ] = 1,
    gpus_per_client: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            help="GPUs, or the share of one, that a client occupies. If not given, "
            "clients share all GPUs, at most 4 clients on each; 0: none.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Use this running Ray cluster (see docs/simulation.md).",
        ),
    ] = None,
    app_folder: Annotated[
        Path | None,
        typer.Option(
            "--app", metavar="DIR", help="Folder of another Flower app to run instead."
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(callback=positive, help="Stop the run after so many seconds."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train: run the federation in a simulation on this machine; write its report.

    A terminal shows a bar and the last round's numbers, other outputs a line for each
    round. Flower's log goes to the file run.log in the run's folder.

    The run has its own SuperLink, and all its processes end with the command, even
    after Ctrl-C. Exit status: 0 the run completed; 1 it did not; 2 wrong usage; 130 or
    143 the command was interrupted by Ctrl-C or SIGTERM.
    """
    from clip2fl_cli.progress import RunProgress
    from clip2fl_cli.signals import Interrupted
    from clip2fl_cli.simulation import simulate
    from clip2fl_common.project import PROJECT

    progress = RunProgress(console.out, verbose, at_end=_import_report_early)
    output = progress.output
    try:
        with progress:
            result = simulate(
                app_folder or PROJECT,
                run_config=run_config,
                overrides=settings,
                resume=resume,
                supernodes=supernodes,
                cpus_per_client=cpus_per_client,
                gpus_per_client=gpus_per_client,
                ray_address=ray_address,
                timeout=timeout,
                output=output,
            )
    except Interrupted as interruption:
        console.tell(f"clip2fl: {interruption}; all processes have ended")
        if output.folder is not None:
            console.tell(f"clip2fl run --resume {output.folder} continues the run")
        _name_log(output.log.path)
        raise typer.Exit(128 + interruption.signum) from None
    if not result.completed:
        console.tell_lines(
            f"clip2fl: the run did not complete ({result.status}): {result.details}"
        )
        _name_log(output.log.path)
        raise typer.Exit(1)
    if output.folder is not None:
        _report_run(output.folder)


def _import_report_early() -> None:
    """Import what draws a report while Flower's processes end: it takes seconds."""
    Thread(target=import_module, args=["clip2fl_cli.report"], daemon=True).start()


def _name_log(path: Path | None) -> None:
    """Say where the log is, on standard error."""
    if path is not None:
        console.tell(f"clip2fl: the whole log is in {path}")


def _report_run(folder: Path) -> None:
    """Write a run's report; without one, the run is complete all the same."""
    from clip2fl_cli.report import write_run_report
    from clip2fl_cli.runs import FinishedRun, chosen_images

    try:
        run = FinishedRun.read(folder)
        page = write_run_report(run.on(chosen_images([run])))
    except (ValueError, OSError) as error:
        console.tell(f"clip2fl: no report: {error}", "bold red")
    else:
        console.answer_file("Report", page)


@app.command()
def federate(
    root_certificates: RootCertificates,
    superlink: ControlAddress = CONTROL_ADDRESS,
    run_config: RunConfigFile = None,
    settings: Settings = [],  # noqa: B006
    patience: Patience = 300.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Start the run, and do not follow it.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train: start a run on a SuperLink and follow it to its end.

    Run this command at the server: Flower's Control API must not be reachable from
    other machines. Ctrl-C ends the command, and the run goes on: clip2fl attach follows
    it again, and clip2fl stop ends it. Exit status: 0 the run completed, or has started
    with --detach; 1 it did not; 2 wrong usage; 130 or 143 Ctrl-C or SIGTERM ended the
    command.
    """
    from clip2fl_cli.federation import begin, connected
    from clip2fl_cli.following import Following

    following = Following(superlink, root_certificates, verbose)
    with following, connected(superlink, root_certificates, patience) as link:
        following.run = begin(link, run_config, settings, following.output)
        if not detach:
            following.to_the_end(link)
    following.finish(detached=detach, again=["clip2fl", *sys.argv[1:]])


@app.command()
def attach(
    root_certificates: RootCertificates,
    run: RunId = None,
    superlink: ControlAddress = CONTROL_ADDRESS,
    patience: Patience = 300.0,
    verbose: Verbose = False,
) -> None:
    """Follow a run on a SuperLink, from its first line to its end.

    The exit status is that of federate, and Ctrl-C leaves the run running, too.
    """
    from clip2fl_cli.federation import begun, connected
    from clip2fl_cli.following import Following

    following = Following(superlink, root_certificates, verbose)
    with following, connected(superlink, root_certificates, patience) as link:
        following.run = link.known(None if run is None else str(run))
        following.output.write(begun(following.run))
        following.to_the_end(link)
    following.finish()


@app.command()
def stop(
    root_certificates: RootCertificates,
    run: RunId = None,
    superlink: ControlAddress = CONTROL_ADDRESS,
) -> None:
    """Stop a run on a SuperLink. Its checkpoints stay, and a run can resume from them.

    Exit status: 0 the run has ended; 1 it has not; 2 wrong usage.
    """
    from clip2fl_cli.federation import connected

    with connected(superlink, root_certificates, 0.0) as link:
        number = link.known(None if run is None else str(run))
        status, details = link.stop(number)
    told = f"run {number}: {status}"
    console.answer(f"{told} ({details})" if details else told)
    if status == "unknown":
        raise typer.Exit(1)
    if status != "finished:completed":
        console.tell(RESUMING)


@app.command()
def serve(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="The server's keys, database, registry, runs and logs; made if need "
            "be.",
        ),
    ],
    names: Annotated[
        list[str],
        typer.Option(
            "--name",
            metavar="HOST",
            help="DNS name or IP address by which nodes reach this machine; may be "
            "repeated. Its certificate is made for these names and for localhost.",
        ),
    ] = [],  # noqa: B006
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port for nodes.")] = 9092,
    superlink_port: Annotated[
        int,
        typer.Option(
            min=1, max=65535, help="Port of the SuperLink, on this machine only."
        ),
    ] = 8000,
) -> None:
    """Run a server on this machine: SuperLink, SuperExec and proxy, until Ctrl-C.

    The first start makes keys and certificates. A restart keeps sites and runs.
    """
    from clip2fl_cli import serving

    serving.serve(serving.Serving(folder, names, port, superlink_port))


@app.command()
def compare(
    comparison: Annotated[
        Path,
        typer.Argument(
            metavar="TOML|NAME",
            help="File of a comparison, or the name of one that comes with the "
            "program, such as demo-compare.",
        ),
    ],
    runs: Annotated[
        Path, typer.Option(help="Folder under which the comparison has its own.")
    ] = Path("runs"),
    settings: Settings = [],  # noqa: B006
    seeds: Annotated[
        list[int],
        typer.Option("--seed", help="Instead of the file's; may be repeated."),
    ] = [],  # noqa: B006
    variants: Annotated[
        list[str],
        typer.Option("--variant", help="Only this one and others so named."),
    ] = [],  # noqa: B006
    images: ShownImages = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Run variants over seeds; write their table and report.

    Complete runs are not repeated. After an interruption, the same command continues.
    """
    from clip2fl_cli import comparison as comparisons
    from clip2fl_cli.progress import ComparisonProgress
    from clip2fl_common.project import experiment

    compared = comparisons.Comparison.read(
        experiment(comparison), runs, settings, seeds, variants
    )
    compared.refuse_absent(images)
    # torch is imported from here on, after the checks of the settings.
    from clip2fl_cli.results import write_results

    missing = compared.missing()
    there = len(compared.plan) - len(missing)
    console.tell(f"{compared.name}: {there} of {len(compared.plan)} runs are there")
    if warning := compared.other_code():
        console.tell(f"warning: {warning}", "yellow")
    try:
        with ComparisonProgress(missing, there, console.err, verbose) as progress:
            failed = list(comparisons.complete(compared, progress))
    except KeyboardInterrupt as interruption:
        # Between two simulations, Python's own handler raises KeyboardInterrupt.
        signum: int = getattr(interruption, "signum", signal.SIGINT)
        console.tell("interrupted; the same command goes on where this one stopped")
        raise typer.Exit(128 + signum) from None
    if finished := compared.finished():
        command = shlex.join(["clip2fl", *sys.argv[1:]])
        console.tell("Drawing the reports of all runs")
        written = write_results(compared, finished, command, failed, images)
        console.out.print(written.results.answer(as_json), soft_wrap=True)
        console.tell_file("Report", written.report)
    else:
        console.tell("no run has completed, so there is nothing to report")
    for run in failed:
        console.tell(
            f"failed: {run.variant}, seed {run.seed}: {run.reason}", "bold red"
        )
    raise typer.Exit(1 if failed else 0)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def doctor(context: typer.Context) -> None:
    """Check a site before it takes part in a federation, and say what to fix.

    ``clip2fl doctor --help`` lists the options. On nodes without this command,
    ``python -m client_app.doctor`` has the same options.
    """
    from client_app import doctor as check

    raise typer.Exit(check.main(context.args, prog="clip2fl doctor"))


@app.command()
def partition(
    run_config: RunConfigFile = None,
    settings: Settings = [],  # noqa: B006
    figure: Annotated[
        Path | None, typer.Option(help="Also draw a heat map here (.png, .svg, .pdf).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which client would hold how many images of which class."""
    from clip2fl_cli.configuration import resolve

    config = resolve(run_config, settings)
    # torch is imported from here on, after the checks of the settings.
    from clip2fl_cli.holdings import Holdings

    held = Holdings.of(config)
    if figure is not None:
        held.draw(figure)
        console.tell(f"Heat map: {figure}")
    if as_json:
        console.print_json(
            {"classes": held.class_names, "images": held.counts.tolist()}
        )
        return
    rows = [[str(client), *row, sum(row)] for client, row in enumerate(held.counts)]
    totals = held.counts.sum(axis=0)
    rows.append(["all", *totals, totals.sum()])
    console.print_table(["client", *held.class_names, "all"], rows)


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
    images: ShownImages = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html, with its pictures also as PNG and SVG, into the folder.

    Of a comparison's table, print the page that the comparison has left.
    """
    from clip2fl_cli.report import write_run_report
    from clip2fl_cli.results import SUMMARY_FILE, redraw, rewrite_report
    from clip2fl_cli.runs import FinishedRun, chosen_images

    is_table = folder.suffix == ".csv" and not folder.is_dir()
    is_comparison = os.path.lexists(folder / SUMMARY_FILE)
    if against is not None and (is_table or is_comparison):
        raise click.UsageError("--against belongs to the report of a single run")
    if is_table:
        console.out.print(redraw(folder, images).answer(as_json), soft_wrap=True)
        return
    if is_comparison:
        page = rewrite_report(folder, images)
    else:
        runs = [FinishedRun.read(path) for path in (folder, against) if path]
        chosen = chosen_images(runs, images)
        page = write_run_report(*(run.on(chosen) for run in runs))
    console.print_json({"report": str(page)}) if as_json else console.answer(str(page))


@app.command()
def status(
    folder: RunFolder,
    as_json: AsJson = False,
    prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Print Prometheus' text format.")
    ] = False,
) -> None:
    """Say what a run does now: round, phase, sites, accuracy and time left."""
    from clip2fl_cli.live import RunWatch
    from clip2fl_cli.prometheus import exposition
    from clip2fl_cli.status import sentences, site_rows

    if as_json and prometheus:
        raise click.UsageError("give one of --json and --prometheus")
    found = RunWatch(folder).look()
    if prometheus:
        # As it is: lines must neither be wrapped nor escaped.
        click.echo(exposition(found), nl=False)
        return
    if as_json:
        console.print_json(found.fields())
        return
    for line in sentences(found):
        console.answer(line)
    if found.sites:
        console.print_table(*site_rows(found))


@app.command()
def watch(
    folder: RunFolder,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one."),
    ] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the token that every request needs, at least 32 "
            "characters; none: a random token.",
        ),
    ] = None,
    newest: Annotated[
        bool,
        typer.Option(
            "--newest",
            help="RUN is a folder of runs: show the one that started last, and later "
            "ones when they start.",
        ),
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on: 0.0.0.0 in a container whose port the engine "
            "publishes on 127.0.0.1.",
        ),
    ] = "127.0.0.1",
) -> None:
    """Show a run in the browser while it runs: curves, sites, phase, time left, log.

    Only this machine can open the page, and only with the whole printed address. At
    /metrics, Prometheus gets the same numbers. Ctrl-C ends the page; the run goes on.
    """
    from clip2fl_cli.live import RunWatch
    from clip2fl_cli.newest import NewestRun
    from clip2fl_cli.watch import read_token, serve

    shown_run: RunWatch | NewestRun
    if newest:
        shown_run = NewestRun(folder)
    else:
        shown_run = RunWatch(folder)
        # A folder without a run is refused here.
        shown_run.look()
    token = None if token_file is None else read_token(token_file)
    with contextlib.suppress(KeyboardInterrupt):
        serve(shown_run, console.answer_address, port, token, host)
    console.tell("clip2fl: the page has ended; a run that is running goes on")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: ModelPath,
    public_key: PublicKey = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Classify images with a delivered model."""
    from clip2fl_cli.prediction import Model

    found = Model.load(model, public_key).predict(images, top)
    if as_json:
        answer = [
            {
                "image": str(file),
                "classes": [
                    {"name": name, "probability": round(probability, 6)}
                    for name, probability in prediction.classes
                ],
            }
            for file, prediction in zip(images, found, strict=True)
        ]
        console.print_json(answer)
        return
    for file, prediction in zip(images, found, strict=True):
        named = ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes)
        console.answer(f"{file}: {named}")


@app.command()
def export(
    model: ModelPath,
    output: Annotated[Path, typer.Option(help="Folder for the files.")],
    public_key: PublicKey = None,
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

    file = model_file(model, public_key)
    # Errors are found before anything is written.
    teacher = exporting.run_teacher(file) if costs else None
    written = exporting.export(file, output)
    loaded = teacher if teacher and (teacher_cost or teacher.is_built_in) else None
    measured = exporting.costs(file, loaded) if costs else []
    if teacher and not loaded:
        console.tell(
            f"the run's teacher, {short(teacher.name)}, is not measured; "
            "--teacher-cost loads and measures it: give it if you trust this run's "
            "configuration"
        )
    if as_json:
        console.print_json(
            {
                "files": [str(path) for path in written],
                "costs": [vars(cost) for cost in measured],
            }
        )
        return
    for path in written:
        console.answer(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    if measured:
        console.print_table(
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


app.command()(deliver)
app.command()(signing_key)


def main() -> None:
    """Run the command; an error of the user gives one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without such characters shows them escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(prog_name="clip2fl", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        problem = error.format_message().rstrip(".")
        console.fail(f"{problem}; --help lists the choices", error.exit_code)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        console.fail(_message(error), 2)
    except RuntimeError as error:
        from clip2fl_cli.flower_command import SimulationError
        from clip2fl_cli.serving import ServerError
        from clip2fl_common.teacher import TeacherError

        if not isinstance(error, TeacherError | SimulationError | ServerError):
            raise
        console.fail(_message(error), 1)
    sys.exit(status if isinstance(status, int) else 0)


def _message(error: Exception) -> str:
    """Return an error's text: one line, except for lists of keys and ends of logs."""
    from clip2fl_cli.flower_command import SimulationError
    from clip2fl_common.config import ConfigError

    text = str(error)
    several = isinstance(error, ConfigError | SimulationError)
    lines = text.split("\n") if several else [text]
    return "\n".join(map(shown, lines))


if __name__ == "__main__":
    main()
