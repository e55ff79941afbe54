"""The problem that all peers solve, and how their models are compared."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

import server_app.app
from benchmarks import peers, peers_flower, peers_problem
from benchmarks.peers_problem import Problem, write_model
from client_app.training import LocalObjective, train_locally
from clip2fl_common.randomness import generator
from server_app.checkpoints import load_checkpoint
from tests.defaults import run_config
from tests.flower_private import act_as_flower_process
from tests.in_process_grid import InProcessGrid
from tests.stand_in_grid import StandInGrid

CONFIG = run_config(
    method="fedavg",
    client__epochs=2,
    client__batch_size=8,
    federation__clients_per_round=3,
    checkpoint__keep=10,
)


def test_batches_are_those_of_local_training() -> None:
    """A plain loop over them gives the model that this program's clients train."""
    problem = Problem(CONFIG)
    plain, ours = problem.model(), problem.model()
    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=CONFIG.client.learning_rate)
    for pictures, labels in problem.batches(3, 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(pictures), labels).backward()
        optimizer.step()
    images, labels = problem.held[1]
    train_locally(
        ours,
        images,
        labels,
        None,
        LocalObjective(),
        epochs=2,
        batch_size=8,
        learning_rate=CONFIG.client.learning_rate,
        crop_padding=CONFIG.client.crop_padding,
        generator=generator(CONFIG.seed, "batches", 3, 1),
    )
    for name, expected in ours.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], expected, msg=name)


class TextbookGrid(StandInGrid):
    """Calls the textbook ClientApp in this process; each node is one client."""

    def get_node_ids(self) -> list[int]:
        """Return one node for each client."""
        return [10 + client for client in range(CONFIG.partition.clients)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the ClientApp's replies."""
        return [
            peers_flower.client_app(
                message,
                Context(
                    run_id=1,
                    node_id=message.metadata.dst_node_id,
                    node_config={"partition-id": message.metadata.dst_node_id - 10},
                    state=RecordDict(),
                    run_config={},
                ),
            )
            for message in messages
        ]


def test_textbook_apps_average_the_model_of_this_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.dumps(CONFIG.to_flat())
    (tmp_path / peers_problem.CONFIG).write_text(settings, "utf-8")
    monkeypatch.setattr("sys.argv", ["peers_flower", str(tmp_path)])
    act_as_flower_process(monkeypatch.setattr)
    threads = torch.get_num_threads()
    peers_flower.server_app(TextbookGrid(), Context(1, 0, {}, RecordDict(), {}))
    torch.set_num_threads(threads)
    ends = json.loads((tmp_path / peers_problem.TIMES).read_text("utf-8"))
    assert len(ends) == CONFIG.federation.rounds and ends == sorted(ends)
    own = tmp_path / "own"
    own.mkdir()
    (own / peers_problem.CONFIG).write_text(
        json.dumps({**CONFIG.to_flat(), "run.dir": str(own), "run.name": "run"}),
        "utf-8",
    )
    grid = InProcessGrid(Problem.read(own).config, CONFIG.partition.clients)
    flat = Problem.read(own).config.to_flat()
    server_app.app.main(grid, Context(1, 0, {}, RecordDict(), flat))
    write_model(own, load_checkpoint(own / "run", 1).model)
    start = Problem(CONFIG).model().state_dict()
    assert peers.largest_difference(own, tmp_path, start) < peers.TOLERANCE


def test_difference_is_relative_to_the_step_and_leaves_statistics_out(
    tmp_path: Path,
) -> None:
    start = {"weight": torch.zeros(3), "bn.running_mean": torch.zeros(1)}
    places = []
    for name, change, mean in (("a", 0.0, 0.0), ("b", 0.25, 9.0)):
        places.append(tmp_path / name)
        places[-1].mkdir()
        weight = torch.tensor([0.5, -2.0, 1.0 + change])
        state = {"weight": weight, "bn.running_mean": torch.tensor([mean])}
        write_model(places[-1], state)
    assert peers.largest_difference(places[1], places[0], start) == 0.125
    assert peers.largest_difference(places[0], places[0], start) == 0.0


def test_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers, "measure", lambda *_: peers.Measured([1.0], [1.0], [1.0])
    )
    monkeypatch.setattr(peers, "largest_difference", lambda *_: 1e-3)
    with pytest.raises(RuntimeError, match="averaged another model than clip2fl run"):
        peers.compare(CONFIG, [peers.OURS, peers.FLOWER], 1, "")
    monkeypatch.setattr(peers, "largest_difference", lambda *_: 1e-6)
    found = peers.compare(CONFIG, [peers.OURS, peers.FLOWER], 2, "")
    assert found[peers.FLOWER].later == [1.0, 1.0]
    text = peers.page(found, CONFIG, 2)
    assert "pfl was not installed" in text and "| Flower | 1 (1-1) | 1 (1-1) |" in text
