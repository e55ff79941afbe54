"""``clip2fl deliver`` and ``clip2fl signing-key``: the server's part of a delivery."""

from pathlib import Path
from typing import Annotated

import typer

from clip2fl_cli import console
from clip2fl_cli.options import (
    CONTROL_ADDRESS,
    AsJson,
    ControlAddress,
    Patience,
    RootCertificates,
    Verbose,
)


def deliver(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder of a complete run, on the server's machine."
        ),
    ],
    root_certificates: RootCertificates,
    superlink: ControlAddress = CONTROL_ADDRESS,
    signing_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The server's signing key; if not given, delivery.signing-key of "
            "the run.",
        ),
    ] = None,
    patience: Patience = 300.0,
    verbose: Verbose = False,
) -> None:
    """Send a run's signed model to the sites that are connected now.

    Sites that were away at the run's end get it, and no site gets it twice. The paths
    are those of the ServerApp's machine. Exit status: 0 a site has the model; 1 none;
    2 wrong usage; 130 or 143 Ctrl-C or SIGTERM ended the command, and the delivery
    continues.
    """
    from clip2fl_cli.federation import begin, connected
    from clip2fl_cli.following import Following
    from clip2fl_common.config.files import toml_pair

    settings = [toml_pair("delivery.run", str(run.absolute()))]
    if signing_key is not None:
        settings.append(toml_pair("delivery.signing-key", str(signing_key.absolute())))
    following = Following(superlink, root_certificates, verbose)
    with following, connected(superlink, root_certificates, patience) as link:
        following.run = begin(link, None, settings, following.output)
        following.to_the_end(link)
    following.finish()


def signing_key(
    file: Annotated[
        Path, typer.Argument(help="File of the private key; made if it is missing.")
    ],
    as_json: AsJson = False,
) -> None:
    """Make the server's signing key if it is missing; print its public half.

    Sites need the public half, the file with .pub added to the name or the printed
    digits, as model-key in their policies.
    """
    from clip2fl_common.signed_folder import public_key_of
    from server_app.signing import public_key_file

    public = public_key_file(file)
    digits = public_key_of(str(public))
    if as_json:
        console.print_json({"file": str(public), "key": digits})
        return
    console.answer(f"public key: {public}")
    console.answer(f'model-key = "{digits}"')
