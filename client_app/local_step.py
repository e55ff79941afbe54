"""One step of local training, and its recording as a CUDA graph."""

import copy
from dataclasses import replace

import torch

from client_app.losses import LocalObjective, distillation_loss, label_loss
from client_app.optimizers import Optimizer, OptimizerSettings, make_optimizer
from clip2fl_common.devices import tf32_state
from clip2fl_common.graphs import Capture, Kept, Replayed
from clip2fl_common.models import ImageClassifier

# Recordings kept in a process, each with a model, its gradients and the activations of
# a batch. A run needs one; a comparison may need one for each of its variants.
KEPT = 4


def mixed_precision(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return torch's automatic mixed precision; float32 switches it off."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == torch.bfloat16
    )


class LocalStep:
    """A step: forward pass, losses, backward pass and update of the model.

    Parameters
    ----------
    model : ImageClassifier
        Moved in place.
    objective : LocalObjective
        Terms of the loss.
    descent : Optimizer
        Moves the model's parameters.
    offsets : Tensor or None, shape [C]
        Added to the logits in the cross-entropy.
    precision : torch.dtype
        Precision of the passes.

    Attributes
    ----------
    total, distilled : Tensor, scalar
        Sums over images of the loss and of the distillation loss.
    """

    def __init__(
        self,
        model: ImageClassifier,
        objective: LocalObjective,
        descent: Optimizer,
        offsets: torch.Tensor | None,
        precision: torch.dtype,
    ) -> None:
        self.model = model.train()
        self.objective, self.descent = objective, descent
        self.offsets, self.precision = offsets, precision
        # The global model's parameters stay fixed while the local ones move.
        self.anchors = (
            [parameter.detach().clone() for parameter in model.parameters()]
            if objective.proximal_mu > 0
            else []
        )
        first = next(model.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.total, self.distilled = (
            torch.zeros((), dtype=dtype, device=first.device) for _ in range(2)
        )

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        taught: torch.Tensor | None = None,
        others: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
    ) -> None:
        """Take a step on a batch, with the parts of `batches.Batch`."""
        objective = self.objective
        with mixed_precision(images.device, self.precision):
            logits = self.model(images)
        # In half precision the loss would be rounded to three digits.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits if self.offsets is None else logits + self.offsets
        mixture = None if others is None or shares is None else (others, shares)
        loss = label_loss(scores, labels, mixture)
        if objective.label_weight != 1:
            loss = objective.label_weight * loss
        if taught is not None:
            distillation = distillation_loss(
                logits, taught, objective.distillation_temperature
            )
            loss = loss + objective.distillation_weight * distillation
            self.distilled += distillation.detach() * len(labels)
        if self.anchors:
            squared = sum(
                (parameter - anchor).square().sum()
                for parameter, anchor in zip(
                    self.model.parameters(), self.anchors, strict=True
                )
            )
            loss = loss + objective.proximal_mu / 2 * squared
        self.model.zero_grad()
        loss.backward()
        self.descent.step()
        self.total += loss.detach() * len(labels)


class RecordedTraining:
    """Local training of models of one kind by a step that is recorded once.

    The step works on a model of its own, at fixed addresses. `start` copies a model
    into it, and `finish` copies the trained one out.

    Parameters
    ----------
    model : ImageClassifier
        A model of the kind; not changed.
    objective, precision
        As `LocalStep`.
    optimizer : OptimizerSettings
        The optimizer. Its step size is an input of each training.
    offsets : Tensor or None, shape [C]
        Whether there are offsets; their values are an input of each training.
    capture : Capture
        How a step is recorded.
    """

    def __init__(
        self,
        model: ImageClassifier,
        objective: LocalObjective,
        optimizer: OptimizerSettings,
        offsets: torch.Tensor | None,
        precision: torch.dtype,
        capture: Capture,
    ) -> None:
        own = copy.deepcopy(model)
        self._rates = next(own.parameters()).detach().new_zeros(2)
        self._descent = make_optimizer(optimizer, own, self._rates[0], self._rates[1])
        self._offsets = None if offsets is None else offsets.clone()
        self.step = LocalStep(own, objective, self._descent, self._offsets, precision)
        self._tensors = list(own.state_dict().values())
        state = [*self._tensors, *self._descent.state()]
        state += [self.step.total, self.step.distilled]
        self.take_step = Replayed(self.step, state, capture, "local training")

    @torch.no_grad()
    def start(
        self,
        model: ImageClassifier,
        learning_rate: float,
        other_learning_rate: float,
        offsets: torch.Tensor | None,
    ) -> None:
        """Copy a global model and the numbers of this training to where steps read.

        Parameters
        ----------
        model : ImageClassifier
            Of the same kind; not changed.
        learning_rate, other_learning_rate : float
            Step sizes of the optimizer.
        offsets : Tensor or None, shape [C]
            Offsets of the logits, if there are any.
        """
        for own, given in zip(self._tensors, model.state_dict().values(), strict=True):
            own.copy_(given)
        for anchor, parameter in zip(
            self.step.anchors,
            model.parameters() if self.step.anchors else (),
            strict=True,
        ):
            anchor.copy_(parameter)
        for kept in self._descent.state():
            kept.zero_()
        self._rates[0] = learning_rate
        self._rates[1] = other_learning_rate
        if self._offsets is not None and offsets is not None:
            self._offsets.copy_(offsets)

    @torch.no_grad()
    def finish(self, model: ImageClassifier) -> None:
        """Copy the trained model, with its statistics, to a model of the same kind."""
        for own, given in zip(self._tensors, model.state_dict().values(), strict=True):
            given.copy_(own)


_recorded: Kept[RecordedTraining] = Kept(KEPT)


def recorded_training(
    model: ImageClassifier,
    objective: LocalObjective,
    optimizer: OptimizerSettings,
    offsets: torch.Tensor | None,
    precision: torch.dtype,
    capture: Capture,
) -> RecordedTraining:
    """Return the recorded training of a model's kind, the same one in each round.

    A process keeps the last `KEPT`. The parameters are those of `RecordedTraining`; the
    kind is the model's modules and shapes with all that a recording contains.
    """
    kind = (
        str(model),
        *((name, t.shape, t.dtype, t.device) for name, t in model.state_dict().items()),
    )
    rest = (offsets is None, precision, capture, tf32_state())
    return _recorded.of(
        (kind, objective, replace(optimizer, other_learning_rate=0.0), *rest),
        lambda: RecordedTraining(
            model, objective, optimizer, offsets, precision, capture
        ),
    )
