"""CCVR: classifier calibration with virtual representations (Luo et al. 2021)."""

from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from statistics import median_low
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from clip2fl_common import messages
from clip2fl_common.messages import ClassStatistics, StatisticsFormat, TrainReply
from clip2fl_common.randomness import generator
from strategy.class_gaussians import draw_features, merged_statistics
from strategy.creff import CLASSIFIER
from strategy.fedavg import FedAvg
from strategy.log import log
from strategy.outliers import QUORUM
from strategy.retraining import new_classifier, retrain_classifier
from strategy.setting import Setting

# Prefix of the names in the strategy's state, and the parts of the clients' statistics.
STATISTICS = "class-statistics."
PARTS = ("classes", "counts", "means", "covariances")


class CCVR(FedAvg):
    """FedAvg with a classifier that is calibrated on virtual features.

    Clients also send count, mean and covariance of the global model's features for
    every class they hold. The server merges them into one normal distribution per
    class (`merged_statistics`), draws as many features from each (`draw_features`) and
    trains a new linear classifier on them. The paper does this once, after training,
    with all clients. Here it is done in every round: with the last statistics of every
    client that has sent any.

    Attributes
    ----------
    virtual_features : int
        Features drawn for each class, M_c in the paper.
    retraining : Retraining
        Settings of the re-training.
    classifier : torch.nn.Linear
        Calibrated classifier of the last round; freshly initialised before round 1.
    """

    reply_fields: ClassVar[tuple[str, ...]] = (messages.CLASS_STATISTICS,)
    classifier: nn.Linear

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config
        self.virtual_features = config.ccvr.virtual_features
        self.retraining = config.retraining
        self._format = StatisticsFormat.of(config, setting.num_classes)
        self._dim = config.model.feature_dim
        self.classifier = new_classifier(
            self._dim, setting.num_classes, generator(self.clients.seed, "classifier")
        ).to(self.device)
        # By client: the statistics of the last round in which it took part.
        self._latest: dict[int, ClassStatistics] = {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the clients' statistics and the calibrated classifier by name."""
        state = super().state() | {
            f"{CLASSIFIER}.{name}": tensor
            for name, tensor in self.classifier.state_dict().items()
        }
        if not self._latest:
            return state
        clients = torch.tensor(list(self._latest), dtype=torch.int64)
        rows = torch.tensor([len(own.classes) for own in self._latest.values()])
        return state | {
            f"{STATISTICS}clients": clients,
            f"{STATISTICS}rows": rows,
            **{
                f"{STATISTICS}{part}": torch.cat(
                    [getattr(own, part) for own in self._latest.values()]
                )
                for part in PARTS
            },
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the clients' statistics and the calibrated classifier."""
        super().load_state(state)
        self.classifier.load_state_dict(
            {name: state[f"{CLASSIFIER}.{name}"] for name in ("weight", "bias")}
        )
        self._latest = {}
        if f"{STATISTICS}clients" not in state:
            return
        rows = state[f"{STATISTICS}rows"].tolist()
        parts = [state[f"{STATISTICS}{part}"].split(rows) for part in PARTS]
        for client, *own in zip(
            state[f"{STATISTICS}clients"].tolist(), *parts, strict=True
        ):
            self._latest[client] = ClassStatistics(*own)

    def summary(self) -> None:
        """Log the settings of the calibration."""
        log(INFO, "\t├──> Calibration:")
        log(
            INFO,
            "\t│\t├── Uploaded statistics: features %d wide, %d bytes for each class",
            self._format.width,
            self._format.class_bytes,
        )
        log(INFO, "\t│\t├── Virtual features per class: %d", self.virtual_features)
        log(
            INFO,
            "\t│\t└── Re-training: %s start, %d epochs, batch size %d, learning rate "
            "%g",
            self.retraining.init,
            self.retraining.epochs,
            self.retraining.batch_size,
            self.retraining.learning_rate,
        )
        super().summary()

    def use_replies(self, server_round: int, replies: Sequence[TrainReply]) -> None:
        """Calibrate the classifier on features drawn from the merged statistics."""
        super().use_replies(server_round, replies)
        sent = {reply.client: reply.field(self._format) for reply in replies}
        latest = self._plausible(
            server_round, dict(sorted({**self._latest, **sent}.items()))
        )
        merged = merged_statistics(list(latest.values()))
        known = merged.classes.tolist()
        if absent := sorted(set(range(self._format.num_classes)) - set(known)):
            log(
                WARNING if not known else INFO,
                "round %d: no client has sent statistics of class %s; calibration has "
                "no features of it",
                server_round,
                ", ".join(map(str, absent)),
            )
        if not known:
            return
        started = self.begin("sampling")
        features = self._projected(
            draw_features(
                merged,
                self._format.num_classes,
                self.virtual_features,
                generator(self.clients.seed, "virtual-features", server_round),
            )
        )
        self.book("sampling", started)
        started = self.begin("retraining")
        classifier = retrain_classifier(
            features.to(self.device),
            epochs=self.retraining.epochs,
            batch_size=self.retraining.batch_size,
            learning_rate=self.retraining.learning_rate,
            generator=generator(self.clients.seed, "retraining", server_round),
            initial=self.classifier if self.retraining.init == "warm" else None,
            classes=merged.classes.to(self.device),
            num_classes=self._format.num_classes,
        )
        self.book("retraining", started)
        # Without aggregation.max-length-ratio, or with few clients, they may be huge.
        if not all(torch.isfinite(p).all() for p in classifier.parameters()):
            log(
                WARNING,
                "round %d: the calibrated classifier is not finite; the classifier and "
                "the clients' statistics stay as they were",
                server_round,
            )
            return
        self._latest, self.classifier = latest, classifier

    def _plausible(
        self, server_round: int, latest: Mapping[int, ClassStatistics]
    ) -> dict[int, ClassStatistics]:
        """Return the statistics without those of features that are far too long.

        A round in which few clients replied cannot tell; those of all clients can.
        """
        ratio = self.aggregation.max_length_ratio
        scales = {client: own.feature_scale() for client, own in latest.items()}
        known = [scale for scale in scales.values() if scale > 0]
        if ratio == 0 or len(known) < QUORUM:
            return dict(latest)
        longest = ratio * median_low(known)
        if far := [client for client, scale in scales.items() if scale > longest]:
            log(
                WARNING,
                "round %d: left out the class statistics of %s: their features are "
                "more than aggregation.max-length-ratio = %g times the median",
                server_round,
                ", ".join(str(self.clients.label(client)) for client in far),
                ratio,
            )
        return {client: own for client, own in latest.items() if client not in far}

    def _projected(self, features: torch.Tensor) -> torch.Tensor:
        """Return narrow features [K, m, D] as wide as the classifier's, [K, m, d].

        The projection is the one of the model whose features the clients measured.
        """
        if self._format.width == self._dim:
            return features
        weight, bias = (
            torch.from_numpy(self.sent[f"projection.{name}"].copy())
            for name in ("weight", "bias")
        )
        return functional.linear(features, weight, bias)
