"""A stand-in for CUDA graphs on a CPU: record operations with their memory, re-run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class _Recorder(TorchDispatchMode):
    """Keep each operation with its operands and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, refuse one that tells the host a number."""
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class StandInCapture:
    """Record like CUDA: operations and addresses, none of Python's own work.

    A replay runs the same operations on the same tensors, and writes their results to
    the tensors of the recording. So a number that Python computed stays as it was, and
    a tensor that took another's place is not seen, as in a CUDA graph.

    Attributes
    ----------
    recordings, replays : int
        How often a step was recorded, and replayed.
    """

    def __init__(self, warm_ups: int = 3) -> None:
        self.warm_ups = warm_ups
        self.recordings = self.replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Warm the step up, record it, and return what replays it."""
        for _ in range(self.warm_ups):
            step()
        with _Recorder() as recorder:
            step()
        self.recordings += 1

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, result in recorder.calls:
                again = func(*args, **kwargs)
                for there, new in zip(_tensors(result), _tensors(again), strict=True):
                    if there.data_ptr() != new.data_ptr():
                        there.copy_(new)

        return replay


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
