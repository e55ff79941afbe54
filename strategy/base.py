"""What every method shares: seeded sampling of partitions, and checked replies."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from statistics import fmean
from typing import Any, ClassVar, Self, cast

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
from torch import nn

from clip2fl_common import messages
from clip2fl_common.config import EMA, Aggregation, Privacy, RunConfig
from clip2fl_common.data.datasets import DatasetError
from clip2fl_common.metrics import FEDAVG_HEAD, HEADS, RETRAINED_HEAD, TEACHER_HEAD
from clip2fl_common.models import ImageClassifier
from clip2fl_common.provenance import code_fingerprint
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher
from strategy.clients import SitePlan
from strategy.model_average import ModelAverage
from strategy.outliers import LengthRule
from strategy.privacy_ledger import PrivacyLedger
from strategy.recovery import (
    MOST_EMPTY,
    MOST_RETURNS,
    ORIGIN,
    Earlier,
    Recovery,
)
from strategy.replies import ReplyCheck, Verdicts, reasons
from strategy.robust import flower_aggregator, shorten_update
from strategy.round_record import RoundRecord

# Names of weights in the average over rounds.
MODEL_WEIGHTS, CLASSIFIER_WEIGHTS = "model.", "classifier."


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
    images : tuple of int
        Images of each partition: no client can have trained on more.
    """

    nodes: tuple[int, ...]
    num_clients: int
    clients_per_round: int
    seed: int
    images: tuple[int, ...]

    def available(self) -> list[int]:
        """Return all partitions, ascending."""
        return list(range(self.num_clients))

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
        """Return what a round's line says of who took part: nothing."""
        return ""

    def node_of(self, partition: int) -> int:
        """Return the node that simulates a partition."""
        return self.nodes[partition % len(self.nodes)]

    def noise_source(self, server_round: int) -> torch.Generator:
        """Return random numbers for a round's noise: the seed's, as all others."""
        return generator(self.seed, "privacy", server_round, self.num_clients)

    def stream_of(self, partition: int) -> int:
        """Return the number of a client's random streams: the partition's."""
        return partition

    def images_of(self, partition: int) -> int:
        """Return the most images that a partition can have been trained on."""
        return self.images[partition]

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


@dataclass(frozen=True)
class Setting:
    """Everything from which a method may be built.

    Attributes
    ----------
    plan : ClientPlan or SitePlan
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

    plan: ClientPlan | SitePlan
    config: RunConfig
    class_names: tuple[str, ...]
    device: torch.device
    teacher: Teacher | None

    @property
    def safeguards(self) -> dict[str, Any]:
        """Settings that every method has, whatever it does otherwise."""
        return {
            "aggregation": self.config.aggregation,
            "min_replies": self.config.federation.min_replies,
            "privacy": self.config.privacy,
            "ema": self.config.ema,
        }


class PartitionedTraining(FlowerFedAvg):
    """Base of the methods: a Flower FedAvg with the plan's sampling, checking replies.

    Put it first among the bases, before the Flower strategy that it changes.

    Parameters
    ----------
    plan : ClientPlan or SitePlan
        Who trains when and where. Sites also evaluate each round's model.
    aggregation : Aggregation
        How models are put together, and the bounds on what a client sends.
    min_replies : int
        Good replies that a round needs, with fewer, the model stays as it is; 0: what
        the plan says.
    privacy : Privacy
        Noise on the mean update, and what is accounted for.
    ema : EMA
        Mean of the rounds' models that is evaluated and delivered, if any.
    **flower_settings : Any
        Settings of the Flower strategy (``proximal_mu``, ...).

    Attributes
    ----------
    needs_teacher : bool
        Whether the run has to load the teacher for this method.
    asks_class_gradients : bool
        Whether clients send class gradients for this method.
    classifier : torch.nn.Linear or None
        Classifier that is delivered instead of the global model's own, if any.
    average : ModelAverage
        Of both over the rounds, where ``ema.decay`` asks for it.
    gradient_format : GradientFormat or None
        What is expected of class gradients, where a method asks for them.
    round : RoundRecord
        What the last round cost and brought.
    earlier : callable
        Returns a run's state after the last round before a given one that is kept;
        None if none is. Set by who keeps them.
    """

    needs_teacher: ClassVar[bool] = False
    asks_class_gradients: ClassVar[bool] = False
    classifier: nn.Linear | None = None
    gradient_format: messages.GradientFormat | None = None

    @classmethod
    def build(cls, setting: Setting) -> Self:
        """Return the method as a run's configuration wants it."""
        return cls(setting.plan, **setting.safeguards)

    def __init__(
        self,
        plan: ClientPlan | SitePlan,
        *,
        aggregation: Aggregation,
        min_replies: int,
        privacy: Privacy,
        ema: EMA,
        **flower_settings: Any,
    ) -> None:
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
        self.aggregation = aggregation
        self.min_replies = min_replies
        self.privacy = privacy
        self.average = ModelAverage(ema.decay)
        self.ledger = PrivacyLedger.of(privacy, self.asks_class_gradients)
        self.round = RoundRecord()
        self.earlier: Callable[[int], Earlier | None] = _nothing_kept
        self.recovery = Recovery()
        self.lengths = LengthRule(aggregation.max_length_ratio)
        self._aggregator = flower_aggregator(
            aggregation, train_metrics_aggr_fn=_summarise_metrics
        )
        # Clients that each node was asked for in the round, with the most images that
        # they can have, and what logs call the node.
        self._asked: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._names: dict[int, str] = {}
        self._sent = ArrayRecord()
        self._sent_at = 0.0
        self._heads: list[str] = []

    def state(self) -> dict[str, torch.Tensor]:
        """Return by name what a round leaves to the next, besides the global model.

        Random numbers are no part of it: each generator comes from the run's seed,
        its purpose, the round and the client.
        """
        return {
            **self.ledger.state(),
            **self.average.state(),
            **self.recovery.state(),
            **self.lengths.state(),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` returned."""
        self.ledger.load_state(state)
        self.average.load_state(state)
        self.recovery.load_state(state)
        self.lengths.load_state(state)

    def summary(self) -> None:
        """Log the sampling, then the Flower strategy's own settings."""
        log(INFO, "\t├──> Clients:")
        log(INFO, "\t│\t├── Drawn each round: %s", self.plan)
        needed = self.min_replies or self.plan.replies_needed(0)
        log(INFO, "\t│\t└── Good replies a round needs: %s", needed)
        rule = self.aggregation
        log(INFO, "\t├──> Aggregation:")
        log(INFO, "\t│\t├── Rule: %s, trim %g", rule.rule, rule.trim)
        log(
            INFO,
            "\t│\t├── Longest update, in medians of the round (0: any): %g",
            rule.max_length_ratio,
        )
        log(
            INFO,
            "\t│\t└── Norms allowed (0: any): update %g, class gradient %g",
            rule.max_update_norm,
            rule.max_gradient_norm,
        )
        cut = int(rule.trim * self.plan.clients_per_round)
        if rule.rule == "trimmed-mean" and cut == 0:
            log(
                WARNING,
                "aggregation.trim = %g of %d clients a round cuts nobody off: this is "
                "the unweighted mean; raise it to %g at least",
                rule.trim,
                self.plan.clients_per_round,
                1 / self.plan.clients_per_round,
            )
        log(INFO, "\t├──> Evaluated and delivered:")
        decay = self.average.decay
        what = f"average of the rounds' models, decay {decay:g}" if decay else "last"
        log(INFO, "\t│\t└── Model: %s", what)
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
        # Flower hands the round's model on here, after all that a method does to it.
        if self.average.decay > 0 and not self.round.kept_model:
            self.average.add(self._weights(arrays))
        if mean := self.average.mean(MODEL_WEIGHTS):
            arrays = messages.state_to_arrays(mean)
        return super().configure_evaluate(
            server_round, arrays, config, self.plan.refresh(grid)
        )

    def _weights(self, arrays: ArrayRecord) -> dict[str, torch.Tensor]:
        """Return the weights of the global model and of a re-trained classifier."""
        named = {
            f"{MODEL_WEIGHTS}{name}": torch.from_numpy(values)
            for name, values in messages.arrays_to_numpy(arrays).items()
        }
        retrained = self.classifier.state_dict() if self.classifier else {}
        return named | {
            f"{CLASSIFIER_WEIGHTS}{name}": tensor.detach().cpu()
            for name, tensor in retrained.items()
        }

    def delivered_model(self, model: ImageClassifier) -> ImageClassifier:
        """Return the model that is evaluated and delivered.

        Parameters
        ----------
        model : ImageClassifier
            Global model after the last round; stays as it is.

        Returns
        -------
        ImageClassifier
            The given one, or a copy with the average over rounds.
        """
        return self.average.applied_to(model, MODEL_WEIGHTS)

    @property
    def delivered_classifier(self) -> nn.Linear | None:
        """Re-trained classifier that goes with it, in methods that have one."""
        if self.classifier is None:
            return None
        return self.average.applied_to(self.classifier, CLASSIFIER_WEIGHTS)

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        """Address one message to each client that the plan has for it."""
        config = record.config_records[messages.CONFIG]
        server_round = cast(int, config[messages.ROUND])
        if message_type == MessageType.TRAIN:
            self._sent = record.array_records[messages.ARRAYS]
            self._sent_at = time.perf_counter()
            clients = self._sample(server_round)
            self.round = RoundRecord(
                bytes_down=len(clients) * messages.payload_bytes(record)
            )
        else:
            assert isinstance(self.plan, SitePlan)
            clients = self.plan.connected()
            asked = {
                RETRAINED_HEAD: messages.CLASSIFIER in record,
                FEDAVG_HEAD: True,
                TEACHER_HEAD: messages.TEACHER_FINGERPRINT in config,
            }
            self._heads = [head for head in HEADS if asked[head]]
        labels = [self.plan.label(client) for client in clients]
        log(INFO, "round %d: clients %s %s", server_round, labels, message_type)
        self._asked.clear()
        requests = []
        for client, label in zip(clients, labels, strict=True):
            content = RecordDict(dict(record.items()))
            content[messages.CONFIG] = ConfigRecord(
                {
                    **config,
                    messages.PARTITION: client,
                    messages.STREAM: self.plan.stream_of(client),
                    messages.CODE_FINGERPRINT: code_fingerprint(),
                }
            )
            node = self.plan.node_of(client)
            self._asked[node][client] = self.plan.images_of(client)
            if message_type == MessageType.TRAIN:
                self.ledger.note(client)
            self._names[node] = f"node {node}" + (
                f" ({label})" if isinstance(label, str) else ""
            )
            requests.append(Message(content, node, message_type))
        return requests

    def _sample(self, server_round: int) -> list[int]:
        """Return the clients that train in a round, without those that are left out."""
        available = self.plan.available()
        usual = min(self.plan.clients_per_round, len(available))
        needed = max(self.plan.replies_needed(self.min_replies), -(-usual // 2))
        absent = self.recovery.absent(server_round, available, needed)
        if absent:
            log(
                INFO,
                "round %d: left out because of an earlier model: %s",
                server_round,
                ", ".join(str(self.plan.label(client)) for client in sorted(absent)),
            )
        return self.plan.sample(server_round, absent)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, then aggregate those that are good.

        Raises
        ------
        DatasetError
            If a simulated client's images cannot be read and are not to be skipped.
        NoRepliesError
            If no reply is usable, and there is nothing to go back to or on with.
        """
        replies = list(replies)
        self._book("clients", self._sent_at)
        self._name_silent(server_round, replies)
        self.round.privacy = self.ledger.spent()
        started = time.perf_counter()
        verdicts = self._judge(server_round, replies)
        self.round.dropped = len(replies) - len(verdicts.good)
        if verdicts.poisoned:
            self._book("checks", started)
            return self._go_back(server_round, verdicts), None
        accepted = list(verdicts.good.values())
        trained = {c: size.images for c, size in verdicts.sizes.items()}
        self.round.participation = self.plan.participation(trained)
        needed = self.plan.replies_needed(self.min_replies)
        if len(accepted) < needed:
            log(
                WARNING,
                "round %d: %d good replies, fewer than federation.min-replies = %d; "
                "the model stays as it was",
                server_round,
                len(accepted),
                needed,
            )
            self.round.kept_model = True
            self._book("checks", started)
            return None, None
        self.round.clients = [
            self.plan.label(messages.partition_of(reply)) for reply in accepted
        ]
        self.round.upload_bytes = [messages.payload_bytes(r.content) for r in accepted]
        self.round.gradient_bytes = [
            messages.gradient_bytes(r.content) for r in accepted
        ]
        self._shorten_updates(server_round, accepted)
        if self.privacy.update_noise_multiplier > 0:
            _weigh_equally(accepted)
        self._book("checks", started)
        self.use_replies(server_round, accepted)
        started = time.perf_counter()
        # The mean is the Flower strategy's own step, whatever it adds to an average.
        if self.aggregation.rule == "mean":
            arrays, metrics = super().aggregate_train(server_round, accepted)
        else:
            arrays, metrics = self._aggregator.aggregate_train(server_round, accepted)
        assert arrays is not None and metrics is not None
        if self.privacy.update_noise_multiplier > 0:
            arrays = self._with_noise(server_round, arrays, len(accepted))
        self.recovery.note(
            server_round, {c: size.update for c, size in verdicts.sizes.items()}
        )
        self.lengths.remember(list(verdicts.sizes.values()))
        self._book("aggregation", started)
        self._record(metrics)
        return arrays, metrics

    def use_replies(self, server_round: int, replies: Sequence[Message]) -> None:
        """Take what a method needs beyond model and metrics out of good replies."""

    def artifacts(self) -> dict[str, torch.Tensor]:
        """Return what a report may show of the method's state, by name."""
        return {}

    def _judge(self, server_round: int, replies: Sequence[Message]) -> Verdicts:
        """Tell good replies from bad ones, and name these."""
        check = ReplyCheck(
            self._sent,
            self._asked,
            self.gradient_format,
            self.privacy.gradient_noise_multiplier > 0,
            self.lengths,
        )
        verdicts = check.judge(replies)
        simulated = not isinstance(self.plan, SitePlan)
        # The same images are missing in every round and in every run: nothing is won
        # by going on. A site may say so for reasons of its own.
        if verdicts.unreadable and simulated:
            raise DatasetError(f"round {server_round}: {verdicts.unreadable}")
        named = reasons(verdicts, self._name)
        for reason in named:
            log(WARNING, "round %d: dropped the reply of %s", server_round, reason)
        if verdicts.good or verdicts.poisoned:
            return verdicts
        self.recovery.empty_rounds += 1
        hopeless = (
            not self.recovery.succeeded and self.recovery.empty_rounds >= MOST_EMPTY
        )
        if simulated or hopeless:
            raise NoRepliesError(
                f"round {server_round}: no usable reply from "
                f"{self.plan.clients_per_round} clients ("
                + ("; ".join(named) or "none arrived before federation.round-timeout")
                + ")"
            )
        return verdicts

    def _go_back(self, server_round: int, verdicts: Verdicts) -> ArrayRecord | None:
        """Take the last model that clients can train on; leave out who made this one.

        Raises
        ------
        NoRepliesError
            If there is no earlier model.
        """
        bad = self.recovery.origin
        found = (
            f"round {server_round}: training diverged at {verdicts.diverged} of "
            f"{verdicts.diverged + len(verdicts.good)} clients, so the model of round "
            f"{bad} is at fault"
        )
        self.round.kept_model = True
        self.round.dropped += len(verdicts.good)
        earlier = self.earlier(bad) if bad else None
        if earlier:
            # A round that kept its model has that of the round that made it.
            origin = int(earlier.strategy[ORIGIN])
            if self.recovery.returns[origin] == MOST_RETURNS:
                earlier = None
        if earlier is None:
            if isinstance(self.plan, SitePlan) and self.recovery.succeeded:
                log(WARNING, "%s; there is none to go back to, so it stays", found)
                return None
            raise NoRepliesError(
                f"{found} ("
                + "; ".join(reasons(verdicts, self._name))
                + "), and there is none to go back to; lower client.learning-rate, or "
                "keep more models (checkpoint.every, checkpoint.keep)"
            )
        culprits = self.recovery.leave_out(server_round)
        self.round.left_out = [self.plan.label(client) for client in culprits]
        self.round.went_back_to = origin
        self.recovery.returns[origin] += 1
        log(
            WARNING,
            "%s; the run goes on with that of round %d and leaves out for some rounds "
            "the clients that made the bad one: %s",
            found,
            origin,
            ", ".join(map(str, self.round.left_out)),
        )
        # What privacy has cost and who is left out is not undone.
        self.load_state(
            {
                **earlier.strategy,
                **self.ledger.state(),
                **self.recovery.absences(),
            }
        )
        return earlier.arrays

    def _shorten_updates(self, server_round: int, replies: Sequence[Message]) -> None:
        """Shorten models' updates that are longer than allowed."""
        limit = self.aggregation.max_update_norm
        if limit == 0:
            return
        sent = messages.arrays_to_numpy(self._sent)
        for reply in replies:
            local = messages.arrays_to_numpy(
                reply.content.array_records[messages.ARRAYS]
            )
            shorter = shorten_update(local, sent, limit)
            if shorter is not None:
                reply.content[messages.ARRAYS] = messages.numpy_to_arrays(shorter)
                self.round.shortened_updates += 1
                log(
                    INFO,
                    "round %d: shortened the update of node %d to "
                    "aggregation.max-update-norm = %g",
                    server_round,
                    reply.metadata.src_node_id,
                    limit,
                )

    def _with_noise(
        self, server_round: int, arrays: ArrayRecord, clients: int
    ) -> ArrayRecord:
        """Return a mean model with Gaussian noise on all but counters."""
        # Replacing one of the shortened updates turns it around, at worst.
        sensitivity = 2 * self.aggregation.max_update_norm / clients
        deviation = self.privacy.update_noise_multiplier * sensitivity
        source = self.plan.noise_source(server_round)
        noisy = {}
        for name, values in messages.arrays_to_numpy(arrays).items():
            if values.dtype.kind == "f":
                drawn = torch.randn(values.shape, generator=source).numpy()
                values = (values + deviation * drawn).astype(values.dtype)
                if name.endswith(messages.VARIANCE):
                    values = values.clip(min=0)
            noisy[name] = values
        return messages.numpy_to_arrays(noisy)

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
                    raise messages.ReplyError(str(reply.error.reason))
                found.append(
                    messages.recalls_of(reply, self.plan.num_classes, self._heads)
                )
            except messages.ReplyError as error:
                log(
                    WARNING,
                    "round %d: dropped the evaluation of %s: %s",
                    server_round,
                    self._name(reply),
                    error,
                )
        self.round.site_recalls = found
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
        return self._names.get(node, f"node {node}")

    def _name_silent(self, server_round: int, replies: Sequence[Message]) -> None:
        """Log the nodes that have not replied at all."""
        for node in self._asked.keys() - {r.metadata.src_node_id for r in replies}:
            log(
                WARNING,
                "round %d: %s did not reply in time; the round goes on without it",
                server_round,
                self._names[node],
            )

    def _book(self, phase: str, started: float) -> None:
        self.round.seconds[phase] = time.perf_counter() - started


def _nothing_kept(before: int) -> Earlier | None:
    return None


def _weigh_equally(replies: Sequence[Message]) -> None:
    """Let every client count the same: who has more images would change more."""
    for reply in replies:
        reply.content.metric_records[messages.METRICS][messages.NUM_EXAMPLES] = 1


def _summarise_metrics(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Average losses by number of images (as Flower does) and sum everything else."""
    averaged = aggregate_metricrecords(contents, weighted_by)
    del averaged[messages.PARTITION]
    for name in (weighted_by, *messages.SUMMED_METRICS):
        averaged[name] = sum(
            cast(float, content.metric_records[messages.METRICS][name])
            for content in contents
        )
    return averaged
