"""CReFF: classifier re-training with federated features (Shang et al., IJCAI 2022)."""

import time
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO, WARNING

import torch
from flwr.app import Message, RecordDict
from flwr.common.logger import log

from clip2fl_common import records
from clip2fl_common.config import Retraining, Synthesis, Upload
from clip2fl_common.gradient_coding import CodedGradient
from clip2fl_common.randomness import generator
from strategy.fedavg import FedAvg
from strategy.partitioned import ClientPlan
from strategy.retraining import new_classifier, retrain_classifier
from strategy.sites import SitePlan
from strategy.synthesis import (
    gradient_matching_loss,
    mean_class_gradients,
    prototype_contrastive_loss,
    synthesize,
)


class CReFF(FedAvg):
    """FedAvg whose classifier is re-trained on balanced, synthesised features.

    Clients also send the gradient of the re-trained classifier for every class they
    hold. The server moves the federated features until their class gradients match
    the clients' mean (Eq. 6) and trains a new linear classifier on them (Eq. 8).

    Parameters
    ----------
    plan : ClientPlan or SitePlan
        Who trains when and where.
    num_classes : int
        Number of classes C.
    feature_dim : int
        Width d of the student's features.
    synthesis : Synthesis
        Settings of the federated features.
    retraining : Retraining
        Settings of the re-training.
    upload : Upload
        How clients send their class gradients.
    device : torch.device
        Where both are computed.

    Attributes
    ----------
    features : Tensor, shape [C, m, d]
        Federated features, kept from round to round.
    classifier : torch.nn.Linear
        Re-trained classifier of the last round; freshly initialised before round 1.
    """

    def __init__(
        self,
        plan: ClientPlan | SitePlan,
        *,
        num_classes: int,
        feature_dim: int,
        synthesis: Synthesis,
        retraining: Retraining,
        upload: Upload,
        device: torch.device,
    ) -> None:
        super().__init__(plan)
        self.synthesis = synthesis
        self.retraining = retraining
        self.gradient_format = records.GradientFormat(num_classes, feature_dim, upload)
        self.device = device
        self.features = torch.randn(
            num_classes,
            synthesis.features_per_class,
            feature_dim,
            generator=generator(plan.seed, "features"),
        ).to(device)
        self.classifier = new_classifier(
            feature_dim, num_classes, generator(plan.seed, "classifier")
        ).to(device)

    @property
    def text_features(self) -> torch.Tensor | None:
        """Class prototypes near which features are held; CReFF has none."""
        return None

    def summary(self) -> None:
        """Log the settings of synthesis and re-training."""
        upload = self.gradient_format.upload
        log(INFO, "\t├──> Uploaded class gradients:")
        log(
            INFO,
            "\t│\t└── %s precision, smallest cosine of a row %g",
            upload.precision,
            upload.min_cosine,
        )
        log(INFO, "\t├──> Federated features:")
        log(INFO, "\t│\t├── Shape (classes, per class, width): %s", self.shape)
        log(
            INFO,
            "\t│\t└── %d steps, learning rate %g",
            self.synthesis.steps,
            self.synthesis.learning_rate,
        )
        log(INFO, "\t├──> Re-training:")
        log(
            INFO,
            "\t│\t└── %s start, %d epochs, batch size %d, learning rate %g",
            self.retraining.init,
            self.retraining.epochs,
            self.retraining.batch_size,
            self.retraining.learning_rate,
        )
        super().summary()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Classes C, federated features of each m, their width d."""
        classes, per_class, dim = self.features.shape
        return classes, per_class, dim

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        """Send the re-trained classifier along."""
        record[records.CLASSIFIER] = records.model_to_arrays(self.classifier)
        return super()._construct_messages(record, node_ids, message_type)

    def check(self, reply: Message) -> None:
        """Raise `ReplyError` if model, metrics or class gradients are not as agreed."""
        records.check_reply(reply, self._sent, self.gradient_format)

    def use_replies(self, server_round: int, replies: Sequence[Message]) -> None:
        """Synthesise federated features and re-train the classifier on them."""
        classes = len(self.features)
        gradients = mean_class_gradients(
            records.gradients_from_arrays(
                # Popped, because Flower's FedAvg averages every array in a reply.
                reply.content.array_records.pop(records.GRADIENTS),
                self.gradient_format,
            )
            for reply in replies
        )
        if absent := sorted(set(range(classes)) - set(gradients)):
            log(
                WARNING if len(absent) == classes else INFO,
                "round %d: none of the clients holds class %s; its features keep their "
                "gradient term for a later round",
                server_round,
                ", ".join(map(str, absent)),
            )
        started = time.perf_counter()
        weight, bias = self.classifier.weight.detach(), self.classifier.bias.detach()
        self.features = synthesize(
            self.features,
            gradients,
            weight,
            bias,
            self.text_features,
            steps=self.synthesis.steps,
            learning_rate=self.synthesis.learning_rate,
            contrast_weight=self.synthesis.contrast_weight,
            temperature=self.synthesis.contrast_temperature,
        )
        self.round.losses = self._synthesis_losses(gradients, weight, bias)
        self._book("synthesis", started)
        started = time.perf_counter()
        self.classifier = retrain_classifier(
            self.features,
            epochs=self.retraining.epochs,
            batch_size=self.retraining.batch_size,
            learning_rate=self.retraining.learning_rate,
            generator=generator(self.plan.seed, "retraining", server_round),
            initial=self.classifier if self.retraining.init == "warm" else None,
        )
        self._book("retraining", started)

    def _synthesis_losses(
        self,
        gradients: Mapping[int, CodedGradient],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> dict[str, float]:
        """Return how far the new features are from gradients and prototypes."""
        losses = {
            "gradient_matching": gradient_matching_loss(
                self.features, gradients, weight, bias
            )
        }
        if self.text_features is not None:
            losses["prototype_contrast"] = prototype_contrastive_loss(
                self.features,
                self.text_features,
                self.synthesis.contrast_temperature,
            )
        return {name: float(loss) for name, loss in losses.items()}
