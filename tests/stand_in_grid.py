"""A base of grids that stand in for Flower's in tests and benchmarks."""

from collections.abc import Iterable
from typing import Any, NoReturn

from flwr.app import Message
from flwr.serverapp import Grid


class StandInGrid(Grid):
    """Refuses what neither the ServerApp nor Flower's strategies ask of a grid.

    Subclasses say which nodes are connected, and answer messages.
    """

    def set_run(self, run: Any) -> NoReturn:
        """Refuse: there is no run."""
        raise NotImplementedError

    @property
    def run(self) -> NoReturn:
        """Refuse: there is no run."""
        raise NotImplementedError

    def create_message(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: messages are made with ``Message(...)``."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Refuse: messages are sent and answered in one call."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Refuse: messages are sent and answered in one call."""
        raise NotImplementedError
