"""A site's own log: what it says, who can read it, and that it never hinders."""

import logging
import re
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict

from client_app import node_log
from client_app.app import app
from client_app.node_log import SharedFile
from clip2fl_common import messages
from clip2fl_common.signed_folder import public_text, sign_folder
from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import SiteNode, refusal, site_run, works

LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) "
    r"run (\d+) (query|train|evaluate|model)(?: round (\d+))?: (.+)"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_site(tmp_path / "images", {"circle": 9, "star": 9})


def lines(file: Path) -> list[tuple[str, ...]]:
    """Return level, run, kind, round and text of each line."""
    text = file.read_text("utf-8")
    assert "\x1b" not in text
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [match.groups("") for match in found if match]


def test_log_has_run_round_losses_and_seconds(tmp_path: Path, folder: Path) -> None:
    state = tmp_path / "state"
    node = SiteNode(folder, {"site_state": str(state), "site": "north"})
    config = site_run()
    works(node.ask("query", config, run=7))
    trained = works(node.ask("train", config, run=7, server_round=3))
    works(node.ask("evaluate", config, run=7, server_round=3))
    found = lines(state / "node.log")
    assert [line[:4] for line in found] == [
        *[("INFO", "7", "query", "")] * 2,
        *[("INFO", "7", "train", "3")] * 2,
        *[("INFO", "7", "evaluate", "3")] * 2,
    ]
    metrics = trained.content.metric_records["metrics"]
    size = messages.message_bytes(trained.content) / 1e6
    told = found[3][4]
    assert told.startswith(f"answered, {size:.2f} MB: {metrics['num-examples']} images")
    assert f"loss {metrics['loss']:.4f}" in told
    assert f"training {metrics['seconds-training']:.1f} s" in told
    assert re.search(r"balanced accuracy: fedavg \d+\.\d %", found[5][4])
    assert stat.S_IMODE((state / "node.log").stat().st_mode) == 0o600


def test_log_says_which_model_has_arrived_and_why_one_was_refused(
    tmp_path: Path, folder: Path
) -> None:
    key, made = Ed25519PrivateKey.generate(), datetime(2026, 11, 27, tzinfo=UTC)
    (tmp_path / "signed").mkdir()
    (tmp_path / "signed" / "b.bin").write_bytes(b"x" * 30_000)
    manifest = sign_folder(tmp_path / "signed", "run", made, ["b.bin"], key)
    node = {
        "data-path": str(folder),
        "site-state": str(tmp_path / "state"),
        "models-folder": str(tmp_path / "models"),
        "model-key": public_text(key.public_key()),
    }

    def offer(start: int, piece: bytes, signature: bytes = manifest.signature) -> None:
        offered = messages.ModelOffer(manifest.content, signature, start, piece)
        message = Message(offered.content(), 42, "query.model")
        app(message, Context(7, 42, cast(Any, node), RecordDict(), {}))

    offer(0, b"x" * 10_000)
    offer(10_000, b"x" * 20_000)
    offer(0, b"", bytes(64))
    found = lines(tmp_path / "state" / "node.log")
    assert all(line[1:4] == ("7", "model", "") for line in found)
    assert [(line[0], line[4].partition(" is not the")[0]) for line in found] == [
        ("INFO", "wanted, 0.01 MB are here"),
        ("INFO", f"the model {manifest.name} has arrived in {tmp_path}/models"),
        ("INFO", "stored, 0.03 MB are here"),
        ("ERROR", "refused: the site refuses the model: manifest.sig"),
    ]


def test_reasons_with_names_stay_in_the_sites_own_log(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "circle" / "patient \x1b[31m7\n.png").write_bytes(b"x")
    state = tmp_path / "state"
    node = SiteNode(folder, {"site_state": str(state)})
    reply = node.ask("train", site_run())
    assert reply.has_error() and "patient" not in str(reply.error.reason)
    (_, last) = lines(state / "node.log")
    assert last[0] == "ERROR" and r"patient \x1b[31m7\n.png" in last[4]
    # The same line, for whoever reads the node's output.
    assert r"patient \x1b[31m7\n.png" in capfd.readouterr().err
    node = SiteNode(folder, {"site_state": str(state), "max_rounds": 1})
    refusal(node.ask("train", site_run()))
    assert "refused: the run has federation.rounds" in lines(state / "node.log")[-1][4]


def test_log_that_cannot_be_written_does_not_hinder_the_answer(
    tmp_path: Path, folder: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    aim = tmp_path / "aim"
    aim.write_text("")
    (state / "node.log").symlink_to(aim)
    node = SiteNode(folder, {"site_state": str(state)})
    works(node.ask("query", site_run()))
    assert aim.read_text() == ""
    (state / "node.log").unlink()
    (state / "node.log").mkdir()
    works(node.ask("query", site_run()))


def test_node_that_simulates_a_client_has_no_log(tmp_path: Path) -> None:
    with node_log.logging_to_site({"partition-id": 0}, 1, "train", 1):
        logging.getLogger("client_app").warning("nobody keeps this")
    assert list(tmp_path.rglob("node.log")) == []


def test_lines_of_several_writers_survive_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writer has its own file and lock, as processes have."""
    monkeypatch.setattr(node_log, "FILE_BYTES", 2_000)
    monkeypatch.setattr(node_log, "OLD_FILES", 100)
    monkeypatch.setattr(node_log, "LOCK_S", 60.0)
    file = tmp_path / "node.log"

    def write(writer: int) -> None:
        for number in range(60):
            handler = SharedFile(file)
            text = f"writer {writer} line {number} {'.' * 20}"
            handler.emit(logging.LogRecord("x", 20, "", 0, text, (), None))
            handler.close()

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    files = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert len(files) > 3
    assert all(path.stat().st_size <= 2_000 for path in files)
    found = sorted(line for path in files for line in path.read_text().splitlines())
    assert found == sorted(
        f"writer {w} line {n} {'.' * 20}" for w in range(4) for n in range(60)
    )


def test_only_some_old_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_log, "FILE_BYTES", 100)
    file = tmp_path / "node.log"
    for number in range(60):
        handler = SharedFile(file)
        text = f"line {number} {'.' * 40}"
        handler.emit(logging.LogRecord("x", 20, "", 0, text, (), None))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["node.log", *(f"node.log.{n}" for n in (1, 2, 3)), "node.log.lock"]
    assert "line 59" in file.read_text()
