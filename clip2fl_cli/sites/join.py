"""Join a federation with a kit: install it, check the site, start the node."""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from clip2fl_cli import console
from clip2fl_cli.sites import kit_archive, node, service
from clip2fl_cli.sites.folder import (
    CACHE,
    STATE,
    TRUSTED_ENTITIES,
    SiteFolderError,
    SiteSettings,
    give_to,
    installed_node,
    refuse_foreign_root,
)
from clip2fl_cli.sites.keys import KeyFileError, fingerprint, new_key, public_half
from clip2fl_cli.sites.starts import Start
from clip2fl_common.files import (
    FOLDER_MODE,
    remove,
    replacing,
    replacing_folder,
)
from clip2fl_common.project import version
from clip2fl_common.provenance import PACKAGE_ROOT

PUBLIC_KEY = "key.pub"
SYSTEM_FOLDER = Path("/etc/clip2fl/sites")
# User id of the image that deploy/Dockerfile builds.
IMAGE_USER = 10001


class JoinError(ValueError):
    """A kit that cannot be installed here; says why and what to do."""


@dataclass(frozen=True)
class Wishes:
    """What the site's administrator decides.

    Attributes
    ----------
    data : Path
        The images, ``<class>/<image>``.
    folder : Path or None
        Where the site is installed; None: a folder of the user, or of the system.
    start : Start
        How the node is started.
    user : str
        The user who owns the folder and runs the node, by name or number; empty: this
        user, or with root the user ``clip2fl`` (a container: the image's user).
    policy, trusted_entities : Path or None
        The site's own rules, and the keys whose signed code may run.
    teacher : Path or None
        The site's own folder of the teacher.
    fingerprint : str
        The kit's fingerprint as the server has told it, or its beginning; empty: it is
        compared by people.
    update : bool
        Whether an installed site gets another kit, or other images.
    image : str
        The container's image.
    """

    data: Path
    folder: Path | None = None
    start: Start = Start.FOREGROUND
    user: str = ""
    policy: Path | None = None
    trusted_entities: Path | None = None
    teacher: Path | None = None
    fingerprint: str = ""
    update: bool = False
    image: str = "clip2fl"


def join(kit: Path, wishes: Wishes) -> int:
    """Check a kit, install it, check the site and start its node.

    The same command again changes nothing that is installed, checks the site and starts
    the node.

    Parameters
    ----------
    kit : Path
        The archive from the server.
    wishes : Wishes
        What the site's administrator decides.

    Returns
    -------
    int
        0 if the node was set up; else see `node.check`. A node in the foreground takes
        the place of this process.

    Raises
    ------
    KitError, JoinError, SiteFolderError, NodeError, ServiceError
        If the kit, the folder or a path cannot be used.
    """
    _check_paths(wishes)
    owner = _owner(wishes)
    digest = _checked_fingerprint(kit, wishes.fingerprint)
    manifest = kit_archive.read_manifest(kit)
    if wishes.start is Start.SYSTEMD:
        service.unit_name(manifest.site)  # refuses a name before anything is installed
    folder = _folder(manifest.site, owner, wishes)
    if wishes.start is Start.FOREGROUND:
        refuse_foreign_root(folder)
    _install(kit, manifest, digest, folder, owner, wishes)
    made = _make_key(folder)
    for name in (CACHE, STATE):
        (folder / name).mkdir(mode=FOLDER_MODE, exist_ok=True)
    if os.geteuid() == 0:
        give_to(folder, *owner)
    told = f"clip2fl: {manifest.site} is installed in {folder}"
    if wishes.start is Start.FOREGROUND:
        again = node.shell_line(["clip2fl", "site", "start", str(folder)])
        told += f"; '{again}' starts its node again without the kit"
    console.tell(told)
    if manifest.version != version():
        console.tell(
            f"clip2fl: the kit is of clip2fl {manifest.version}, and this is "
            f"{version()}: install the server's version if the run refuses this site"
        )
    status = _check_as(owner, folder)
    if made:
        _tell_public_half(folder, manifest.site)
        return status
    if status:
        _tell_what_to_do(status)
        return status
    return _start(folder, owner, wishes)


def _check_paths(wishes: Wishes) -> None:
    if not wishes.data.is_dir():
        raise JoinError(
            f"--data {wishes.data} is no folder: give the folder with the images, "
            "<class>/<image>"
        )
    for option, path in (
        ("--policy", wishes.policy),
        ("--trusted-entities", wishes.trusted_entities),
    ):
        if path is not None and not path.is_file():
            raise JoinError(f"{option} {path} is no file")
    if wishes.trusted_entities is not None:
        node.check_trusted_entities(wishes.trusted_entities)
    if (
        wishes.teacher is not None
        and not (wishes.teacher / "open_clip_config.json").is_file()
    ):
        raise JoinError(
            f"--teacher {wishes.teacher} has no open_clip_config.json: give the folder "
            "of an open_clip checkpoint (configuration and weights)"
        )


def _owner(wishes: Wishes) -> tuple[int, int]:
    """Return user and group who own the site's folder and run its node."""
    if os.geteuid() != 0:
        own = os.geteuid(), os.getegid()
        if wishes.user and _account(wishes.user) != own:
            raise JoinError(
                f"--user {wishes.user}: only root can give files to another user: "
                "join as that user, or as root"
            )
        return own
    if wishes.user and wishes.start is Start.FOREGROUND:
        raise JoinError(
            "--start foreground runs the node as the user who calls it: call it as "
            f"{wishes.user}, without --user"
        )
    if wishes.user:
        return _account(wishes.user)
    if wishes.start is Start.SYSTEMD:
        return _account("clip2fl")
    if wishes.start is Start.CONTAINER:
        return IMAGE_USER, IMAGE_USER
    return 0, 0


def _account(user: str) -> tuple[int, int]:
    with contextlib.suppress(KeyError):
        found = pwd.getpwnam(user)
        return found.pw_uid, found.pw_gid
    if user.isdecimal():
        return int(user), int(user)
    raise JoinError(
        f"this machine has no user {user!r}: make it with 'useradd --system --shell "
        f"/usr/sbin/nologin {user}', or name another with --user"
    )


def _checked_fingerprint(kit: Path, expected: str) -> str:
    try:
        digest = kit_archive.fingerprint(kit)
    except OSError as error:
        raise JoinError(f"{kit} cannot be read ({error.strerror})") from None
    if expected and (len(expected) < 12 or not digest.startswith(expected.lower())):
        raise JoinError(
            f"{kit} has the fingerprint {digest}, and not {expected}: it is another "
            "kit than the server's, or was changed on the way. Do not use it"
        )
    if not expected:
        console.tell(
            f"clip2fl: the kit's fingerprint, to compare by telephone: {digest}"
        )
    return digest


def _folder(site: str, owner: tuple[int, int], wishes: Wishes) -> Path:
    if wishes.folder is not None:
        return wishes.folder.absolute()
    if owner[0] != os.geteuid():
        return SYSTEM_FOLDER / site  # the node's user cannot enter root's own folders
    return platformdirs.user_data_path("clip2fl") / "sites" / site


def _install(
    kit: Path,
    manifest: kit_archive.Manifest,
    digest: str,
    folder: Path,
    owner: tuple[int, int],
    wishes: Wishes,
) -> None:
    """Install a kit, or leave a site as it is if the same kit is installed."""
    settings = SiteSettings(
        manifest.site,
        manifest.superlink,
        str(wishes.data.absolute()),
        digest,
        str(wishes.teacher.absolute()) if wishes.teacher else "",
    )
    if not os.path.lexists(folder) or (folder.is_dir() and not os.listdir(folder)):
        if wishes.update:
            raise JoinError(
                f"no site is installed in {folder}, and --update changes an installed "
                "one: give its --folder, or --start as when it was installed"
            )
        _make_parents(folder, passable=owner[0] != os.geteuid())
        _check_space(manifest, folder.parent)
        with replacing_folder(folder, FOLDER_MODE) as place:
            kit_archive.read_archive(kit, place)
            _put_own_files(place, wishes)
            settings.write(place)
        return
    _check_installed(settings, folder, wishes)
    if wishes.update:
        _check_space(manifest, folder)
        with tempfile.TemporaryDirectory(prefix=".kit-", dir=folder) as name:
            kit_archive.read_archive(kit, Path(name))
            _update(Path(name), folder, manifest)
        _put_own_files(folder, wishes)
        settings.write(folder)


def _make_parents(folder: Path, *, passable: bool) -> None:
    """Make the folders above a site's folder; passable: for all users to go through."""
    missing = [place for place in folder.parents if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        if passable:  # whatever the umask is
            place.chmod(0o755)


def _check_space(manifest: kit_archive.Manifest, folder: Path) -> None:
    needed = sum(entry.size for entry in manifest.files.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise JoinError(
            f"the kit needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free "
            f"in {folder}: make room, or give another --folder"
        )


def _put_own_files(folder: Path, wishes: Wishes) -> None:
    """Write the site's own rules and trusted keys, if they are given."""
    for name, source in (
        (kit_archive.POLICY, wishes.policy),
        (TRUSTED_ENTITIES, wishes.trusted_entities),
    ):
        if source is not None:
            _copy(source, folder / name, kit_archive.PUBLIC_MODE)


def _copy(source: Path, place: Path, mode: int) -> None:
    with source.open("rb") as opened, replacing(place, mode) as file:
        shutil.copyfileobj(opened, file)


def _check_installed(settings: SiteSettings, folder: Path, wishes: Wishes) -> None:
    """Refuse to change another site, or this one without being asked to."""
    try:
        installed = SiteSettings.read(folder)
    except SiteFolderError as error:
        raise JoinError(
            f"{folder} exists and is no site's folder ({error}); give another --folder"
        ) from None
    if installed.site != settings.site:
        raise JoinError(
            f"{folder} is the site {installed.site}, and the kit is for "
            f"{settings.site}: give another --folder"
        )
    if wishes.update:
        return
    for what, old, new in (
        ("another kit", installed.kit, settings.kit),
        (f"the images {installed.data}", installed.data, settings.data),
        (f"the teacher {installed.teacher}", installed.teacher, settings.teacher),
    ):
        if old != new:
            raise JoinError(
                f"{settings.site} is installed in {folder} with {what}: --update "
                "changes it, and keeps key, policy and record"
            )
    for option, given in (
        ("--policy", wishes.policy),
        ("--trusted-entities", wishes.trusted_entities),
    ):
        if given is not None:
            raise JoinError(
                f"{settings.site} is installed in {folder}: {option} needs --update"
            )


def _update(files: Path, folder: Path, manifest: kit_archive.Manifest) -> None:
    """Replace what the server decides; rules, record and, without a new one, key stay.

    A new key replaces the old one with its public half. A teacher that an earlier kit
    has brought stays only if the run still has it.
    """
    earlier = kit_archive.parsed_manifest(folder / kit_archive.MANIFEST)
    if manifest.teacher_fingerprint not in ("", earlier.teacher_fingerprint):
        remove(folder / kit_archive.TEACHER)
    for name in (
        kit_archive.CERTIFICATE,
        kit_archive.RUN_CONFIG,
        kit_archive.GUIDE,
        kit_archive.MANIFEST,
    ):
        if (files / name).exists():
            _copy(files / name, folder / name, kit_archive.PUBLIC_MODE)
    if (files / kit_archive.KEY).exists():
        (folder / PUBLIC_KEY).unlink(missing_ok=True)
        key = folder / kit_archive.KEY
        _copy(files / kit_archive.KEY, key, kit_archive.PRIVATE_MODE)
    if (files / kit_archive.TEACHER).is_dir():
        remove(folder / kit_archive.TEACHER)
        os.replace(files / kit_archive.TEACHER, folder / kit_archive.TEACHER)


def _make_key(folder: Path) -> bool:
    """Make the site's key if it has none; return whether it was made.

    The public half is written, too, for the administrator.
    """
    path = folder / kit_archive.KEY
    made = not os.path.lexists(path)
    if made:
        with replacing(path, kit_archive.PRIVATE_MODE) as file:
            file.write(new_key())
    if made or not (folder / PUBLIC_KEY).exists():
        site = SiteSettings.read(folder).site
        try:
            half = public_half(path.read_bytes())
        except KeyFileError as error:
            raise JoinError(
                f"{path}: {error}; have the server make another kit"
            ) from None
        with replacing(folder / PUBLIC_KEY, kit_archive.PUBLIC_MODE) as file:
            file.write(f"{half} {site}\n".encode())
    return made


def _check_as(owner: tuple[int, int], folder: Path) -> int:
    """Check the site as the user who will run its node, and who must read all."""
    if owner[0] == os.geteuid():
        return node.check(installed_node(folder), all_checks=True)
    try:
        return subprocess.run(
            [
                *(sys.executable, "-m", "clip2fl_cli.app", "site", "start"),
                *("--only-check", str(folder)),
            ],
            cwd=PACKAGE_ROOT,
            user=owner[0],
            group=owner[1],
            extra_groups=[],
            env={**os.environ, "HOME": str(folder)},
        ).returncode
    except OSError as error:
        raise JoinError(
            f"the node's user {owner[0]} cannot run {sys.executable} in {PACKAGE_ROOT} "
            f"({error.strerror}): install this program where all users can read it, "
            "such as /opt/clip2fl, or name another user with --user"
        ) from None


def _tell_public_half(folder: Path, site: str) -> None:
    half = (folder / PUBLIC_KEY).read_text("utf-8").strip()
    console.tell(
        f"clip2fl: {site} has made its key. The private half stays in {folder}. Have "
        "this line run at the server, and compare the fingerprint by telephone: "
        f"{fingerprint(half)}"
    )
    console.answer(f"clip2fl site register '{site}={half}'")
    console.tell("clip2fl: then give the same join command again: it starts the node")


def _tell_what_to_do(status: int) -> None:
    if status == node.TRY_AGAIN:
        console.tell(
            "clip2fl: the server cannot be used now; the same command starts the node "
            "later",
            "bold red",
        )
    else:
        console.tell(
            "clip2fl: the node is not started. Mend what is listed above (PROBLEM, "
            "fix), and give the same command again",
            "bold red",
        )


def _start(folder: Path, owner: tuple[int, int], wishes: Wishes) -> int:
    found = installed_node(folder)
    if wishes.start is Start.FOREGROUND:
        node.run(found, None)
    elif wishes.start is Start.SYSTEMD:
        _start_systemd(found, folder, owner[0])
    elif wishes.start is Start.CONTAINER:
        path = folder / service.COMPOSE_FILE
        with replacing(path, kit_archive.PUBLIC_MODE) as file:
            file.write(service.compose(found, folder, owner, wishes.image).encode())
            if os.geteuid() == 0:
                os.fchown(file.fileno(), *owner)
        # The same compose.yaml may stand for another kit, which a running node lacks.
        again = " --force-recreate" if wishes.update else ""
        command = f"docker compose -f {node.shell_line([str(path)])} up -d{again}"
        console.answer(command)
        console.tell("clip2fl: this line starts the node, now and at every boot")
    return 0


def _start_systemd(found: node.Node, folder: Path, user: int) -> None:
    """Install and start a unit; without root or systemd, write it and say how."""
    name = service.unit_name(found.site)
    try:
        account = pwd.getpwuid(user).pw_name
    except KeyError:
        account = str(user)
    mounts = [found.data, *([found.teacher] if found.teacher else [])]
    text = service.unit(found.site, folder, account, mounts).encode()
    if os.geteuid() == 0 and Path("/run/systemd/system").is_dir():
        with replacing(service.UNIT_FOLDER / name, kit_archive.PUBLIC_MODE) as file:
            file.write(text)
        # A node that runs starts again, as the kit may be a new one.
        for action in (["daemon-reload"], ["enable", name], ["restart", name]):
            if subprocess.run(["systemctl", *action]).returncode:
                raise JoinError(
                    f"systemctl {' '.join(action)} failed, and the unit is "
                    f"{service.UNIT_FOLDER / name}: mend what systemctl says, and give "
                    "the command again"
                )
        console.tell(f"clip2fl: the node runs; its log: journalctl -u {name}")
        return
    with replacing(folder / name, kit_archive.PUBLIC_MODE) as file:
        file.write(text)
    console.tell("clip2fl: the unit is written. As root, on a machine with systemd:")
    source = node.shell_line([str(folder / name)])
    console.answer(f"cp {source} {service.UNIT_FOLDER}/")
    console.answer(f"systemctl enable --now {name}")
