"""The methods by name. A new method is a file in this package and a line here."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from clip2fl_common.config import ConfigError

if TYPE_CHECKING:
    from strategy.base import Method

METHODS = {
    "ccvr": "strategy.ccvr:CCVR",
    "clip2fl": "strategy.clip2fl:CLIP2FL",
    "clip2flm": "strategy.clip2flm:CLIP2FLM",
    "clip2fl-plus": "strategy.clip2fl_plus:CLIP2FLPlus",
    "creff": "strategy.creff:CReFF",
    "fedavg": "strategy.fedavg:FedAvg",
    "fedavgm": "strategy.fedavgm:FedAvgM",
    "fedlda": "strategy.fedlda:FedLDA",
    "fedprox": "strategy.fedprox:FedProx",
}
"""Module and class of each method. They are imported on use: a misspelt name is then
refused before the import of torch and flwr, which takes seconds."""


def refuse_unknown_method(name: str) -> None:
    """Raise if there is no method of this name; nothing is imported.

    Parameters
    ----------
    name : str
        The configuration's ``method``.

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


def method_named(name: str) -> "type[Method]":
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
    refuse_unknown_method(name)
    module, _, class_name = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(module), class_name)
    return found
