"""A balanced linear discriminant from sums of the clients' features, in closed form."""

import math
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING

import numpy as np
import torch
from torch import nn

from clip2fl_common.class_moments import ClassMoments, noise_deviations
from clip2fl_common.config import Aggregation, RunConfig
from clip2fl_common.head_choice import uses_moments
from clip2fl_common.messages import LARGEST_VALUE, MOMENTS, TrainReply, array_fields
from strategy.log import log
from strategy.outliers import QUORUM, impossible_moments, statistic_length
from strategy.robust import robust_mean

# Share of the mean eigenvalue that is added to each eigenvalue.
RIDGE = 1e-3
# The logit of a class without statistics is this much below the mean logit.
UNSEEN_MARGIN = 10.0
# A noisy count is believed from this many standard deviations of its noise on.
BELIEVED = 2.0

# Prefix of the names in the strategy's state.
STATE = "class-moments."
RELEASES = f"{STATE}releases"

Head = tuple[torch.Tensor, torch.Tensor]


def balanced_discriminant(
    moments: ClassMoments, deviations: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Head | None:
    """Return the linear discriminant that treats all classes alike.

    With means mu_c = s_c / n_c and the covariance within classes
    ``S = (Q - sum_c n_c mu_c mu_c^T) / n``, Gaussian classes of equal covariance and
    equal prior have the logits (Hastie et al. 2009, Eq. 4.10)

        z^T S^-1 mu_c - mu_c^T S^-1 mu_c / 2.

    A class's number of images enters S alone, so frequent classes are not preferred.
    Every eigenvalue of S is raised by `RIDGE` times the mean eigenvalue. Under noise S
    may have negative eigenvalues: those below the noise's spectral radius are set to
    that radius first.

    A class without statistics gets the mean of the other classes' rows, minus a margin.
    Its logit is below the greatest logit for every z, so it is never predicted.

    Parameters
    ----------
    moments : ClassMoments
        Sums over images, in float64.
    deviations : tuple of float
        Standard deviation of the noise on counts, sums and scatter. A class counts as
        seen if its count is above `BELIEVED` times the deviation of the noise on it.

    Returns
    -------
    tuple of Tensor or None
        Weight [C, w] and bias [C] in float64; None if no class is seen or all
        statistics are zero.
    """
    seen = moments.count > BELIEVED * deviations[0]
    if not seen.any():
        return None
    count, total = moments.count[seen], moments.total[seen]
    means = total / count[:, None]
    within = (moments.scatter - total.T @ means) / count.sum()
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    # A symmetric matrix of noise with deviation s / sqrt(2) off the diagonal has
    # eigenvalues up to s sqrt(2 w), by Wigner's semicircle.
    radius = deviations[2] * math.sqrt(2 * len(values)) / float(count.sum())
    values = values.clamp(min=radius)
    # Without any spread in a class, the means alone give the scale.
    scale = values.mean() if values.mean() > 0 else means.square().mean()
    if scale == 0:
        return None
    values = values + RIDGE * scale
    rows = (means @ vectors / values) @ vectors.T
    weight = rows.mean(0).repeat(len(seen), 1)
    offsets = -(rows * means).sum(1) / 2
    bias = (offsets.mean() - UNSEEN_MARGIN).repeat(len(seen))
    weight[seen], bias[seen] = rows, offsets
    return weight, bias


def on_features(head: Head, projection: torch.Tensor, offset: torch.Tensor) -> Head:
    """Return a head on projected features that equals a head on the pooled output.

    Features are ``f = P z + p``. If P [d, w] has full column rank, its pseudo-inverse
    P+ has ``P+ P = I``, so ``z = P+ (f - p)`` and

        A z + b = (A P+) f + (b - A P+ p).

    With a lower rank, the head sees the part of z that the features determine.

    Parameters
    ----------
    head : tuple of Tensor
        A [C, w] and b [C].
    projection, offset : Tensor, shapes [d, w] and [d]
        P and p.

    Returns
    -------
    tuple of Tensor
        Weight [C, d] and bias [C].
    """
    weight, bias = head
    on_projected = weight @ torch.linalg.pinv(projection.to(weight))
    return on_projected, bias - on_projected @ offset.to(weight)


def combined_moments(
    clients: Sequence[ClassMoments], aggregation: Aggregation
) -> ClassMoments:
    """Return the clients' moments combined by ``aggregation.rule``.

    The mean adds them up. The median and the trimmed mean are taken of each class's
    mean over the clients that hold it, and of the clients' covariances within classes,
    per coordinate; the result has the summed counts and, with them, these means and
    this covariance. If one client holds a class, every rule uses its mean.

    Parameters
    ----------
    clients : sequence of ClassMoments
        One for each client, at least one.
    aggregation : Aggregation
        Holds the rule.
    """
    summed = clients[0]
    for own in clients[1:]:
        summed = summed.plus(own)
    if aggregation.rule == "mean":
        return summed

    def combine(values: Sequence[torch.Tensor]) -> torch.Tensor:
        stacked = np.stack([value.numpy() for value in values])
        return torch.from_numpy(robust_mean(stacked, aggregation)).double()

    means = torch.zeros_like(summed.total)
    for c in torch.nonzero(summed.count > 0).flatten().tolist():
        held = [own for own in clients if own.count[c] > 0]
        means[c] = combine([own.total[c] / own.count[c] for own in held])
    holders = [own for own in clients if own.count.sum() > 0]
    between = (means * summed.count[:, None]).T @ means
    scatter = between
    if holders:
        covariance = combine([_within(own) for own in holders])
        scatter = between + summed.count.sum() * covariance
    return ClassMoments(summed.count, means * summed.count[:, None], scatter)


def _within(moments: ClassMoments) -> torch.Tensor:
    """Return one client's covariance within classes."""
    means = moments.total / moments.count.clamp(min=1e-300)[:, None]
    return (moments.scatter - moments.total.T @ means) / moments.count.sum()


class Discriminant:
    """The discriminant of a run, from the moments of this round and earlier ones.

    Clients see the model that is sent to them, so a round's moments are those of a
    model that is one round older than the evaluated one. A local model's moments would
    be as new, but each from another model, and are worse. A round sees few clients, and
    each class at few of them. Hence the sums go on from round to round,

        M_t = decay M_(t - 1) + sum over the round's clients,

    which needs no memory of single clients.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    num_classes : int
        Number of classes C.
    """

    def __init__(self, config: RunConfig, num_classes: int) -> None:
        self.decay = config.head.decay
        self._aggregation = config.aggregation
        self._fields = array_fields(MOMENTS, config, num_classes)
        noise = config.privacy.moment_noise_multiplier
        self._deviations = noise_deviations(noise, config.privacy.moment_clip_norm)
        self._noisy = noise > 0
        width = self._fields.shapes["scatter"][0]
        self.moments = ClassMoments.zeros(num_classes, width)
        # Variance of the noise in the sums, in units of one client's.
        self._releases = 0.0

    @classmethod
    def of(cls, config: RunConfig, num_classes: int) -> "Discriminant | None":
        """Return a run's discriminant; None if the run computes none."""
        return cls(config, num_classes) if uses_moments(config) else None

    def log_settings(self) -> None:
        """Log the settings of the discriminant."""
        log(INFO, "\t├──> Balanced discriminant:")
        log(
            INFO,
            "\t│\t└── Width %d, weight of a round relative to the next %g",
            len(self.moments.scatter),
            self.decay,
        )

    def objection(self, reply: TrainReply) -> str:
        """Return why no images have a reply's moments; empty if some have."""
        if self._noisy:
            return ""
        return impossible_moments(self._of(reply), reply.images)

    def add(self, server_round: int, replies: Sequence[TrainReply]) -> None:
        """Add a round's moments, without those of features that are far too long.

        Parameters
        ----------
        server_round : int
            The round, for the log.
        replies : sequence of TrainReply
            Good replies, in ascending order of client.
        """
        found = [self._of(reply) for reply in replies]
        allowed = self._longest(found)
        used, releases = [], 0
        for reply, own in zip(replies, found, strict=True):
            if self._noisy or statistic_length(own) <= allowed:
                used.append(own)
                releases += len(reply.clients)
                continue
            log(
                WARNING,
                "round %d: left out the class moments of node %d: its features have "
                "the norm %.3g, and aggregation.max-length-ratio = %g allows %.3g",
                server_round,
                reply.node,
                statistic_length(own),
                self._aggregation.max_length_ratio,
                allowed,
            )
        if not used:
            return
        self.moments = self.moments.plus(
            combined_moments(used, self._aggregation), self.decay
        )
        self._releases = self.decay**2 * self._releases + releases

    def head(self, model: Mapping[str, torch.Tensor]) -> nn.Linear:
        """Return the discriminant as a classifier of a model's projected features.

        Parameters
        ----------
        model : mapping of str to Tensor
            State of the `ImageClassifier` that is evaluated. Its own classifier is
            returned as long as there are no usable statistics.

        Returns
        -------
        nn.Linear
            With d inputs and C outputs, on the model's device.
        """
        own = model["classifier.weight"]
        projection = model["projection.weight"]
        scale = math.sqrt(self._releases)
        count, total, scatter = (scale * deviation for deviation in self._deviations)
        found = balanced_discriminant(self.moments, (count, total, scatter))
        if found is not None and projection.shape[1] < projection.shape[0]:
            found = on_features(found, projection.cpu(), model["projection.bias"].cpu())
        if found is None or not all(
            tensor.abs().max() <= LARGEST_VALUE for tensor in found
        ):
            found = own, model["classifier.bias"]
        # The meta device keeps nn.Linear's own initialisation from drawing numbers.
        classifier = nn.Linear(own.shape[1], own.shape[0], device="meta")
        classifier = classifier.to_empty(device=own.device)
        classifier.load_state_dict({"weight": found[0], "bias": found[1]})
        return classifier

    def state(self) -> dict[str, torch.Tensor]:
        """Return the sums by name, so that a run can be resumed."""
        named = {f"{STATE}{n}": t for n, t in self.moments.named().items()}
        return {**named, RELEASES: torch.tensor(self._releases, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` returned."""
        self.moments = ClassMoments(
            **{name: state[f"{STATE}{name}"] for name in self.moments.named()}
        )
        self._releases = float(state[RELEASES])

    def _of(self, reply: TrainReply) -> ClassMoments:
        named = reply.field(self._fields)
        return ClassMoments(**{name: t.double() for name, t in named.items()})

    def _longest(self, found: Sequence[ClassMoments]) -> float:
        """Return the norm that features may have, by the median of the clients.

        The ratio bounds the mean square, of which the scatter is made.
        """
        ratio = self._aggregation.max_length_ratio
        lengths = sorted(length for own in found if (length := statistic_length(own)))
        if len(lengths) >= QUORUM:
            usual = lengths[(len(lengths) - 1) // 2]
        else:  # too few to outvote one of them; earlier rounds, if there are any
            usual = statistic_length(self.moments)
        return math.sqrt(ratio) * usual if ratio > 0 and usual > 0 else math.inf
