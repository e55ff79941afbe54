"""What is summed of sites' evaluations with secure aggregation.

A site adds the accuracies that it would send without secure aggregation, in the same
steps, with a one for each class that it evaluates. So the server gets the same mean
over sites as without, and the difference of two sums shows nothing of a site that the
site does not send without secure aggregation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip2fl_common.messages.arrays import ReplyError
from clip2fl_common.messages.sites import MOST_IMAGES, Evaluation
from clip2fl_common.messages.vectors import WIDE, Segment, Values, VectorFormat
from clip2fl_common.secure.masks import Vector

COUNTS, HELD, CONFUSION = "counts", "held", "confusion"


@dataclass(frozen=True)
class SummedEvaluation:
    """The evaluations of a sum's sites together.

    Attributes
    ----------
    sites : tuple of str
        Names of the sites in the sum.
    images : int
        Number of images that they evaluated.
    unreadable : int
        Number of validation images that were skipped as unreadable.
    held : tuple of int, length C
        Number of sites that evaluate each class.
    recalls : dict of str to list of float or None
        Mean accuracy over the sites that evaluate a class, in percent, by head; None
        for a class that no site evaluates.
    confusion : ndarray of int64, shape [C, C], or None
        Sum of the matrices of the sites whose policies allow it; None if the server
        did not ask, or no site allows it.
    """

    sites: tuple[str, ...]
    images: int
    unreadable: int
    held: tuple[int, ...]
    recalls: dict[str, list[float | None]]
    confusion: npt.NDArray[np.int64] | None = None


class EvaluationSums(VectorFormat):
    """The vector of an evaluation.

    Parameters
    ----------
    heads : sequence of str
        Heads (classifiers) that all sites report on.
    num_classes : int
        Number of classes C.
    confusion : bool
        Whether the server asks for a confusion matrix.
    """

    def __init__(self, heads: Sequence[str], num_classes: int, confusion: bool) -> None:
        self._heads = tuple(heads)
        self._num_classes = num_classes
        shapes: dict[str, tuple[int, ...]] = {COUNTS: (2,), HELD: (num_classes,)}
        # The client knows the heads in another order.
        for head in sorted(heads):
            shapes[_of(head)] = (num_classes,)
        if confusion:
            shapes[CONFUSION] = (num_classes, num_classes)
        super().__init__({name: Segment(shape, WIDE) for name, shape in shapes.items()})

    def values_of(self, evaluation: Evaluation) -> Values:
        """Return what a site adds to the sum, by name of the segment."""
        values = {
            name: np.zeros(segment.shape) for name, segment in self.segments.items()
        }
        values[COUNTS][:] = evaluation.images, evaluation.unreadable
        for head, recalls in evaluation.stepped_recalls().items():
            for c, percent in recalls.items():
                values[HELD][c] = 1
                values[_of(head)][c] = percent
        if CONFUSION in values and evaluation.confusion is not None:
            values[CONFUSION][:] = evaluation.confusion
        return values

    def evaluation_of(
        self, total: Vector, parties: int, sites: Sequence[str]
    ) -> SummedEvaluation:
        """Return what a sum says.

        Parameters
        ----------
        total : Vector
            The sum without masks.
        parties : int
            Number of parties of the round.
        sites : sequence of str
            Names of those in the sum.

        Raises
        ------
        ReplyError
            If the sum is none of possible evaluations.
        """
        values = {
            name: self._whole(name, values, len(sites))
            for name, values in self.decode(total, parties).items()
        }
        held = values[HELD]
        images, unreadable = values[COUNTS].tolist()
        matrix = values.get(CONFUSION)
        if matrix is not None and int(matrix.sum()) > images:
            raise ReplyError(f"the sum has confusion matrices of over {images} images")
        return SummedEvaluation(
            sites=tuple(sites),
            images=images,
            unreadable=unreadable,
            held=tuple(held.tolist()),
            recalls={
                head: self._means(values[_of(head)], held, head) for head in self._heads
            },
            confusion=matrix if matrix is not None and matrix.any() else None,
        )

    def _whole(
        self, name: str, values: npt.NDArray[np.float64], members: int
    ) -> npt.NDArray[np.int64]:
        """Return values that must be counts, as integers."""
        whole = np.rint(values)
        most = members if name == HELD else members * MOST_IMAGES
        # Sums of integers are exact, as the step of the ring is a power of two.
        if (whole != values).any() or whole.min() < 0 or whole.max() > most:
            raise ReplyError(f"the sum's {name} are no counts of {members} sites")
        return whole.astype(np.int64)

    def _means(
        self, total: npt.NDArray[np.int64], held: npt.NDArray[np.int64], head: str
    ) -> list[float | None]:
        if (total > 100 * held).any():
            raise ReplyError(f"the sum's accuracies of {head} are above 100 %")
        return [
            float(total[c] / held[c]) if held[c] else None
            for c in range(self._num_classes)
        ]


def _of(head: str) -> str:
    return f"accuracy.{head}"
