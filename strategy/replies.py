"""Check a round's replies: accept or drop each one, and give the reason."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from clip2fl_common import messages
from clip2fl_common.messages import (
    GradientFormat,
    ReplyField,
    StatisticsFormat,
    TrainReply,
)
from strategy.grid import UNKNOWN_ERROR
from strategy.outliers import (
    LengthRule,
    ReplySize,
    feature_scale,
    impossible_gradient,
    reply_size,
)
from strategy.robust import Arrays


@dataclass
class Verdicts:
    """The result of checking a round's replies.

    Attributes
    ----------
    good : list of TrainReply
        Replies that may be used, in ascending order of their clients.
    sizes : dict of int to ReplySize
        Norms of each good reply, by client.
    dropped : list of tuple of Message and str
        The dropped replies, each with its reason.
    diverged : int
        Number of replies dropped because their training diverged.
    unreadable : str
        A client's message about images that it cannot read; empty if there is none.
    unknown : str
        A message of Flower about a process that has ended; empty if there is none.
    lost : str
        Why there is no sum, with secure aggregation; empty if there is one.
    masked : int
        Number of clients that sent masked sums, whether or not there is a sum.
    """

    good: list[TrainReply] = field(default_factory=list)
    sizes: dict[int, ReplySize] = field(default_factory=dict)
    dropped: list[tuple[Message, str]] = field(default_factory=list)
    diverged: int = 0
    unreadable: str = ""
    unknown: str = ""
    lost: str = ""
    masked: int = 0

    @property
    def used(self) -> int:
        """Return the number of clients whose updates are in the good replies."""
        return sum(len(reply.clients) for reply in self.good)

    @property
    def trained(self) -> int:
        """Return the number of clients whose training did not diverge."""
        return max(self.used, self.masked)

    def note_error(self, message: Message) -> None:
        """Add an error in place of a reply to the dropped ones."""
        reason = messages.error_reason(message)
        self.dropped.append((message, reason))
        self.diverged += message.error.code == messages.DIVERGED
        if message.error.code == messages.DATA_ERROR:
            self.unreadable = reason
        if message.error.code == UNKNOWN_ERROR:
            self.unknown = reason

    def reasons(self, name: Callable[[Message], str]) -> list[str]:
        """Return a line for each dropped reply, with the name of its sender."""
        return [f"{name(reply)}: {reason}" for reply, reason in self.dropped]


def _none(reply: TrainReply) -> str:
    return ""


@dataclass(frozen=True)
class ReplyCheck:
    """The expectations that a round's replies must meet.

    Attributes
    ----------
    sent : mapping of str to ndarray
        The global model that was sent.
    asked : mapping of int to mapping of int to int
        The clients that each node was asked for, each with the most images that it
        can have.
    fields : sequence of ReplyField
        Fields that replies hold besides model and metrics.
    objection : callable
        Returns why a reply whose arrays are as declared must not be used all the same;
        an empty string if it may be used.
    """

    sent: Arrays
    asked: Mapping[int, Mapping[int, int]]
    fields: Sequence[ReplyField[object]]
    objection: Callable[[TrainReply], str] = _none

    def judge(
        self, replies: Sequence[Message], lengths: LengthRule, *, noisy: bool
    ) -> Verdicts:
        """Return the good replies in the order of their clients, and the dropped ones.

        Replies arrive in any order, and a sum of floating-point numbers depends on its
        order. If a node answers twice for a client, neither answer is used: which one
        arrived first is chance.

        Parameters
        ----------
        replies : sequence of Message
            In the order of arrival.
        lengths : LengthRule
            Drops replies that are far too long.
        noisy : bool
            Whether clients add noise to class gradients. Then any gradient is
            possible, and the size of class gradients is not checked.

        Returns
        -------
        Verdicts
        """
        verdicts = Verdicts()
        found: defaultdict[int, list[tuple[Message, TrainReply, ReplySize]]]
        found = defaultdict(list)
        for message in replies:
            if message.has_error():
                verdicts.note_error(message)
                continue
            try:
                reply, size = self._accept(message, not noisy)
            except messages.ReplyError as error:
                verdicts.dropped.append((message, str(error)))
                verdicts.diverged += isinstance(error, messages.NotFiniteError)
            else:
                found[reply.client].append((message, reply, size))
        for client, answers in list(found.items()):
            if len(answers) > 1:
                reason = f"{len(answers)} replies for partition {client}"
                verdicts.dropped += [(message, reason) for message, _, _ in answers]
                del found[client]
        sizes = {client: size for client, [(_, _, size)] in sorted(found.items())}
        too_long = lengths.too_long(sizes, self.sent)
        for client, [(message, reply, size)] in sorted(found.items()):
            if client in too_long:
                verdicts.dropped.append((message, too_long[client]))
            else:
                verdicts.good.append(reply)
                verdicts.sizes[client] = size
        return verdicts

    def _accept(self, message: Message, measured: bool) -> tuple[TrainReply, ReplySize]:
        """Return an accepted reply and its norms.

        Raises
        ------
        ReplyError
            If the reply must not be used.
        """
        asked = self.asked.get(message.metadata.src_node_id, {})
        reply = TrainReply.parse(message, self.sent, self.fields, asked)
        return reply, self.measure(reply, measured)

    def measure(self, reply: TrainReply, measured: bool) -> ReplySize:
        """Return the norms of a reply, or of a sum, whose arrays are as declared.

        Parameters
        ----------
        reply : TrainReply
            The reply.
        measured : bool
            Whether the size of its class gradients or statistics matters.

        Raises
        ------
        ReplyError
            If the reply must not be used.
        """
        self._check_counts(reply)
        if reason := self.objection(reply):
            raise messages.ReplyError(reason)
        scale = self._scale(reply) if measured else None
        return reply_size(reply.model, self.sent, reply.images, scale)

    def _check_counts(self, reply: TrainReply) -> None:
        """Raise `ReplyError` if class statistics count more images than the client has.

        Raises
        ------
        ReplyError
            With both numbers.
        """
        for declared in self.fields:
            if isinstance(declared, StatisticsFormat):
                counted = reply.field(declared).images
                if counted > reply.images:
                    raise messages.ReplyError(
                        f"class statistics of {counted} images, but the client has "
                        f"{reply.images}"
                    )

    def _scale(self, reply: TrainReply) -> float | None:
        """Return the norm of features that class gradients or statistics imply."""
        for declared in self.fields:
            if isinstance(declared, GradientFormat):
                gradients = reply.field(declared)
                if reason := impossible_gradient(gradients):
                    raise messages.ReplyError(reason)
                return feature_scale(gradients) if gradients else None
            if isinstance(declared, StatisticsFormat):
                return reply.field(declared).feature_scale()
        return None
