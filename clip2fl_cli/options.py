"""Options that several subcommands share, and checks of their numbers."""

import math
from pathlib import Path
from typing import Annotated

import typer

from clip2fl_cli.run_schema import Images

# A simulated node is an entry in a database; the clients alone decide the result.
MOST_NODES = 100_000


def finite(value: float | None) -> float | None:
    """Refuse infinity and NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def positive(value: float | None) -> float | None:
    """Refuse a value that is not a finite number above 0."""
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return finite(value)


RunConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--run-config",
        metavar="TOML|NAME",
        help="File of run configuration keys, or the name of an experiment that comes "
        "with the program, such as demo or paper-cifar10-lt; none: the defaults.",
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="'KEY=VALUE ...'",
        help="Run configuration keys that override the file; may be repeated.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Also show Flower's log, which otherwise only goes to a file."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
ShownImages = Annotated[
    Images | None,
    typer.Option(
        "--images",
        help="Test images on which accuracy is shown, of runs with an "
        "evaluation.tuning-share: tuning while you choose settings. If not given: "
        "those of the comparison's page, or else those held out.",
    ),
]
ModelPath = Annotated[
    Path,
    typer.Option(
        "--model",
        help="A run's folder, its model.safetensors, or a folder that clip2fl site "
        "fetch has written.",
    ),
]
PublicKey = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|KEY",
        help="Public key of the server that must have signed the model's folder: its "
        "signing.key.pub, or 64 hexadecimal digits. If not given, a signed folder "
        "must be signed by a key that clip2fl site fetch has used.",
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="The run's folder, which the run names when it starts."
    ),
]
RootCertificates = Annotated[
    Path, typer.Option(metavar="FILE", help="The federation's ca.crt.")
]
ControlAddress = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Control API of the SuperLink.")
]
CONTROL_ADDRESS = "127.0.0.1:8000"
Patience = Annotated[
    float,
    typer.Option(
        min=0,
        callback=finite,
        help="Seconds for which the SuperLink may be away.",
    ),
]
RunId = Annotated[
    int | None,
    typer.Argument(
        metavar="[RUN]",
        min=0,
        help="The run's number, which federate prints; none: the only run that has "
        "not ended.",
    ),
]
