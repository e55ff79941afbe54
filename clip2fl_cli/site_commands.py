"""The subcommands of ``clip2fl site``."""

import typer

from clip2fl_cli.site_fetch import fetch

site = typer.Typer(
    name="site", help="Commands for the sites of a federation.", no_args_is_help=True
)
site.command()(fetch)


@site.callback()
def _group() -> None:
    """Keep the group a group, even with a single subcommand."""
