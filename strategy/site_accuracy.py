"""Evaluations that sites send for a model, one by one or as a secure sum."""

from collections.abc import Mapping, Sequence
from logging import WARNING
from statistics import fmean

from flwr.app import Message

from clip2fl_common import messages
from clip2fl_common.messages import Evaluation
from clip2fl_common.messages.evaluation_sums import EvaluationSums, SummedEvaluation
from strategy.log import log
from strategy.replies import Verdicts
from strategy.requests import Requests
from strategy.secure_sums import SecureSums


def site_evaluations(
    server_round: int,
    replies: Sequence[Message],
    heads: Sequence[str],
    num_classes: int,
    requests: Requests,
) -> dict[str, Evaluation]:
    """Return each site's evaluation; log and skip unusable replies.

    Parameters
    ----------
    server_round : int
        The round, for the log.
    replies : sequence of Message
        In the order of arrival.
    heads : sequence of str
        Heads (classifiers) that each site must report on.
    num_classes : int
        Number of classes C.
    requests : Requests
        The requests that the replies answer.

    Returns
    -------
    dict of str to Evaluation
        By the site's name, in the order of arrival.
    """
    found = {}
    for reply in replies:
        try:
            if reply.has_error():
                raise messages.ReplyError(messages.error_reason(reply))
            evaluation = Evaluation.parse(reply, num_classes, heads)
        except messages.ReplyError as error:
            log(
                WARNING,
                "round %d: dropped the evaluation of %s: %s",
                server_round,
                requests.name(reply),
                error,
            )
            requests.note_dropped(reply, str(error))
        else:
            found[str(requests.client(reply))] = evaluation
    return found


def summed_evaluation(
    server_round: int,
    replies: Sequence[Message],
    sums: EvaluationSums,
    secure: SecureSums,
    requests: Requests,
    needed: int,
) -> SummedEvaluation | None:
    """Return the evaluations of a round's secure sum; None, with a log line, without.

    Parameters
    ----------
    server_round : int
        The round, for the log.
    replies : sequence of Message
        In the order of arrival.
    sums : EvaluationSums
        The vectors that they must hold.
    secure : SecureSums
        The run's secure sums of evaluations.
    requests : Requests
        The requests that the replies answer.
    needed : int
        Fewest sites in a sum.
    """
    verdicts, found = Verdicts(), None
    try:
        total = secure.add(replies, sums, requests.asked, needed, verdicts)
        found = sums.evaluation_of(total.total, total.parties, total.names)
    except messages.ReplyError as error:
        log(WARNING, "round %d: no secure sum of evaluations: %s", server_round, error)
    for reply, reason in verdicts.dropped:
        requests.note_dropped(reply, reason)
    for line in verdicts.reasons(requests.name):
        log(WARNING, "round %d: dropped the evaluation of %s", server_round, line)
    return found


def mean_recalls(
    sites: Sequence[Mapping[str, Mapping[int, float]]],
    heads: Sequence[str],
    num_classes: int,
) -> dict[str, list[float | None]]:
    """Average each class's accuracy over the sites that have images of it.

    The mean is not weighted by images, so that sites need not send class counts.

    Parameters
    ----------
    sites : sequence of mapping of str to mapping of int to float
        Each site's accuracy in percent, by head and class.
    heads : sequence of str
        Heads (classifiers) that all sites report on.
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
