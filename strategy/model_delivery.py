"""Send a signed model to all connected sites, each over its node's own connection."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from clip2fl_common import messages
from clip2fl_common.messages import (
    ModelAnswer,
    ModelOffer,
    ModelState,
    ReplyError,
    error_reason,
)
from clip2fl_common.signed_folder import Manifest
from clip2fl_common.site_registry import SiteRegistry
from strategy.log import log

# Seconds that a site has for a piece: eight megabytes at 150 kbit/s.
PIECE_TIMEOUT_S = 480.0
# Answers that do not take the whole piece after which a site is given up. Two
# deliveries to one site at the same time disturb each other.
MAX_STANDSTILLS = 3


@dataclass
class Delivered:
    """What became of a model at each connected site.

    Attributes
    ----------
    have : dict of str to str
        Sites that have the model, by name, each with what it said.
    failed : dict of str to str
        Sites that do not have it, by name, each with the reason.
    """

    have: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def lines(self, model: str) -> Iterator[str]:
        """Yield what a person reads of a delivery, one line at a time."""
        asked = len(self.have) + len(self.failed)
        yield f"delivery: {len(self.have)} of {asked} connected sites have {model}"
        for name, said in sorted((self.have | self.failed).items()):
            yield f"delivery: {name}: {said}"


def deliver_model(
    grid: Grid, folder: Path, manifest: Manifest, registry: SiteRegistry | None
) -> Delivered:
    """Offer a signed folder to all connected nodes; send each the bytes that it wants.

    All sites receive at the same time, one piece each in a message. A site that is not
    there, refuses or goes away does not hinder the others. A slow one does, but not for
    longer than a site may take that receives whole pieces. What is missing then can be
    sent in another delivery.

    Parameters
    ----------
    grid : Grid
        Returns errors with the asked node as their source, as `AttentiveGrid` does.
    folder : Path
        The files that the manifest lists.
    manifest : Manifest
        The signed manifest.
    registry : SiteRegistry or None
        Names the sites; nodes that are not in it get nothing. None: each node that is
        connected gets the model, and names itself.

    Returns
    -------
    Delivered
    """
    found = Delivered()
    names = {node: f"node {node}" for node in sorted(grid.get_node_ids())}
    if registry is not None:
        known = {node: registry.name_of(node) for node in names}
        names = {node: name for node, name in known.items() if name is not None}
    # The place and the length of the piece that each node gets next.
    wanted = dict.fromkeys(names, (0, 0))
    standstills: Counter[int] = Counter()
    limit = _limit_s(manifest.size)
    started = time.monotonic()
    while wanted:
        if time.monotonic() - started > limit:
            for node, (start, _) in wanted.items():
                found.failed[names[node]] = (
                    f"it still wants byte {start:,} after {limit:.0f} s, the most that "
                    "a delivery of this size may take"
                )
            break
        replies = _exchange(grid, folder, manifest, wanted)
        for node, (start, length) in list(wanted.items()):
            try:
                answer = _answer(replies.get(node), manifest)
            except ReplyError as error:
                del wanted[node]
                found.failed[names[node]] = str(error)
                log(WARNING, "%s does not get the model: %s", names[node], error)
                continue
            if registry is None and answer.site:
                # Names that sites choose themselves may be equal.
                taken = {name for other, name in names.items() if other != node}
                own = answer.site
                names[node] = own if own not in taken else f"{own} (node {node})"
            if answer.state is not ModelState.WANTED:
                del wanted[node]
                found.have[names[node]] = _said(answer)
                continue
            # What one step may cost is so bounded, whatever a site answers.
            if length and answer.next != start + length:
                standstills[node] += 1
            if standstills[node] == MAX_STANDSTILLS:
                del wanted[node]
                found.failed[names[node]] = f"it still wants byte {answer.next:,}"
                continue
            left = manifest.size - answer.next
            wanted[node] = answer.next, min(messages.PIECE_BYTES, answer.room, left)
    return found


def _limit_s(size: int) -> float:
    """Return the seconds after which a delivery of so many bytes sends no more pieces.

    Enough for the offer, for all pieces, and for the answers that do not take a whole
    piece, with `PIECE_TIMEOUT_S` for each.
    """
    pieces = -(-size // messages.PIECE_BYTES)
    return PIECE_TIMEOUT_S * (1 + pieces + MAX_STANDSTILLS)


def _exchange(
    grid: Grid,
    folder: Path,
    manifest: Manifest,
    wanted: Mapping[int, tuple[int, int]],
) -> dict[int, Message]:
    """Send each node its piece; return the replies by node."""
    pieces = {place: _piece(folder, manifest, *place) for place in {*wanted.values()}}
    requests = [
        Message(
            ModelOffer(
                manifest.content, manifest.signature, place[0], pieces[place]
            ).content(),
            node,
            messages.MODEL_REQUEST,
        )
        for node, place in wanted.items()
    ]
    replies = grid.send_and_receive(requests, timeout=PIECE_TIMEOUT_S)
    return {reply.metadata.src_node_id: reply for reply in replies}


def _answer(reply: Message | None, manifest: Manifest) -> ModelAnswer:
    if reply is None:
        raise ReplyError(f"no answer in {PIECE_TIMEOUT_S:.0f} s")
    if reply.has_error():
        raise ReplyError(error_reason(reply))
    return ModelAnswer.parse(reply, manifest.size)


def _said(answer: ModelAnswer) -> str:
    said = "stored" if answer.state is ModelState.STORED else "was there before"
    return f"{said}; {answer.note}" if answer.note else said


def _piece(folder: Path, manifest: Manifest, start: int, length: int) -> bytes:
    """Return bytes of the files, one file after the other."""
    found = b""
    end = 0
    for file in manifest.files:
        begin, end = end, end + file.bytes
        if length > len(found) and start + len(found) < end:
            with (folder / file.name).open("rb") as stream:
                stream.seek(start + len(found) - begin)
                found += stream.read(length - len(found))
    return found
