"""The sites that are registered at the server, and what Flower says of their nodes."""

from dataclasses import dataclass

from clip2fl_cli.sites.keys import fingerprint
from clip2fl_cli.sites.registration import Server
from clip2fl_common.site_registry import SiteRegistry

UNKNOWN = "unknown to the SuperLink"


@dataclass(frozen=True)
class ListedSite:
    """One site.

    Attributes
    ----------
    name : str
        The site's name.
    state : str
        Flower's word for the state of its node: ``registered`` (it has never
        connected), ``online``, ``offline`` or ``unregistered``.
    node : str
        Flower's id of its node.
    key : str
        Fingerprint of its key.
    """

    name: str
    state: str
    node: str
    key: str


def listed(server: Server) -> list[ListedSite]:
    """Return all sites of the registry, in the order of registration.

    Raises
    ------
    RegistryError
        If the registry cannot be used.
    RegistrationError
        If the SuperLink does not answer.
    """
    registry = SiteRegistry.read(server.registry)
    with server.flower() as flower:
        states = flower.nodes()
    return [
        ListedSite(
            site.name,
            states.get(site.node, UNKNOWN),
            str(site.node),
            fingerprint(site.key),
        )
        for site in registry.sites
    ]
