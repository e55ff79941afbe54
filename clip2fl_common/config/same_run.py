"""Whether two configurations are those of the same run."""

from collections.abc import Mapping
from typing import NamedTuple

from clip2fl_common.config.schema import KEYS

NOTHING = "nothing"
"""Stands for the value of a key that one of the two does not have."""


class Difference(NamedTuple):
    """A key that makes two runs of what would have been one.

    Attributes
    ----------
    key : str
        Its name.
    then, now : bool, int, float or str
        Its value in the run that is there, and the one that is wanted.
    """

    key: str
    then: object
    now: object


def differences(
    then: Mapping[str, object], now: Mapping[str, object]
) -> list[Difference]:
    """Return what makes a wanted run another one than the run that is there.

    The one definition of "the same run", for a run that goes on and for a comparison
    that finds a complete run. Keys that the schema marks with `MayChange` do not count.
    A key that is newer than the run that is there had its default.

    Parameters
    ----------
    then : mapping
        Dotted keys to values of the run that is there, as its folder has them.
    now : mapping
        All dotted keys of the wanted run (`RunConfig.to_flat`).

    Returns
    -------
    list of Difference
        Sorted by key; empty for the same run.
    """
    found = []
    for key in sorted(then.keys() | now.keys()):
        known = KEYS.get(key)
        if known and known.may_change:
            continue
        before = then.get(key, known.default if known else NOTHING)
        after = now.get(key, NOTHING)
        if before != after:
            found.append(Difference(key, before, after))
    return found
