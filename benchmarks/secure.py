"""Measure what secure aggregation adds to a round: CPU seconds and bytes.

    python -m benchmarks.secure --clients 4 16 --classes 10 100 1000

Runs the real exchanges of both sides in one process, with made-up updates in place of
training. Sizes are those of the messages' arrays. A vector larger than
``--largest-mb`` is not computed; its size is printed all the same.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from benchmarks.measure import markdown
from client_app.secure_sum import SecureParty
from clip2fl_common import messages
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.config import RunConfig, Scalar, defaults
from clip2fl_common.files import CACHE_VARIABLE
from clip2fl_common.messages import (
    ArrayFields,
    GradientFormat,
    ReplyField,
    TrainRequest,
)
from clip2fl_common.messages.secure import SecureRequest
from clip2fl_common.messages.sums import SumFormat
from clip2fl_common.models import build_model
from strategy.clients import SimulatedClients
from strategy.outliers import LengthRule
from strategy.replies import ReplyCheck
from strategy.requests import Requests
from strategy.secure_sums import SecureSums, SumCheck
from strategy.setting import Setting
from tests.flower_private import act_as_flower_process
from tests.stand_in_grid import StandInGrid

# What clients send, each with a method that asks for it.
STATISTICS: dict[str, tuple[str, list[str]]] = {
    "model": ("fedavg", []),
    "model, class moments": ("fedlda", [messages.MOMENTS]),
    "model, class gradients": ("clip2fl", [messages.GRADIENTS]),
}
IMAGES = 100


class Parties(StandInGrid):
    """Answers the exchanges besides training, and counts the clients' seconds."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.seconds = 0.0

    def get_node_ids(self) -> list[int]:
        """Return the only node, which simulates all clients."""
        return [1]

    def party(self, client: int) -> SecureParty:
        """Return a client's side."""
        return SecureParty.of(self._config, "1", None, client)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the clients' answers."""
        replies = []
        for message in messages:
            started = time.process_time()
            request = SecureRequest.parse(message.content)
            step = getattr(
                self.party(request.partition),
                message.metadata.message_type.partition(".")[2],
            )
            replies.append(Message(step(request), reply_to=message))
            self.seconds += time.process_time() - started
        return replies


def made_up(
    client: int,
    sent: Mapping[str, np.ndarray],
    fields: Sequence[ReplyField[object]],
) -> RecordDict:
    """Return a reply without secure aggregation, of random numbers."""
    torch.manual_seed(client)
    content = RecordDict()
    for field in fields:
        if isinstance(field, GradientFormat):
            shape = (field.num_classes, field.feature_dim)
            gradient = ClassGradient(
                torch.randn(shape) / 100, torch.randn(shape[0]) / 100
            )
            same = dict.fromkeys(range(field.num_classes), gradient)
            content[field.name] = field.encode(same)
        else:
            assert isinstance(field, ArrayFields)
            zeros = {n: torch.zeros(shape) for n, shape in field.shapes.items()}
            content[field.name] = field.encode(zeros)
    model = {
        name: torch.from_numpy(values) + 0.01 * torch.randn(values.shape)
        for name, values in sent.items()
    }
    content[messages.ARRAYS] = messages.state_to_arrays(
        {
            name: tensor.abs() if name.endswith(messages.VARIANCE) else tensor
            for name, tensor in model.items()
        }
    )
    names = (*messages.AVERAGED_METRICS, *messages.SUMMED_METRICS)
    content[messages.METRICS] = MetricRecord(
        {messages.NUM_EXAMPLES: IMAGES, **dict.fromkeys(names, 1.0)}
    )
    return content


def measure(what: str, clients: int, classes: int, largest: float) -> list[str]:
    """Return a row: sizes in MB and seconds of one round."""
    method, names = STATISTICS[what]
    flat: dict[str, Scalar] = {
        **defaults(),
        "method": method,
        "aggregation.secure": True,
        "aggregation.max-length-ratio": 0.0,
        "partition.clients": clients,
        "federation.clients-per-round": clients,
    }
    config = RunConfig.from_run_config(flat)
    arrays = messages.model_to_arrays(
        build_model(config.model.name, classes, config.model.feature_dim)
    )
    sent = messages.arrays_to_numpy(arrays)
    fields = [messages.reply_field(name, config, classes) for name in names]
    sums = SumFormat(config, sent, fields)
    size = sum(s.size * s.ring.bits // 8 for s in sums.segments.values())
    row = [what, str(clients), str(classes), f"{size / 1e6:.2f}"]
    if size > largest * 1e6:
        return [*row, "-", "-", "-"]
    plain = messages.payload_bytes(made_up(0, sent, fields))
    numbers = range(clients)
    setting = Setting(
        SimulatedClients((1,), clients, clients, 7, (10 * IMAGES,) * clients),
        config,
        tuple(map(str, range(classes))),
        torch.device("cpu"),
        None,
        run="1",
    )
    requests = Requests(setting.clients, setting.events, 3600.0)
    server, grid = SecureSums(setting, requests), Parties(config)
    started = time.process_time()
    server.agree(1, grid, numbers)
    server_seconds = time.process_time() - started
    replies, masking = [], 0.0
    for client in numbers:
        content = request(arrays, client, names, server.record())
        reply = made_up(client, sent, fields)
        started = time.process_time()
        masked = grid.party(client).train(
            content, TrainRequest.parse(content), partial(_given, reply)
        )
        masking += time.process_time() - started
        replies.append(Message(masked, reply_to=Message(content, 1, "train")))
    asked = {1: dict.fromkeys(numbers, 10 * IMAGES)}
    check = SumCheck(server, ReplyCheck(sent, asked, fields), clients)
    started = time.process_time()
    verdicts = check.judge(replies, LengthRule(0), noisy=True)
    # The clients' other exchanges ran within both calls of the server.
    server_seconds += time.process_time() - started - grid.seconds
    assert verdicts.used == clients, verdicts.lost
    return [
        *row,
        f"{plain / 1e6:.2f}",
        f"{(masking + grid.seconds) / clients:.2f}",
        f"{server_seconds:.2f}",
    ]


def _given(reply: RecordDict) -> RecordDict:
    return reply


def request(
    arrays: ArrayRecord, client: int, fields: Sequence[str], secure: ConfigRecord
) -> RecordDict:
    """Return a client's train request."""
    config = ConfigRecord(
        {
            messages.ROUND: 1,
            messages.PARTITION: client,
            messages.CODE_FINGERPRINT: "",
            messages.FIELDS: list(fields),
        }
    )
    return RecordDict(
        {
            messages.ARRAYS: arrays,
            messages.CONFIG: config,
            messages.SECURE: secure,
        }
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--largest-mb", type=float, default=100.0)
    options = parser.parse_args()
    act_as_flower_process()
    rows = []
    for what in STATISTICS:
        for classes in options.classes:
            for clients in options.clients:
                with tempfile.TemporaryDirectory() as cache:
                    os.environ[CACHE_VARIABLE] = cache
                    rows.append(measure(what, clients, classes, options.largest_mb))
    header = [
        "what is summed",
        "clients",
        "classes",
        "masked sums, MB",
        "plain reply, MB",
        "CPU s a client",
        "CPU s at the server",
    ]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
