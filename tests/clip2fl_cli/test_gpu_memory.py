"""The prediction of a simulation's GPU memory."""

import re
import subprocess
from typing import Any

import pytest
import torch
from torch import nn

from clip2fl_cli import gpu_memory
from clip2fl_cli.gpu_memory import (
    MIB,
    client_bytes,
    free_gpu_bytes,
    memory_warning,
    server_bytes,
)
from clip2fl_common.models import ImageClassifier
from tests.defaults import run_config

PAPER: dict[str, Any] = {"model__name": "resnet8", "device": "auto"}
MANY_CLASSES: dict[str, Any] = {
    "dataset__name": "imagenet-lt",
    "dataset__root": "/images",
    "dataset__train_list": "/train.txt",
    "dataset__test_list": "/test.txt",
}


class TwoLayers(ImageClassifier):
    """A model whose kept activations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__(pooled_dim=5, num_classes=10, feature_dim=7)
        self.first = nn.Linear(3 * 32 * 32, 5)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Return five numbers of each image."""
        return self.first(images.flatten(1)).sigmoid()  # type: ignore[no-any-return]


def test_activations_are_those_of_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pixels, the sigmoid's result (kept twice, counted once) and the features."""
    monkeypatch.setattr(
        "clip2fl_common.models.build_model", lambda name, classes, dim: TwoLayers()
    )
    parameters, saved, largest = gpu_memory._model_bytes(run_config())
    assert parameters == 4 * (3072 * 5 + 5 + 5 * 7 + 7 + 7 * 10 + 10)
    assert saved == 4 * (3072 + 5 + 7)
    assert largest == 4 * 3072


def test_prediction_grows_with_what_takes_memory() -> None:
    plain = client_bytes(run_config(**PAPER))
    assert 800 * MIB < plain < 2000 * MIB
    larger: list[dict[str, Any]] = [
        {"client__batch_size": 256},
        {"client__optimizer": "adam"},
        {"dataset__image_size": 64},
        {"teacher__model": "ViT-B-32", "method": "clip2fl"},
    ]
    for change in larger:
        assert client_bytes(run_config(**{**PAPER, **change})) > plain, change
    many = run_config(**PAPER, **MANY_CLASSES)
    assert server_bytes(many) > server_bytes(run_config(**PAPER))


def test_random_numbers_of_the_caller_stay() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    client_bytes(run_config())
    assert torch.equal(state, torch.random.get_rng_state())


def test_warning_names_a_share_with_which_it_fits() -> None:
    config = run_config(**PAPER)
    each, server = client_bytes(config), server_bytes(config)
    assert memory_warning(config, 0.25, 16, server + 4 * each) == ""
    line = memory_warning(config, 0.25, 16, server + 4 * each - 1)
    assert "4 clients at once" in line and "\n" not in line
    found = re.search(r"--gpus-per-client (\S+) makes it 3 at a time", line)
    assert found is not None
    assert memory_warning(config, float(found[1]), 16, server + 3 * each) == ""
    # The cores allow only two at once.
    assert memory_warning(config, 0.25, 2, server + 2 * each) == ""
    alone = memory_warning(config, 1.0, 16, server)
    assert "1 clients at once" in alone and "batch-size" in alone


@pytest.mark.parametrize("fitting", range(1, 30))
def test_share_lets_exactly_so_many_train(fitting: int) -> None:
    assert int(1 / gpu_memory._share(fitting)) == fitting


def test_nothing_is_said_without_a_gpu() -> None:
    assert memory_warning(run_config(**PAPER), 0.0, 16, 1) == ""
    assert memory_warning(run_config(**PAPER), 0.25, 16, None) == ""
    assert memory_warning(run_config(**{**PAPER, "device": "cpu"}), 0.25, 16, 1) == ""


def test_fullest_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked: list[list[str]] = []

    def answer(text: str) -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            return subprocess.CompletedProcess([], 0, stdout=text)

        monkeypatch.setattr("subprocess.run", run)

    answer("80000\n512\n")
    assert free_gpu_bytes() == 512 * MIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert free_gpu_bytes() == 512 * MIB
    assert ["--id=0,3" in command for command in asked] == [False, True]
    answer("[N/A]\n")
    assert free_gpu_bytes() is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert free_gpu_bytes() is None
