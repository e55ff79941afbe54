"""The problem that all peers solve, and how their models are compared."""

from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.peers_problem import Problem, write_model
from client_app.training import LocalObjective, train_locally
from clip2fl_common.randomness import generator
from tests.defaults import run_config

CONFIG = run_config(method="fedavg", client__epochs=2, client__batch_size=8)


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
