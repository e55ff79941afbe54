"""Words of a report: names that a person reads, and phrases that depend on numbers."""

from clip2fl_cli.runs import LAST_ROUNDS
from clip2fl_common.metrics import FEDAVG_HEAD, RETRAINED_HEAD
from strategy.registry import METHODS

_HEADS = {RETRAINED_HEAD: "re-trained head", FEDAVG_HEAD: "the model's own head"}


def method_title(method: str) -> str:
    """Return a method's name as its paper writes it; an unknown name as it is."""
    return METHODS[method].__name__ if method in METHODS else method


def head_title(head: str) -> str:
    """Return the name of a classifier for readers."""
    return _HEADS.get(head, f"{head} head")


def last_rounds(evaluated: int) -> str:
    """Return which rounds a mean of the last rounds covers.

    Parameters
    ----------
    evaluated : int
        Number of rounds with an accuracy, at least one.

    Returns
    -------
    str
        For example "the last 5 rounds" or, of a short run, "both rounds".
    """
    if evaluated > LAST_ROUNDS:
        return f"the last {LAST_ROUNDS} rounds"
    return {1: "the only round", 2: "both rounds"}.get(
        evaluated, f"all {evaluated} rounds"
    )
