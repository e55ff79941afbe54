"""The client's part of CReFF and CLIP2FL: one gradient for every class it holds."""

from typing import ClassVar

from flwr.app import ArrayRecord

from client_app.gradients import coded_class_gradients
from client_app.noise import gradient_protection
from client_app.part import ClientPart, ClientRound
from client_app.training import augmented_features
from clip2fl_common.messages import GRADIENTS, GradientFormat


class ClassGradients(ClientPart):
    """Gradients of the server's classifier on features of the global model."""

    field: ClassVar[str] = GRADIENTS

    def before_training(self, client: ClientRound) -> ArrayRecord:
        """Return the class gradients (PAPER, "One round", 2)."""
        config, settings = client.config, client.config.class_gradients
        assert client.request.classifier is not None
        weight, bias = client.request.classifier
        features, drawn = augmented_features(
            client.model,
            client.images,
            client.labels,
            draws=settings.draws,
            samples_per_class=settings.samples_per_class,
            augment=settings.augment,
            batch_size=config.evaluation.batch_size,
            generator=client.random("augmentation"),
            precision=client.precision,
            min_class_samples=config.privacy.min_class_samples,
            fixed=client.fixed_images(),
        )
        device = client.images.device
        gradients = coded_class_gradients(
            features,
            drawn,
            weight.to(device),
            bias.to(device),
            min_cosine=config.upload.min_cosine,
            precision=config.upload.precision,
            protection=gradient_protection(
                config.privacy, settings.samples_per_class, client.noise_source()
            ),
        )
        return GradientFormat.of(config, client.num_classes).encode(gradients)
