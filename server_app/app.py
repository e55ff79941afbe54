"""Flower ServerApp: wires clients, method and run together."""

from concurrent.futures import Future
from logging import getLogger
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from clip2fl_common import messages
from clip2fl_common.config import RunConfig
from clip2fl_common.config.unread import unread_warning
from server_app.outbox import deliver_at_end, deliver_run
from server_app.run import ServerRun
from strategy.clients import Clients, SimulatedClients, found_later
from strategy.events import What
from strategy.grid import AttentiveGrid
from strategy.registry import method_named
from strategy.resumed import Continuation
from strategy.setting import Setting
from strategy.site_clients import SiteClients

logger = getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from the run configuration to the delivered model."""
    config = RunConfig.from_run_config(context.run_config)
    if warning := unread_warning(config):
        logger.warning(warning)
    if config.delivery.run:
        deliver_run(AttentiveGrid(grid), config)
        return
    # Nodes start and answer while the run is prepared, which takes seconds, too.
    nodes = found_later(grid) if config.simulated else None
    with ServerRun(config, context.run_id) as run:
        config = run.config  # without "auto", now that the classes are known
        run.measure_teacher()
        clients, grid = _clients(run, grid, nodes)
        setting = Setting(
            clients,
            config,
            run.data.class_names,
            run.device,
            run.teacher,
            run.events,
            str(context.run_id),
        )
        strategy = method_named(config.method)(setting)
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
    if config.delivery.signing_key and isinstance(clients, SiteClients):
        deliver_at_end(
            AttentiveGrid(grid), config, run.folder.path, clients, strategy.round
        )


def _clients(
    run: ServerRun, grid: Grid, nodes: Future[tuple[int, ...]] | None
) -> tuple[Clients, Grid]:
    """Return the clients of a run, and the grid that reaches them.

    ``nodes`` is what `found_later` returned; None with sites.
    """
    config = run.config
    drawn = config.federation.clients_per_round
    if nodes is not None:
        images = run.data.images_per_client
        clients = SimulatedClients(
            nodes.result(), len(images), drawn, config.seed, images
        )
        return clients, grid
    registry = config.federation.site_registry
    sites = SiteClients(
        drawn,
        config.seed,
        config.aggregation.max_site_images,
        Path(registry).expanduser() if registry else None,
        run.events,
    )

    def arrived(client: int) -> None:
        run.events.note(What.REPLIED, sites.label(client))

    return sites, AttentiveGrid(grid, arrived, sites.look)
