"""Which replies of a round are used: accept or drop each one, and say why."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flwr.app import ArrayRecord, Message

from clip2fl_common import messages
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
    good : dict of int to Message
        Replies that may be used, by client, ascending.
    sizes : dict of int to ReplySize
        How large each of them is.
    dropped : list of tuple of Message and str
        The others, and why.
    diverged : int
        How many of those were dropped because their training has diverged.
    unreadable : str
        What a client says of images that it cannot read; empty if none does.
    """

    good: dict[int, Message] = field(default_factory=dict)
    sizes: dict[int, ReplySize] = field(default_factory=dict)
    dropped: list[tuple[Message, str]] = field(default_factory=list)
    diverged: int = 0
    unreadable: str = ""

    @property
    def poisoned(self) -> bool:
        """Whether most clients diverged: then the model that was sent is at fault."""
        return self.diverged > len(self.good)


@dataclass(frozen=True)
class ReplyCheck:
    """What is expected of a round's replies.

    Attributes
    ----------
    sent : ArrayRecord
        The global model that was sent.
    asked : mapping of int to mapping of int to int
        For each node the clients that it was asked for, with the most images that
        they can have.
    gradients : GradientFormat or None
        What class gradients look like, where they are asked for.
    noisy : bool
        Whether clients add noise to class gradients, so that these may be anything.
    lengths : LengthRule
        Drops what is far too long.
    """

    sent: ArrayRecord
    asked: Mapping[int, Mapping[int, int]]
    gradients: messages.GradientFormat | None
    noisy: bool
    lengths: LengthRule

    @cached_property
    def _sent_values(self) -> Arrays:
        """The global model's values, decoded once for all replies."""
        return messages.arrays_to_numpy(self.sent)

    def judge(self, replies: Sequence[Message]) -> Verdicts:
        """Tell the good replies from the others, in the order of their clients.

        Replies arrive in any order, and sums of floating-point numbers depend on it.
        Where a node answers twice for a client, which answer came first is chance,
        so that neither is used.

        Parameters
        ----------
        replies : sequence of Message
            As they arrived.

        Returns
        -------
        Verdicts
        """
        verdicts = Verdicts()
        found: defaultdict[int, list[tuple[Message, ReplySize]]] = defaultdict(list)
        for reply in replies:
            if reply.has_error():
                reason = messages.plain(reply.error.reason)
                verdicts.dropped.append((reply, reason))
                verdicts.diverged += reply.error.code == messages.DIVERGED
                if reply.error.code == messages.DATA_ERROR:
                    verdicts.unreadable = reason
                continue
            try:
                size = self._size(reply)
            except messages.ReplyError as error:
                verdicts.dropped.append((reply, str(error)))
                verdicts.diverged += isinstance(error, messages.NotFiniteError)
            else:
                found[messages.partition_of(reply)].append((reply, size))
        for client, answers in sorted(found.items()):
            if len(answers) > 1:
                reason = f"{len(answers)} replies for partition {client}"
                verdicts.dropped += [(reply, reason) for reply, _ in answers]
            else:
                verdicts.good[client], verdicts.sizes[client] = answers[0]
        too_long = self.lengths.too_long(verdicts.sizes, self._sent_values)
        for client, reason in too_long.items():
            verdicts.dropped.append((verdicts.good.pop(client), reason))
            del verdicts.sizes[client]
        return verdicts

    def _size(self, reply: Message) -> ReplySize:
        """Check a reply and measure it.

        Raises
        ------
        ReplyError
            If it must not be used.
        """
        gradients = messages.check_reply(
            reply,
            self.sent,
            self.gradients,
            self.asked.get(reply.metadata.src_node_id, {}),
        )
        features = None
        if gradients and self.lengths.ratio > 0 and not self.noisy:
            if reason := impossible_gradient(gradients):
                raise messages.ReplyError(reason)
            features = feature_scale(gradients)
        return reply_size(
            messages.arrays_to_numpy(reply.content.array_records[messages.ARRAYS]),
            self._sent_values,
            messages.images_of(reply),
            features,
        )


def reasons(verdicts: Verdicts, name: Callable[[Message], str]) -> list[str]:
    """Return a line for each dropped reply, with the name of its sender."""
    return [f"{name(reply)}: {reason}" for reply, reason in verdicts.dropped]
