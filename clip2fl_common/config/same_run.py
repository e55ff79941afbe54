"""Decide whether two configurations belong to the same run."""

from collections.abc import Mapping
from typing import NamedTuple

from clip2fl_common.config.schema import KEYS

NOTHING = "nothing"
"""The value of a key that one of the two configurations lacks."""


class Difference(NamedTuple):
    """A key whose values make two configurations different runs.

    Attributes
    ----------
    key : str
        Its name.
    then, now : bool, int, float or str
        Its value in the existing run, and in the wanted run.
    """

    key: str
    then: object
    now: object


def differences(
    then: Mapping[str, object], now: Mapping[str, object]
) -> list[Difference]:
    """Return the keys in which a wanted run differs from an existing run.

    This is the one definition of "the same run". It serves a run that is resumed, and a
    comparison that finds a complete run. Keys that the schema marks with `MayChange` do
    not count. A key that did not exist when the run was made had its default.

    Parameters
    ----------
    then : mapping
        Dotted keys to values of the existing run, as its folder has them.
    now : mapping
        All dotted keys of the wanted run (`RunConfig.to_flat`).

    Returns
    -------
    list of Difference
        Sorted by key; empty if it is the same run.
    """
    found = []
    for key in sorted(then.keys() | now.keys()):
        known = KEYS.get(key)
        if known and known.may_change:
            continue
        absent = known.default_of(then.get("method")) if known else NOTHING
        before = then.get(key, absent)
        after = now.get(key, NOTHING)
        if before != after:
            found.append(Difference(key, before, after))
    return found
