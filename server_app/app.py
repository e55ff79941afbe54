"""Flower ServerApp: wires clients, method and run together."""

from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from clip2fl_common import messages
from clip2fl_common.config import SITES, RunConfig
from server_app.run import Session
from strategy.clients import Clients, SimulatedClients
from strategy.grid import AttentiveGrid
from strategy.registry import method_named
from strategy.resumed import Continuation
from strategy.setting import Setting
from strategy.site_clients import SiteClients

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from the run configuration to the delivered model."""
    config = RunConfig.from_run_config(context.run_config)
    if config.dataset.name == SITES:
        grid = AttentiveGrid(grid)
    with Session(config, context.run_id) as session:
        setting = Setting(
            _clients(session, grid),
            config,
            session.dataset.class_names,
            session.device,
            session.teacher,
        )
        strategy = method_named(config.method)(setting)
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


def _clients(session: Session, grid: Grid) -> Clients:
    config = session.config
    drawn = config.federation.clients_per_round
    if config.dataset.name == SITES:
        registry = config.federation.site_registry
        return SiteClients(
            drawn,
            config.seed,
            config.aggregation.max_site_images,
            Path(registry).expanduser() if registry else None,
        )
    return SimulatedClients.find(grid, drawn, config.seed, session.images_per_client)
