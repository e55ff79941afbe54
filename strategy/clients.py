"""Who takes part: the clients of a run, and the ones that a program simulates."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.randomness import generator

# Seconds within which nodes must say which partition they simulate.
QUERY_TIMEOUT_S = 120.0


class Clients(Protocol):
    """The clients of a run: who trains in which round, and which node to ask.

    Attributes
    ----------
    come_and_go : bool
        Whether clients leave and return, and change their images: then a round
        without a usable reply says nothing about the next round.
    """

    come_and_go: ClassVar[bool]

    @property
    def clients_per_round(self) -> int:
        """Clients drawn each round."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    def refresh(self, grid: Grid) -> None:
        """Find out which clients are there; wait while there are too few."""

    def available(self) -> list[int]:
        """Return the numbers of the clients that are there."""

    def evaluating(self) -> list[int]:
        """Return the numbers of the clients that evaluate each round's model."""

    def sample(self, server_round: int, left_out: Collection[int] = ()) -> list[int]:
        """Return the clients that train in a round, ascending."""

    def replies_needed(self, configured: int) -> int:
        """Return the good replies that a round needs."""

    def participation(self, trained: Mapping[int, int]) -> str:
        """Return what a round's line says of who took part."""

    def node_of(self, client: int, /) -> int:
        """Return the node to ask for a client."""

    def noise_source(self, server_round: int) -> torch.Generator:
        """Return random numbers for a round's noise."""

    def stream_of(self, client: int, /) -> int:
        """Return the number of a client's random streams."""

    def images_of(self, client: int, /) -> int:
        """Return the most images that a client can have trained on."""

    def label(self, client: int, /) -> int | str:
        """Return what reports call a client."""


@dataclass(frozen=True)
class SimulatedClients:
    """Clients that nodes simulate: each has a part of a data set that all nodes have.

    Flower's node ids are random and its own sampling draws nodes, so a seed does not
    repeat who trains. Here partitions are drawn from the run's seed and then mapped
    to nodes. The outcome depends neither on node ids nor on how many nodes there are.

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
        Images of each partition: no client can have trained on more.
    """

    come_and_go: ClassVar[bool] = False

    nodes: tuple[int, ...]
    num_clients: int
    clients_per_round: int
    seed: int
    images: tuple[int, ...]

    @classmethod
    def find(
        cls, grid: Grid, clients_per_round: int, seed: int, images: tuple[int, ...]
    ) -> Self:
        """Return the clients of a run, simulated by the nodes that answer.

        Parameters
        ----------
        grid : Grid
            Flower's.
        clients_per_round, seed, images
            As the attributes.

        Raises
        ------
        RuntimeError
            If no node answers.
        """
        return cls(find_nodes(grid), len(images), clients_per_round, seed, images)

    def refresh(self, grid: Grid) -> None:
        """Do nothing: simulated nodes stay."""

    def available(self) -> list[int]:
        """Return all partitions, ascending."""
        return list(range(self.num_clients))

    def evaluating(self) -> list[int]:
        """Return nobody: the server has the test images."""
        return []

    def sample(self, server_round: int, left_out: Collection[int] = ()) -> list[int]:
        """Return the partitions that train in a round, ascending.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        left_out : collection of int
            Partitions that do not; others train in their place.
        """
        drawn = torch.randperm(
            self.num_clients, generator=generator(self.seed, "sampling", server_round)
        ).tolist()
        drawn = [partition for partition in drawn if partition not in left_out]
        return sorted(drawn[: self.clients_per_round])

    def replies_needed(self, configured: int) -> int:
        """Return the good replies that a round needs: one, unless configured."""
        return max(1, configured)

    def participation(self, trained: Mapping[int, int]) -> str:
        """Return nothing: a simulation's line does not say who took part."""
        return ""

    def node_of(self, client: int) -> int:
        """Return the node that simulates a partition."""
        return self.nodes[client % len(self.nodes)]

    def noise_source(self, server_round: int) -> torch.Generator:
        """Return random numbers for a round's noise: the seed's, as all others."""
        return generator(self.seed, "privacy", server_round, self.num_clients)

    def stream_of(self, client: int) -> int:
        """Return the number of a client's random streams: the partition's."""
        return client

    def images_of(self, client: int) -> int:
        """Return the most images that a partition can have been trained on."""
        return self.images[client]

    def label(self, client: int) -> int:
        """Return what reports call a partition."""
        return client

    def __str__(self) -> str:
        """Return a line for the strategy's summary."""
        return (
            f"{self.clients_per_round} of {self.num_clients} (seed {self.seed}). "
            f"Simulated by {len(self.nodes)} nodes"
        )


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
            reasons.add(messages.plain(answer.error.reason))
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
