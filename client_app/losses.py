"""Local losses: (logit-adjusted) cross-entropy, distillation, proximal term."""

from dataclasses import dataclass

import torch
from torch.nn import functional


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return ``T^2 * KL(softmax(teacher/T) || softmax(student/T))``.

    Knowledge distillation (Hinton et al. 2015) as CLIP2FL uses it (Eq. 5), averaged
    over the batch.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape [N, C]
        Logits.
    temperature : float
        T > 0.

    Returns
    -------
    Tensor, scalar
    """
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student_logits / temperature, dim=1),
        functional.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def logit_offsets(
    labels: torch.Tensor, num_classes: int, strength: float
) -> torch.Tensor:
    """Return ``strength * log(prior)``, with the label frequencies as the prior.

    The offsets are added to the logits inside the cross-entropy (Menon et al. 2021,
    Eq. 10). They demand a larger margin of rare classes over frequent ones. The
    classifier without the offsets then suits balanced classes. Each client uses its
    own prior, as in FedLC (Zhang et al. 2022), so that no label counts leave it.

    A class that the client does not hold has the offset -infinity. It takes no part in
    the softmax, so this client neither raises nor lowers its score. This is the limit
    of the formula (and of FedLC's), and the restricted softmax of FedRS (Li and Zhan
    2021). With a finite offset the clients without a rare class, which are the
    majority, would unlearn it in every step.

    Parameters
    ----------
    labels : Tensor of int64, shape [N]
        The client's labels.
    num_classes : int
        Number of classes C.
    strength : float
        tau > 0; Menon et al. use 1.

    Returns
    -------
    Tensor, shape [C]
        On the labels' device.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return strength * (counts / len(labels)).log()


@dataclass(frozen=True)
class LocalObjective:
    """The terms of the local loss and their weights.

    Attributes
    ----------
    distillation_weight : float
        alpha; 0 turns distillation off.
    distillation_temperature : float
        T > 0.
    proximal_mu : float
        Weight of half the squared distance to the global model (FedProx, Li et al.
        2020, Eq. 2); 0 turns it off.
    label_weight : float
        Weight of the cross-entropy with the labels; with 0 the teacher alone trains.
    """

    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    proximal_mu: float = 0.0
    label_weight: float = 1.0


def label_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mixture: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the cross-entropy with the labels, averaged over the batch.

    For a mixed picture it is ``lambda * CE(y_i) + (1 - lambda) * CE(y_j)`` (mixup,
    Zhang et al. 2018; CutMix, Yun et al. 2019).

    Parameters
    ----------
    scores : Tensor, shape [n, C]
        Logits. They may be -infinity for classes that are no label.
    labels : Tensor of int64, shape [n]
        Labels of the (first) images.
    mixture : tuple of Tensor or None
        Labels [n] of the images that are mixed in, and lambda [n].

    Returns
    -------
    Tensor, scalar
    """
    if mixture is None:
        return functional.cross_entropy(scores, labels)
    others, shares = mixture
    # Soft labels in one cross-entropy would multiply -infinity by zero.
    own = functional.cross_entropy(scores, labels, reduction="none")
    other = functional.cross_entropy(scores, others, reduction="none")
    return (shares * own + (1 - shares) * other).mean()
