"""Fixed-point numbers modulo 2^k, in which sums of masked vectors are exact.

A value v becomes the integer ``round(v * 2^f)`` modulo 2^k. The number f of bits after
the point is the largest with which the sum over n parties cannot overflow,

    n * bound * 2^f < 2^(k - 1),

for values up to ``bound``. The only error is that of rounding: a sum over n parties
differs from the exact sum by at most ``n * 2^-(f + 1)``.

Models are summed as update times number of images. A client with 20 images and one with
a million take part in one sum, so the integers need about 20 bits for the weight alone,
and 32 bits would leave fewer than half precision has. Hence k = 64 for them. Class
gradients are not weighted and their directions alone count: k = 32 is enough.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^k for values of bounded size.

    Attributes
    ----------
    bits : {32, 64}
        k.
    bound : float
        Largest absolute value of one party's value: a power of two.
    """

    bits: int
    bound: float

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the integers: unsigned, little-endian."""
        return np.dtype(f"<u{self.bits // 8}")

    def step(self, parties: int) -> float:
        """Return 2^-f, the distance of two neighbouring numbers.

        Parameters
        ----------
        parties : int
            Most parties in a sum, n.
        """
        log_bound = int(np.log2(self.bound))
        assert 2.0**log_bound == self.bound and parties > 0
        # parties < 2^bit_length, so the sum stays below 2^(bits - 1).
        return 2.0 ** (log_bound + parties.bit_length() + 1 - self.bits)

    def encode(
        self, values: npt.NDArray[np.float64], parties: int
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return values as integers modulo 2^k, in the same shape.

        Raises
        ------
        FloatingPointError
            If a value is not finite or larger than the bound.
        """
        # NaN is not at most the bound either.
        if not np.all(np.abs(values) <= self.bound):
            raise FloatingPointError(
                "a value to be summed is not finite, or its absolute value is above "
                f"{self.bound:.3g}"
            )
        whole = np.rint(values / self.step(parties)).astype(np.int64)
        return whole.astype(np.uint64).astype(self.dtype)

    def decode(
        self, total: npt.NDArray[np.unsignedinteger[Any]], parties: int
    ) -> npt.NDArray[np.float64]:
        """Return the sum of encoded values, in the same shape.

        Parameters
        ----------
        total : ndarray of the ring's type
            Sum modulo 2^k over at most ``parties`` parties.
        parties : int
            The number with which all of them encoded.
        """
        signed = total.view(total.dtype.str.replace("u", "i"))
        return np.asarray(signed.astype(np.float64) * self.step(parties))
