"""Requests and replies of a round, made by hand."""

import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from torch import nn

from clip2fl_common import messages
from clip2fl_common.class_gradients import ClassGradient, CodedGradient, Precision
from clip2fl_common.config import Scalar
from clip2fl_common.teacher import Teacher
from strategy.base import Method
from strategy.clients import Clients, SimulatedClients
from strategy.setting import Setting
from tests.defaults import run_config
from tests.stand_in_grid import StandInGrid

M = TypeVar("M", bound=Method)

NODES = (71, 13)
# Number of images of each partition.
IMAGES = 1000


class FakeGrid(StandInGrid):
    """A grid with node ids only; tests pass the messages themselves."""

    def __init__(self, nodes: Sequence[int] = NODES) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        """Return the nodes' ids."""
        return self._nodes

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return no reply."""
        return []


def client_plan(
    clients: int = 4,
    per_round: int = 3,
    seed: int = 7,
    nodes: tuple[int, ...] = NODES,
) -> SimulatedClients:
    """Return a small plan."""
    return SimulatedClients(nodes, clients, per_round, seed, (IMAGES,) * clients)


def safeguards(min_replies: int = 1, **settings: Scalar) -> dict[str, Scalar]:
    """Return settings that concern every method, by configuration key.

    Names that begin with ``privacy`` or ``ema`` belong to those sections; all others
    belong to ``aggregation``.
    """
    return {
        "federation__min_replies": min_replies,
        **{
            name
            if name.startswith(("privacy__", "ema__"))
            else f"aggregation__{name}": value
            for name, value in settings.items()
        },
    }


@dataclass(frozen=True)
class FakeTeacher:
    """The part of a teacher that methods use."""

    prototypes: torch.Tensor
    fingerprint: str = "fingerprint-of-the-teacher"
    name: str = "tiny"

    def text_features(self, names: Sequence[str]) -> torch.Tensor:
        """Return the prototypes."""
        return self.prototypes


def setting(
    clients: Clients,
    shape: tuple[int, int] = (3, 512),
    prototypes: torch.Tensor | None = None,
    /,
    **changes: Scalar,
) -> Setting:
    """Return a setting of small classifiers: C and d, prototypes [C, d]."""
    changed: dict[str, Scalar] = {
        "model__feature_dim": shape[1],
        "partition__clients": max(2, clients.clients_per_round),
        "federation__clients_per_round": clients.clients_per_round,
        **changes,
    }
    config = run_config(**changed)
    names = tuple(f"class-{c}" for c in range(shape[0]))
    teacher = None if prototypes is None else cast(Teacher, FakeTeacher(prototypes))
    return Setting(clients, config, names, torch.device("cpu"), teacher)


def made(
    method: type[M],
    clients: Clients,
    shape: tuple[int, int] = (3, 512),
    prototypes: torch.Tensor | None = None,
    /,
    **changes: Scalar,
) -> M:
    """Return a method of a small run; see `setting`."""
    return method(setting(clients, shape, prototypes, **changes))


def global_model() -> ArrayRecord:
    """Return the arrays of a small model with BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3))
    return messages.model_to_arrays(model)


def configure(
    strategy: Method, arrays: ArrayRecord, server_round: int = 1
) -> list[Message]:
    """Return a round's requests as they arrive, sharing no state with the sender."""
    assert isinstance(strategy.clients, SimulatedClients)
    grid = FakeGrid(strategy.clients.nodes)
    requests = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    return [copy.deepcopy(request) for request in requests]


def random_model(like: ArrayRecord, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return random arrays with the shapes of another model."""
    rng = np.random.default_rng(seed)
    model = {
        name: rng.normal(size=tuple(array.shape)).astype(np.float32)
        for name, array in like.items()
    }
    return {
        name: np.abs(values) if name.endswith("running_var") else values
        for name, values in model.items()
    }


def train_reply(
    request: Message,
    model: Mapping[str, npt.NDArray[np.float32]],
    examples: int,
    gradients: Mapping[int, CodedGradient] | None = None,
    precision: Precision = "full",
    **metrics: float,
) -> Message:
    """Return a good reply to a request; ``_`` in a metric's name becomes ``-``."""
    config = request.content.config_records[messages.CONFIG]
    values: dict[str, int | float] = {
        messages.PARTITION: cast(int, config[messages.PARTITION]),
        messages.NUM_EXAMPLES: examples,
        "loss": 1.0,
        "distillation-loss": 0.0,
        "unreadable-images": 0,
        "seconds-data": 0.1,
        "seconds-gradients": 0.2,
        "seconds-training": 0.3,
    }
    values |= {name.replace("_", "-"): value for name, value in metrics.items()}
    content = RecordDict(
        {
            messages.ARRAYS: ArrayRecord(
                {n: Array(value) for n, value in model.items()}
            ),
            messages.METRICS: MetricRecord(dict(values)),
        }
    )
    if gradients is not None:
        content[messages.GRADIENTS] = messages.gradients_to_arrays(gradients, precision)
    return Message(content, reply_to=request)


def error_reply(request: Message, reason: str, code: int = 2) -> Message:
    """Return an error; by default the one Flower sends after a ClientApp raised."""
    return Message(Error(code, reason), reply_to=request)


def wire_bytes(arrays: Iterable[npt.NDArray[np.generic]]) -> int:
    """Return the size of the arrays in numpy's own format, which Flower uses too."""
    total = 0
    for array in arrays:
        buffer = io.BytesIO()
        np.save(buffer, array)
        total += buffer.tell()
    return total


def random_gradients(
    classes: Sequence[int], shape: tuple[int, int], seed: int
) -> dict[int, ClassGradient]:
    """Return class gradients of a classifier of shape [C, d], each from four images."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for c in classes:
        features = torch.randn(4, shape[1], generator=generator)
        residual = torch.randn(4, shape[0], generator=generator).softmax(dim=1)
        residual[:, c % shape[0]] -= 1  # classes out of range are sent, too
        gradients[c] = ClassGradient(residual.T @ features / 4, residual.mean(0))
    return gradients
