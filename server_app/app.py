"""Flower ServerApp: wires nodes, strategy and session together."""

from typing import Any, cast

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from clip2fl_common import records
from clip2fl_common.config import SITES, RunConfig
from server_app.session import RoundOutcome, Session
from strategy.clip2fl import CLIP2FL
from strategy.creff import CReFF
from strategy.fedavg import FedAvg
from strategy.fedprox import FedProx
from strategy.partitioned import ClientPlan, PartitionedTraining
from strategy.sites import AttentiveGrid, SitePlan

app = ServerApp()

# Seconds within which nodes must say which partition they simulate.
QUERY_TIMEOUT_S = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from the run configuration to the delivered model."""
    config = RunConfig.from_run_config(context.run_config)
    if config.dataset.name == SITES:
        grid = cast(Grid, AttentiveGrid(grid))
    session = Session(config, context.run_id)
    strategy = build_strategy(session, _plan(session, grid))
    session.open()

    def close_round(server_round: int, arrays: ArrayRecord) -> None:
        if server_round > 0:
            records.load_arrays(session.model, arrays)
            retrained = strategy.classifier if isinstance(strategy, CReFF) else None
            session.close_round(server_round, retrained, _outcome(strategy))

    strategy.start(
        grid,
        records.model_to_arrays(session.model),
        num_rounds=config.federation.rounds,
        timeout=config.federation.round_timeout,
        evaluate_fn=close_round,
    )
    session.close()


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
    answers = grid.send_and_receive(queries, timeout=QUERY_TIMEOUT_S)
    places = {
        records.partition_of(answer): answer.metadata.src_node_id
        for answer in answers
        if not answer.has_error()
    }
    if not places:
        reasons = {str(a.error.reason) for a in answers if a.has_error()} or {
            "no answer"
        }
        raise RuntimeError(
            f"none of {len(queries)} nodes says which clients it simulates: "
            + "; ".join(reasons)
        )
    return tuple(places[partition] for partition in sorted(places))


def _plan(session: Session, grid: Grid) -> ClientPlan | SitePlan:
    config = session.config
    if config.dataset.name == SITES:
        return SitePlan(
            len(session.dataset.class_names),
            config.federation.clients_per_round,
            config.seed,
        )
    return ClientPlan(
        find_nodes(grid),
        config.partition.clients,
        config.federation.clients_per_round,
        config.seed,
    )


def build_strategy(
    session: Session, plan: ClientPlan | SitePlan
) -> PartitionedTraining:
    """Return the strategy of the configuration's method."""
    config = session.config
    if config.method == "fedavg":
        return FedAvg(plan)
    if config.method == "fedprox":
        return FedProx(plan, proximal_mu=config.fedprox.mu)
    settings: dict[str, Any] = {
        "num_classes": len(session.dataset.class_names),
        "feature_dim": config.model.feature_dim,
        "synthesis": config.synthesis,
        "retraining": config.retraining,
        "upload": config.upload,
        "device": session.device,
    }
    if config.method == "creff":
        return CReFF(plan, **settings)
    assert session.teacher is not None
    return CLIP2FL(
        plan,
        text_features=session.teacher.text_features(session.dataset.class_names),
        teacher_fingerprint=session.teacher.fingerprint,
        distillation=config.distillation,
        **settings,
    )


def _outcome(strategy: PartitionedTraining) -> RoundOutcome:
    """Translate a strategy's record of a round into what a session reports."""
    record = strategy.round
    metrics = dict(record.metrics)
    return RoundOutcome(
        clients=record.clients,
        dropped=record.dropped,
        bytes_down=record.bytes_down,
        upload_bytes=record.upload_bytes,
        gradient_bytes=record.gradient_bytes,
        losses={
            "client": metrics["loss"],
            "distillation": metrics["distillation-loss"],
            **record.losses,
        },
        unreadable=int(metrics["unreadable-images"]),
        seconds={
            **record.seconds,
            **{
                f"clients-{name.removeprefix('seconds-')}": value
                for name, value in metrics.items()
                if name.startswith("seconds-")
            },
        },
        recalls=record.recalls,
    )
