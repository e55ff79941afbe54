"""What a person sees of a run on a SuperLink, and how it can be reached again."""

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import typer

from clip2fl_cli import console
from clip2fl_cli.federation import Federation
from clip2fl_cli.options import CONTROL_ADDRESS
from clip2fl_cli.progress import RunProgress
from clip2fl_cli.signals import Interrupted, interrupting

COMPLETED = "finished:completed"


class Following:
    """Show the log of a run; after Ctrl-C say that the run goes on, and end.

    Parameters
    ----------
    superlink : str
        ``HOST:PORT`` of the SuperLink's Control API.
    certificates : Path
        The federation's ca.crt.
    verbose : bool
        Whether to show Flower's log, too.

    Attributes
    ----------
    output : RunOutput
        Stream for the run's log.
    run : str or None
        The run's id, once it is known.
    """

    def __init__(self, superlink: str, certificates: Path, verbose: bool) -> None:
        self._options = ["--root-certificates", str(certificates)]
        if superlink != CONTROL_ADDRESS:
            self._options += ["--superlink", superlink]
        self._progress = RunProgress(console.out, verbose)
        self._stack = ExitStack()
        self.output = self._progress.output
        self.run: str | None = None
        self._outcome: tuple[str, str] | None = None

    def __enter__(self) -> Self:
        """Begin the display; signals raise `Interrupted`."""
        self._stack.enter_context(interrupting())
        self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the display; after a signal, end the command.

        Raises
        ------
        typer.Exit
            After a signal, with 128 and its number.
        """
        self._stack.__exit__(kind, error, trace)
        if not isinstance(error, Interrupted):
            return
        if self.run is None:
            console.tell(
                f"clip2fl: {error}; a run that has started goes on: "
                f"{self._command('attach')} follows it, {self._command('stop')} ends it"
            )
        else:
            console.tell(f"clip2fl: {error}; run {self.run} goes on")
            self._say_commands()
        self._name_log()
        raise typer.Exit(128 + error.signum) from None

    def to_the_end(self, link: Federation) -> None:
        """Pass on the run's log until the run has ended."""
        assert self.run is not None
        self._outcome = link.follow(self.run, self.output)

    def finish(self, *, detached: bool = False, again: Sequence[str] = ()) -> None:
        """Say how the run ended, and how to go on if it did not complete.

        Parameters
        ----------
        detached : bool
            Whether the run was only started.
        again : sequence of str
            The command that started it, if it is known.

        Raises
        ------
        typer.Exit
            With 0 if the run completed, else with 1.
        """
        if detached:
            self._say_commands()
            self._name_log()
            raise typer.Exit(0)
        assert self._outcome is not None
        status, details = self._outcome
        console.answer(f"{status} ({details})" if details else status)
        if status == "unknown":
            console.tell(f"clip2fl: run {self.run} may go on")
            self._say_commands()
        elif status != COMPLETED and self.output.named is not None:
            resumed = ["--set", f'run.resume="{self.output.named}"']
            command = (
                shlex.join([*again, *resumed])
                if again
                else "clip2fl federate with the same configuration and "
                + shlex.join(resumed)
            )
            console.tell(f"clip2fl: to go on after its last checkpoint: {command}")
        self._name_log()
        raise typer.Exit(0 if status == COMPLETED else 1)

    def _say_commands(self) -> None:
        assert self.run is not None
        console.tell(f"clip2fl: to follow it: {self._command('attach', self.run)}")
        console.tell(f"clip2fl: to end it: {self._command('stop', self.run)}")

    def _command(self, name: str, *arguments: str) -> str:
        return shlex.join(["clip2fl", name, *arguments, *self._options])

    def _name_log(self) -> None:
        if self.output.log.path is not None:
            console.tell(f"clip2fl: the whole log is in {self.output.log.path}")
