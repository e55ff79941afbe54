"""The clip2fl command: wires its subcommands together."""

import typer

app = typer.Typer()
