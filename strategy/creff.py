"""CReFF: classifier re-training with federated features (Shang et al., IJCAI 2022)."""

import time
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, ClassVar, Self

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from torch import nn

from clip2fl_common import messages
from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.config import Retraining, Synthesis, Upload
from clip2fl_common.randomness import generator
from clip2fl_common.schedule import step_size
from strategy.base import ClientPlan, Setting
from strategy.clients import SitePlan
from strategy.fedavg import FedAvg
from strategy.retraining import new_classifier, retrain_classifier
from strategy.robust import combine_class_gradients, shorten_gradient
from strategy.synthesis import (
    gradient_matching_loss,
    prototype_contrastive_loss,
    synthesize,
)

# Names in a strategy's state.
FEATURES = "federated-features"
CLASSIFIER = "retrained-classifier"


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
    rounds : int
        Rounds of the run, over which a schedule of the features' step size goes.
    **common_settings : Any
        Settings of `PartitionedTraining`.

    Attributes
    ----------
    features : Tensor, shape [C, m, d]
        Federated features, kept from round to round.
    classifier : torch.nn.Linear
        Re-trained classifier of the last round; freshly initialised before round 1.
    """

    asks_class_gradients: ClassVar[bool] = True
    classifier: nn.Linear

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
        rounds: int,
        **common_settings: Any,
    ) -> None:
        super().__init__(plan, **common_settings)
        self.synthesis = synthesis
        self.rounds = rounds
        self.retraining = retraining
        self.gradient_format: messages.GradientFormat = messages.GradientFormat(
            num_classes, feature_dim, upload
        )
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

    @classmethod
    def build(cls, setting: Setting) -> Self:
        """Return the method as a run's configuration wants it."""
        return cls(setting.plan, **cls.settings(setting))

    @staticmethod
    def settings(setting: Setting) -> dict[str, Any]:
        """Return the keyword arguments that a run's configuration decides."""
        config = setting.config
        return {
            "num_classes": len(setting.class_names),
            "feature_dim": config.model.feature_dim,
            "synthesis": config.synthesis,
            "retraining": config.retraining,
            "upload": config.upload,
            "device": setting.device,
            "rounds": config.federation.rounds,
            **setting.safeguards,
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return federated features and re-trained classifier by name."""
        return {
            **super().state(),
            FEATURES: self.features,
            **{
                f"{CLASSIFIER}.{name}": tensor
                for name, tensor in self.classifier.state_dict().items()
            },
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back federated features and re-trained classifier."""
        assert state[FEATURES].shape == self.features.shape
        super().load_state(state)
        self.features = state[FEATURES].to(self.device)
        self.classifier.load_state_dict(
            {
                name.removeprefix(f"{CLASSIFIER}."): tensor
                for name, tensor in state.items()
                if name.startswith(CLASSIFIER)
            }
        )

    @property
    def text_features(self) -> torch.Tensor | None:
        """Class prototypes near which features are held; CReFF has none."""
        return None

    def artifacts(self) -> dict[str, torch.Tensor]:
        """Return the federated features and, where there are any, the prototypes."""
        found = {"features": self.features, "text_features": self.text_features}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

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
            "\t│\t└── %d steps, learning rate %g in round 1, %g in the last",
            self.synthesis.steps,
            self._step_size(1),
            self._step_size(self.rounds),
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
        training = message_type == MessageType.TRAIN
        classifier = self.classifier if training else self.delivered_classifier
        assert classifier is not None
        record[messages.CLASSIFIER] = messages.model_to_arrays(classifier)
        return super()._construct_messages(record, node_ids, message_type)

    def use_replies(self, server_round: int, replies: Sequence[Message]) -> None:
        """Synthesise federated features and re-train the classifier on them."""
        classes = len(self.features)
        gradients = combine_class_gradients(
            map(self._gradients_of, replies), self.aggregation
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
            learning_rate=self._step_size(server_round),
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

    def _step_size(self, server_round: int) -> float:
        return step_size(
            self.synthesis.learning_rate,
            self.synthesis.learning_rate_final,
            server_round,
            self.rounds,
        )

    def _gradients_of(self, reply: Message) -> dict[int, CodedGradient]:
        """Take the class gradients out of a reply, none longer than allowed."""
        gradients = messages.gradients_from_arrays(
            # Popped, because Flower's FedAvg averages every array in a reply.
            reply.content.array_records.pop(messages.GRADIENTS),
            self.gradient_format,
        )
        if limit := self.aggregation.max_gradient_norm:
            for c, gradient in gradients.items():
                shorter = shorten_gradient(gradient, limit)
                if shorter is not None:
                    gradients[c] = shorter
                    self.round.shortened_gradients += 1
        return gradients

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
