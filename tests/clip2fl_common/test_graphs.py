"""The bookkeeping of recorded steps, with a stand-in for CUDA's recording."""

import logging
from collections.abc import Callable

import pytest
import torch

from clip2fl_common.graphs import Capture, Kept, Replayed, capture_for, run_directly
from tests.recording import StandInCapture


class Counter:
    """A step with a state: adds inputs to a sum, and counts its calls there."""

    def __init__(self) -> None:
        self.sum = torch.zeros(3)
        self.calls = torch.zeros((), dtype=torch.int64)

    def __call__(
        self, values: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        weighted = values if weights is None else values * weights[:, None]
        self.calls += 1
        self.sum += weighted.sum(0) / self.calls

    @property
    def state(self) -> list[torch.Tensor]:
        """Return what the step changes."""
        return [self.sum, self.calls]


def run(capture: Capture) -> tuple[Counter, Replayed]:
    """Take steps of three shapes in turn, each of them more than once."""
    counter = Counter()
    replayed = Replayed(counter, counter.state, capture, "counting")
    drawing = torch.Generator().manual_seed(0)
    for rows, weighted in ((4, 0), (4, 0), (2, 0), (4, 1), (4, 0), (2, 0), (4, 1)):
        values = torch.randn(rows, 3, generator=drawing)
        weights = torch.rand(rows, generator=drawing) if weighted else None
        replayed(values, weights)
    return counter, replayed


def test_replays_equal_direct_steps_to_the_last_bit() -> None:
    """The warm-up and the recording leave no trace; each shape is recorded once."""
    expected, _ = run(run_directly)
    for warm_ups in (0, 3):
        capture = StandInCapture(warm_ups)
        found, _ = run(capture)
        assert torch.equal(found.sum, expected.sum)
        assert found.calls == expected.calls == 7
        assert (capture.recordings, capture.replays) == (3, 7)


def test_state_may_be_set_between_steps() -> None:
    """Replays read the state at its address."""
    counter, replayed = run(StandInCapture())
    counter.sum.zero_()
    counter.calls.zero_()
    replayed(torch.ones(2, 3), None)
    assert counter.calls == 1
    assert counter.sum.tolist() == [2.0, 2.0, 2.0]


def test_inputs_are_copied() -> None:
    """The caller's tensors may change or go away; they are never written to."""
    counter = Counter()
    replayed = Replayed(counter, counter.state, StandInCapture(), "counting")
    values = torch.ones(2, 3)
    replayed(values)
    values.fill_(100)
    replayed(torch.zeros(2, 3))
    assert counter.sum.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("fails_while", ["warming up", "recording"])
def test_step_that_cannot_be_recorded_runs_directly_with_one_line(
    caplog: pytest.LogCaptureFixture, fails_while: str
) -> None:
    attempts = 0

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        nonlocal attempts
        attempts += 1
        if fails_while == "recording":
            step()
        raise RuntimeError("CUDA error: not permitted\nCompile with ...")

    expected, _ = run(run_directly)
    with caplog.at_level(logging.WARNING, "flwr"):
        found, _ = run(capture)
    assert torch.equal(found.sum, expected.sum) and found.calls == 7
    assert attempts == 1
    (line,) = caplog.messages
    assert line == (
        "no CUDA graph of counting (CUDA error: not permitted); it runs step by step, "
        "more slowly"
    )


def test_step_that_needs_a_number_of_the_device_is_not_recorded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As CUDA refuses it; without this the stand-in would accept wrong steps."""
    total = torch.zeros(())

    def step(values: torch.Tensor) -> None:
        total.add_(float(values.max()))

    replayed = Replayed(step, [total], StandInCapture(), "looking")
    with caplog.at_level(logging.WARNING, "flwr"):
        for value in (1.0, 2.0):
            replayed(torch.tensor([value]))
    assert float(total) == 3.0
    assert "no CUDA graph of looking" in caplog.text


def test_other_errors_are_not_hidden() -> None:
    def step(values: torch.Tensor) -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        Replayed(step, [], StandInCapture(), "failing")(torch.zeros(1))


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert capture_for(torch.device("cpu")) is None


def test_the_values_used_last_are_kept() -> None:
    made = []

    def value(key: int) -> int:
        made.append(key)
        return -key

    kept: Kept[int] = Kept(2)
    for key in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, which was used before 1
        assert kept.of(key, lambda key=key: value(key)) == -key  # type: ignore[misc]
    assert made == [1, 2, 3, 2]


def test_last_batches_of_all_sizes_share_one_buffer() -> None:
    """Otherwise each size of a last batch would hold memory of its own for good."""
    places: dict[int, int] = {}

    def step(values: torch.Tensor) -> None:
        places[len(values)] = values.untyped_storage().data_ptr()
        total.add_(values.sum())

    total = torch.zeros(())
    replayed = Replayed(step, [total], StandInCapture(), "adding")
    for rows in (8, *range(1, 9)):
        replayed(torch.full((rows, 3), float(rows)))
    assert len(places) == 8 and len(set(places.values())) == 1
    assert total == 3 * (64 + sum(n * n for n in range(1, 9)))
    strided = torch.arange(6.0).view(2, 3).T  # the layout of an input stays as it is
    before = float(total)
    replayed(strided)
    assert total == before + 15
