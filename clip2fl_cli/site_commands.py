"""The ``clip2fl site`` commands; each imports its module when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip2fl_cli import console
from clip2fl_cli.options import AsJson

if TYPE_CHECKING:
    from clip2fl_cli.sites.registration import Server

DEFAULT_FOLDER = Path("/etc/clip2fl")
DEFAULT_SUPERLINK = "127.0.0.1:8000"

site = typer.Typer(
    name="site",
    help="Kits for sites; their names and keys at the server; their nodes.",
    no_args_is_help=True,
)

ServerFolder = Annotated[
    Path,
    typer.Option(
        "--server",
        metavar="FOLDER",
        envvar="CLIP2FL_SERVER_FOLDER",
        help="The server's folder, with trust/ca.crt and registry/sites.json.",
    ),
]
SuperLinkAddress = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        envvar="CLIP2FL_SUPERLINK",
        help="The SuperLink itself, which only the server reaches.",
    ),
]


def _server(folder: Path, superlink: str) -> "Server":
    from clip2fl_cli.sites.registration import Server

    return Server(folder, superlink)


@site.command("register")
def register_sites(
    sites: Annotated[
        list[str],
        typer.Argument(
            metavar="SITE=KEY...",
            help="A name and the site's public key: a file, - for the standard input, "
            "or the line itself in quotes.",
        ),
    ],
    server: ServerFolder = DEFAULT_FOLDER,
    superlink: SuperLinkAddress = DEFAULT_SUPERLINK,
    node_id: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Of one key that Flower knows already."),
    ] = None,
) -> None:
    """Bind a name to a site's public key (at the server)."""
    from clip2fl_cli.sites import registration

    if node_id is not None and len(sites) != 1:
        raise typer.BadParameter("--node-id goes with one site")
    wanted = registration.wanted(sites)
    at = _server(server, superlink)
    with at.flower() as flower, registration.opened(at.registry) as registry:
        registration.register(registry, wanted, flower, at.registry, node_id)


@site.command("list")
def list_sites(
    server: ServerFolder = DEFAULT_FOLDER,
    superlink: SuperLinkAddress = DEFAULT_SUPERLINK,
    as_json: AsJson = False,
) -> None:
    """Show each site's name, key and whether its node is online (at the server)."""
    from clip2fl_cli.sites import listing

    listed = listing.listed(_server(server, superlink))
    if as_json:
        console.print_json([vars(row) for row in listed])
        return
    console.print_table(
        ["site", "state", "node", "key"],
        [[row.name, row.state, row.node, row.key] for row in listed],
    )


@site.command("remove")
def remove_sites(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    server: ServerFolder = DEFAULT_FOLDER,
    superlink: SuperLinkAddress = DEFAULT_SUPERLINK,
) -> None:
    """Let a site's node connect no more; its key cannot come back (at the server)."""
    from clip2fl_cli.sites import registration

    at = _server(server, superlink)
    with at.flower() as flower, registration.opened(at.registry) as registry:
        registration.remove(registry, names, flower, at.registry)
