"""CReFF: classifier re-training with federated features (Shang et al., IJCAI 2022)."""

from collections.abc import Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import ClassVar

import torch
from flwr.app import RecordDict
from torch import nn

from clip2fl_common import messages
from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.messages import GradientFormat, TrainReply
from clip2fl_common.randomness import generator
from clip2fl_common.schedule import step_size
from strategy.fedavg import FedAvg
from strategy.log import log
from strategy.memory import refuse_beyond_memory
from strategy.retraining import new_classifier, retrain_classifier
from strategy.robust import combine_class_gradients, shorten_gradient
from strategy.setting import Setting
from strategy.synthesis import (
    gradient_matching_loss,
    prototype_contrastive_loss,
    synthesize,
)

# Names of the entries in the strategy's state.
FEATURES = "federated-features"
CLASSIFIER = "retrained-classifier"


class CReFF(FedAvg):
    """FedAvg with a classifier that is re-trained on balanced, synthetic features.

    Clients also send the gradient of the re-trained classifier for every class they
    hold. The server moves the federated features until their class gradients match
    the clients' mean (Eq. 6) and trains a new linear classifier on them (Eq. 8).

    Attributes
    ----------
    synthesis : Synthesis
        Settings of the federated features.
    retraining : Retraining
        Settings of the re-training.
    features : Tensor, shape [C, m, d]
        Federated features, kept from round to round.
    classifier : torch.nn.Linear
        Re-trained classifier of the last round; freshly initialised before round 1.

    Raises
    ------
    ConfigError
        If this machine's memory is too small for the number of classes.
    """

    reply_fields: ClassVar[tuple[str, ...]] = (messages.GRADIENTS,)
    classifier: nn.Linear

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = setting.config
        self.synthesis = config.synthesis
        self.retraining = config.retraining
        self.rounds = config.federation.rounds
        self._format = GradientFormat.of(config, setting.num_classes)
        dim = config.model.feature_dim
        refuse_beyond_memory(
            setting.num_classes,
            self.synthesis.features_per_class,
            dim,
            dense=config.upload.min_cosine == 1,
        )
        self.features = torch.randn(
            setting.num_classes,
            self.synthesis.features_per_class,
            dim,
            generator=generator(self.clients.seed, "features"),
        ).to(self.device)
        self.classifier = new_classifier(
            dim, setting.num_classes, generator(self.clients.seed, "classifier")
        ).to(self.device)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the federated features and the re-trained classifier by name."""
        return {
            **super().state(),
            FEATURES: self.features,
            **{
                f"{CLASSIFIER}.{name}": tensor
                for name, tensor in self.classifier.state_dict().items()
            },
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the federated features and the re-trained classifier."""
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
        """Return class prototypes for the features, or None; CReFF has none."""
        return None

    def artifacts(self) -> dict[str, torch.Tensor]:
        """Return the federated features and, if there are any, the prototypes."""
        found = {"features": self.features, "text_features": self.text_features}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def summary(self) -> None:
        """Log the settings of synthesis and re-training."""
        upload = self._format.upload
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
        """Return the features' shape: classes C, features per class m, width d."""
        classes, per_class, dim = self.features.shape
        return classes, per_class, dim

    def content(self) -> RecordDict:
        """Add the re-trained classifier, at which clients take the class gradients."""
        content = super().content()
        content[messages.CLASSIFIER] = messages.model_to_arrays(self.classifier)
        return content

    def use_replies(self, server_round: int, replies: Sequence[TrainReply]) -> None:
        """Synthesise federated features and re-train the classifier on them."""
        super().use_replies(server_round, replies)
        classes = len(self.features)
        gradients = combine_class_gradients(
            self._gradients_of(replies), self.aggregation
        )
        if absent := sorted(set(range(classes)) - set(gradients)):
            log(
                WARNING if len(absent) == classes else INFO,
                "round %d: none of the clients holds class %s; its features keep their "
                "gradient term for a later round",
                server_round,
                ", ".join(map(str, absent)),
            )
        started = self.begin("synthesis")
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
        self.book("synthesis", started)
        started = self.begin("retraining")
        self.classifier = retrain_classifier(
            self.features,
            epochs=self.retraining.epochs,
            batch_size=self.retraining.batch_size,
            learning_rate=self.retraining.learning_rate,
            generator=generator(self.clients.seed, "retraining", server_round),
            initial=self.classifier if self.retraining.init == "warm" else None,
        )
        self.book("retraining", started)

    def _step_size(self, server_round: int) -> float:
        return step_size(
            self.synthesis.learning_rate,
            self.synthesis.learning_rate_final,
            server_round,
            self.rounds,
        )

    def _gradients_of(
        self, replies: Sequence[TrainReply]
    ) -> Iterator[Mapping[int, CodedGradient]]:
        """Yield each client's class gradients, shortened to the allowed norm."""
        limit = self.aggregation.max_gradient_norm
        for reply in replies:
            gradients = reply.field(self._format)
            if limit == 0:
                yield gradients
                continue
            bounded = {c: shorten_gradient(g, limit) for c, g in gradients.items()}
            shortened = {c: g for c, g in bounded.items() if g is not None}
            self.round.shortened_gradients += len(shortened)
            yield {**gradients, **shortened}

    def _synthesis_losses(
        self,
        gradients: Mapping[int, CodedGradient],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> dict[str, float]:
        """Return the matching and contrastive losses of the new features."""
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
