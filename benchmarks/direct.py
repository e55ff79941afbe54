"""Run the application without Flower's processes: a process pool calls the clients."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, cast

import torch
from flwr.app import Context, Message, RecordDict

from client_app.app import app
from clip2fl_common.config import RunConfig
from server_app.app import main
from tests.flower_private import act_as_flower_process
from tests.stand_in_grid import StandInGrid


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    act_as_flower_process()


def _started() -> None:
    """Do nothing, in a process that is ready."""


def _answer(message: Message, config: dict[str, Any], place: int, run: int) -> Message:
    context = Context(
        run_id=run,
        node_id=message.metadata.dst_node_id,
        node_config={"partition-id": place},
        state=RecordDict(),
        run_config=config,
    )
    return app(message, context)


class DirectGrid(StandInGrid):
    """Answer messages by calling the ClientApp in long-lived worker processes.

    Parameters
    ----------
    config : RunConfig
        The run configuration that clients see.
    workers : int
        Number of processes, each with one thread.
    run : int
        Flower's id of the run.
    """

    def __init__(self, config: RunConfig, workers: int, run: int = 1) -> None:
        self._config = config.to_flat()
        self._run = run
        self._nodes = list(range(1, workers + 1))
        self._pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start, initargs=(1,)
        )

    def __enter__(self) -> "DirectGrid":
        """Return the grid itself, once the processes have started."""
        # On a busy machine this takes longer than the ServerApp waits for replies.
        for started in [self._pool.submit(_started) for _ in self._nodes]:
            started.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the worker processes."""
        self._pool.shutdown()

    def get_node_ids(self) -> list[int]:
        """Return a node id for each worker."""
        return self._nodes

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the ClientApp's replies."""
        under_way = [
            self._pool.submit(
                _answer,
                message,
                self._config,
                self._nodes.index(message.metadata.dst_node_id),
                self._run,
            )
            for message in messages
        ]
        return [answer.result(timeout) for answer in under_way]


def run_directly(config: RunConfig, workers: int) -> None:
    """Run a federation with the real ServerApp and ClientApp, without Flower between.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    workers : int
        Clients that train at the same time, each in a process with one thread.
    """
    act_as_flower_process()
    with DirectGrid(config, workers) as grid:
        context = Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat()))
        main(grid, context)
