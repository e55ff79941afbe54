"""Evaluation of each round's model by the sites: ask them, and combine the answers."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import nn

from clip2fl_common import messages
from clip2fl_common.messages import Evaluation
from clip2fl_common.messages.evaluation_sums import EvaluationSums
from clip2fl_common.metrics import FEDAVG_HEAD, TEACHER_HEAD
from clip2fl_common.secure.statements import EVALUATION
from strategy.events import What
from strategy.requests import Requests
from strategy.round_record import RoundRecord
from strategy.secure_sums import SecureSums
from strategy.setting import Setting
from strategy.site_accuracy import (
    mean_recalls,
    site_evaluations,
    summed_evaluation,
)


class SiteEvaluations:
    """The sites' evaluations of a run, one by one or as secure sums.

    Parameters
    ----------
    setting : Setting
        The run's clients, configuration and events.
    requests : Requests
        Addresses the requests.
    """

    def __init__(self, setting: Setting, requests: Requests) -> None:
        federation = setting.config.federation
        self._clients = setting.clients
        self._events = setting.events
        self._num_classes = setting.num_classes
        self._requests = requests
        self._last_round = federation.rounds
        self._min_replies = federation.min_replies
        secure = setting.config.aggregation.secure
        self._secure = SecureSums(setting, requests, EVALUATION) if secure else None
        # Those that sites report on, the delivered one first; none before a request.
        self._heads: list[str] = []

    def request(
        self,
        server_round: int,
        content: RecordDict,
        heads: Mapping[str, nn.Linear],
        grid: Grid,
    ) -> list[Message]:
        """Return the requests of a round, one for each site that is connected.

        Parameters
        ----------
        server_round : int
            The round.
        content : RecordDict
            Model and ``config`` of the requests; gets the other records.
        heads : mapping of str to nn.Linear
            Classifiers besides the model's own, the delivered one first.
        grid : Grid
            Flower's grid.
        """
        numbers = self._clients.evaluating()
        if self._secure is not None:
            numbers = self._secure.agree(server_round, grid, numbers)
            content[messages.SECURE] = self._secure.record()
        for name, head in heads.items():
            content[messages.HEAD_RECORDS[name]] = messages.model_to_arrays(head)
        config = content.config_records[messages.CONFIG]
        teacher = [TEACHER_HEAD] if messages.TEACHER_FINGERPRINT in config else []
        self._heads = [*heads, FEDAVG_HEAD, *teacher]
        if server_round == self._last_round:
            config[messages.CONFUSION] = self._heads[0]
        return self._requests.address(content, numbers, MessageType.EVALUATE)

    def combine(
        self, server_round: int, replies: Sequence[Message], record: RoundRecord
    ) -> bool:
        """Put the mean of each class's accuracy over the sites into a round's record.

        Parameters
        ----------
        server_round : int
            The round.
        replies : sequence of Message
            In the order of arrival.
        record : RoundRecord
            Gets accuracies and evaluations.

        Returns
        -------
        bool
            Whether sites were asked at all.
        """
        if not self._heads:
            return False
        self._requests.log_silent(server_round, replies)
        if self._secure is None:
            found = site_evaluations(
                server_round, replies, self._heads, self._num_classes, self._requests
            )
            for site, evaluation in found.items():
                self._note(site, evaluation)
            record.evaluations = found
            recalls = [evaluation.recalls for evaluation in found.values()]
            record.recalls = mean_recalls(recalls, self._heads, self._num_classes)
            return True
        final = server_round == self._last_round
        record.summed = summed_evaluation(
            server_round,
            replies,
            EvaluationSums(self._heads, self._num_classes, confusion=final),
            self._secure,
            self._requests,
            self._clients.replies_needed(self._min_replies),
        )
        for site in record.summed.sites if record.summed is not None else ():
            self._events.note(What.EVALUATED, site)  # nobody knows its accuracy
        nothing = mean_recalls([], self._heads, self._num_classes)
        record.recalls = nothing if record.summed is None else record.summed.recalls
        return True

    def _note(self, site: str, evaluation: Evaluation) -> None:
        # A site may have no image that evaluates.
        values = list(evaluation.recalls[self._heads[0]].values())
        self._events.note(
            What.EVALUATED,
            site,
            images=evaluation.images,
            seconds=evaluation.seconds,
            accuracy=fmean(values) if values else None,
        )
