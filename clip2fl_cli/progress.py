"""The progress of a comparison: a bar on a terminal, plain lines elsewhere."""

import io
import re
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from clip2fl_cli.comparison import PlannedRun
from clip2fl_cli.simulation import RunResult
from clip2fl_common.shown import shown

# The line that the server prints at the end of each round (server_app/console.py).
ROUND = re.compile(r"round (\d+)/\d+: .*")


class RoundLines(io.StringIO):
    """Stream for a run's log that passes on the line of each round and drops the rest.

    Parameters
    ----------
    on_round : callable
        Called with the round's number and its line.
    """

    def __init__(self, on_round: Callable[[int, str], None]) -> None:
        super().__init__()
        self._on_round = on_round
        self._rest = ""

    def write(self, text: str) -> int:
        """Receive a piece of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if match := ROUND.fullmatch(line):
                self._on_round(int(match[1]), line)
        return len(text)


class ComparisonProgress:
    """Shows the progress of a comparison's runs.

    Parameters
    ----------
    runs : list of PlannedRun
        The runs to execute.
    complete : int
        Number of runs that are already complete.
    console : Console
        Console for the progress.
    """

    def __init__(self, runs: list[PlannedRun], complete: int, console: Console) -> None:
        self._console = console
        self._number = complete
        self._total = complete + len(runs)
        self._before = 0
        self._progress = Progress(
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
        rounds = sum(run.config.federation.rounds for run in runs)
        self._task = self._progress.add_task("", total=rounds)

    def __enter__(self) -> Self:
        """Start the display."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the terminal."""
        self._progress.stop()

    def started(self, run: PlannedRun) -> TextIO:
        """Return a stream for the log of a run that is about to start."""
        self._number += 1
        name = f"[{self._number}/{self._total}] {run.variant}, seed {run.seed}"

        def on_round(number: int, line: str) -> None:
            self._progress.update(self._task, completed=self._before + number)
            if not self._console.is_terminal:
                self._print(f"{name}: {line}")

        self._progress.update(self._task, description=shown(name))
        if not self._console.is_terminal:
            self._print(f"{name}: starts")
        return RoundLines(on_round)

    def ended(self, run: PlannedRun, result: RunResult) -> None:
        """Print the result of a run."""
        self._before += run.config.federation.rounds
        self._progress.update(self._task, completed=self._before)
        name = f"{run.variant}, seed {run.seed}"
        if result.completed:
            self._print(f"{name}: complete, {run.folder}")
        else:
            self._print(f"{name}: did not complete ({result.status}): {result.details}")

    def _print(self, text: str) -> None:
        self._console.print(
            shown(text), markup=False, emoji=False, highlight=False, soft_wrap=True
        )
