"""Messages that bring a delivered model to a site, piece by piece.

Each request holds the signed manifest, so that a site keeps nothing between two
requests but the bytes that have arrived: ``model-offer`` (manifest, signature, start)
and, unless it is the first one, ``model-piece`` (bytes of the files, one file after
the other). The reply holds ``model-answer``: which byte the site wants next.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from clip2fl_common.messages.arrays import ReplyError, decode, read_header
from clip2fl_common.shown import plain, quoted
from clip2fl_common.site_names import NAME_RULE, is_site_name

MODEL_ACTION = "model"
MODEL_REQUEST = f"query.{MODEL_ACTION}"
"""Flower's type of these messages."""

PIECE_BYTES = 8 * 2**20
"""Most bytes of a piece. Each message costs a site the start of a process, and the
SuperLink memory."""
MIN_PIECE_BYTES = 2**18
"""Least bytes that a site must accept in a piece."""

_OFFER, _PIECE, _ANSWER = "model-offer", "model-piece", "model-answer"
_MANIFEST, _SIGNATURE, _START, _BYTES = "manifest", "signature", "start", "bytes"
_STATE, _NEXT, _ROOM, _NOTE, _SITE = "state", "next", "room", "note", "site"


class ModelState(StrEnum):
    """What a site says of an offered model."""

    WANTED = "wanted"
    """Bytes are missing."""
    STORED = "stored"
    """The last byte has arrived, and all files are as the server signed them."""
    THERE = "there"
    """The site had it before."""


@dataclass(frozen=True)
class ModelOffer:
    """A signed manifest, and bytes of the files that it lists.

    Attributes
    ----------
    manifest, signature : bytes
        Not checked.
    start : int
        Place of the piece in the files, written one after the other.
    piece : bytes
        Empty in the first request.
    """

    manifest: bytes
    signature: bytes
    start: int = 0
    piece: bytes = b""

    def content(self) -> RecordDict:
        """Return the content of the request."""
        records = RecordDict(
            {
                _OFFER: ConfigRecord(
                    {
                        _MANIFEST: self.manifest,
                        _SIGNATURE: self.signature,
                        _START: self.start,
                    }
                )
            }
        )
        if self.piece:
            # Flower splits arrays into small messages, and nothing else.
            data = Array(np.frombuffer(self.piece, np.uint8))
            records[_PIECE] = ArrayRecord({_BYTES: data})
        return records

    @classmethod
    def parse(cls, content: RecordDict) -> "ModelOffer":
        """Return the offer in a request.

        Raises
        ------
        ReplyError
            If it is not as `content` makes it.
        """
        offer = content.config_records.get(_OFFER, ConfigRecord())
        manifest, signature = offer.get(_MANIFEST), offer.get(_SIGNATURE)
        start = offer.get(_START)
        if (
            not isinstance(manifest, bytes)
            or not isinstance(signature, bytes)
            or not isinstance(start, int)
        ):
            raise ReplyError("the request offers no model")
        record = content.array_records.get(_PIECE)
        if record is None:
            return cls(manifest, signature, start)
        if set(record) != {_BYTES}:
            raise ReplyError(f"{_PIECE} has no {_BYTES}")
        header = read_header(_BYTES, record[_BYTES])
        if header.dtype != np.uint8 or len(header.shape) != 1:
            raise ReplyError(f"{_PIECE} has other values than bytes")
        piece = decode(_BYTES, record[_BYTES], header).tobytes()
        return cls(manifest, signature, start, piece)


@dataclass(frozen=True)
class ModelAnswer:
    """A site's answer to an offer.

    Attributes
    ----------
    state : ModelState
        What the site has.
    next : int
        Number of bytes that have arrived; the next piece begins there.
    room : int
        Most bytes of the next piece, from `MIN_PIECE_BYTES` on.
    note : str
        What a person should know, on one line; may be empty.
    site : str
        The site's own name, or empty.
    """

    state: ModelState
    next: int
    room: int = PIECE_BYTES
    note: str = ""
    site: str = ""

    def content(self) -> RecordDict:
        """Return the content of the reply."""
        answer = ConfigRecord(
            {
                _STATE: self.state.value,
                _NEXT: self.next,
                _ROOM: self.room,
                _NOTE: self.note,
                _SITE: self.site,
            }
        )
        return RecordDict({_ANSWER: answer})

    @classmethod
    def parse(cls, reply: Message, total: int) -> "ModelAnswer":
        """Return the answer in a site's reply.

        Parameters
        ----------
        reply : Message
            A reply with content.
        total : int
            Bytes of all files.

        Raises
        ------
        ReplyError
            If anything is missing or out of range.
        """
        answer = reply.content.config_records.get(_ANSWER, ConfigRecord())
        state, place, room = answer.get(_STATE), answer.get(_NEXT), answer.get(_ROOM)
        note, site = answer.get(_NOTE), answer.get(_SITE)
        if state not in list(ModelState) or not isinstance(note, str):
            raise ReplyError(f"its answer to a model is {quoted(state)}")
        if not isinstance(place, int) or not 0 <= place <= total:
            raise ReplyError(f"it wants byte {quoted(place)} of {total:,}")
        if (state == ModelState.WANTED) != (place < total):
            raise ReplyError(f"it has {place:,} of {total:,} bytes, and says {state}")
        if not isinstance(room, int) or room < MIN_PIECE_BYTES:
            raise ReplyError(f"it has room for {quoted(room)} bytes")
        if site != "" and not is_site_name(site):
            raise ReplyError(f"it calls itself {quoted(site)}; expected {NAME_RULE}")
        return cls(ModelState(state), place, room, plain(note), site)
