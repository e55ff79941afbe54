"""Pieces of CPU work, each on its own thread."""

import threading
from collections.abc import Iterator

import pytest
import torch

from clip2fl_common.parallel import map_pieces, single_threaded_kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """Let torch use three threads on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_kernels_use_one_thread_and_the_setting_comes_back() -> None:
    with pytest.raises(KeyError), single_threaded_kernels() as before:
        assert (before, torch.get_num_threads()) == (3, 1)
        raise KeyError
    assert torch.get_num_threads() == 3


def test_results_come_in_order_from_threads_without_gradients() -> None:
    weight = torch.ones((), requires_grad=True)
    meeting = threading.Barrier(3, timeout=30)

    def work(piece: int) -> tuple[int, bool, int]:
        meeting.wait()  # passes only if three pieces run at the same time
        return piece, (weight * piece).requires_grad, torch.get_num_threads()

    assert list(map_pieces(work, range(6), CPU)) == [(n, False, 1) for n in range(6)]


def test_pieces_are_taken_as_they_are_needed() -> None:
    """The pieces together may be larger than the memory."""
    taken = []

    def pieces() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    results = map_pieces(lambda n: n, pieces(), CPU)
    next(results)
    assert len(taken) <= 5


def test_error_of_a_piece_is_raised_and_the_setting_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_pieces(lambda n: 1 / n, [1, 0, 2], CPU))
    assert torch.get_num_threads() == 3


def test_other_devices_take_one_piece_after_the_other() -> None:
    main = threading.get_ident()
    results = map_pieces(
        lambda _: threading.get_ident(), range(3), torch.device("meta")
    )
    assert list(results) == [main] * 3
