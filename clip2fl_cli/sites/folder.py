"""The folder of an installed site: what `clip2fl site join` writes, and its modes.

FOLDER/                 0700, owned by the node's user
site.toml           name, server and images of the site
key, key.pub        0600, 0644: the key pair
ca.crt              certificate of the federation's CA
run.toml            configuration of the run, for the check before the start
policy.toml         the site's own rules
trusted-entities.yaml   optional: keys whose signed code may run here
trusted-sites.json  optional: sites whose keys count in secure sums
teacher/            optional: the teacher's weights
kit.json            what the kit said
state/, cache/      record of what the site has answered; caches
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from clip2fl_cli.sites import kit_archive
from clip2fl_cli.sites.node import Node, toml_string
from clip2fl_common.files import replacing

SETTINGS = "site.toml"
TRUSTED_ENTITIES = "trusted-entities.yaml"
TRUSTED_SITES = "trusted-sites.json"
STATE, CACHE = "state", "cache"


class SiteFolderError(ValueError):
    """A folder that is no site's, or is another site's; says why and what to do."""


@dataclass(frozen=True)
class SiteSettings:
    """What ``site.toml`` says.

    Attributes
    ----------
    site : str
        Name of the site.
    superlink : str
        ``HOST:PORT`` of the server.
    data : str
        Absolute path of the images.
    kit : str
        Fingerprint of the archive that was installed last.
    teacher : str
        Absolute path of the site's own folder of the teacher; empty: the kit's, or
        none.
    """

    site: str
    superlink: str
    data: str
    kit: str
    teacher: str = ""

    def write(self, folder: Path) -> None:
        """Write the file."""
        lines = [f"{key} = {toml_string(value)}" for key, value in vars(self).items()]
        text = '# "clip2fl site join" has written this file; "start" reads it.\n'
        with replacing(folder / SETTINGS, kit_archive.PUBLIC_MODE) as file:
            file.write((text + "\n".join(lines) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "SiteSettings":
        """Return what the file in a site's folder says.

        Raises
        ------
        SiteFolderError
            If there is none, or it is damaged.
        """
        path = folder / SETTINGS
        try:
            found = tomllib.loads(path.read_text("utf-8"))
            if not all(isinstance(value, str) for value in found.values()):
                raise ValueError("a value is no text")
            return cls(**found)
        except OSError as error:
            raise SiteFolderError(
                f"{path} cannot be read ({error.strerror}): give the folder that "
                "'clip2fl site join' has made, as the user who owns it"
            ) from None
        except (ValueError, TypeError) as error:
            raise SiteFolderError(
                f"{path} is damaged ({error}): join again with --update"
            ) from None


def installed_node(folder: Path) -> Node:
    """Return the node of an installed site.

    Raises
    ------
    SiteFolderError, KitError, NodeError
        If something in the folder is missing or cannot be used.
    """
    folder = folder.absolute()
    settings = SiteSettings.read(folder)
    manifest = kit_archive.parsed_manifest(folder / kit_archive.MANIFEST)
    teacher = Path(settings.teacher) if settings.teacher else None
    if teacher is None and (folder / kit_archive.TEACHER).is_dir():
        teacher = folder / kit_archive.TEACHER
    trusted = folder / TRUSTED_ENTITIES
    return Node(
        site=settings.site,
        superlink=settings.superlink,
        data=Path(settings.data),
        key=folder / kit_archive.KEY,
        certificate=folder / kit_archive.CERTIFICATE,
        run_config=folder / kit_archive.RUN_CONFIG,
        policy=folder / kit_archive.POLICY,
        teacher=teacher,
        teacher_fingerprint=manifest.teacher_fingerprint,
        trusted_entities=trusted if os.path.lexists(trusted) else None,
        state=folder / STATE,
        cache=folder / CACHE,
    )


def refuse_foreign_root(folder: Path) -> None:
    """Raise if root would run the node of a site that belongs to another user.

    The node runs code from the server, and files that root writes would be lost to the
    node's own user.

    Raises
    ------
    SiteFolderError
        Names the user, and what to do.
    """
    if os.geteuid() != 0 or not folder.exists():
        return
    owner = folder.stat().st_uid
    if owner != 0:
        raise SiteFolderError(
            f"{folder} belongs to the user {owner}, and root must not run its node: "
            "use its service (systemctl restart ..., docker compose up -d), or start "
            "it as that user; with 'join' give the same --start as before"
        )


def give_to(folder: Path, user: int, group: int) -> None:
    """Let a user own a folder and all that is in it; links are not followed.

    Files are named by their open folder. The node's user could otherwise replace a
    folder by a link meanwhile, and so get files outside.
    """
    for _, folders, files, opened in os.fwalk(folder):
        os.fchown(opened, user, group)
        for name in folders + files:
            os.chown(name, user, group, dir_fd=opened, follow_symlinks=False)
