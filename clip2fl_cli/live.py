"""The state of a run that may still be running, from the files in its folder.

`clip2fl status` and `clip2fl watch` show what `RunWatch.look` returns. It reads only
what has been added to the files since the last look. This module needs no torch.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from clip2fl_cli.run_schema import (
    MAX_FACTS_BYTES,
    MAX_METRICS_BYTES,
    MAX_SECONDS,
    Facts,
    Images,
    Round,
)
from clip2fl_common.provenance import differences
from clip2fl_common.shown import shown
from server_app.console import HEAD_TITLES, shows_held_out
from server_app.event_file import EventReader
from server_app.file_names import CONFIG, EVENTS, LOG, METRICS, MODEL
from server_app.folder_lock import in_use
from server_app.foreign_files import (
    MEGABYTE,
    ForeignFileError,
    opened,
    parse_json,
    read_json,
)
from server_app.growing_file import GrowingFile
from server_app.time_left import seconds_left
from strategy.events import Event, What

# A line of a round with 10,000 classes has 2 megabytes.
MAX_ROUND_BYTES = 16 * MEGABYTE
# Only a damaged or foreign file has more; further names are not counted.
MAX_SITES = 10_000
MAX_PHASES = 50
LOG_BYTES = 64 * 1024
LOG_LINES = 200
# No reason is known of a process that was killed.
VANISHED = "its process has ended without an error: it was stopped or killed"


class RunState(StrEnum):
    """Whether a run is running."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"


class SiteState(StrEnum):
    """What the server last knows of a site or a simulated client."""

    CONNECTED = "connected"
    TRAINING = "training"
    EVALUATING = "evaluating"
    REPLIED = "replied"
    ACCEPTED = "accepted"
    EVALUATED = "evaluated"
    DROPPED = "dropped"
    SILENT = "no reply"
    AWAY = "away"
    REFUSED = "refused"


@dataclass
class Site:
    """A site or a simulated client.

    Attributes
    ----------
    name : str or int
        The site's name, or the simulated client's number.
    state : SiteState
        What the server last knows.
    round : int or None
        The last round in which it was asked.
    last_seen : datetime or None
        When the server last heard from it.
    images, seconds, bytes : int, float, int or None
        Of its last accepted reply: training images, its own working time, size.
    accuracy : float or None
        Balanced accuracy of the delivered head on its own validation images, in
        percent, when it last evaluated.
    seconds_left : float or None
        Estimate of the time until it replies, from the time that it took before; None
        if the server waits for nothing, or knows no earlier time.
    versions : dict of str to str
        Versions of its code and packages; empty for a simulated client.
    other_versions : str
        How they differ from the server's, in words; empty if they do not.
    reason : str
        Why its reply was dropped, or it was refused or lost.
    """

    name: str | int
    state: SiteState = SiteState.CONNECTED
    round: int | None = None
    last_seen: datetime | None = None
    images: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    accuracy: float | None = None
    seconds_left: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    other_versions: str = ""
    reason: str = ""

    def fields(self) -> dict[str, Any]:
        """Return the attributes for JSON."""
        seen = None if self.last_seen is None else self.last_seen.isoformat()
        return {**dataclasses.asdict(self), "last_seen": seen}


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one classifier in one round, in percent."""

    title: str
    balanced: float
    few: float | None

    @classmethod
    def of(cls, head: str, accuracy: Mapping[str, Any]) -> "Accuracy":
        """Return the accuracy of a head in a line of ``metrics.jsonl``."""
        title = HEAD_TITLES.get(head, f"{shown(head)} head")
        return cls(title, accuracy["balanced"], accuracy["few"])


@dataclass(frozen=True)
class Phase:
    """A phase of a round; the last one of a running round goes on."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes
    ----------
    name, method, dataset, seed : str, str, str, int
        Name of the folder, and what runs in it.
    sites_train : bool
        Whether sites train; else clients are simulated.
    state : RunState
        Whether the run is running.
    reason : str
        Why it failed or stopped.
    round : int or None
        The round that is being computed.
    done, rounds : int
        Number of rounds that are over, and of all.
    phases : list of Phase
        Phases of the current or last round.
    elapsed : float or None
        Seconds since the run started or resumed, to its end if it has ended.
    seconds_left : float or None
        Estimate; None without a complete round, and if the run does not run.
    images : Images or None
        Which test images the accuracies are of; None: the sites' own.
    accuracy : dict of str to Accuracy
        By head, in the last round with an accuracy.
    accuracy_round : int or None
        That round.
    sites : list of Site
        Sites or simulated clients, those of the current or last round first.
    unreadable : int
        Lines of ``events.jsonl`` and ``metrics.jsonl`` that cannot be read.
    has_events : bool
        Whether the run writes ``events.jsonl``: runs of early versions do not.
    """

    name: str
    method: str
    dataset: str
    seed: int
    sites_train: bool
    state: RunState
    reason: str
    round: int | None
    done: int
    rounds: int
    phases: list[Phase]
    elapsed: float | None
    seconds_left: float | None
    images: Images | None
    accuracy: dict[str, Accuracy]
    accuracy_round: int | None
    sites: list[Site]
    unreadable: int
    has_events: bool

    def fields(self) -> dict[str, Any]:
        """Return the attributes for JSON."""
        whole = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **whole,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "accuracy": {
                head: dataclasses.asdict(accuracy)
                for head, accuracy in self.accuracy.items()
            },
            "sites": [site.fields() for site in self.sites],
        }


# What an event of a site says of it; `asked` depends on the phase.
_STATES = {
    What.REPLIED: SiteState.REPLIED,
    What.ACCEPTED: SiteState.ACCEPTED,
    What.EVALUATED: SiteState.EVALUATED,
    What.DROPPED: SiteState.DROPPED,
    What.SILENT: SiteState.SILENT,
    What.JOINED: SiteState.CONNECTED,
    What.BACK: SiteState.CONNECTED,
    What.AWAY: SiteState.AWAY,
    What.REFUSED: SiteState.REFUSED,
}
_NOT_HEARD = (What.ASKED, What.SILENT, What.AWAY)
# A reply that was asked of a site which is away is lost, and does not bring it back.
_LOST = (What.DROPPED, What.SILENT)
_ANSWERS = (What.REPLIED, What.ACCEPTED, What.EVALUATED)
_ENDS = {
    What.RUN_ENDED: RunState.COMPLETED,
    What.RUN_FAILED: RunState.FAILED,
    What.RUN_STOPPED: RunState.STOPPED,
}


@dataclass
class _Told:
    """What the events so far have told."""

    started: datetime | None = None
    last: datetime | None = None
    end: RunState | None = None
    reason: str = ""
    done: int = 0
    round: int | None = None
    round_started: datetime | None = None
    durations: list[float] = field(default_factory=list)
    phases: list[tuple[str, datetime]] = field(default_factory=list)
    phases_ended: datetime | None = None
    sites: dict[str | int, Site] = field(default_factory=dict)
    # By site: what the server waits for, since when; and how long each kind took last.
    asked: dict[str | int, tuple[SiteState, datetime]] = field(default_factory=dict)
    took: dict[tuple[str | int, SiteState], float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take the next event into account."""
        self.last = event.time
        if event.site is not None:
            self._take_site(event, event.site)
        elif event.what in _ENDS:
            self.end, self.reason = _ENDS[event.what], event.reason or ""
            self._close(event.time)
        elif event.what is What.RUN_STARTED:
            self.started, self.end, self.reason = event.time, None, ""
            self.done, self.durations = event.round, []
            self._close(event.time)
        elif event.what is What.ROUND_STARTED:
            self.round, self.round_started = event.round, event.time
            self.phases, self.phases_ended = [], None
        elif event.what is What.PHASE and event.phase is not None:
            self.phases = [*self.phases[: MAX_PHASES - 1], (event.phase, event.time)]
        elif event.what is What.ROUND_ENDED:
            if self.round_started is not None:
                spent = event.time - self.round_started
                self.durations.append(max(0.0, spent.total_seconds()))
            self.done = event.round
            self._close(event.time)

    def _close(self, time: datetime) -> None:
        """End the current round, if there is one; its clients no longer work."""
        self.round, self.round_started = None, None
        self.phases_ended = self.phases_ended or time
        for site in self.sites.values():
            if site.state in (SiteState.TRAINING, SiteState.EVALUATING):
                site.state = SiteState.SILENT

    def _take_site(self, event: Event, name: str | int) -> None:
        if name not in self.sites and len(self.sites) >= MAX_SITES:
            return
        site = self.sites.setdefault(name, Site(name))
        if event.what is What.ASKED:
            evaluates = bool(self.phases) and self.phases[-1][0] == "evaluation"
            site.state = SiteState.EVALUATING if evaluates else SiteState.TRAINING
            site.round = event.round
            self.asked[name] = site.state, event.time
        elif event.what in _STATES and not (
            site.state is SiteState.AWAY and event.what in _LOST
        ):
            site.state = _STATES[event.what]
        if event.what in _ANSWERS and name in self.asked:
            kind, since = self.asked.pop(name)
            self.took[name, kind] = _seconds(since, event.time) or 0.0
        if event.what not in _NOT_HEARD:
            site.last_seen = event.time
        if event.what is What.ACCEPTED:
            site.images, site.seconds = event.images, event.seconds
            site.bytes = event.bytes
        if event.what is What.EVALUATED:
            site.accuracy = event.accuracy
        if event.versions is not None:
            site.versions = event.versions
        site.reason = event.reason or ""

    def left(self, site: Site, now: datetime) -> float | None:
        """Return the seconds until a site replies, if it takes as long as before."""
        if site.state not in (SiteState.TRAINING, SiteState.EVALUATING):
            return None
        took = self.took.get((site.name, site.state))
        if took is None or site.name not in self.asked:
            return None
        waited = _seconds(self.asked[site.name][1], now) or 0.0
        return min(max(0.0, took - waited), MAX_SECONDS)

    def phase_list(self, now: datetime) -> list[Phase]:
        """Return the phases of the current or last round with their seconds."""
        ends = [*(start for _, start in self.phases[1:]), self.phases_ended or now]
        return [
            Phase(name, max(0.0, (end - start).total_seconds()))
            for (name, start), end in zip(self.phases, ends, strict=False)
        ]


class RunWatch:
    """Look at a run's folder again and again.

    Parameters
    ----------
    folder : Path
        The folder, which may be damaged or come from a stranger.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events = EventReader(folder / EVENTS)
        self._metrics = GrowingFile(
            folder / METRICS, MAX_ROUND_BYTES, MAX_METRICS_BYTES
        )
        self._told = _Told()
        self._rounds: dict[int, dict[str, Accuracy]] = {}
        self._unreadable = 0
        self._tuning = False
        self._facts: tuple[tuple[int, int, int], dict[str, Any]] | None = None

    def look(self, now: datetime | None = None) -> Status:
        """Return the run's state.

        Parameters
        ----------
        now : datetime or None
            The time to which durations count; None: the present.

        Returns
        -------
        Status

        Raises
        ------
        ForeignFileError
            If the folder holds no run, or a file has not the form that a run writes.
        """
        facts = self._read_facts()
        self._events.read(self._told.take, self._forget_events)
        self._metrics.read(self._take_round, self._forget_rounds)
        now = now or datetime.now(UTC)
        config, told = facts["config"], self._told
        state, reason = self._state()
        rounds: int = config["federation.rounds"]
        running = state is RunState.RUNNING
        if not running:
            # Durations end where the run's last words are.
            now = told.last or now
        done = max(self._rounds, default=0) if told.last is None else told.done
        latest = max((n for n, heads in self._rounds.items() if heads), default=None)
        sites_train = facts["test_images"] == 0
        return Status(
            name=shown(os.path.basename(os.path.abspath(self._folder))),
            method=shown(config["method"]),
            dataset=shown(config["dataset.name"]),
            seed=config["seed"],
            sites_train=sites_train,
            state=state,
            reason=shown(reason),
            round=told.round if running else None,
            done=done,
            rounds=rounds,
            phases=told.phase_list(now),
            elapsed=_seconds(told.started, now),
            seconds_left=self._left(now, rounds) if running else None,
            images=_images(sites_train, self._tuning),
            accuracy={} if latest is None else self._rounds[latest],
            accuracy_round=latest,
            sites=self._sites(now, facts["versions"]),
            unreadable=self._events.unreadable + self._unreadable,
            has_events=told.last is not None,
        )

    def curves(self) -> dict[str, dict[str, Any]]:
        """Return each head's accuracy by round, as of the last look.

        Returns
        -------
        dict of str to dict
            By head: ``title``, and ``balanced`` and ``few`` as lists of pairs of round
            and percent.
        """
        curves: dict[str, dict[str, Any]] = {}
        for number, heads in sorted(self._rounds.items()):
            for head, accuracy in heads.items():
                empty = {"title": accuracy.title, "balanced": [], "few": []}
                curve = curves.setdefault(head, empty)
                curve["balanced"].append((number, accuracy.balanced))
                if accuracy.few is not None:
                    curve["few"].append((number, accuracy.few))
        return curves

    def log_tail(self) -> list[str]:
        """Return the last lines of the run's log; none without a log.

        With a tuning share, the rows of the table at its end are left out that have
        accuracy on images that are held out.

        Raises
        ------
        ForeignFileError
            If the log is no regular file.
        """
        path = self._folder / LOG
        if not os.path.lexists(path):
            return []
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode("utf-8", "replace")
        lines = text.split("\n")
        # The first one begins anywhere, the last one is being written.
        whole = lines[1 if size > LOG_BYTES else 0 : -1]
        if self._tuning:
            whole = [line for line in whole if not shows_held_out(line.rstrip())]
        return [shown(line.expandtabs()) for line in whole[-LOG_LINES:]]

    def _read_facts(self) -> dict[str, Any]:
        """Return ``config.json``, which a resumed run writes again."""
        path = self._folder / CONFIG
        if not os.path.lexists(path):
            raise ForeignFileError(
                f"{shown(self._folder)} is no run's folder: it has no {CONFIG}; give "
                'the folder that a run names in its line "run folder: ..."'
            )
        with opened(path) as file:
            status = os.fstat(file.fileno())
        version = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._facts is None or self._facts[0] != version:
            self._facts = version, read_json(path, Facts, MAX_FACTS_BYTES)
        return self._facts[1]

    def _forget_events(self) -> None:
        self._told = _Told()

    def _forget_rounds(self) -> None:
        self._rounds, self._unreadable = {}, 0

    def _take_round(self, line: bytes | None) -> None:
        try:
            if line is None:
                raise ForeignFileError("too long")
            found = parse_json(line.decode("utf-8"), Round, METRICS)
        except (ForeignFileError, UnicodeDecodeError):
            self._unreadable += 1
            return
        # While settings are chosen, the images that are held out stay unseen.
        tuning = found.get("accuracy_tuning")
        self._tuning = bool(tuning)
        heads = tuning or found["accuracy"]
        self._rounds[found["round"]] = {
            head: Accuracy.of(head, accuracy) for head, accuracy in heads.items()
        }

    def _state(self) -> tuple[RunState, str]:
        told = self._told
        # A run that is resumed holds its folder while it is prepared.
        completed = told.end is RunState.COMPLETED
        if not completed and in_use(self._folder):
            return RunState.RUNNING, ""
        if told.end is not None:
            return told.end, told.reason
        if told.last is None and os.path.lexists(self._folder / MODEL):
            return RunState.COMPLETED, ""
        return RunState.STOPPED, VANISHED

    def _left(self, now: datetime, rounds: int) -> float | None:
        told = self._told
        if not told.durations:
            return None
        whole = seconds_left(told.durations, max(0, rounds - told.done))
        left = whole - (_seconds(told.round_started, now) or 0.0)
        # Times in a foreign file may be centuries apart.
        return min(max(0.0, left), MAX_SECONDS)

    def _sites(self, now: datetime, server: dict[str, str]) -> list[Site]:
        """Return copies: those asked last come first, then by name."""

        def place(site: Site) -> tuple[int, bool, int, str]:
            number = site.name if isinstance(site.name, int) else 0
            return (
                -(site.round or 0),
                isinstance(site.name, str),
                number,
                str(site.name),
            )

        return [
            dataclasses.replace(
                site,
                name=site.name if isinstance(site.name, int) else shown(site.name),
                reason=shown(site.reason),
                seconds_left=self._told.left(site, now),
                versions={shown(n): shown(v) for n, v in site.versions.items()},
                other_versions=shown(differences(site.versions, server)),
            )
            for site in sorted(self._told.sites.values(), key=place)
        ]


def _seconds(start: datetime | None, end: datetime) -> float | None:
    return None if start is None else max(0.0, (end - start).total_seconds())


def _images(sites_train: bool, tuning: bool) -> Images | None:
    if sites_train:
        return None
    return Images.TUNING if tuning else Images.ALL
