"""docs/operating.md: a copy of the server is restored, certificates are renewed."""

import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from tests.certificates import let_end
from tests.deployment.conftest import COUNTS, TINY
from tests.deployment.stack import Stack, stack, wait_for
from tests.site_folders import write_site

pytestmark = pytest.mark.slow
ROUNDS = 4
# A round takes half a minute on two idle cores; others may use them.
ROUND_S = 300.0


def test_server_is_restored_from_its_copy_and_the_run_resumed(
    federation: Stack, tmp_path: Path
) -> None:
    federation.start_run(f"{TINY} federation.rounds={ROUNDS}")
    federation.wait_for_round(1, 2 * ROUND_S)
    # The copy is made while the SuperLink is stopped. The run goes on afterwards.
    federation.server.kill("superlink", signal.SIGTERM)
    places = [federation.keys, federation.server.folder, federation.results.parent]
    copy = tmp_path / "copy.tar.gz"
    with tarfile.open(copy, "w:gz") as archive:
        for place in places:
            archive.add(place, place.relative_to(tmp_path))
    copied = len(federation.rounds())
    federation.start_superlink()
    federation.wait_for_round(copied + 1, 2 * ROUND_S)

    # The server is lost with all that it had. Its nodes go on asking.
    federation.server.kill_all()
    for place in places:
        shutil.rmtree(place)
    with tarfile.open(copy) as archive:
        archive.extractall(tmp_path, filter="fully_trusted")
    assert len(federation.rounds()) == copied
    federation.start_server()
    folder = f'run.resume="{federation.results}"'
    federation.start_run(f"{TINY} federation.rounds={ROUNDS} {folder}")
    assert federation.wait_for_run(ROUNDS * ROUND_S) == 0, federation.server.log("run")
    rounds = federation.rounds()
    assert [line["round"] for line in rounds] == [*range(1, ROUNDS + 1)]
    # Nobody was registered again.
    assert sorted(rounds[-1]["clients"]) == sorted(COUNTS)
    listed = federation.run_site("list")
    assert listed.count("online") == len(COUNTS), listed


def test_node_comes_back_after_expired_certificates_are_renewed(tmp_path: Path) -> None:
    with stack(tmp_path) as made:
        let_end(made.keys, "proxy/proxy.crt", -1)
        let_end(made.keys, "superlink/server.crt", 5)
        made.start_server()
        north = made.add_node("north")
        write_site(north.folder / "images", COUNTS["north"])
        made.start_node("north", north.folder / "images")
        wait_for(
            "refusal",
            lambda: "certificate has expired" in north.log("supernode"),
            ROUND_S,
        )
        told = made.run_site("list")
        assert "proxy.crt ended on" in told and "server.crt ends on" in told
        assert "registered" in told and "online" not in told

        renewed = made.server.run(made.make_keys, "renew", made.keys)
        assert "renewed, restart SuperLink and proxy" in renewed
        for part in ("nginx", "superlink"):
            made.server.kill(part, signal.SIGTERM)
        made.start_superlink()
        made.start_proxy()
        wait_for("node", lambda: "online" in made.run_site("list"), ROUND_S)
        assert "proxy.crt" not in made.run_site("list")
