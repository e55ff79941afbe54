"""What happens in a run, told as it happens.

Strategy and server tell events through `Events`. ``server_app/event_file.py`` writes
them to ``events.jsonl``, from which `clip2fl status` and `clip2fl watch` show a run.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from clip2fl_common.limits import MAX_NAME_LENGTH
from clip2fl_common.shown import plain

# Bounds far above all that a run or a hostile site can bring about, since an event that
# exceeds one raises an error. A reader refuses what exceeds them.
MAX_COUNT = 2**62
MAX_SECONDS = 1e13


Short = Annotated[str, Field(max_length=50)]


class What(StrEnum):
    """The kinds of events."""

    RUN_STARTED = "run-started"
    """Also of a resumed run; ``round`` is the number of rounds that are over."""
    RUN_ENDED = "run-ended"
    """The run is complete and its model delivered."""
    RUN_FAILED = "run-failed"
    """An error ended the run."""
    RUN_STOPPED = "run-stopped"
    """A signal ended the run."""
    ROUND_STARTED = "round-started"
    PHASE = "phase"
    """The server begins a phase of the round."""
    ROUND_ENDED = "round-ended"
    """The round's results are on disk."""
    ASKED = "asked"
    """The server asks a client to train, or in the phase evaluation to evaluate."""
    REPLIED = "replied"
    """A site's reply has arrived. A simulation's replies arrive all at once."""
    ACCEPTED = "accepted"
    """A reply has passed all checks."""
    DROPPED = "dropped"
    """A reply is not used."""
    SILENT = "silent"
    """A client did not reply in time."""
    EVALUATED = "evaluated"
    """A site's evaluation of the round's model has passed all checks."""
    JOINED = "joined"
    """A site has connected for the first time in this run."""
    BACK = "back"
    """A site that was away has connected again."""
    AWAY = "away"
    """A site is no longer connected, or no longer registered."""
    REFUSED = "refused"
    """A node does not take part."""


class Event(BaseModel):
    """One event: a line of ``events.jsonl``.

    Attributes
    ----------
    time : datetime
        When it happened, by the server's clock.
    what : What
        The kind.
    round : int
        The round; 0 before the first one.
    site : str or int or None
        The site's name or the simulated client's number, if the event has one.
    phase : str or None
        The phase that begins.
    images : int or None
        Number of images that the client claims to have trained on or evaluated.
    seconds : float or None
        The client's own measurement of its work.
    bytes : int or None
        Size of the arrays in the request (``asked``) or in the reply (``accepted``).
    accuracy : float or None
        Balanced accuracy of the delivered head on the site's own validation images, in
        percent.
    versions : dict of str to str or None
        Versions of a site's code and packages, when it connects.
    reason : str or None
        Why, on one line: of a dropped reply, a refused node or a failed run.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False
    )

    # Not strict: in a file they are text.
    time: Annotated[AwareDatetime, Field(strict=False)]
    what: Annotated[What, Field(strict=False)]
    round: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    site: (
        Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
        | Annotated[int, Field(ge=0, le=MAX_COUNT)]
        | None
    ) = None
    phase: Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)] | None = None
    images: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] | None = None
    bytes: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    accuracy: Annotated[float, Field(ge=0, le=100)] | None = None
    versions: Annotated[dict[Short, Short], Field(max_length=50)] | None = None
    reason: Annotated[str, Field(max_length=1000)] | None = None


def _nobody(event: Event) -> None:
    pass


class Events:
    """Tells what happens, with the time and the current round.

    Parameters
    ----------
    tell : callable
        Called with each event; by default nobody listens.
    """

    def __init__(self, tell: Callable[[Event], None] = _nobody) -> None:
        self._tell = tell
        self._round = 0
        self._phase = ""

    def begin_run(self, done: int) -> None:
        """Tell that the run starts, or goes on after ``done`` rounds."""
        self._round, self._phase = done, ""
        self.note(What.RUN_STARTED)

    def begin_round(self, server_round: int) -> None:
        """Tell that a round begins; later events belong to it."""
        self._round, self._phase = server_round, ""
        self.note(What.ROUND_STARTED)

    def begin_phase(self, phase: str) -> None:
        """Tell that a phase of the round begins, unless it has begun already."""
        if phase != self._phase:
            self._phase = phase
            self.note(What.PHASE, phase=phase)

    def note(
        self,
        what: What,
        site: str | int | None = None,
        *,
        phase: str | None = None,
        images: int | None = None,
        seconds: float | None = None,
        size: int | None = None,
        accuracy: float | None = None,
        versions: dict[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        """Tell an event; `Event` describes the parameters, ``size`` is in bytes."""
        self._tell(
            Event(
                time=datetime.now(UTC),
                what=what,
                round=self._round,
                site=site,
                phase=phase,
                images=images,
                seconds=seconds,
                bytes=size,
                accuracy=accuracy,
                versions=versions or None,
                reason=None if reason is None else plain(reason),
            )
        )
