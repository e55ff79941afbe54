"""Test which clients are left out after a bad model, and for how long."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategy.recovery import LEFT_OUT_ROUNDS, Recovery


def test_makers_of_the_bad_model_are_left_out_for_some_rounds() -> None:
    recovery = Recovery()
    recovery.note(4, {1: 2.0, 3: 9.0})
    assert recovery.origin == 4
    assert recovery.leave_out(5) == [1, 3]
    everyone = range(10)
    for server_round in range(5, 6 + LEFT_OUT_ROUNDS):
        assert recovery.absent(server_round, everyone, 4) == {1, 3}
    assert recovery.absent(6 + LEFT_OUT_ROUNDS, everyone, 4) == set()


def test_the_second_time_takes_twice_as_long() -> None:
    recovery = Recovery()
    recovery.note(4, {1: 2.0, 3: 9.0})
    recovery.leave_out(5)
    recovery.note(20, {3: 9.0})
    assert recovery.leave_out(21) == [3]
    last = 21 + 2 * LEFT_OUT_ROUNDS
    assert recovery.absent(last, range(10), 4) == {3}
    assert recovery.absent(last + 1, range(10), 4) == set()


def test_where_all_made_it_the_shortest_updates_come_back() -> None:
    recovery = Recovery()
    recovery.note(1, {5: 2.0, 6: 30.0, 7: 1.0})
    recovery.leave_out(2)
    assert recovery.absent(3, [5, 6, 7], 2) == {6}
    assert recovery.absent(3, [5, 6, 7], 1) == {5, 6}
    assert recovery.absent(3, [6], 1) == set()


@given(
    notes=st.lists(
        st.dictionaries(st.integers(0, 2**62), st.floats(0, 1e12), max_size=4),
        max_size=4,
    )
)
def test_state_is_whole(notes: list[dict[int, float]]) -> None:
    first, second = Recovery(), Recovery()
    for server_round, lengths in enumerate(notes, start=1):
        first.note(server_round, lengths)
        first.leave_out(server_round + 1)
    second.load_state(first.state())
    clients = {client for lengths in notes for client in lengths}
    for server_round in range(1, 60):
        assert first.absent(server_round, clients, 1) == second.absent(
            server_round, clients, 1
        )
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name])
    assert second.succeeded == bool(notes)


@pytest.mark.parametrize("available", [0, 1, 5])
def test_nobody_is_left_out_at_first(available: int) -> None:
    assert Recovery().absent(1, range(available), 1) == set()
