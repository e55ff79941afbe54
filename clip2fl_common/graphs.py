"""Record a step on fixed memory once, and replay it: CUDA graphs.

A GPU computes a small operation faster than Python can start it. A CUDA graph starts
all operations of a step at once. It always reads and writes the same memory, so inputs
are copied into buffers that stay where they are, and the step writes its results into
tensors that outlive it. `Replayed` keeps these buffers; `cuda_graph` records.

What the bookkeeping promises is tested on a CPU with a stand-in for CUDA's recording.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import cache, partial
from logging import getLogger
from typing import Generic, TypeVar

import torch

# Flower's log shows the lines of a client at this level, other logs only warnings.
log = getLogger("flwr")

Step = Callable[..., None]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a step a few times to warm up, records it, and returns what replays it. The
recording itself may run the step or not. Raises RuntimeError if it is not possible."""

# PyTorch's documentation asks for a few runs before a capture: libraries allocate their
# workspaces then, which a capture must not do.
WARM_UPS = 3


Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values that are made once for each key; the last ones that were used are kept.

    Parameters
    ----------
    number : int
        How many are kept. Each recording holds memory of the device.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def of(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key; make it if it is not kept."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.number:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


class Replayed:
    """A step that is recorded once for each shape of its inputs, and then replayed.

    The first call with new shapes records. It leaves every tensor of ``state`` as one
    run of the step leaves it: what the warm-up changed is set back. If a step cannot be
    recorded, one line is logged, and it runs without a recording from then on, on the
    same buffers.

    Parameters
    ----------
    step : callable
        Called with tensors, or None in their places. It computes on the device only:
        every number that changes from call to call must be an input or in ``state``.
    state : iterable of Tensor
        All tensors that the step changes, and that the caller reads or sets. They stay
        at their addresses; set them with ``copy_`` and ``zero_``.
    capture : Capture
        How a step is recorded, such as `cuda_graph`.
    name : str
        Name of the step in the log.
    """

    def __init__(
        self, step: Step, state: Iterable[torch.Tensor], capture: Capture, name: str
    ) -> None:
        self._step = step
        self._state = list(state)
        self._capture = capture
        self._name = name
        # By place and type of an input: as long as the largest one so far.
        self._buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._recorded: dict[
            tuple[tuple[torch.Size, torch.dtype] | None, ...],
            tuple[tuple[torch.Tensor | None, ...], Callable[[], None]],
        ] = {}

    def __call__(self, *inputs: torch.Tensor | None) -> None:
        """Run the step on copies of the inputs.

        Parameters
        ----------
        *inputs : Tensor or None
            On the device of the step. The shapes and types, and which are None, decide
            which recording is replayed.
        """
        key = tuple(None if i is None else (i.shape, i.dtype) for i in inputs)
        if key not in self._recorded:
            self._recorded[key] = self._record(inputs)
        buffers, replay = self._recorded[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            if buffer is not None and tensor is not None:
                buffer.copy_(tensor)
        replay()

    def _record(
        self, inputs: tuple[torch.Tensor | None, ...]
    ) -> tuple[tuple[torch.Tensor | None, ...], Callable[[], None]]:
        """Return new buffers, and what runs the step on them; keep the state."""
        buffers = tuple(
            None if tensor is None else self._copied(place, tensor)
            for place, tensor in enumerate(inputs)
        )
        on_buffers = partial(self._step, *buffers)
        before = [tensor.detach().clone() for tensor in self._state]
        replay: Callable[[], None] = on_buffers
        if self._capture is not run_directly:
            try:
                replay = self._capture(on_buffers)
            except RuntimeError as error:
                line = str(error).partition("\n")[0]
                text = "no CUDA graph of %s (%s); it runs step by step, more slowly"
                log.warning(text, self._name, line)
                self._capture = run_directly
        with torch.no_grad():
            for tensor, kept in zip(self._state, before, strict=True):
                tensor.copy_(kept)
        return buffers, replay

    def _copied(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in memory that smaller inputs in the same place share.

        Last batches may have any size, and each recording would hold one of its own.
        """
        if not tensor.is_contiguous():
            return tensor.clone()
        kept = self._buffers.get((place, tensor.dtype))
        if kept is None or len(kept) < tensor.numel():
            kept = tensor.new_empty(tensor.numel())
            self._buffers[place, tensor.dtype] = kept
        return kept[: tensor.numel()].view(tensor.shape).copy_(tensor)


def run_directly(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step itself: a `Capture` that records nothing."""
    return step


def capture_for(device: torch.device) -> Capture | None:
    """Return how steps on a device are recorded; None if that does not pay there."""
    return cuda_graph(device) if device.type == "cuda" else None


@cache
def cuda_graph(device: torch.device) -> Capture:
    """Return a `Capture` with CUDA graphs; the same one for the same device.

    All graphs of a device share one stream and one memory pool. The steps of a process
    run one after the other, and each leaves its results in tensors outside the pool. So
    a graph may overwrite whatever another one has left in the pool.

    Parameters
    ----------
    device : torch.device
        A CUDA device.

    Returns
    -------
    Capture
    """
    # Libraries keep a workspace for each stream, so there is one, used to warm up too.
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context: after a failure the inner one leaves the stream set.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            with torch.cuda.graph(graph, pool, stream):
                step()
        replay: Callable[[], None] = graph.replay
        return replay

    return capture
