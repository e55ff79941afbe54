"""A run's state from round to round: saved as checkpoints, and restored from them."""

from collections.abc import Mapping
from logging import getLogger

from clip2fl_common.config import RunConfig
from clip2fl_common.messages import model_to_arrays
from clip2fl_common.metrics import AccuracyReport
from clip2fl_common.models import ImageClassifier
from server_app.checkpoints import (
    BestRound,
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    load_newest,
    prune,
    refuse_differences,
    save_checkpoint,
)
from server_app.run_folder import BEST_MODEL, RunFolder, rounds_with_checkpoint
from strategy.base import Method
from strategy.recovery import Earlier

logger = getLogger(__name__)


class RunState:
    """Global model and strategy of a run, and its checkpoints.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    folder : RunFolder
        Holds the checkpoints.
    model : ImageClassifier
        Global model; receives the parameters of a restored checkpoint.
    made_with : mapping of str to str
        Fingerprints that must be the same when the run continues.
    environment : mapping of str to str
        Properties that must be the same for bit-identical results: device, versions.

    Attributes
    ----------
    best : BestRound or None
        The best round so far among the rounds with a checkpoint.
    resumed_after : tuple of int
        Rounds after which the run was interrupted and continued.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        model: ImageClassifier,
        made_with: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        self._config = config
        self._folder = folder
        self._model = model
        self._made_with = made_with
        self._environment = environment
        self.best: BestRound | None = None
        self.resumed_after: tuple[int, ...] = ()

    def write(self, server_round: int, strategy: Method) -> None:
        """Write the checkpoint of a round; 0: before the first round."""
        save_checkpoint(
            self._folder.path,
            Checkpoint(
                round=server_round,
                config=self._config.to_flat(),
                made_with=self._made_with,
                environment=self._environment,
                best=self.best,
                resumed_after=self.resumed_after,
                metrics=self._folder.metrics,
                model=self._model.state_dict(),
                strategy=strategy.state(),
            ),
        )

    def keep(
        self,
        server_round: int,
        strategy: Method,
        report: AccuracyReport | None,
    ) -> bool:
        """Write a round's checkpoint; return whether the round is the best so far.

        Parameters
        ----------
        server_round : int
            The round.
        strategy : Method
            The strategy, with its state after the round.
        report : AccuracyReport or None
            Accuracy of the delivered classifier, if it was evaluated.

        Returns
        -------
        bool
        """
        value = getattr(report, self._config.checkpoint.best_metric, None)
        is_best = value is not None and (not self.best or value > self.best.value)
        if is_best:
            assert value is not None
            self.best = BestRound(server_round, value)
        self.write(server_round, strategy)
        return is_best

    def prune(self) -> None:
        """Remove the checkpoints that ``checkpoint.keep`` does not protect."""
        prune(self._folder.path, self._config.checkpoint.keep)

    def find(self) -> Checkpoint:
        """Return the newest complete checkpoint, from which the run continues.

        Raises
        ------
        ResumeError
            If there is none, or the folder contains another run.
        """
        newest = load_newest(self._folder.path)
        refuse_differences(newest, self._config.to_flat(), self._made_with)
        for name, now in self._environment.items():
            then = newest.environment.get(name)
            if then != now:
                logger.warning(
                    "%s was %s before round %d and is %s now: the run goes on, but not "
                    "to the last bit as it would have",
                    name,
                    then,
                    newest.round + 1,
                    now,
                )
        self.best = newest.best
        self.resumed_after = (*newest.resumed_after, newest.round)
        return newest

    def find_best(self) -> Checkpoint | None:
        """Return the best round's checkpoint; None if it is absent or damaged."""
        if self.best is None:
            return None
        try:
            return load_checkpoint(self._folder.path, self.best.round)
        except DamagedCheckpointError as error:
            logger.warning(
                "the checkpoint of the best round %d is damaged (%s); %s stays as it "
                "is until a better round",
                self.best.round,
                error,
                BEST_MODEL,
            )
            return None

    def take(self, checkpoint: Checkpoint, strategy: Method) -> None:
        """Load a checkpoint's state into model and strategy."""
        self._model.load_state_dict(checkpoint.model)
        strategy.load_state(checkpoint.strategy)

    def earlier(self, before: int) -> Earlier | None:
        """Return the run's state after the last round before a given one."""
        for server_round in reversed(rounds_with_checkpoint(self._folder.path)):
            if server_round >= before:
                continue
            try:
                found = load_checkpoint(self._folder.path, server_round)
            except DamagedCheckpointError as error:
                logger.warning(
                    "the checkpoint of round %d is damaged (%s); looking for an "
                    "earlier one",
                    server_round,
                    error,
                )
                continue
            self._model.load_state_dict(found.model)
            return Earlier(model_to_arrays(self._model), found.strategy)
        return None
