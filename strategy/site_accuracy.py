"""What sites say of a model's accuracy, and the mean over them."""

from collections.abc import Callable, Mapping, Sequence
from logging import WARNING
from statistics import fmean

from flwr.app import Message

from clip2fl_common import messages
from strategy.log import log


def site_recalls(
    server_round: int,
    replies: Sequence[Message],
    heads: Sequence[str],
    num_classes: int,
    name: Callable[[Message], str],
) -> list[dict[str, dict[int, int]]]:
    """Return what each site says, without those whose replies are unusable.

    Parameters
    ----------
    server_round : int
        The round, for the log.
    replies : sequence of Message
        As they arrived.
    heads : sequence of str
        The heads that each must speak of.
    num_classes : int
        Number of classes C.
    name : callable
        Returns what logs call the sender of a reply.

    Returns
    -------
    list of dict of str to dict of int to int
        For each site its accuracy in percent, by head and class.
    """
    found = []
    for reply in replies:
        try:
            if reply.has_error():
                raise messages.ReplyError(str(reply.error.reason))
            found.append(messages.recalls_of(reply, num_classes, heads))
        except messages.ReplyError as error:
            log(
                WARNING,
                "round %d: dropped the evaluation of %s: %s",
                server_round,
                name(reply),
                error,
            )
    return found


def mean_recalls(
    sites: Sequence[Mapping[str, Mapping[int, int]]],
    heads: Sequence[str],
    num_classes: int,
) -> dict[str, list[float | None]]:
    """Average each class's accuracy over the sites that have images of it.

    A plain mean, as of class gradients: no class count leaves a site.

    Parameters
    ----------
    sites : sequence of mapping of str to mapping of int to int
        For each site its accuracy in percent, by head and class.
    heads : sequence of str
        The heads that all of them speak of.
    num_classes : int
        Number of classes C.

    Returns
    -------
    dict of str to list of float or None
        C values in percent for each head; None where no site has the class.
    """
    return {
        head: [
            fmean(values)
            if (values := [site[head][c] for site in sites if c in site[head]])
            else None
            for c in range(num_classes)
        ]
        for head in heads
    }
