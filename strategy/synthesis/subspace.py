"""The subspace in which a class's federated features stay, and coordinates in it.

Every descent step adds multiples of these rows to a feature: the classifier's rows, the
prototypes, the rows of the class's real gradient, and the class's own features. So all
steps stay in their initial span, which has at most 3 C + m dimensions for C classes and
m features of each. If that is fewer than d, coordinates in an orthonormal basis of the
span have the same inner products. The descent is then the same, and faster.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SharedRows:
    """Rows that all classes share, and an orthonormal basis that extends them.

    Attributes
    ----------
    coordinates : Tensor, shape [S, S]
        The rows in the first S of d coordinates; their other coordinates are zero.
    reflectors, scales : Tensor, shapes [d, S] and [S]
        The basis of all d dimensions as Householder reflectors.
    """

    coordinates: torch.Tensor
    reflectors: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> "SharedRows":
        """Return the basis for rows [S, d] with S < d."""
        reflectors, scales = torch.geqrf(rows.T)
        return cls(reflectors[: len(rows)].triu().T, reflectors, scales)

    def into(self, rows: torch.Tensor) -> torch.Tensor:
        """Return all d coordinates of rows [N, d], in the same shape."""
        turned: torch.Tensor = torch.ormqr(
            self.reflectors, self.scales, rows, left=False
        )
        return turned

    def out_of(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the rows [N, d] that have these coordinates."""
        rows: torch.Tensor = torch.ormqr(
            self.reflectors, self.scales, coordinates, left=False, transpose=True
        )
        return rows


class Subspace:
    """Coordinates in the span of shared rows and each class's own rows.

    Parameters
    ----------
    shared : SharedRows
        S rows that all classes share.
    own : Tensor, shape [k, R, d]
        R more rows of each of k classes, with S + R <= d. They may be linearly
        dependent.

    Attributes
    ----------
    coordinates : Tensor, shape [k, R, S + R]
        Coordinates of ``own``. The shared rows have `SharedRows.coordinates` and R
        zeros.
    """

    def __init__(self, shared: SharedRows, own: torch.Tensor) -> None:
        turned = shared.into(own.flatten(0, 1)).view_as(own)
        known = len(shared.coordinates)
        # These coordinates are orthogonal to the shared rows, whatever the rounding.
        self._reflectors, self._scales = torch.geqrf(turned[..., known:].mT)
        own_part = self._reflectors[:, : own.shape[1]].triu().mT
        self.coordinates = torch.cat([turned[..., :known], own_part], dim=2)
        self._shared = shared

    def out_of(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the vectors [k, m, d] that have these coordinates [k, m, S + R]."""
        shared = self._shared
        known, dim = len(shared.coordinates), len(shared.reflectors)
        padded = torch.nn.functional.pad(coordinates, (0, dim - coordinates.shape[2]))
        padded[..., known:] = torch.ormqr(
            self._reflectors,
            self._scales,
            padded[..., known:].contiguous(),
            left=False,
            transpose=True,
        )
        return shared.out_of(padded.flatten(0, 1)).view_as(padded)
