"""What every method shares: seeded sampling of partitions, and checked replies."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, ClassVar, Self, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import nn

from clip2fl_common import records
from clip2fl_common.config import RunConfig
from clip2fl_common.datasets import DatasetError
from clip2fl_common.provenance import code_fingerprint
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher
from strategy.round_record import RoundRecord


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


@dataclass(frozen=True)
class Setting:
    """Everything from which a method may be built.

    Attributes
    ----------
    plan : ClientPlan
        Who trains when and where.
    config : RunConfig
        The run's configuration, from which a method takes its own settings.
    class_names : tuple of str
        Names of the C classes.
    device : torch.device
        Where the server computes.
    teacher : Teacher or None
        There for methods with ``needs_teacher``, else None.
    """

    plan: ClientPlan
    config: RunConfig
    class_names: tuple[str, ...]
    device: torch.device
    teacher: Teacher | None


class PartitionedTraining(FlowerFedAvg):
    """Base of the methods: a Flower FedAvg with the plan's sampling, checking replies.

    Put it first among the bases, before the Flower strategy that it changes.

    Parameters
    ----------
    plan : ClientPlan
        Who trains when and where.
    **flower_settings : Any
        Settings of the Flower strategy (``proximal_mu``, ...).

    Attributes
    ----------
    needs_teacher : bool
        Whether the run has to load the teacher for this method.
    classifier : torch.nn.Linear or None
        Classifier that is delivered instead of the global model's own, if any.
    """

    needs_teacher: ClassVar[bool] = False
    classifier: nn.Linear | None = None

    @classmethod
    def build(cls, setting: Setting) -> Self:
        """Return the method as a run's configuration wants it."""
        return cls(setting.plan)

    def __init__(self, plan: ClientPlan, **flower_settings: Any) -> None:
        # All nodes are handed to `_construct_messages`, which picks from them.
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=1,
            train_metrics_aggr_fn=_summarise_metrics,
            **flower_settings,
        )
        self.plan = plan
        self.round = RoundRecord()
        self._sent = ArrayRecord()
        self._sent_at = 0.0

    def state(self) -> dict[str, torch.Tensor]:
        """Return by name what a round leaves to the next, besides the global model.

        Random numbers are no part of it: each generator comes from the run's seed,
        its purpose, the round and the client.
        """
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""
        assert not state

    def summary(self) -> None:
        """Log the sampling, then the Flower strategy's own settings."""
        log(INFO, "\t├──> Clients:")
        log(
            INFO,
            "\t│\t├── Drawn each round: %d of %d (seed %d)",
            self.plan.clients_per_round,
            self.plan.num_clients,
            self.plan.seed,
        )
        log(INFO, "\t│\t└── Simulated by %d nodes", len(self.plan.nodes))
        super().summary()

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        """Address one message to each partition drawn, not one to each node."""
        config = record.config_records[records.CONFIG]
        server_round = cast(int, config[records.ROUND])
        self._sent = record.array_records[records.ARRAYS]
        self._sent_at = time.perf_counter()
        partitions = self.plan.sample(server_round)
        log(INFO, "configure_train: clients %s train", partitions)
        messages = []
        for partition in partitions:
            content = RecordDict(dict(record.items()))
            content[records.CONFIG] = ConfigRecord(
                {
                    **config,
                    records.PARTITION: partition,
                    records.CODE_FINGERPRINT: code_fingerprint(),
                }
            )
            node = self.plan.node_of(partition)
            messages.append(Message(content, node, message_type))
        self.round = RoundRecord(
            bytes_down=len(messages) * records.payload_bytes(record)
        )
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
        started = time.perf_counter()
        accepted = self._accept(server_round, replies)
        self._book("checks", started)
        self.use_replies(server_round, accepted)
        started = time.perf_counter()
        arrays, metrics = super().aggregate_train(server_round, accepted)
        self._book("aggregation", started)
        assert metrics is not None
        self._record(metrics)
        return arrays, metrics

    def use_replies(self, server_round: int, replies: Sequence[Message]) -> None:
        """Take what a method needs beyond model and metrics out of good replies."""

    def artifacts(self) -> dict[str, torch.Tensor]:
        """Return what a report may show of the method's state, by name."""
        return {}

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
            reasons.append(f"node {reply.metadata.src_node_id}: {reason}")
            log(WARNING, "round %d: dropped the reply of %s", server_round, reasons[-1])
        if not accepted:
            raise NoRepliesError(
                f"round {server_round}: no usable reply from "
                f"{self.plan.clients_per_round} clients ("
                + ("; ".join(reasons) or "none arrived before federation.round-timeout")
                + ")"
            )
        ordered = [accepted[partition] for partition in sorted(accepted)]
        self.round.clients = sorted(accepted)
        self.round.dropped = len(reasons)
        self.round.upload_bytes = [records.payload_bytes(r.content) for r in ordered]
        self.round.gradient_bytes = [records.gradient_bytes(r.content) for r in ordered]
        return ordered

    def _record(self, metrics: MetricRecord) -> None:
        """Take the clients' summarised metrics into the round's record."""
        values = {name: cast(float, value) for name, value in metrics.items()}
        self.round.losses = {
            "client": values["loss"],
            "distillation": values["distillation-loss"],
            **self.round.losses,
        }
        self.round.unreadable = int(values["unreadable-images"])
        self.round.seconds |= {
            f"clients-{name.removeprefix('seconds-')}": value
            for name, value in values.items()
            if name.startswith("seconds-")
        }

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
