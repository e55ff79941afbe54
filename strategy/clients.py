"""The clients of a run, and the clients that nodes simulate."""

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import ClassVar, Protocol

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.randomness import Noise, generator, seeded_noise

# Seconds that nodes have to tell which partitions they simulate.
QUERY_TIMEOUT_S = 120.0


class Clients(Protocol):
    """The clients of a run: draws those that train and knows their nodes.

    Attributes
    ----------
    come_and_go : bool
        Whether clients may leave, return and change their images. Then later rounds
        may succeed after a round without a usable reply.
    """

    come_and_go: ClassVar[bool]

    @property
    def clients_per_round(self) -> int:
        """Return the number of clients drawn each round."""

    @property
    def seed(self) -> int:
        """Return the run's seed."""

    def refresh(self, grid: Grid) -> None:
        """Find out which clients are connected; wait while there are too few."""

    def available(self) -> list[int]:
        """Return the numbers of the connected clients."""

    def evaluating(self) -> list[int]:
        """Return the numbers of the clients that evaluate each round's model."""

    def sample(self, server_round: int, left_out: Collection[int] = ()) -> list[int]:
        """Return the clients that train in a round, in ascending order."""

    def replies_needed(self, configured: int) -> int:
        """Return the number of good replies that a round needs."""

    def participation(self, trained: Mapping[int, int]) -> str:
        """Return the part of a round's log line that says which clients took part."""

    def node_of(self, client: int, /) -> int:
        """Return the node that runs a client."""

    def noise_source(self, server_round: int) -> Noise:
        """Return the source of a round's noise."""

    def stream_of(self, client: int, /) -> int:
        """Return the number of a client's random streams."""

    def images_of(self, client: int, /) -> int:
        """Return the most images that a client can have trained on."""

    def label(self, client: int, /) -> int | str:
        """Return the name of a client in reports."""


@dataclass(frozen=True)
class SimulatedClients:
    """Clients that nodes simulate: each holds one partition of a shared data set.

    Flower's node ids are random and its own sampling draws nodes, so a seed would not
    repeat which clients train. Here partitions are drawn from the run's seed and then
    mapped to nodes. The result depends neither on node ids nor on the number of nodes.

    Attributes
    ----------
    nodes : tuple of int
        Node ids in the order of their simulated partition numbers.
    num_clients : int
        Number of partitions.
    clients_per_round : int
        Partitions drawn without replacement each round.
    seed : int
        The run's seed.
    images : tuple of int
        Number of images of each partition, the most that its client can train on.
    """

    come_and_go: ClassVar[bool] = False

    nodes: tuple[int, ...]
    num_clients: int
    clients_per_round: int
    seed: int
    images: tuple[int, ...]

    def refresh(self, grid: Grid) -> None:
        """Do nothing: simulated nodes stay connected."""

    def available(self) -> list[int]:
        """Return all partitions in ascending order."""
        return list(range(self.num_clients))

    def evaluating(self) -> list[int]:
        """Return no clients: the server evaluates on its own test images."""
        return []

    def sample(self, server_round: int, left_out: Collection[int] = ()) -> list[int]:
        """Return the partitions that train in a round, in ascending order.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        left_out : collection of int
            Partitions that must not train; others are drawn in their place.
        """
        drawn = torch.randperm(
            self.num_clients, generator=generator(self.seed, "sampling", server_round)
        ).tolist()
        drawn = [partition for partition in drawn if partition not in left_out]
        return sorted(drawn[: self.clients_per_round])

    def replies_needed(self, configured: int) -> int:
        """Return the number of good replies that a round needs: 1 by default."""
        return max(1, configured)

    def participation(self, trained: Mapping[int, int]) -> str:
        """Return an empty string: the log line of a simulation omits participation."""
        return ""

    def node_of(self, client: int) -> int:
        """Return the node that simulates a partition."""
        return self.nodes[client % len(self.nodes)]

    def noise_source(self, server_round: int) -> Noise:
        """Return the source of a round's noise, seeded like all others."""
        numbers = generator(self.seed, "privacy", server_round, self.num_clients)
        return seeded_noise(numbers)

    def stream_of(self, client: int) -> int:
        """Return the number of a client's random streams: its partition's number."""
        return client

    def images_of(self, client: int) -> int:
        """Return the number of images of a partition."""
        return self.images[client]

    def label(self, client: int) -> int:
        """Return the name of a partition in reports: its number."""
        return client

    def __str__(self) -> str:
        """Return the text that the strategy's summary shows."""
        return (
            f"{self.clients_per_round} of {self.num_clients} (seed {self.seed}). "
            f"Simulated by {len(self.nodes)} nodes"
        )


def found_later(grid: Grid) -> Future[tuple[int, ...]]:
    """Begin `find_nodes`, and return what will hold its result or its error.

    A simulated node answers only after Ray has started and has imported the client's
    code.
    """
    found: Future[tuple[int, ...]] = Future()

    def find() -> None:
        try:
            found.set_result(find_nodes(grid))
        except BaseException as error:
            found.set_exception(error)

    # A daemon: a run that fails meanwhile must not wait for the nodes.
    Thread(target=find, daemon=True).start()
    return found


def find_nodes(grid: Grid) -> tuple[int, ...]:
    """Return the ids of the nodes in the order of their simulated partitions.

    Raises
    ------
    RuntimeError
        If no node answers.
    """
    queries = [
        Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()
    ]
    places: dict[int, int] = {}
    reasons: set[str] = set()
    for answer in grid.send_and_receive(queries, timeout=QUERY_TIMEOUT_S):
        if answer.has_error():
            reasons.add(messages.error_reason(answer))
            continue
        try:
            partition = messages.simulated_partition(answer)
        except messages.ReplyError as error:
            reasons.add(str(error))
        else:
            places[partition] = answer.metadata.src_node_id
    if not places:
        raise RuntimeError(
            f"none of {len(queries)} nodes says which clients it simulates: "
            + "; ".join(sorted(reasons) or ["no answer"])
        )
    return tuple(places[partition] for partition in sorted(places))
