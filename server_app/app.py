"""Flower ServerApp: wires nodes, strategy and session together."""

from logging import getLogger
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from clip2fl_common import messages
from clip2fl_common.config import SITES, RunConfig
from clip2fl_common.config.unread import unread_warning
from server_app.run import Session
from strategy.base import ClientPlan, PartitionedTraining, Setting
from strategy.clients import AttentiveGrid, SitePlan
from strategy.registry import method_named
from strategy.resumed import Continuation

logger = getLogger(__name__)

app = ServerApp()

# Seconds within which nodes must say which partition they simulate.
QUERY_TIMEOUT_S = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from the run configuration to the delivered model."""
    config = RunConfig.from_run_config(context.run_config)
    if warning := unread_warning(config):
        logger.warning(warning)
    if config.dataset.name == SITES:
        grid = cast(Grid, AttentiveGrid(grid))
    with Session(config, context.run_id) as session:
        strategy = build_strategy(session, _plan(session, grid))
        done = session.open(strategy)

        def close_round(server_round: int, arrays: ArrayRecord) -> None:
            if server_round > 0:
                messages.load_arrays(session.model, arrays)
                session.close_round(server_round, strategy)

        if done < config.federation.rounds:
            rounds = Continuation(strategy, done) if done else strategy
            rounds.start(
                grid,
                messages.model_to_arrays(session.model),
                num_rounds=config.federation.rounds - done,
                timeout=config.federation.round_timeout,
                evaluate_fn=close_round,
            )
        session.close(strategy)


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


def _plan(session: Session, grid: Grid) -> ClientPlan | SitePlan:
    config = session.config
    if config.dataset.name == SITES:
        registry = config.federation.site_registry
        return SitePlan(
            len(session.dataset.class_names),
            config.federation.clients_per_round,
            config.seed,
            config.aggregation.max_site_images,
            Path(registry).expanduser() if registry else None,
        )
    return ClientPlan(
        find_nodes(grid),
        config.partition.clients,
        config.federation.clients_per_round,
        config.seed,
        session.images_per_client,
    )


def build_strategy(
    session: Session, plan: ClientPlan | SitePlan
) -> PartitionedTraining:
    """Return the strategy of the configuration's method."""
    return method_named(session.config.method).build(
        Setting(
            plan,
            session.config,
            session.dataset.class_names,
            session.device,
            session.teacher,
        )
    )
