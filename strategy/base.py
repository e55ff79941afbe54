"""The flow of a round, which all methods share: ask, check, combine, report.

A method overrides the hooks that it changes and calls ``super()``. docs/new-method.md
shows how.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from typing import ClassVar

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from clip2fl_common import messages
from clip2fl_common.devices import wait_for
from clip2fl_common.messages import TrainReply
from clip2fl_common.metrics import (
    DISCRIMINANT_HEAD,
    RETRAINED_HEAD,
)
from clip2fl_common.models import ImageClassifier
from clip2fl_common.secure.statements import LEAST_PARTIES
from strategy.discriminant import Discriminant
from strategy.evaluations import SiteEvaluations
from strategy.events import What
from strategy.log import log
from strategy.model_average import CLASSIFIER_WEIGHTS, MODEL_WEIGHTS, ModelAverage
from strategy.model_mean import Model, combined_model, noisy_model, summed_metrics
from strategy.noise_bounds import NoiseBounds
from strategy.outliers import LengthRule
from strategy.privacy_ledger import PrivacyLedger
from strategy.recovery import Earlier
from strategy.replies import ReplyCheck, Verdicts
from strategy.requests import Requests
from strategy.robust import Arrays, log_rule, shorten_update
from strategy.round_record import RoundRecord, Trained
from strategy.safeguards import Safeguards
from strategy.secure_sums import SecureSums, SumCheck
from strategy.setting import Setting


class Method(Strategy):
    """Base of all methods: seeded sampling, checked replies, one combined model.

    Parameters
    ----------
    setting : Setting
        Inputs from which the method is built, the run's configuration included.

    Attributes
    ----------
    needs_teacher : bool
        Whether the run has to load the teacher for this method.
    reply_fields : tuple of str
        Names, in `clip2fl_common.messages.REPLY_FIELDS`, of what clients send besides
        their model and metrics.
    clients : Clients
        The run's clients: draws those that train and knows their nodes.
    events : Events
        Told what happens in a round.
    sent : mapping of str to ndarray
        The global model that the round's clients began with.
    classifier : torch.nn.Linear or None
        Classifier that is delivered in place of the global model's own, if any.
    discriminant : Discriminant or None
        Closed-form classifier that is evaluated beside the others and delivered, if the
        run computes it.
    average : ModelAverage
        Average over rounds of the model and the classifier, if ``ema.decay`` is above
        0.
    round : RoundRecord
        Costs and results of the last round.
    earlier : callable
        Takes a round; returns the run's state after the last earlier round whose state
        was kept, or None. The server sets it, since it keeps the checkpoints.
    """

    needs_teacher: ClassVar[bool] = False
    reply_fields: ClassVar[tuple[str, ...]] = ()
    classifier: nn.Linear | None = None

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        self.clients = setting.clients
        self.events = setting.events
        self.device = setting.device
        self.aggregation = config.aggregation
        self.privacy = config.privacy
        self.min_replies = config.federation.min_replies
        self.discriminant = Discriminant.of(config, setting.num_classes)
        moments = () if self.discriminant is None else (messages.MOMENTS,)
        self.fields = [
            messages.reply_field(name, config, setting.num_classes)
            for name in (*self.reply_fields, *moments)
        ]
        self._noise_bounds = NoiseBounds(config, self.fields)
        self.average = ModelAverage(config.ema.decay)
        gradients = messages.GRADIENTS in self.reply_fields
        self.ledger = PrivacyLedger.of(
            self.privacy, [field.name for field in self.fields]
        )
        self.round = RoundRecord()
        self.earlier: Callable[[int], Earlier | None] = _nothing_kept
        privacy = self.privacy
        # A client's noise is many times longer than an update, and hides its norm.
        # Where the server adds noise, one client must not move a median that decides
        # which others count.
        noisy = max(privacy.model_noise_multiplier, privacy.update_noise_multiplier) > 0
        self.safeguards = Safeguards(
            setting.clients,
            LengthRule(0 if noisy else self.aggregation.max_length_ratio),
            self.min_replies,
            LEAST_PARTIES if self.aggregation.secure else 1,
            noisy_gradients=gradients and privacy.gradient_noise_multiplier > 0,
        )
        self._requests = Requests(
            setting.clients, self.events, config.federation.round_timeout
        )
        secure = self.aggregation.secure
        self.secure = SecureSums(setting, self._requests) if secure else None
        if self.secure is not None:
            self.secure.refuse_if_huge(self.fields)
        self._evaluations = SiteEvaluations(setting, self._requests)
        self.sent: Arrays = {}
        self._asked_at = 0.0

    # Hooks: what a method may change.

    def content(self) -> RecordDict:
        """Return the records of train requests besides the model and ``config``."""
        return RecordDict()

    def combine(self, replies: Sequence[TrainReply], weights: Sequence[float]) -> Model:
        """Return one model combined from the clients' models by ``aggregation.rule``.

        Parameters
        ----------
        replies : sequence of TrainReply
            Good replies, in ascending order of client.
        weights : sequence of float
            One weight per reply: the number of the client's images. With noise it is
            1, so that weights do not reveal how many images a client has.

        Returns
        -------
        dict of str to ndarray
        """
        models = [reply.model for reply in replies]
        return combined_model(models, weights, self.aggregation)

    def step(self, sent: Arrays, mean: Model) -> Model:
        """Return the next global model.

        Parameters
        ----------
        sent : mapping of str to ndarray
            The model that the clients began with.
        mean : dict of str to ndarray
            The result of `combine`, with noise if the run asks for noise.

        Returns
        -------
        dict of str to ndarray
        """
        return mean

    def use_replies(self, server_round: int, replies: Sequence[TrainReply]) -> None:
        """Use the fields of good replies that only this method asks for.

        Call ``super()``: in a method with two bases each uses its own fields.
        """

    def objection(self, reply: TrainReply) -> str:
        """Return why a reply must not be used though its arrays are as declared.

        Parameters
        ----------
        reply : TrainReply
            A reply that has passed all other checks.

        Returns
        -------
        str
            Empty if it may be used.
        """
        beyond_noise = self._noise_bounds.objection(reply, self.sent)
        if beyond_noise or self.discriminant is None:
            return beyond_noise
        return self.discriminant.objection(reply)

    def artifacts(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the method's state that a report may show, by name."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the state that the next round needs besides the global model, by name.

        Random numbers are not part of it: every generator is seeded from the run's
        seed, its purpose, the round and the client.
        """
        closed_form = {} if self.discriminant is None else self.discriminant.state()
        return {
            **closed_form,
            **self.ledger.state(),
            **self.average.state(),
            **self.safeguards.state(),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        if self.discriminant is not None:
            self.discriminant.load_state(state)
        self.ledger.load_state(state)
        self.average.load_state(state)
        self.safeguards.load_state(state)

    # The model that is evaluated and delivered.

    def delivered_model(self, model: ImageClassifier) -> ImageClassifier:
        """Return the model that is evaluated and delivered.

        Parameters
        ----------
        model : ImageClassifier
            Global model after the last round; not changed.

        Returns
        -------
        ImageClassifier
            The given model, or a copy with the average over rounds.
        """
        return self.average.applied_to(model, MODEL_WEIGHTS)

    @property
    def delivered_classifier(self) -> nn.Linear | None:
        """Return the re-trained classifier to deliver, or None if there is none."""
        if self.classifier is None:
            return None
        return self.average.applied_to(self.classifier, CLASSIFIER_WEIGHTS)

    def delivered_heads(
        self, model: Mapping[str, torch.Tensor]
    ) -> dict[str, nn.Linear]:
        """Return the classifiers besides the model's own, the delivered one first.

        Parameters
        ----------
        model : mapping of str to Tensor
            State of the model that is evaluated and delivered.

        Returns
        -------
        dict of str to nn.Linear
            By name of the head.
        """
        heads = {}
        if self.discriminant is not None:
            heads[DISCRIMINANT_HEAD] = self.discriminant.head(model)
        if (retrained := self.delivered_classifier) is not None:
            heads[RETRAINED_HEAD] = retrained
        return heads

    # Flower's loop calls these hooks in this order.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a round, one for each client that trains."""
        self.events.begin_round(server_round)
        self.clients.refresh(grid)
        self.sent = messages.arrays_to_numpy(arrays)
        self._asked_at = time.perf_counter()
        if self.fields:
            config[messages.FIELDS] = [field.name for field in self.fields]
        numbers = self.safeguards.sample(server_round)
        content = self._content(server_round, arrays, config, self.content())
        unused = self._requests.begin_round()
        if self.secure is not None:
            self.events.begin_phase("keys")
            numbers = self.secure.agree(server_round, grid, numbers)
            content[messages.SECURE] = self.secure.record()
        self.round = RoundRecord(
            bytes_down=len(numbers) * messages.payload_bytes(content), unused=unused
        )
        self.ledger.note(*numbers)
        self.events.begin_phase("clients")
        return self._requests.address(content, numbers, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, then combine the good ones.

        Raises
        ------
        DatasetError
            If a simulated client's images cannot be read and are not to be skipped.
        NoRepliesError
            If no reply is usable, and the run can neither go back nor go on.
        """
        replies = list(replies)
        self.book("clients", self._asked_at)
        started = self.begin("checks")
        self._requests.log_silent(server_round, replies)
        self.round.privacy = self.ledger.spent()
        verdicts = self.safeguards.judge(
            server_round, self._check(), replies, self._requests
        )
        self.round.dropped = len(replies) - verdicts.used
        self.round.lost = verdicts.lost
        if self.safeguards.poisoned(verdicts):
            self.book("checks", started)
            return self._go_back(server_round, verdicts), None
        self._note_accepted(verdicts.good)
        trained = _images_by_client(verdicts.good)
        self.round.participation = self.clients.participation(trained)
        needed = self.clients.replies_needed(self.min_replies)
        if verdicts.used < needed:
            log(
                WARNING,
                "round %d: %d good replies, fewer than federation.min-replies = %d; "
                "the model stays as it was",
                server_round,
                verdicts.used,
                needed,
            )
            self.round.kept_model = True
            self.book("checks", started)
            return None, None
        accepted = [self._shortened(server_round, reply) for reply in verdicts.good]
        # All clients of a sum have sent messages of the same size.
        each = [(client, reply) for reply in accepted for client in reply.clients]
        self.round.clients = [self.clients.label(client) for client, _ in each]
        self.round.upload_bytes = [reply.upload_bytes for _, reply in each]
        self.round.gradient_bytes = [reply.field_bytes for _, reply in each]
        self.book("checks", started)
        if self.discriminant is not None:
            started = self.begin("discriminant")
            self.discriminant.add(server_round, accepted)
            self.book("discriminant", started)
        self.use_replies(server_round, accepted)
        started = self.begin("aggregation")
        model, metrics = self._combined(server_round, accepted)
        self.safeguards.note(server_round, verdicts)
        self.book("aggregation", started)
        self._record(metrics)
        return messages.numpy_to_arrays(model), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all connected sites to evaluate; simulated clients are not asked."""
        # Flower passes the round's model here after all of the method's changes to it.
        if self.average.decay > 0 and not self.round.kept_model:
            named = messages.arrays_to_numpy(arrays)
            self.average.add_round(named, self.classifier)
        if mean := self.average.mean(MODEL_WEIGHTS):
            arrays = messages.state_to_arrays(mean)
        self.clients.refresh(grid)
        if not self.clients.evaluating():
            return []
        self._asked_at = self.begin("evaluation")
        content = self._content(server_round, arrays, config, RecordDict())
        heads = self.delivered_heads(messages.arrays_to_tensors(arrays))
        return self._evaluations.request(server_round, content, heads, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average each class's accuracy over the sites that have images of it."""
        if self._evaluations.combine(server_round, list(replies), self.round):
            self.book("evaluation", self._asked_at)
        return None

    def summary(self) -> None:
        """Log the settings that all methods share."""
        log(INFO, "\t├──> Clients:")
        log(INFO, "\t│\t├── Drawn each round: %s", self.clients)
        needed = self.min_replies or self.clients.replies_needed(0)
        log(INFO, "\t│\t└── Good replies a round needs: %s", needed)
        log_rule(self.aggregation, self.clients.clients_per_round)
        if self.secure is not None:
            self.secure.log_settings()
        if self.discriminant is not None:
            self.discriminant.log_settings()
        log(INFO, "\t└──> Evaluated and delivered:")
        decay = self.average.decay
        what = f"average of the rounds' models, decay {decay:g}" if decay else "last"
        log(INFO, "\t\t└── Model: %s", what)

    def begin(self, phase: str) -> float:
        """Tell that a phase of the round begins; return the time for `book`."""
        self.events.begin_phase(phase)
        return time.perf_counter()

    def book(self, phase: str, started: float) -> None:
        """Record the seconds since ``started`` under a phase's name."""
        wait_for(self.device)  # or the next phase would seem to take its time
        self.round.seconds[phase] = time.perf_counter() - started

    # Parts of the hooks above.

    def _check(self) -> ReplyCheck | SumCheck:
        """Return the check of this round's replies."""
        check = ReplyCheck(self.sent, self._requests.asked, self.fields, self.objection)
        if self.secure is None:
            return check
        needed = self.clients.replies_needed(self.min_replies)
        return SumCheck(self.secure, check, needed)

    def _note_accepted(self, replies: Sequence[TrainReply]) -> None:
        for reply in replies:
            for client in reply.members:  # whose images and seconds nobody knows
                self.events.note(
                    What.ACCEPTED, self.clients.label(client), size=reply.upload_bytes
                )
            if reply.members:
                continue
            spent = sum(reply.metrics[name] for name in messages.CLIENT_SECONDS)
            label = self.clients.label(reply.client)
            self.events.note(
                What.ACCEPTED,
                label,
                images=reply.images,
                seconds=spent,
                size=reply.upload_bytes,
            )
            if isinstance(label, str):
                self.round.trained[label] = Trained(
                    reply.images,
                    int(reply.metrics["unreadable-images"]),
                    spent,
                    reply.upload_bytes,
                )

    def _content(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        content: RecordDict,
    ) -> RecordDict:
        config[messages.ROUND] = server_round
        content[messages.ARRAYS] = arrays
        content[messages.CONFIG] = config
        return content

    def _go_back(self, server_round: int, verdicts: Verdicts) -> ArrayRecord | None:
        """Return the last usable model; leave out the clients that made the bad one.

        Raises
        ------
        NoRepliesError
            If there is no earlier model.
        """
        self.round.kept_model = True
        self.round.dropped += verdicts.used
        found = self.safeguards.go_back(
            server_round, verdicts, self.earlier, self._requests.name
        )
        if found is None:
            return None
        self.round.left_out = [self.clients.label(client) for client in found.left_out]
        self.round.went_back_to = found.origin
        # Going back restores neither the privacy that was spent nor left-out clients.
        self.load_state(
            {
                **found.earlier.strategy,
                **self.ledger.state(),
                **self.safeguards.absences(),
            }
        )
        return found.earlier.arrays

    def _shortened(self, server_round: int, reply: TrainReply) -> TrainReply:
        """Return the reply with its update shortened to the allowed norm."""
        limit = self.aggregation.max_update_norm
        if limit == 0 or self.privacy.model_noise_multiplier > 0:
            return reply
        shorter = shorten_update(reply.model, self.sent, limit)
        if shorter is None:
            return reply
        self.round.shortened_updates += 1
        log(
            INFO,
            "round %d: shortened the update of node %d to aggregation.max-update-norm "
            "= %g",
            server_round,
            reply.node,
            limit,
        )
        return replace(reply, model=shorter)

    def _combined(
        self, server_round: int, replies: Sequence[TrainReply]
    ) -> tuple[Model, dict[str, float]]:
        """Return the next global model, and the clients' metrics combined."""
        multiplier = self.privacy.update_noise_multiplier
        # With noise all weights are 1: no client may change the mean more than others.
        weights = [1.0 if multiplier > 0 else reply.images for reply in replies]
        mean = self.combine(replies, weights)
        if multiplier > 0:
            # Replacing a client moves its shortened update by twice the norm at most.
            sensitivity = 2 * self.aggregation.max_update_norm / len(replies)
            noise = self.clients.noise_source(server_round)
            mean = noisy_model(mean, multiplier * sensitivity, noise)
        metrics = summed_metrics(
            [reply.metrics for reply in replies],
            weights,
            mean=set(messages.AVERAGED_METRICS),
        )
        metrics[messages.NUM_EXAMPLES] = sum(reply.images for reply in replies)
        return self.step(self.sent, mean), metrics

    def _record(self, metrics: Mapping[str, float]) -> None:
        """Add the clients' metrics to the round's record."""
        self.round.losses = {
            "client": metrics["loss"],
            "distillation": metrics["distillation-loss"],
            **self.round.losses,
        }
        self.round.unreadable = int(metrics["unreadable-images"])
        self.round.seconds |= {
            f"clients-{name.removeprefix('seconds-')}": value
            for name, value in metrics.items()
            if name.startswith("seconds-")
        }


def _images_by_client(replies: Sequence[TrainReply]) -> dict[int, int]:
    """Return the images of each client; those of a sum as equal parts of its images."""
    parts = {}
    for reply in replies:
        clients = reply.clients
        for i, client in enumerate(clients):
            parts[client] = (reply.images + i) // len(clients)
    return parts


def _nothing_kept(before: int) -> Earlier | None:
    return None
