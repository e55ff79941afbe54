"""Sign a run's model and send it to the sites: at the run's end, or later."""

import os
from logging import getLogger
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from clip2fl_common.config import SITES, RunConfig
from clip2fl_common.shown import shown
from clip2fl_common.site_registry import SiteRegistry
from server_app.file_names import CONFIG, DELIVERY, MODEL
from server_app.foreign_files import MEGABYTE, ForeignFileError, read_json
from server_app.model_card import ListedSite
from server_app.signed_model import signed_model
from server_app.signing import signing_key
from strategy.grid import AttentiveGrid
from strategy.model_delivery import Delivered, deliver_model
from strategy.round_record import RoundRecord
from strategy.site_clients import SiteClients

logger = getLogger(__name__)

_MAX_CONFIG_BYTES = 32 * MEGABYTE
_KEY, _REGISTRY = "delivery.signing-key", "federation.site-registry"


class DeliveryError(RuntimeError):
    """A model cannot be delivered, or no site has it; says why and what to do."""


class _Config(BaseModel):
    """The field of ``config.json`` with the run's configuration."""

    model_config = ConfigDict(extra="ignore")

    config: dict[str, bool | int | float | str]


def deliver_at_end(
    grid: AttentiveGrid,
    config: RunConfig,
    run: Path,
    clients: SiteClients,
    last: RoundRecord,
) -> None:
    """Sign the model of a run that has just ended, and send it to the sites.

    The run is complete, so a problem is only logged: `deliver_run` can go on later.

    Parameters
    ----------
    grid : AttentiveGrid
        Reaches the nodes.
    config : RunConfig
        The run's configuration, with ``delivery.signing-key``.
    run : Path
        Its folder.
    clients : SiteClients
        Knows which sites the card may list.
    last : RoundRecord
        The last round's record, with the accuracy at each site.
    """
    try:
        delivered = _deliver(
            grid,
            run,
            config.delivery.signing_key,
            config.federation.site_registry,
            listed_sites(clients, last),
        )
    # What is not foreseen must not turn a complete run into a failed one either.
    except Exception as error:
        logger.exception(
            "the run is complete, but its model was not delivered (%s: %s): remove "
            "the cause, then give clip2fl deliver %s",
            type(error).__name__,
            error,
            run,
        )
        return
    if delivered.failed or not delivered.have:
        print(f"delivery: later, clip2fl deliver {run} serves the others", flush=True)


def deliver_run(grid: AttentiveGrid, config: RunConfig) -> None:
    """Send the model of a complete run to the sites that are connected now.

    Parameters
    ----------
    grid : AttentiveGrid
        Reaches the nodes.
    config : RunConfig
        Names the run (``delivery.run``). Its signing key and site registry are used if
        they are not empty, else those of that run's own configuration.

    Raises
    ------
    DeliveryError
        If the folder holds no complete run of sites, there is no signing key, or no
        site has the model in the end.
    """
    run = Path(config.delivery.run).expanduser()
    try:
        if not (run / MODEL).is_file():
            raise ForeignFileError(f"{run} holds no complete run: it has no {MODEL}")
        own = read_json(run / CONFIG, _Config, _MAX_CONFIG_BYTES)["config"]
    except ForeignFileError as error:
        raise DeliveryError(
            f"{error}; give the folder of a complete run on the server's machine"
        ) from None
    if own.get("dataset.name") != SITES:
        raise DeliveryError(f"{run} is a simulation's: it has no sites")
    key = config.delivery.signing_key or str(own.get(_KEY, ""))
    if not key:
        raise DeliveryError(f"{run} was run without {_KEY}: give one (--signing-key)")
    # A new key, made for a typing error, would replace the right signature.
    if not os.path.lexists(Path(key).expanduser()):
        raise DeliveryError(
            f"there is no signing key {shown(key)}: correct its name; clip2fl "
            "signing-key makes one"
        )
    registry = config.federation.site_registry or str(own.get(_REGISTRY, ""))
    if not _deliver(grid, run, key, registry).have:
        raise DeliveryError(
            "no site has the model: connect the nodes, and look at the reasons above"
        )


def listed_sites(clients: SiteClients, last: RoundRecord) -> list[ListedSite]:
    """Return the sites that allow the card to list them, with their figures."""
    reports = {name: found.recalls for name, found in last.evaluations.items()}
    return [
        ListedSite(name, images, next(iter(reports.get(name, {}).values()), {}))
        for name, images in clients.in_card().items()
    ]


def _deliver(
    grid: AttentiveGrid,
    run: Path,
    key: str,
    registry: str,
    sites: list[ListedSite] | None = None,
) -> Delivered:
    known = SiteRegistry.read(Path(registry).expanduser()) if registry else None
    print("delivery: the model is signed and offered to the sites", flush=True)
    manifest = signed_model(run, signing_key(Path(key).expanduser()), sites)
    delivered = deliver_model(grid, run / DELIVERY, manifest, known)
    for line in delivered.lines(manifest.name):
        print(line, flush=True)
    return delivered
