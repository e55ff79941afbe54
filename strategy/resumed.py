"""A strategy's later rounds: Flower always counts from 1."""

from collections.abc import Callable, Iterable
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategy.log import log


class Continuation(Strategy):
    """Runs a strategy from the round after ``done``.

    Flower's loop runs rounds 1 to ``num_rounds``. Here each of its hooks hands the
    strategy the number that the round has in the whole run; the strategy itself need
    not know that the run was interrupted.

    Parameters
    ----------
    strategy : Strategy
        With the state that it had after round ``done``.
    done : int
        Rounds that are over, at least 1.
    """

    def __init__(self, strategy: Strategy, done: int) -> None:
        self.strategy = strategy
        self.done = done

    def summary(self) -> None:
        """Log where the run goes on, then the strategy's settings."""
        log(
            INFO,
            "\t├──> Continues a run: %d rounds are over, so that Flower's round 1 is "
            "round %d",
            self.done,
            self.done + 1,
        )
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run ``num_rounds`` more rounds from the arrays after round ``done``.

        ``evaluate_fn`` is called after each of them, but not for ``initial_arrays``.
        """

        def evaluate(flower_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if evaluate_fn is None or flower_round == 0:
                return None
            return evaluate_fn(flower_round + self.done, arrays)

        return super().start(
            grid,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of round ``server_round + done``."""
        return self.strategy.configure_train(
            server_round + self.done, arrays, config, grid
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies of round ``server_round + done``."""
        return self.strategy.aggregate_train(server_round + self.done, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluation requests of round ``server_round + done``."""
        return self.strategy.configure_evaluate(
            server_round + self.done, arrays, config, grid
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the evaluations of round ``server_round + done``."""
        return self.strategy.aggregate_evaluate(server_round + self.done, replies)
