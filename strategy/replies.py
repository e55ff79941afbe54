"""Which replies of a round are used: accept or drop each one, and say why."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from clip2fl_common import messages
from clip2fl_common.messages import GradientFormat, ReplyField, TrainReply
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
    """What became of a round's replies.

    Attributes
    ----------
    good : list of TrainReply
        Replies that may be used, in ascending order of their clients.
    sizes : dict of int to ReplySize
        How large each of them is, by client.
    dropped : list of tuple of Message and str
        The others, and why.
    diverged : int
        How many of those were dropped because their training has diverged.
    unreadable : str
        What a client says of images that it cannot read; empty if none does.
    """

    good: list[TrainReply] = field(default_factory=list)
    sizes: dict[int, ReplySize] = field(default_factory=dict)
    dropped: list[tuple[Message, str]] = field(default_factory=list)
    diverged: int = 0
    unreadable: str = ""

    @property
    def poisoned(self) -> bool:
        """Whether most clients diverged: then the model that was sent is at fault."""
        return self.diverged > len(self.good)

    def reasons(self, name: Callable[[Message], str]) -> list[str]:
        """Return a line for each dropped reply, with the name of its sender."""
        return [f"{name(reply)}: {reason}" for reply, reason in self.dropped]


@dataclass(frozen=True)
class ReplyCheck:
    """What is expected of a round's replies.

    Attributes
    ----------
    sent : mapping of str to ndarray
        The global model that was sent.
    asked : mapping of int to mapping of int to int
        For each node the clients that it was asked for, with the most images that
        they can have.
    fields : sequence of ReplyField
        What replies hold besides model and metrics.
    """

    sent: Arrays
    asked: Mapping[int, Mapping[int, int]]
    fields: Sequence[ReplyField[object]]

    def judge(
        self, replies: Sequence[Message], lengths: LengthRule, *, noisy: bool
    ) -> Verdicts:
        """Tell the good replies from the others, in the order of their clients.

        Replies arrive in any order, and sums of floating-point numbers depend on it.
        Where a node answers twice for a client, which answer came first is chance,
        so that neither is used.

        Parameters
        ----------
        replies : sequence of Message
            As they arrived.
        lengths : LengthRule
            Drops what is far too long.
        noisy : bool
            Whether clients add noise to class gradients, so that these may be
            anything.

        Returns
        -------
        Verdicts
        """
        verdicts = Verdicts()
        measured = lengths.ratio > 0 and not noisy
        found: defaultdict[int, list[tuple[Message, TrainReply, ReplySize]]]
        found = defaultdict(list)
        for message in replies:
            if message.has_error():
                reason = messages.plain(message.error.reason)
                verdicts.dropped.append((message, reason))
                verdicts.diverged += message.error.code == messages.DIVERGED
                if message.error.code == messages.DATA_ERROR:
                    verdicts.unreadable = reason
                continue
            try:
                reply, size = self._accept(message, measured)
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
        """Return a reply that may be used, and its size.

        Raises
        ------
        ReplyError
            If it must not be used.
        """
        asked = self.asked.get(message.metadata.src_node_id, {})
        reply = TrainReply.parse(message, self.sent, self.fields, asked)
        scale = self._scale(reply) if measured else None
        return reply, reply_size(reply.model, self.sent, reply.images, scale)

    def _scale(self, reply: TrainReply) -> float | None:
        """Return the length of features that class gradients speak of, if any."""
        for declared in self.fields:
            if isinstance(declared, GradientFormat):
                gradients = reply.field(declared)
                if reason := impossible_gradient(gradients):
                    raise messages.ReplyError(reason)
                return feature_scale(gradients) if gradients else None
        return None
