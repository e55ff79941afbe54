"""What a person sees while runs train: a bar on a terminal, plain lines elsewhere.

Flower's log has hundreds of lines. `RunOutput` keeps all of them in a file and hands on
those that matter: the rounds, what the run itself prints, warnings and errors.
"""

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from clip2fl_cli.flower_command import NOISE
from clip2fl_cli.run_log import RunLog
from clip2fl_cli.simulation import RunResult
from clip2fl_common.shown import shown
from server_app.file_names import CONFIG

if TYPE_CHECKING:
    # Imports torch, for which a single run need not wait.
    from clip2fl_cli.comparison import PlannedRun

# Lines that the server prints (server_app/console.py, server_app/run.py).
ROUND = re.compile(r"round (\d+)/(\d+): .*")
FOLDER = re.compile(r"run folder: (.+)")
# Flower's own log; the first group is the level.
FLOWER = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*(.*)")
BEGINNING = re.compile(r"\[ROUND (\d+)/(\d+)\]")
# Lines of Ray's processes, and of Ray itself.
RAY = re.compile(
    r"\(.*pid=\d+.*?\)|\(raylet\b|\[?\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d+\b"
)
# What the server says of sites (strategy/site_clients.py), which it says rarely.
SITES = re.compile(r"waiting for sites: |site \S+ \(node \d+\) takes part")
TRACEBACK = "Traceback (most recent call last):"
CHAINED = ("The above exception was the direct", "During handling of the above exc")


class Kind(Enum):
    """What a line of the log is for the reader."""

    ROUND = "the line of a round that has ended"
    BEGINNING = "a round begins"
    TEXT = "printed by the run itself"
    WARNING = "a warning"
    ERROR = "an error"
    HIDDEN = "only in the log file"


STYLES = {Kind.WARNING: "yellow", Kind.ERROR: "bold red"}


@dataclass(frozen=True)
class Line:
    """A line of the log.

    Attributes
    ----------
    kind : Kind
        What it is for the reader.
    text : str
        What to show, without Flower's level.
    """

    kind: Kind
    text: str


class Reader:
    """Tells which lines of a run's log matter.

    It has a memory, since the lines of a traceback do not tell by themselves what they
    are.
    """

    def __init__(self) -> None:
        self._in_traceback = False

    def read(self, line: str) -> Line:
        """Return a line's kind, and the text to show for it."""
        if line == TRACEBACK:
            self._in_traceback = True
        elif self._in_traceback and line and not line.startswith(" "):
            # The exception itself, after the indented lines.
            self._in_traceback = False
            return Line(Kind.ERROR, line)
        if (
            self._in_traceback
            or line.startswith(CHAINED)
            or NOISE.match(line)
            or RAY.match(line)
        ):
            return Line(Kind.HIDDEN, line)
        if ROUND.fullmatch(line):
            return Line(Kind.ROUND, line)
        found = FLOWER.match(line)
        if found is None:
            return Line(Kind.TEXT, line)
        level, text = found.groups()
        if level in ("WARNING", "ERROR", "CRITICAL") and text:
            kind = Kind.WARNING if level == "WARNING" else Kind.ERROR
            return Line(kind, f"{level.lower()}: {text}")
        if BEGINNING.fullmatch(text):
            return Line(Kind.BEGINNING, text)
        if SITES.match(text):
            return Line(Kind.TEXT, text)
        return Line(Kind.HIDDEN, line)


class RunOutput(io.StringIO):
    """Stream for a run's log, which goes to a file; its lines are also handed on.

    Parameters
    ----------
    on_line : callable
        Called with each line as it is, and with what `Reader` says of it.

    Attributes
    ----------
    log : RunLog
        The file.
    folder : Path or None
        The run's folder, once the server has named it and if it is on this machine.
    named : str or None
        The run's folder as the server has named it.
    """

    def __init__(self, on_line: Callable[[str, Line], None]) -> None:
        super().__init__()
        self.log = RunLog()
        self.folder: Path | None = None
        self.named: str | None = None
        self._on_line = on_line
        self._reader = Reader()
        self._rest = ""

    def write(self, text: str) -> int:
        """Receive a piece of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.log.write(line)
            if self.named is None and (named := FOLDER.fullmatch(line)):
                self.named = named[1]
                self._settle(Path(named[1]))
            self._on_line(line, self._reader.read(line))
        return len(text)

    def _settle(self, folder: Path) -> None:
        # A server on another machine names a folder that is not here.
        # Nor one that this user may not look into.
        if os.path.isfile(folder / CONFIG):
            self.folder = folder
            self.log.move_to(folder)


class _Bar(Progress):
    """Rich's bar with a line of text below."""

    below: Text | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and the text."""
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class _Shown:
    """A bar and lines above it on a terminal; elsewhere the lines alone."""

    def __init__(self, bar: _Bar, console: Console) -> None:
        self._console = console
        self._bar = bar

    def __enter__(self) -> Self:
        """Start the display."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the terminal."""
        self._bar.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(
            Text(shown(text.expandtabs()), style or ""), soft_wrap=True, highlight=False
        )
        # A pipe must get each line when it comes.
        self._console.file.flush()


class RunProgress(_Shown):
    """Shows one run: a bar on a terminal, a line for each round elsewhere.

    Parameters
    ----------
    console : Console
        Console for the progress.
    verbose : bool
        Whether to show Flower's log, too.
    at_end : callable or None
        Called when the last round has ended. Flower's processes then take some seconds
        to end.

    Attributes
    ----------
    output : RunOutput
        Stream for the run's log.
    """

    def __init__(
        self,
        console: Console,
        verbose: bool = False,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        bar = _Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        super().__init__(bar, console)
        self.output = RunOutput(self._on_line)
        self._verbose = verbose
        self._at_end = at_end
        self._empty_line = False
        self._task = bar.add_task("Flower starts", total=None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the terminal and close the log."""
        super().__exit__(kind, error, trace)
        self.output.log.close()

    def _on_line(self, whole: str, line: Line) -> None:
        if line.kind in (Kind.BEGINNING, Kind.ROUND):
            self._count(line)
        if self._verbose:
            if not NOISE.match(whole):
                self._print(whole)
        elif line.kind is Kind.TEXT and not line.text.strip():
            self._empty_line = True
        elif line.kind not in (Kind.HIDDEN, Kind.BEGINNING):
            if line.kind is Kind.ROUND and self._console.is_terminal:
                return
            if self._empty_line and line.kind is Kind.TEXT:
                self._print("")
            self._empty_line = False
            self._print(line.text, STYLES.get(line.kind))

    def _count(self, line: Line) -> None:
        found = (ROUND if line.kind is Kind.ROUND else BEGINNING).fullmatch(line.text)
        assert found is not None
        number, total = int(found[1]), int(found[2])
        ended = line.kind is Kind.ROUND
        if ended:
            self._bar.below = Text(shown(line.text))
            if number == total and self._at_end is not None:
                self._at_end()
        self._bar.update(
            self._task,
            description=f"round {number}",
            completed=number if ended else number - 1,
            total=total,
        )


class ComparisonProgress(_Shown):
    """Shows the progress of a comparison's runs.

    Parameters
    ----------
    runs : list of PlannedRun
        The runs to execute.
    complete : int
        Number of runs that are already complete.
    console : Console
        Console for the progress.
    verbose : bool
        Whether to show Flower's log, too.
    """

    def __init__(
        self,
        runs: "list[PlannedRun]",
        complete: int,
        console: Console,
        verbose: bool = False,
    ) -> None:
        bar = _Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        super().__init__(bar, console)
        self._verbose = verbose
        self._number = complete
        self._total = complete + len(runs)
        self._before = 0
        self._output: RunOutput | None = None
        rounds = sum(run.config.federation.rounds for run in runs)
        self._task = bar.add_task("", total=rounds)

    def started(self, run: "PlannedRun") -> TextIO:
        """Return a stream for the log of a run that is about to start."""
        self._number += 1
        name = f"[{self._number}/{self._total}] {run.variant}, seed {run.seed}"

        def on_line(whole: str, line: Line) -> None:
            if found := ROUND.fullmatch(line.text):
                self._bar.below = Text(shown(line.text))
                self._bar.update(self._task, completed=self._before + int(found[1]))
            if self._verbose:
                if not NOISE.match(whole):
                    self._print(f"{name}: {whole}")
            elif line.kind in STYLES or (
                line.kind is Kind.ROUND and not self._console.is_terminal
            ):
                self._print(f"{name}: {line.text}", STYLES.get(line.kind))

        self._bar.update(self._task, description=shown(name))
        if not self._console.is_terminal:
            self._print(f"{name}: starts")
        self._output = RunOutput(on_line)
        return self._output

    def ended(self, run: "PlannedRun", result: RunResult) -> None:
        """Print the result of a run."""
        self._before += run.config.federation.rounds
        self._bar.update(self._task, completed=self._before)
        name = f"{run.variant}, seed {run.seed}"
        log = None
        if self._output is not None:
            self._output.log.close()
            log = self._output.log.path
        if result.completed:
            self._print(f"{name}: complete, {run.folder}")
            return
        self._print(f"{name}: did not complete ({result.status}): {result.details}")
        if log is not None:
            self._print(f"{name}: the whole log is in {log}")
