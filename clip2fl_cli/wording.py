"""Words of a report: names that a person reads, and phrases that depend on numbers."""

from collections.abc import Iterable

from clip2fl_cli.runs import LAST_ROUNDS, FinishedRun
from clip2fl_common.config.types import PLUS
from clip2fl_common.metrics import FEDAVG_HEAD
from server_app.console import HEAD_TITLES
from strategy.registry import METHODS, method_named

SHARED_TRAINING = (
    "Minutes are not what a variant costs: runs with the same local training trained "
    "only once (share-local-training)."
)

_HEADS = {**HEAD_TITLES, FEDAVG_HEAD: "the model's own head"}
# Names that a class cannot have.
_TITLES = {PLUS: "CLIP2FL-Plus"}


def method_title(method: str) -> str:
    """Return a method's name as its paper writes it; an unknown name as it is."""
    if method not in METHODS:
        return method
    return _TITLES.get(method, method_named(method).__name__)


def head_title(head: str) -> str:
    """Return the name of a classifier for readers."""
    return _HEADS.get(head, f"{head} head")


def last_rounds(runs: Iterable[FinishedRun]) -> str:
    """Return which rounds the means of the runs' last rounds cover.

    Parameters
    ----------
    runs : iterable of FinishedRun
        At least one.

    Returns
    -------
    str
        For example "the last 5 rounds" or, of a short run, "both rounds".
    """
    numbers = {len(run.evaluated) for run in runs}
    fewest, most = min(numbers), max(numbers)
    if most > LAST_ROUNDS:
        shorter = ", or all of a shorter run" if fewest < LAST_ROUNDS else ""
        return f"the last {LAST_ROUNDS} rounds{shorter}"
    if fewest < most:
        return "all rounds"
    return {1: "the only round", 2: "both rounds"}.get(most, f"all {most} rounds")
