"""The methods by name. A new method is a file in this package and a line here."""

import difflib

from clip2fl_common.config import ConfigError
from strategy.base import Method
from strategy.ccvr import CCVR
from strategy.clip2fl import CLIP2FL
from strategy.clip2fl_plus import CLIP2FLPlus
from strategy.clip2flm import CLIP2FLM
from strategy.creff import CReFF
from strategy.fedavg import FedAvg
from strategy.fedavgm import FedAvgM
from strategy.fedprox import FedProx

METHODS: dict[str, type[Method]] = {
    "ccvr": CCVR,
    "clip2fl": CLIP2FL,
    "clip2flm": CLIP2FLM,
    "clip2fl-plus": CLIP2FLPlus,
    "creff": CReFF,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
}


def method_named(name: str) -> type[Method]:
    """Return the class of a method.

    Parameters
    ----------
    name : str
        The configuration's ``method``.

    Returns
    -------
    type

    Raises
    ------
    ConfigError
        If there is no such method; the message lists the methods.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"method = {name!r}, but it must be one of {', '.join(METHODS)} "
            f"(strategy/registry.py){hint}"
        )
    return METHODS[name]
