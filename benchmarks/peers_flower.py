"""FedAvg as Flower's tutorials write it, in Flower's own simulation."""

import sys
import time
from pathlib import Path

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers_problem import Problem, write_model, write_times

client_app = ClientApp()
server_app = ServerApp()
# Each process keeps the data, as an application that is written with care does.
_problems: dict[str, Problem] = {}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model on this client's images."""
    torch.set_num_threads(1)
    config = message.content.config_records["config"]
    folder = str(config["folder"])
    problem = _problems.setdefault(folder, Problem.read(Path(folder)))
    client = int(str(context.node_config["partition-id"]))
    model = problem.model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=problem.config.client.learning_rate
    )
    images = 0
    for pictures, labels in problem.batches(int(str(config["server-round"])), client):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
        images += len(labels)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": images}),
        }
    )
    return Message(content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Train all rounds; note the time at the end of each."""
    folder = Path(sys.argv[1])
    problem = Problem.read(folder)
    ends: list[float] = []

    def ended(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round > 0:
            ends.append(time.time())
        if server_round == 1:
            write_model(folder, arrays.to_torch_state_dict())
        return None

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=problem.clients,
        min_available_nodes=problem.clients,
    )
    strategy.start(
        grid,
        ArrayRecord(problem.model().state_dict()),
        num_rounds=problem.rounds,
        train_config=ConfigRecord({"folder": str(folder)}),
        evaluate_fn=ended,
    )
    write_times(folder, ends)


if __name__ == "__main__":
    # The actors import the apps by this module's name, not as __main__.
    from benchmarks import peers_flower

    problem = Problem.read(Path(sys.argv[1]))
    run_simulation(
        peers_flower.server_app,
        peers_flower.client_app,
        num_supernodes=problem.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
