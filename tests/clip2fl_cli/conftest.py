"""Real, tiny runs for the command's tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip2fl_cli.runs import FinishedRun
from tests.conftest import be_flower
from tests.federation import federate


@pytest.fixture(autouse=True)
def user_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep logs of runs without a folder out of the user's folder for logs."""
    folder = tmp_path / "user-logs"
    monkeypatch.setattr("platformdirs.user_log_dir", lambda *_: str(folder))
    return folder


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder whose path is short and has no blank, whatever TMPDIR is."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Return the folders of finished runs of three methods; leave them as they are."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        be_flower(folder / "cache", patch)
        for method in ("clip2fl", "creff", "fedavg"):
            federate(folder / method, method)
        yield {method: folder / method for method in ("clip2fl", "creff", "fedavg")}


@pytest.fixture(scope="session")
def runs(trained: dict[str, Path]) -> dict[str, FinishedRun]:
    """Return the runs, read."""
    return {method: FinishedRun.read(folder) for method, folder in trained.items()}
