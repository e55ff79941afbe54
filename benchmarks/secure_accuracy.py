"""Measure what secure aggregation does to the accuracy of a single round.

    python -m benchmarks.secure_accuracy --run-config conf/demo.toml --seed 7 --seed 8

Two runs that differ by a rounding error drift apart within a few rounds, as training
amplifies any difference, so comparing whole runs says little. Here each round of a
plain run is repeated from that run's own state before the round, with secure
aggregation. The clients then train bit for bit the same models, and only the sums
differ.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from benchmarks.direct import DirectGrid, run_directly
from benchmarks.measure import markdown, write_results
from clip2fl_cli.configuration import resolve
from clip2fl_cli.runs import FinishedRun
from clip2fl_common import messages
from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.devices import resolve_device
from clip2fl_common.metrics import FEDAVG_HEAD
from clip2fl_common.models import build_model
from clip2fl_common.teacher import Teacher, load_teacher
from server_app.checkpoints import load_checkpoint
from server_app.console import HEAD_TITLES
from server_app.evaluation import Evaluator
from server_app.run_data import RunData
from strategy.base import Method
from strategy.clients import SimulatedClients
from strategy.registry import method_named
from strategy.setting import Setting

Balanced = dict[str, float]


class Rounds:
    """Single rounds of a configuration, each from a given state.

    Parameters
    ----------
    config : RunConfig
        The configuration, ``"auto"`` in it or not.
    grid : Grid
        Answers requests.
    run : int
        Flower's id of the run.
    nodes : sequence of int
        The grid's nodes.
    """

    def __init__(
        self, config: RunConfig, grid: Grid, run: int, nodes: Sequence[int]
    ) -> None:
        self._data = RunData.load(config)
        self._config = config.for_classes(len(self._data.class_names))
        self._grid = grid
        self._run = run
        self._nodes = tuple(nodes)
        self._device = resolve_device(config.device)
        self._teacher = self._load_teacher()

    def _load_teacher(self) -> Teacher | None:
        if not method_named(self._config.method).needs_teacher:
            return None
        named = self._config.teacher
        return load_teacher(
            named.model,
            named.pretrained,
            self._device,
            prompt=named.prompt,
            batch_size=named.batch_size,
        )

    def _method(self) -> Method:
        images = self._data.images_per_client
        drawn = self._config.federation.clients_per_round
        clients = SimulatedClients(
            self._nodes, len(images), drawn, self._config.seed, images
        )
        names = self._data.class_names
        setting = Setting(
            clients,
            self._config,
            names,
            self._device,
            self._teacher,
            run=str(self._run),
        )
        return method_named(self._config.method)(setting)

    def accuracy(self, folder: Path, server_round: int) -> Balanced:
        """Return the heads' balanced accuracy after a round from a run's checkpoint.

        Parameters
        ----------
        folder : Path
            Folder of the run, with the checkpoint before the round.
        server_round : int
            The round.
        """
        config, before = self._config, load_checkpoint(folder, server_round - 1)
        model = build_model(
            config.model.name, len(self._data.class_names), config.model.feature_dim
        )
        model.load_state_dict(before.model)
        method = self._method()
        method.load_state(before.strategy)
        requests = method.configure_train(
            server_round, messages.model_to_arrays(model), ConfigRecord(), self._grid
        )
        replies = self._grid.send_and_receive(requests)
        arrays, _ = method.aggregate_train(server_round, replies)
        assert arrays is not None, method.round.lost
        messages.load_arrays(model, arrays)
        delivered = method.delivered_model(model)
        heads = method.delivered_heads(delivered.state_dict())
        evaluator = Evaluator(
            self._data.dataset,
            self._data.groups,
            0,
            config.evaluation.batch_size,
            self._device,
            config.seed,
            0.0,
        )
        reports = evaluator.evaluate(
            delivered, {**heads, FEDAVG_HEAD: delivered.classifier}, final=True
        )
        return {head: report.balanced for head, report in reports.items()}


def differences(
    config: RunConfig, folder: Path, workers: int
) -> Iterator[tuple[int, Balanced, Balanced]]:
    """Yield each round with the accuracy of a plain run and of its secure repetition.

    Parameters
    ----------
    config : RunConfig
        The run's configuration, without a folder.
    folder : Path
        Where the plain run goes.
    workers : int
        Clients that train at the same time.
    """
    rounds = config.federation.rounds
    own: dict[str, Scalar] = {
        "run.dir": str(folder),
        "run.name": "plain",
        "checkpoint.keep": rounds + 1,
    }
    plain = RunConfig.from_run_config({**config.to_flat(), **own})
    run_directly(plain, workers)
    finished = FinishedRun.read(folder / "plain")
    secure = RunConfig.from_run_config({**plain.to_flat(), "aggregation.secure": True})
    # A client takes part in no round of a run twice, also if this is called again.
    run = int.from_bytes(os.urandom(7), "big")
    with DirectGrid(secure, workers, run) as grid:
        repeated = Rounds(secure, grid, run, grid.get_node_ids())
        for line in finished.rounds:
            server_round = cast(int, line["round"])
            told = {h: cast(float, a["balanced"]) for h, a in line["accuracy"].items()}
            yield server_round, told, repeated.accuracy(folder / "plain", server_round)


def rows(
    seed: int, found: Sequence[tuple[int, Balanced, Balanced]]
) -> Iterator[list[str]]:
    """Yield a row of the table for each head."""
    for head in found[-1][1]:
        plain = [one[head] for _, one, _ in found]
        secure = [other[head] for _, _, other in found]
        apart = [b - a for a, b in zip(plain, secure, strict=True)]
        yield [
            str(seed),
            HEAD_TITLES[head],
            str(len(found)),
            f"{statistics.fmean(plain):.2f}",
            f"{statistics.fmean(secure):.2f}",
            f"{statistics.fmean(apart):+.3f}",
            f"{max(map(abs, apart)):.2f}",
        ]


def main() -> None:
    """Repeat all rounds of a run for each seed; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    table = []
    header = ["seed", "head", "rounds", "plain, %", "secure, %"]
    header += ["mean difference", "largest difference"]
    for seed in arguments.seed:
        config = resolve(arguments.run_config, arguments.settings, {"seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            found = list(differences(config, Path(folder), arguments.workers))
        table += list(rows(seed, found))
        print(markdown(header, table), flush=True)
    name = arguments.run_config.stem
    write_results(
        f"secure-accuracy-{name}",
        f"Accuracy of single rounds with secure aggregation: {name}",
        "Each round of a plain run, and the same round from the same state with secure "
        "aggregation: balanced accuracy on the test images, mean over the rounds, "
        f"percent. Differences are in points.\n\n{markdown(header, table)}",
        torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
