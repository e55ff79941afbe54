"""What every method shares: seeded sampling of partitions, and checked replies."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from statistics import fmean
from typing import Any, cast

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from clip2fl_common import records
from clip2fl_common.datasets import DatasetError
from clip2fl_common.metrics import FEDAVG_HEAD, HEADS, RETRAINED_HEAD, TEACHER_HEAD
from clip2fl_common.provenance import code_fingerprint
from clip2fl_common.randomness import generator
from strategy.sites import SitePlan


class NoRepliesError(RuntimeError):
    """A round brought no usable reply; the run stops instead of going on unchanged."""


@dataclass(frozen=True)
class ClientPlan:
    """Which clients train in which round, and which node simulates each of them.

    Flower's node ids are random and its own sampling draws nodes, so a seed does not
    repeat who trains. Here partitions are drawn from the run's seed and then mapped
    to nodes: the outcome depends neither on node ids nor on how many nodes there are.

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
    """

    nodes: tuple[int, ...]
    num_clients: int
    clients_per_round: int
    seed: int

    def sample(self, server_round: int) -> list[int]:
        """Return the partitions that train in a round, ascending."""
        drawn = torch.randperm(
            self.num_clients, generator=generator(self.seed, "sampling", server_round)
        )
        return sorted(drawn[: self.clients_per_round].tolist())

    def node_of(self, partition: int) -> int:
        """Return the node that simulates a partition."""
        return self.nodes[partition % len(self.nodes)]

    def label(self, partition: int) -> int:
        """Return what reports call a partition."""
        return partition

    def refresh(self, grid: Grid) -> Grid:
        """Return the grid as it is: simulated nodes stay."""
        return grid

    def __str__(self) -> str:
        """Return a line for the strategy's summary."""
        return (
            f"{self.clients_per_round} of {self.num_clients} (seed {self.seed}). "
            f"Simulated by {len(self.nodes)} nodes"
        )


@dataclass
class RoundRecord:
    """What a round cost and brought.

    Attributes
    ----------
    clients : list of (int or str)
        Partitions, or names of sites, whose replies were used.
    dropped : int
        Replies that were not.
    bytes_down : int
        Arrays sent to all clients.
    upload_bytes, gradient_bytes : list of int
        Arrays received from each of ``clients``, and the class gradients among them.
    metrics : dict
        Clients' metrics: losses averaged by number of images, the rest summed.
    losses : dict
        Losses computed at the server.
    seconds : dict
        Wall-clock seconds of each phase.
    recalls : dict or None
        Sites' mean accuracy on each class in percent (None: no site has it), by head;
        None without sites.
    """

    clients: list[int | str] = field(default_factory=list)
    dropped: int = 0
    bytes_down: int = 0
    upload_bytes: list[int] = field(default_factory=list)
    gradient_bytes: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    recalls: dict[str, list[float | None]] | None = None


class PartitionedTraining(FlowerFedAvg):
    """Base of the methods: a Flower FedAvg with the plan's sampling, checking replies.

    Put it first among the bases, before the Flower strategy that it changes.

    Parameters
    ----------
    plan : ClientPlan or SitePlan
        Who trains when and where. Sites also evaluate each round's model.
    **flower_settings : Any
        Settings of the Flower strategy (``proximal_mu``, ...).
    """

    def __init__(self, plan: ClientPlan | SitePlan, **flower_settings: Any) -> None:
        # All nodes are handed to `_construct_messages`, which picks from them.
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=1.0 if isinstance(plan, SitePlan) else 0.0,
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            train_metrics_aggr_fn=_summarise_metrics,
            **flower_settings,
        )
        self.plan = plan
        self.round = RoundRecord()
        self._sent = ArrayRecord()
        self._sent_at = 0.0
        # Nodes that a request was sent to, and what logs call them.
        self._asked: dict[int, str] = {}
        self._heads: list[str] = []

    def summary(self) -> None:
        """Log the sampling, then the Flower strategy's own settings."""
        log(INFO, "\t├──> Clients:")
        log(INFO, "\t│\t└── Drawn each round: %s", self.plan)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Look who is there first, where nodes may come and go."""
        return super().configure_train(
            server_round, arrays, config, self.plan.refresh(grid)
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all sites that are there; nobody where clients are simulated."""
        return super().configure_evaluate(
            server_round, arrays, config, self.plan.refresh(grid)
        )

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        """Address one message to each client that the plan has for it."""
        config = record.config_records[records.CONFIG]
        server_round = cast(int, config[records.ROUND])
        if message_type == MessageType.TRAIN:
            self._sent = record.array_records[records.ARRAYS]
            self._sent_at = time.perf_counter()
            clients = self.plan.sample(server_round)
            self.round = RoundRecord(
                bytes_down=len(clients) * records.payload_bytes(record)
            )
        else:
            assert isinstance(self.plan, SitePlan)
            clients = self.plan.connected()
            asked = {
                RETRAINED_HEAD: records.CLASSIFIER in record,
                FEDAVG_HEAD: True,
                TEACHER_HEAD: records.TEACHER_FINGERPRINT in config,
            }
            self._heads = [head for head in HEADS if asked[head]]
        labels = [self.plan.label(client) for client in clients]
        log(INFO, "round %d: clients %s %s", server_round, labels, message_type)
        self._asked = {}
        messages = []
        for client, label in zip(clients, labels, strict=True):
            content = RecordDict(dict(record.items()))
            content[records.CONFIG] = ConfigRecord(
                {
                    **config,
                    records.PARTITION: client,
                    records.CODE_FINGERPRINT: code_fingerprint(),
                }
            )
            node = self.plan.node_of(client)
            self._asked[node] = f"node {node}" + (
                f" ({label})" if isinstance(label, str) else ""
            )
            messages.append(Message(content, node, message_type))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, then aggregate those that are good.

        Raises
        ------
        DatasetError
            If a client's images cannot be read and are not to be skipped.
        NoRepliesError
            If no reply is usable.
        """
        replies = list(replies)
        self._book("clients", self._sent_at)
        self._name_silent(server_round, replies)
        started = time.perf_counter()
        accepted = self._accept(server_round, replies)
        self._book("checks", started)
        self.use_replies(server_round, accepted)
        started = time.perf_counter()
        arrays, metrics = super().aggregate_train(server_round, accepted)
        self._book("aggregation", started)
        assert metrics is not None
        self.round.metrics = {
            name: float(cast(float, value)) for name, value in metrics.items()
        }
        return arrays, metrics

    def use_replies(self, server_round: int, replies: Sequence[Message]) -> None:
        """Take what a method needs beyond model and metrics out of good replies."""

    def check(self, reply: Message) -> None:
        """Raise `ReplyError` if a reply is not as agreed."""
        records.check_reply(reply, self._sent, gradients=None)

    def _accept(self, server_round: int, replies: Sequence[Message]) -> list[Message]:
        """Return the good replies in the order of their partitions.

        Replies arrive in any order, and sums of floating-point numbers depend on it.
        """
        accepted: dict[int, Message] = {}
        reasons = []
        for reply in replies:
            if reply.has_error():
                reason = str(reply.error.reason)
                if DatasetError.__name__ in reason:
                    raise DatasetError(f"round {server_round}: {reason}")
            else:
                try:
                    self.check(reply)
                except records.ReplyError as error:
                    reason = str(error)
                else:
                    accepted[records.partition_of(reply)] = reply
                    continue
            reasons.append(f"{self._name(reply)}: {reason}")
            log(WARNING, "round %d: dropped the reply of %s", server_round, reasons[-1])
        if not accepted:
            raise NoRepliesError(
                f"round {server_round}: no usable reply from "
                f"{self.plan.clients_per_round} clients ("
                + ("; ".join(reasons) or "none arrived before federation.round-timeout")
                + ")"
            )
        ordered = [accepted[partition] for partition in sorted(accepted)]
        self.round.clients = [self.plan.label(client) for client in sorted(accepted)]
        self.round.dropped = len(reasons)
        self.round.upload_bytes = [records.payload_bytes(r.content) for r in ordered]
        self.round.gradient_bytes = [records.gradient_bytes(r.content) for r in ordered]
        return ordered

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average each class's accuracy over the sites that have images of it.

        A plain mean, as of class gradients: no class count leaves a site.
        """
        if not isinstance(self.plan, SitePlan):
            return None
        replies = list(replies)
        self._name_silent(server_round, replies)
        found: list[dict[str, dict[int, int]]] = []
        for reply in replies:
            try:
                if reply.has_error():
                    raise records.ReplyError(reply.error.reason)
                found.append(
                    records.recalls_of(reply, self.plan.num_classes, self._heads)
                )
            except records.ReplyError as error:
                log(
                    WARNING,
                    "round %d: dropped the evaluation of %s: %s",
                    server_round,
                    self._name(reply),
                    error,
                )
        self.round.recalls = {
            head: [
                fmean(values)
                if (values := [site[head][c] for site in found if c in site[head]])
                else None
                for c in range(self.plan.num_classes)
            ]
            for head in self._heads
        }
        return None

    def _name(self, reply: Message) -> str:
        """Return what logs call the sender of a reply."""
        node = reply.metadata.src_node_id
        return self._asked.get(node, f"node {node}")

    def _name_silent(self, server_round: int, replies: Sequence[Message]) -> None:
        """Log the nodes that have not replied at all."""
        for node in self._asked.keys() - {r.metadata.src_node_id for r in replies}:
            log(
                WARNING,
                "round %d: %s did not reply in time; the round goes on without it",
                server_round,
                self._asked[node],
            )

    def _book(self, phase: str, started: float) -> None:
        self.round.seconds[phase] = time.perf_counter() - started


def _summarise_metrics(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Average losses by number of images (as Flower does) and sum everything else."""
    averaged = aggregate_metricrecords(contents, weighted_by)
    del averaged[records.PARTITION]
    for name in (weighted_by, *records.SUMMED_METRICS):
        averaged[name] = sum(
            cast(float, content.metric_records[records.METRICS][name])
            for content in contents
        )
    return averaged
