"""Take a list of sites whose keys this site trusts in secure sums."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from clip2fl_cli.sites import kit_archive
from clip2fl_cli.sites.folder import TRUSTED_SITES, SiteFolderError, SiteSettings
from clip2fl_cli.sites.keys import fingerprint
from clip2fl_cli.sites.node import toml_string
from clip2fl_common.files import replacing
from clip2fl_common.secure.identities import PinnedKeys, read_private_key
from clip2fl_common.secure.statements import LEAST_PARTIES, encoded
from clip2fl_common.site_registry import SiteRegistry


@dataclass(frozen=True)
class TrustedSite:
    """One site of a list.

    Attributes
    ----------
    name : str
        The site's name.
    key : str
        Fingerprint of its key.
    own : bool
        Whether it is this site.
    """

    name: str
    key: str
    own: bool


@dataclass(frozen=True)
class TakenList:
    """A list that a site has taken.

    Attributes
    ----------
    sites : list of TrustedSite
        In the order of the names.
    code : str
        Fingerprint of all names and keys: the same at every site with the same list,
        however the file was written.
    rules : list of str
        Lines for the site's policy.
    server_made_key : bool
        Whether the site's key came in its kit, so that the server can sign with it.
    """

    sites: list[TrustedSite]
    code: str
    rules: list[str]
    server_made_key: bool


def take(listed: Path, folder: Path) -> TakenList:
    """Copy a list of sites into a site's folder, after checking it.

    Parameters
    ----------
    listed : Path
        A site registry, from the server or from another site.
    folder : Path
        Folder of the installed site.

    Returns
    -------
    TakenList

    Raises
    ------
    RegistryError, SecureError, SiteFolderError, KitError
        If the list or the folder cannot be used, or the site is not in the list.
    """
    folder = folder.absolute()
    settings = SiteSettings.read(folder)
    listed = listed.absolute()
    registry = SiteRegistry.read(listed)
    own = PinnedKeys.read(listed).identity(read_private_key(folder / kit_archive.KEY))
    if own.name != settings.site:
        raise SiteFolderError(
            f"{listed} has this site's key for {own.name}, and the site is "
            f"{settings.site}: ask the server's people for another list"
        )
    if len(registry.sites) < LEAST_PARTIES:
        raise SiteFolderError(
            f"{listed} has {len(registry.sites)} sites, and secure sums need "
            f"{LEAST_PARTIES}: ask again when all sites are registered"
        )
    path = folder / TRUSTED_SITES
    owner = folder.stat()
    with replacing(path, kit_archive.PUBLIC_MODE) as file:
        file.write(registry.text().encode())
        if os.geteuid() == 0:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
    return TakenList(
        [
            TrustedSite(site.name, fingerprint(site.key), site.name == own.name)
            for site in sorted(registry.sites, key=lambda site: site.name)
        ],
        list_code(registry),
        [
            f"identity-key = {toml_string(str(folder / kit_archive.KEY))}",
            f"trusted-sites = {toml_string(str(path))}",
            "secure-only = true",
        ],
        kit_archive.parsed_manifest(folder / kit_archive.MANIFEST).has_key,
    )


def list_code(registry: SiteRegistry) -> str:
    """Return 60 digits, in groups of five, that stand for all names and keys of a list.

    They are read out over a telephone, so they are digits. There are 2^199 codes:
    nobody can make two lists with the same one.
    """
    entries = sorted(f"{site.name} {site.key}".encode() for site in registry.sites)
    digest = hashlib.sha512(encoded("trusted sites", *entries)).digest()
    digits = f"{int.from_bytes(digest, 'big') % 10**60:060}"
    return " ".join(digits[i : i + 5] for i in range(0, len(digits), 5))
