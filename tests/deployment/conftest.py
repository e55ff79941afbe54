"""A server and three nodes, for every test of the deployment."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.stack import Stack, stack
from tests.site_folders import write_site

COUNTS = {
    "north": {"circle": 30, "triangle": 20, "square": 10},
    "east": {"square": 20, "pentagon": 15, "star": 8},
    "west": {"circle": 10, "ring": 12, "heart": 9, "arrow": 5},
}
TINY = (
    "federation.clients-per-round=3 client.epochs=1 class-gradients.draws=2 "
    "synthesis.steps=5 retraining.epochs=10"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Stack]:
    """Return a server that runs."""
    with stack(tmp_path) as made:
        made.start_server()
        yield made


@pytest.fixture
def federation(server: Stack) -> Stack:
    """Return a server with three registered nodes that run."""
    for name, counts in COUNTS.items():
        node = server.add_node(name)
        write_site(node.folder / "images", counts)
        server.start_node(name, node.folder / "images")
    return server
