"""Sites: nodes with images of their own. Each is one client, and may come and go."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import ClassVar

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.provenance import differences, versions_here
from clip2fl_common.randomness import Noise, generator, secret_noise
from clip2fl_common.site_names import clashing, client_number, random_stream
from clip2fl_common.site_registry import RegistryError, SiteRegistry
from strategy.events import Events, What
from strategy.log import log

# Seconds that nodes have to tell which site they are.
QUERY_TIMEOUT_S = 120.0
# Seconds between two checks of the connected nodes while there are too few sites.
WAIT_S = 3.0
# Seconds after which a line about missing sites is repeated, if nothing has changed.
TELL_AGAIN_S = 300.0
# Seconds after which a node that refused to take part is asked again. They double each
# time that a node does not answer at all, since all sites wait for its answer.
ASK_AGAIN_S = 30.0
# Seconds after which a query took long, so that its nodes are asked less often.
SLOW_QUERY_S = 10.0
MOST_PAUSE_S = 900.0


@dataclass
class SiteClients:
    """The sites of a run. Those that train are drawn from the connected ones.

    A site is known by its name, not by Flower's random node id. So a seed repeats which
    sites train and their random numbers, as long as the same sites are connected.

    Attributes
    ----------
    clients_per_round : int
        Sites drawn without replacement each round. The first round waits until this
        many are connected; later rounds go on with fewer.
    seed : int
        The run's seed.
    max_images : int
        Most training images that a site may claim.
    registry : Path or None
        File that binds sites' names to nodes' keys; None lets each node choose a name.
    events : Events
        Told which sites come and leave.

    Raises
    ------
    RegistryError
        If the registry cannot be read.
    """

    come_and_go: ClassVar[bool] = True

    clients_per_round: int
    seed: int
    max_images: int
    registry: Path | None = None
    events: Events = field(default_factory=Events)
    _bound: SiteRegistry | None = None
    _names: dict[int, str] = field(default_factory=dict)
    # All sites that have taken part, connected or not, by number; and the number of
    # images that each trained on last.
    _seen: dict[int, str] = field(default_factory=dict)
    _images: dict[int, int] = field(default_factory=dict)
    # Nodes that do not take part: when each is asked again, and its last pause.
    _ask_at: dict[int, float] = field(default_factory=dict)
    _pauses: dict[int, float] = field(default_factory=dict)
    _started: bool = False
    # Names of the sites that may be in the delivered model's card.
    _in_card: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read the registry, if there is one."""
        if self.registry is not None:
            self._bound = SiteRegistry.read(self.registry)
        else:
            log(
                WARNING,
                "federation.site-registry is empty: names of sites are free, and any "
                "registered node may call itself any site",
            )

    def __str__(self) -> str:
        """Return the text that the strategy's summary shows."""
        return f"{self.clients_per_round} of the sites connected (seed {self.seed})"

    def refresh(self, grid: Grid) -> None:
        """Find out which sites are connected, and wait while there are too few.

        Parameters
        ----------
        grid : Grid
            Flower's grid.
        """
        told, told_at = "", 0.0
        while True:
            self._meet(grid)
            needed = 1 if self._started else self.clients_per_round
            if len(self._names) >= needed:
                break
            self.events.begin_phase("waiting")
            names = ", ".join(sorted(self._names.values())) or "none"
            text = f"{len(self._names)} of {needed} connected ({names})"
            if text != told or time.monotonic() - told_at >= TELL_AGAIN_S:
                log(INFO, "waiting for sites: %s", text)
                told, told_at = text, time.monotonic()
            time.sleep(WAIT_S)
        self._started = True

    def available(self) -> list[int]:
        """Return the numbers of the sites that are connected."""
        return self.connected()

    def evaluating(self) -> list[int]:
        """Return the numbers of the sites that evaluate: all connected sites."""
        return self.connected()

    def sample(self, server_round: int, left_out: Collection[int] = ()) -> list[int]:
        """Return the numbers of the sites that train in a round, in ascending order.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        left_out : collection of int
            Sites that must not train; others are drawn in their place.
        """
        clients = self.connected()
        order = torch.randperm(
            len(clients), generator=generator(self.seed, "sampling", server_round)
        )
        drawn = [clients[i] for i in order if clients[i] not in left_out]
        return sorted(drawn[: self.clients_per_round])

    def replies_needed(self, configured: int) -> int:
        """Return the number of good replies that a round needs.

        Parameters
        ----------
        configured : int
            ``federation.min-replies``. 0 means more than half of the sites seen in the
            run (or of the sites drawn each round, if these are fewer). When most sites
            are away, the rest do not represent the federation, however good their
            replies are.
        """
        if configured:
            return configured
        return min(self.clients_per_round, len(self._seen)) // 2 + 1

    def participation(self, trained: Mapping[int, int]) -> str:
        """Return how many of the sites and images took part in a round.

        Parameters
        ----------
        trained : mapping of int to int
            Number of training images of each site whose reply was good.

        Returns
        -------
        str
            Such as ``2 of 3 sites, 345 of 438 images``.
        """
        self._images |= trained
        return (
            f"{len(trained)} of {len(self._seen)} sites, {sum(trained.values()):,} of "
            f"{sum(self._images.values()):,} images"
        )

    def connected(self) -> list[int]:
        """Return the numbers of all known sites, in the order of their names."""
        return [client_number(name) for name in sorted(self._names.values())]

    def node_of(self, client: int) -> int:
        """Return a site's node."""
        return {client_number(name): n for n, name in self._names.items()}[client]

    def noise_source(self, server_round: int) -> Noise:
        """Return the source of a round's noise; no seed repeats its numbers."""
        return secret_noise

    def stream_of(self, client: int) -> int:
        """Return the number of a site's random streams."""
        return random_stream(client)

    def images_of(self, client: int) -> int:
        """Return the most training images that a site may claim."""
        return self.max_images

    def label(self, client: int) -> str:
        """Return the name of a site that is connected or has been."""
        return self._seen.get(client, f"site number {client}")

    def in_card(self) -> dict[str, int | None]:
        """Return the sites that may be in the delivered model's card, by name.

        Returns
        -------
        dict of str to int or None
            Number of images that each trained on last; None if it has not trained.
        """
        return {
            name: self._images.get(client_number(name))
            for name in sorted(self._in_card)
        }

    def look(self, grid: Grid) -> set[int]:
        """Forget the sites that are no longer connected; return the connected nodes."""
        connected = set(grid.get_node_ids())
        for node in sorted(self._names.keys() - connected):
            name = self._names.pop(node)
            log(
                WARNING,
                "site %s (node %d) is not connected: it is left out until it is back",
                name,
                node,
            )
            self.events.note(What.AWAY, name)
        return connected

    def _meet(self, grid: Grid) -> None:
        """Forget the sites that have left, and ask new nodes for their names."""
        connected = self.look(grid)
        self._read_registry()
        now = time.monotonic()
        asked = [
            node
            for node in sorted(connected - self._names.keys())
            if now >= self._ask_at.get(node, now)
        ]
        if not asked:
            return
        answers = grid.send_and_receive(
            [Message(RecordDict(), node, MessageType.QUERY) for node in asked],
            timeout=QUERY_TIMEOUT_S,
        )
        slow = time.monotonic() - now > SLOW_QUERY_S
        now = time.monotonic()  # the query itself may have taken longer than a pause
        reasons = dict.fromkeys(asked, f"no answer in {QUERY_TIMEOUT_S:.0f} s")
        silent = {*asked} - {answer.metadata.src_node_id for answer in answers}
        # Sorted by node, so that the order of the answers does not decide between sites
        # with equal names.
        for answer in sorted(answers, key=lambda a: a.metadata.src_node_id):
            node = answer.metadata.src_node_id
            if answer.has_error():
                reasons[node] = messages.error_reason(answer)
                continue
            try:
                versions = messages.versions_of(answer)
                name = self._name_of(node, messages.site_of(answer))
                self._welcome(node, name, versions)
            except messages.ReplyError as error:
                reasons[node] = str(error)
                continue
            # What the site said last holds.
            self._in_card.discard(self._names[node])
            if messages.may_be_in_card(answer):
                self._in_card.add(self._names[node])
            del reasons[node]
            self._pauses.pop(node, None)
        for node, reason in reasons.items():
            doubled = min(2 * self._pauses.get(node, ASK_AGAIN_S / 2), MOST_PAUSE_S)
            # A round waits for all answers, also for a refusal that comes late.
            self._pauses[node] = doubled if node in silent or slow else ASK_AGAIN_S
            self._ask_at[node] = now + self._pauses[node]
            log(WARNING, "node %d does not take part: %s", node, reason)
            self.events.note(What.REFUSED, f"node {node}", reason=reason)

    def _read_registry(self) -> None:
        """Read the registry again, and forget the sites that were removed from it."""
        if self.registry is None:
            return
        try:
            self._bound = SiteRegistry.read(self.registry)
        except RegistryError as error:
            log(WARNING, "%s. The entries read before stay valid", error)
        assert self._bound is not None
        for node, name in list(self._names.items()):
            if self._bound.name_of(node) != name:
                del self._names[node]
                log(
                    WARNING,
                    "site %s (node %d) is no longer in the site registry: it is left "
                    "out",
                    name,
                    node,
                )
                self.events.note(What.AWAY, name)

    def _name_of(self, node: int, given: str) -> str:
        """Return a node's name: the registry's, or without one the name it gives."""
        if self._bound is None:
            return given or f"node-{node}"
        name = self._bound.name_of(node)
        if name is None:
            raise messages.ReplyError(
                f"it calls itself {given or 'nothing'}, but its key is not in "
                f"{self.registry}: register it there with 'clip2fl site register'"
            )
        if given not in ("", name):
            raise messages.ReplyError(
                f"it calls itself {given}, but its key is registered for {name}: "
                f"--node-config 'site=\"{name}\"' at the node"
            )
        return name

    def _welcome(self, node: int, name: str, versions: dict[str, str]) -> None:
        taken = {clashing(known) for known in self._names.values()}
        if clashing(name) in taken:
            log(
                WARNING,
                "node %d calls itself %s, as another node does (case does not count); "
                "give each site a name of its own: --node-config 'site=\"...\"'",
                node,
                name,
            )
            name = f"{name}-{node}"
        if clashing(name) in taken or client_number(name) in self.connected():
            raise messages.ReplyError(
                f"the name {name} is already used by another site; give each site a "
                "name of its own: --node-config 'site=\"...\"'"
            )
        known = client_number(name) in self._seen
        self._names[node] = name
        self._seen[client_number(name)] = name
        listed = ", ".join(f"{package} {v}" for package, v in versions.items())
        log(INFO, "site %s (node %d) takes part: %s", name, node, listed or "-")
        if other := differences(versions, versions_here()):
            log(WARNING, "site %s has other versions than the server: %s", name, other)
        self.events.note(What.BACK if known else What.JOINED, name, versions=versions)
