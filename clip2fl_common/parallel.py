"""Run CPU work in large pieces, each on one thread.

Torch splits every operation among its threads, and all threads wait for the last one.
Small operations gain nothing from this. On shared cores they lose much: one delayed
thread delays every operation. Independent pieces, each on one thread, keep all cores
busy without waiting.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_threaded_kernels() -> Iterator[int]:
    """Limit torch operations to one CPU thread; yield the number used before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def map_pieces(
    function: Callable[[Item], Result], pieces: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield a function's results for independent pieces of work, without gradients.

    On a CPU, as many pieces run at a time as torch has threads; the result does not
    depend on that number. On other devices one piece follows the other.

    Parameters
    ----------
    function : callable
        Called with one piece; must not change data that other calls read.
    pieces : iterable
        Read one by one, a few ahead of the results, so that they need not all be in
        memory.
    device : torch.device
        Device on which the function computes.

    Yields
    ------
    Result
        Results in the order of the pieces.
    """

    def call(piece: Item) -> Result:
        with torch.no_grad():  # each thread has its own setting
            return function(piece)

    if device.type != "cpu":
        yield from map(call, pieces)
        return
    with single_threaded_kernels() as threads, ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Result]] = deque()
        for piece in pieces:
            under_way.append(pool.submit(call, piece))
            if len(under_way) > threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
