"""Each hook of a continued run gets the number that its round has in the whole run."""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import Strategy

from strategy.resumed import Continuation
from tests.stand_in_grid import StandInGrid

HOOKS = ("configure_train", "aggregate_train", "configure_evaluate")
DONE = 4


class Recorder(Strategy):
    """Notes the round number of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def configure_train(self, server_round: int, *_: Any) -> Any:
        self.calls.append(("configure_train", server_round))
        return []

    def aggregate_train(self, server_round: int, *_: Any) -> Any:
        self.calls.append(("aggregate_train", server_round))
        return None, None

    def configure_evaluate(self, server_round: int, *_: Any) -> Any:
        self.calls.append(("configure_evaluate", server_round))
        return []

    def aggregate_evaluate(self, server_round: int, *_: Any) -> Any:
        self.calls.append(("aggregate_evaluate", server_round))

    def summary(self) -> None:
        """Say nothing."""


class _NoNodes(StandInGrid):
    def get_node_ids(self) -> list[int]:
        return []

    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> list[Any]:
        return list(messages)


def test_every_hook_and_the_evaluation_count_from_the_rounds_that_are_over() -> None:
    recorder = Recorder()
    evaluated: list[int] = []
    Continuation(recorder, DONE).start(
        _NoNodes(),
        ArrayRecord(),
        num_rounds=2,
        train_config=ConfigRecord(),
        evaluate_config=ConfigRecord(),
        evaluate_fn=lambda server_round, _: evaluated.append(server_round),
    )
    hooks = (*HOOKS, "aggregate_evaluate")
    assert recorder.calls == [
        (hook, server_round) for server_round in (5, 6) for hook in hooks
    ]
    assert evaluated == [5, 6]
