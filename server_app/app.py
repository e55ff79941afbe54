"""Flower ServerApp: wires nodes, strategy and run together."""

from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from clip2fl_common import messages
from clip2fl_common.config import RunConfig
from server_app.run import Run
from strategy.base import ClientPlan, PartitionedTraining, Setting
from strategy.clients import AttentiveGrid, SitePlan
from strategy.registry import method_named
from strategy.resumed import Continuation

app = ServerApp()

# Seconds within which nodes must say which partition they simulate.
QUERY_TIMEOUT_S = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from the run configuration to the delivered model."""
    config = RunConfig.from_run_config(context.run_config)
    with Run(config, context.run_id) as run:
        grid, plan = _participants(run, grid)
        strategy = build_strategy(run, plan)
        done = run.open(strategy)

        def close_round(server_round: int, arrays: ArrayRecord) -> None:
            if server_round > 0:
                messages.load_arrays(run.model, arrays)
                run.close_round(server_round, strategy)

        if done < config.federation.rounds:
            rounds = Continuation(strategy, done) if done else strategy
            rounds.start(
                grid,
                messages.model_to_arrays(run.model),
                num_rounds=config.federation.rounds - done,
                timeout=config.federation.round_timeout,
                evaluate_fn=close_round,
            )
        run.close(strategy)


def find_nodes(grid: Grid) -> tuple[int, ...]:
    """Return the ids of the nodes in the order of their simulated partitions.

    Raises
    ------
    RuntimeError
        If no node answers.
    """
    queries = [
        Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()
    ]
    places: dict[int, int] = {}
    reasons: set[str] = set()
    for answer in grid.send_and_receive(queries, timeout=QUERY_TIMEOUT_S):
        if answer.has_error():
            reasons.add(messages.plain(answer.error.reason))
            continue
        try:
            partition = messages.simulated_partition(answer)
        except messages.ReplyError as error:
            reasons.add(str(error))
        else:
            places[partition] = answer.metadata.src_node_id
    if not places:
        raise RuntimeError(
            f"none of {len(queries)} nodes says which clients it simulates: "
            + "; ".join(sorted(reasons) or ["no answer"])
        )
    return tuple(places[partition] for partition in sorted(places))


def _participants(run: Run, grid: Grid) -> tuple[Grid, ClientPlan | SitePlan]:
    """Return who takes part, and the grid that reaches them."""
    config = run.config
    if config.simulated:
        return grid, ClientPlan(
            find_nodes(grid),
            config.partition.clients,
            config.federation.clients_per_round,
            config.seed,
            run.data.images_per_client,
        )
    registry = config.federation.site_registry
    return cast(Grid, AttentiveGrid(grid)), SitePlan(
        len(run.data.class_names),
        config.federation.clients_per_round,
        config.seed,
        config.aggregation.max_site_images,
        Path(registry).expanduser() if registry else None,
    )


def build_strategy(run: Run, plan: ClientPlan | SitePlan) -> PartitionedTraining:
    """Return the strategy of the configuration's method."""
    return method_named(run.config.method).build(
        Setting(
            plan,
            run.config,
            run.data.class_names,
            run.device,
            run.teacher,
        )
    )
