"""``clip2fl site fetch``: the models that the server has delivered to this site."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip2fl_cli import console
from clip2fl_cli.options import AsJson

if TYPE_CHECKING:
    from clip2fl_common.signed_folder import Manifest

POLICY = Path("/etc/clip2fl/policy.toml")


@dataclass(frozen=True)
class Arrived:
    """A model in the site's folder.

    Attributes
    ----------
    folder : Path
        Its folder.
    manifest : Manifest
        What the server signed.
    problem : str
        Why it must not be used; empty if all files are as they were signed.
    """

    folder: Path
    manifest: "Manifest"
    problem: str


def fetch(
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Folder for a copy of the newest model, new or empty; if not given, "
            "the models are only listed."
        ),
    ] = None,
    policy: Annotated[
        Path, typer.Option(metavar="FILE", help="The site's own rules.")
    ] = POLICY,
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The node's models-folder, instead of the policy's."
        ),
    ] = None,
    public_key: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|KEY", help="The server's key, instead of the policy's."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Copy this model, or the newest of this run's name."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that have arrived, check them, and copy one.

    The server sends a model over the node's connection, so this command needs no
    network. It compares every byte with what the server signed. Exit status: 0 done;
    1 nothing has arrived; 2 a model was changed, or wrong usage. A model
    with a changed manifest may be the newest: only --name then copies another one.
    """
    from client_app.model_inbox import INCOMING, refused_models
    from clip2fl_cli.model_keys import trust
    from clip2fl_common.shown import shown

    folder, key = _place(policy, models, public_key)
    found = arrived_models(folder, key)
    refused = refused_models(folder, key)
    if not found and not refused:
        console.tell(_nothing(folder, sorted(folder.glob(f"{INCOMING}*"))))
        raise typer.Exit(1)
    chosen = None if output is None else _chosen(found, refused, name)
    if output is not None and chosen is not None:
        copy_model(chosen, output, key)
        try:
            trust(key)
        except OSError as error:
            console.tell(
                f"clip2fl: the server's key cannot be remembered ({error}): give "
                f"predict --public-key {key}"
            )
    first = next(iter(found), None)
    newest = None if first is None or first.problem or refused else first
    if as_json:
        entries = [
            {
                "name": model.manifest.name,
                "run": model.manifest.run,
                "made": model.manifest.made.isoformat(),
                "bytes": model.manifest.size,
                "newest": model is newest,
                "problem": model.problem or None,
            }
            for model in found
        ]
        console.print_json(
            {
                "models": entries,
                "refused": [
                    {"name": path.name, "problem": reason} for path, reason in refused
                ],
                "copied": None if output is None else str(output),
            }
        )
    elif output is None:
        for path, reason in refused:
            console.answer(f"{shown(path.name)}: {reason}")
        for model in found:
            console.answer(_line(model, model is first, model is newest))
    else:
        console.answer(f"{output}: clip2fl predict --model {output} IMAGE")
    if chosen is None:
        if refused or any(model.problem for model in found):
            raise typer.Exit(2)
        return
    for _, reason in refused:
        console.tell(f"clip2fl: {reason}; this model may be newer")
    if first is not None and chosen is not first:
        console.tell(
            f"{chosen.manifest.name} of {chosen.manifest.made:%Y-%m-%d %H:%M} is older "
            f"than {first.manifest.name} of {first.manifest.made:%Y-%m-%d %H:%M}"
        )


def arrived_models(folder: Path, key: str) -> list[Arrived]:
    """Return the models in a folder that a key signed, the newest first, checked.

    Raises
    ------
    OSError
        If the folder cannot be read.
    """
    from client_app.model_inbox import stored_models
    from clip2fl_common.signed_folder import SignatureError

    if not folder.exists():
        return []
    next(folder.iterdir(), None)  # raises, unlike a search, if it cannot be read
    found = []
    for manifest in stored_models(folder, key):
        place = folder / manifest.name
        problem = ""
        try:
            manifest.verify_files(place)
        except SignatureError as error:
            problem = str(error)
        found.append(Arrived(place, manifest, problem))
    return found


def copy_model(model: Arrived, output: Path, key: str) -> None:
    """Copy a model, and check the copy before it gets its name.

    Raises
    ------
    RunError
        If the model must not be used, or ``output`` is there and not empty.
    SignatureError
        If a file changes meanwhile.
    """
    import shutil

    from clip2fl_cli.runs import RunError
    from clip2fl_common.files import replacing_folder
    from clip2fl_common.shown import shown
    from clip2fl_common.signed_folder import MANIFEST, SIGNATURE, verify_folder

    if model.problem:
        raise RunError(
            f"{model.problem}; it is not copied: remove {shown(model.folder)}, and ask "
            "the server to give clip2fl deliver RUN again"
        )
    # A link or a file has no place here either.
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise RunError(f"{shown(output)} is no folder: name a new one")
    if output.is_dir() and any(output.iterdir()):
        raise RunError(f"{shown(output)} is not empty, and stays: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    names = [MANIFEST, SIGNATURE, *(file.name for file in model.manifest.files)]
    with replacing_folder(output) as new:
        for file in names:
            shutil.copyfile(model.folder / file, new / file, follow_symlinks=False)
        verify_folder(new, key)


def _place(
    policy: Path, models: Path | None, public_key: str | None
) -> tuple[Path, str]:
    """Return the folder of the models and the key that must have signed them."""
    from client_app.site_policy import SiteRefusal, policy_file
    from clip2fl_cli.runs import RunError
    from clip2fl_common.shown import shown
    from clip2fl_common.signed_folder import public_key_of

    if models is not None and public_key is not None:
        return models, public_key_of(public_key)
    if not policy.exists():
        raise RunError(
            f"{shown(policy)} is not there: name this site's policy with --policy, or "
            "give --models and --public-key"
        )
    try:
        rules = policy_file(policy)
    except SiteRefusal as refusal:
        raise RunError(str(refusal)) from None
    folder = models or (rules.models_folder and Path(rules.models_folder))
    key = public_key_of(public_key) if public_key else rules.model_key
    if not folder or not key:
        missing = "model-key" if folder else "models-folder"
        raise RunError(
            f"{shown(policy)} has no {missing}, so this site takes no models: add "
            "models-folder and model-key (docs/model-delivery.md), and ask the server "
            "to give clip2fl deliver RUN"
        )
    return Path(folder), key


def _chosen(
    found: list[Arrived], refused: list[tuple[Path, str]], name: str | None
) -> Arrived:
    from clip2fl_cli.runs import RunError
    from clip2fl_common.shown import short, shown

    for path, reason in refused:
        run = path.name.rpartition("-")[0]
        if name is None or name in (path.name, run):
            raise RunError(
                f"{reason}; it may be the newest model, so nothing is copied: remove "
                f"{shown(path)}, or ask the server to give clip2fl deliver RUN; --name "
                "copies another model"
            )
    if name is None:
        return found[0]
    for model in found:
        if name in (model.manifest.name, model.manifest.run):
            return model
    known = ", ".join(model.manifest.name for model in found) or "none"
    raise RunError(f"no model is called {short(name)}; there are {known}")


def _line(model: Arrived, first: bool, newest: bool) -> str:
    manifest = model.manifest
    latest = "the newest" if newest else "perhaps not the newest"
    state = model.problem or (latest if first else "older")
    return (
        f"{manifest.name}: {manifest.made:%Y-%m-%d %H:%M} UTC, "
        f"{manifest.size / 1e6:.2f} MB, {state}"
    )


def _nothing(folder: Path, incoming: list[Path]) -> str:
    from clip2fl_common.shown import shown

    begun = " A part of a model is there, and the rest follows." if incoming else ""
    return (
        f"clip2fl: no model has arrived in {shown(folder)}.{begun} The server sends "
        "it at the end of a run with delivery.signing-key, if this site's node is "
        "connected then. Ask the server to give clip2fl deliver RUN while the node "
        "runs. If this site refuses the model, the node's log says why"
    )
