"""The ``clip2fl site`` commands; each imports its module when it runs."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip2fl_cli import console
from clip2fl_cli.options import CONTROL_ADDRESS, AsJson, RunConfigFile, Settings
from clip2fl_cli.site_fetch import fetch
from clip2fl_cli.sites.starts import Start

if TYPE_CHECKING:
    from clip2fl_cli.sites.registration import Server

DEFAULT_FOLDER = Path("/etc/clip2fl")

site = typer.Typer(
    name="site",
    help="Kits for sites; their names and keys at the server; their nodes.",
    no_args_is_help=True,
)
site.command()(fetch)

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
    from clip2fl_cli.sites.certificates import endings
    from clip2fl_cli.sites.registration import Server

    for text in endings(folder, datetime.now(UTC)):
        console.tell(f"clip2fl: {text}", "bold red")
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
    superlink: SuperLinkAddress = CONTROL_ADDRESS,
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


@site.command("kit")
def make_kits(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="By which sites reach the server's proxy."
        ),
    ],
    run_config: RunConfigFile = None,
    settings: Settings = [],  # noqa: B006
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For the archives and run.toml.")
    ] = Path("kits"),
    no_key: Annotated[
        bool,
        typer.Option(
            "--no-key",
            help="The site makes its own key at join and prints the public half for "
            "'site register'; or it has a key already.",
        ),
    ] = False,
    teacher_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Weights of the run's teacher to pack; of a local-dir: teacher they "
            "are packed without this option.",
        ),
    ] = None,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Pack no weights.")
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Rules for the sites in place of the template."
        ),
    ] = None,
    server: ServerFolder = DEFAULT_FOLDER,
    superlink: SuperLinkAddress = CONTROL_ADDRESS,
) -> None:
    """Make one archive for each site, with all that it needs to join (at the server).

    Register the keys in the archives, too. Each archive with a key is a secret of its
    site. OUTPUT/run.toml is the run, for 'clip2fl federate --run-config'.
    """
    from clip2fl_cli.sites import kit, kit_archive

    wishes = kit.KitWishes(
        address,
        run_config,
        settings,
        output,
        with_keys=not no_key,
        teacher=teacher_folder,
        with_teacher=not no_teacher,
        policy=policy,
    )
    for path in kit.make_kits(names, _server(server, superlink), wishes):
        console.answer(f"{path}  {kit_archive.fingerprint(path)}")


@site.command("join")
def join_federation(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The server's archive.")],
    data: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="This site's images, <class>/<image>."),
    ],
    start: Annotated[
        Start, typer.Option(help="How the node runs; none: install and check only.")
    ] = Start.FOREGROUND,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the site is installed; if not given, a folder of the user, or "
            "/etc/clip2fl/sites/NAME (root, systemd).",
        ),
    ] = None,
    user: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Who runs the node and owns its key, with systemd (if not given: "
            "clip2fl) or a container; only root can name another.",
        ),
    ] = "",
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="This site's own folder of the run's teacher."
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="This site's own rules."),
    ] = None,
    trusted_entities: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys whose signed code may run; none: the server's."
        ),
    ] = None,
    fingerprint: Annotated[
        str,
        typer.Option(
            metavar="HEX",
            help="The kit's fingerprint, as the server has told it, or 12 digits.",
        ),
    ] = "",
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Of an installed site: take another kit or other images; key, rules "
            "and record stay.",
        ),
    ] = False,
    image: Annotated[
        str, typer.Option(help="Of a container: what deploy/Dockerfile builds.")
    ] = "clip2fl",
) -> None:
    """Check a kit and this site's images, install the site and start its node.

    The same command again starts the node again. Exit status: 75 the server cannot be
    used now; 78 somebody must mend what is listed.
    """
    from clip2fl_cli.sites import join

    wishes = join.Wishes(
        data,
        folder,
        start,
        user,
        policy=policy,
        trusted_entities=trusted_entities,
        teacher=teacher,
        fingerprint=fingerprint,
        update=update,
        image=image,
    )
    raise typer.Exit(join.join(kit, wishes))


@site.command("start")
def start_node(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="Of the installed site; if not given, variables of the environment "
            "describe the node (docs/deployment.md).",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="On this machine's loopback, for the node's own processes; if not "
            "given, a free one.",
        ),
    ] = None,
    only_check: Annotated[
        bool, typer.Option("--only-check", help="Check, and do not start.")
    ] = False,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold",
            help="If somebody must mend something, wait for the end of the container: "
            "an engine would start it again for ever.",
        ),
    ] = False,
) -> None:
    """Check an installed site, and become its node: for services and containers.

    Exit status: 75 the server cannot be used now, try again; 78 somebody must mend what
    is listed.
    """
    from clip2fl_cli.sites import node
    from clip2fl_cli.sites.folder import installed_node, refuse_foreign_root

    if folder and not only_check:
        refuse_foreign_root(folder)
    found = installed_node(folder) if folder else node.Node.of_environment(os.environ)
    status = node.check(found, all_checks=only_check)
    if status == 0 and not only_check:
        node.run(found, port)
    if status == node.NOTHING_HELPS and hold:
        node.hold()
    raise typer.Exit(status)


@site.command("trust")
def trust_sites(
    listed: Annotated[
        Path,
        typer.Argument(
            metavar="SITES.json", help="The server's list of sites and their keys."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of the installed site.")
    ],
) -> None:
    """Take the list of the sites that this site trusts in secure sums.

    Compare the code with the other sites by telephone: it is the same everywhere.
    """
    from clip2fl_cli.sites import trust

    taken = trust.take(listed, folder)
    console.print_table(
        ["site", "key", ""],
        [
            [site.name, site.key, "this site" if site.own else ""]
            for site in taken.sites
        ],
    )
    console.tell(
        "Compare this code with the other sites, by telephone. If it differs, somebody "
        "has another list, and nobody may start:"
    )
    console.answer(taken.code)
    if taken.server_made_key:
        console.tell(
            "This site's key came in its kit, so the server has had it and can sign as "
            "this site. For secure sums, join with a kit without a key (site kit "
            "--no-key): then the site makes its own.",
            "bold red",
        )
    console.tell("Then put these lines into the site's policy.toml:")
    for line in taken.rules:
        console.answer(line)


@site.command("list")
def list_sites(
    server: ServerFolder = DEFAULT_FOLDER,
    superlink: SuperLinkAddress = CONTROL_ADDRESS,
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
    superlink: SuperLinkAddress = CONTROL_ADDRESS,
) -> None:
    """Let a site's node connect no more; its key cannot come back (at the server)."""
    from clip2fl_cli.sites import registration

    at = _server(server, superlink)
    with at.flower() as flower, registration.opened(at.registry) as registry:
        registration.remove(registry, names, flower, at.registry)
