"""FedAvg in pfl (Apple's simulation framework); needs an environment that has it.

Started by ``benchmarks.peers``, one process for each client that trains at a time.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

from benchmarks.peers_problem import Batch, Problem, write_model, write_times


class Network(nn.Module):
    """The model with the two functions that pfl asks of one."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def loss(self, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of a batch."""
        self.train()
        return nn.functional.cross_entropy(self.classifier(pictures), labels)

    def metrics(self, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return the number of images; accuracy is not part of the comparison."""
        return {"images": Weighted(len(labels), len(labels))}


class OwnBatches(Dataset):  # type: ignore[misc]
    """A client's images of one round, in the batches that the problem gives."""

    def __init__(self, problem: Problem, server_round: int, client: int) -> None:
        super().__init__((problem.held[client][1],), user_id=str(client))
        self._batches = partial(problem.batches, server_round, client)

    def iter(self, batch_size: int | None) -> Iterator[Batch]:  # noqa: A003
        """Return the batches anew: pfl reads them to train, and once to evaluate."""
        return self._batches()


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Note the time at the end of each round, and the model after the first."""

    def __init__(self, folder: Path) -> None:
        self.ends: list[float] = []
        self._folder = folder

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time."""
        self.ends.append(time.time())
        if central_iteration == 0 and pytorch_ops.distributed.global_rank == 0:
            write_model(self._folder, model.pytorch_model.classifier.state_dict())
        return False, Metrics()


def main() -> None:
    """Train all rounds."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    problem = Problem.read(folder)
    # Every process asks for all clients in the same order, and makes its own data.
    asked = iter(range(problem.clients * problem.rounds))
    clock = Clock(folder)

    def made(place: int) -> OwnBatches:
        server_round, client = divmod(place, problem.clients)
        return OwnBatches(problem, server_round + 1, client)

    data = FederatedDataset(made, lambda: next(asked))
    network = Network(problem.model())
    model = PyTorchModel(
        network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0)
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=problem.rounds,
            evaluation_frequency=problem.rounds + 1,
            train_cohort_size=problem.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1,  # the batches hold all epochs
            local_learning_rate=problem.config.client.learning_rate,
            local_batch_size=problem.config.client.batch_size,
        ),
        callbacks=[clock],
    )
    if pytorch_ops.distributed.global_rank == 0:
        write_times(folder, clock.ends)


if __name__ == "__main__":
    main()
