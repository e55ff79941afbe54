"""Results replace links instead of writing through them, and appear complete."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from clip2fl_cli import exporting
from clip2fl_cli.comparison import Comparison
from clip2fl_cli.output import OutputError, OutputFolder
from clip2fl_cli.page import PAGE_FILE
from clip2fl_cli.results import write_results
from clip2fl_cli.runs import FinishedRun
from tests.clip2fl_cli.commands import refused, run, tree
from tests.clip2fl_cli.made_up import write_run

PRECIOUS = b"what nobody may overwrite"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """Return the target file of the links."""
    file = tmp_path / "precious"
    file.write_bytes(PRECIOUS)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run."""
    return write_run(tmp_path / "a-run", [50.0, 60.0]).folder


@pytest.mark.parametrize("dangling", [False, True])
def test_report_replaces_links(
    folder: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, dangling: bool
) -> None:
    target = folder.parent / "nowhere" if dangling else precious
    (folder / "figures").mkdir()
    names = ("report.html", *(f"figures/{n}" for n in ("classes.svg", "costs.png")))
    for name in names:
        (folder / name).symlink_to(target)
    assert run(monkeypatch, "report", folder) == 0
    for name in names:
        assert not (folder / name).is_symlink()
        assert (folder / name).stat().st_size > 1000
    assert precious.read_bytes() == PRECIOUS
    assert not (folder.parent / "nowhere").exists()


@pytest.mark.parametrize("leads_to", ["elsewhere", "nowhere", "precious", "figures"])
def test_figures_that_are_a_link_are_refused(
    folder: Path,
    precious: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    leads_to: str,
) -> None:
    (folder.parent / "elsewhere").mkdir()
    place = folder if leads_to == "figures" else folder.parent
    (folder / "figures").symlink_to(place / leads_to)
    before = tree(folder.parent)
    line = refused(monkeypatch, capsys, "report", folder)
    assert f"{folder / 'figures'} is a link or no folder" in line
    assert "remove it" in line
    assert tree(folder.parent) == before


def test_figures_that_are_a_file_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "figures").write_bytes(PRECIOUS)
    line = refused(monkeypatch, capsys, "report", folder)
    assert f"{folder / 'figures'} is a link or no folder" in line


def test_report_that_is_a_folder_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "report.html").mkdir()
    line = refused(monkeypatch, capsys, "report", folder)
    assert f"{folder / 'report.html'}: Is a directory" in line


def test_run_folder_may_be_reached_by_a_link(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user named the link, so it is followed."""
    latest = folder.parent / "latest"
    latest.symlink_to(folder)
    assert run(monkeypatch, "report", latest) == 0
    assert (folder / "report.html").is_file()
    assert latest.is_symlink()


def test_export_replaces_links(
    runs: dict[str, FinishedRun],
    precious: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    model = runs["fedavg"].folder / "model.safetensors"
    for name in ("model.onnx", "model.safetensors"):
        (place / name).symlink_to(precious)
    assert (
        run(monkeypatch, "export", "--model", model, "--output", place, "--no-costs")
        == 0
    )
    assert precious.read_bytes() == PRECIOUS
    assert not any(file.is_symlink() for file in place.iterdir())
    assert (place / "model.safetensors").read_bytes() == model.read_bytes()


def test_export_into_the_runs_own_folder_keeps_the_model(
    runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes((runs["fedavg"].folder / "model.safetensors").read_bytes())
    before = model.stat()
    exporting.export(model, tmp_path)
    assert model.stat().st_ino == before.st_ino
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.onnx",
        "model.safetensors",
    ]


def test_output_that_is_a_file_is_one_line(
    runs: dict[str, FinishedRun],
    precious: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = runs["fedavg"].folder
    arguments = ("export", "--no-costs", "--model", model, "--output", precious)
    assert f"{precious}: File exists" in refused(monkeypatch, capsys, *arguments)
    assert precious.read_bytes() == PRECIOUS


def test_comparisons_results_replace_links(folder: Path, precious: Path) -> None:
    place = folder.parent / "x"
    finished = write_run(place / "plain-seed1", [50.0])
    (finished.folder / "figures").mkdir()
    links = [
        *(place / f"comparison.{ending}" for ending in ("csv", "json", "md")),
        place / "report.html",
        *(finished.folder / name for name in ("report.html", "figures/costs.svg")),
    ]
    for link in links:
        link.symlink_to(precious)
    write_results(Comparison("x", "plain", place, ()), {"plain": [finished]}, "command")
    assert not any(link.is_symlink() for link in links)
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_heat_map_replaces_a_link(
    precious: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    file = tmp_path / f"held.{ending}"
    file.symlink_to(precious)
    assert run(monkeypatch, "partition", "--figure", file) == 0
    assert not file.is_symlink()
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("name", ["held", "held.xyz", "held.pgf", "held.raw"])
def test_heat_map_of_no_known_format_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    file = tmp_path / name
    line = refused(monkeypatch, capsys, "partition", "--figure", file)
    assert f"--figure {file}: the name must end with .png, .svg, .pdf" in line
    assert not file.exists()


def failing(number: int) -> Callable[..., int]:
    """Return an ``os.open`` that cannot create files."""
    real = os.open

    def opening(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *args, dir_fd=dir_fd)

    return opening


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folder_that_cannot_be_written_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.setattr(os, "open", failing(number))
    line = refused(monkeypatch, capsys, "report", folder)
    assert f"{folder / 'figures' / 'accuracy.svg'}: {os.strerror(number)}" in line
    assert not (folder / "report.html").exists()


def test_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(PRECIOUS)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        OutputFolder.open(tmp_path) as place,
        pytest.raises(OutputError, match="x: No space left on device; not written"),
    ):
        place.write("x", b"new")
    assert tree(tmp_path) == {"x": PRECIOUS}


def test_new_files_have_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with OutputFolder.open(tmp_path) as place:
        place.write("x", b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def _write_often(folder: Path, content: bytes) -> None:
    with OutputFolder.open(folder) as place:
        for _ in range(200):
            place.write("x", content)


def test_two_writers_at_once_both_succeed(tmp_path: Path) -> None:
    """Each file is complete and from one writer, and no other file remains."""
    contents = [bytes([n]) * 100_000 for n in range(2)]
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_often, args=(tmp_path, content))
        for content in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() in contents


def test_report_is_written_whole_or_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure that cannot be drawn is found before any figure is written."""
    (folder / "artifacts.safetensors").write_bytes(b"")
    before = tree(folder)
    refused(monkeypatch, capsys, "report", folder)
    assert tree(folder) == before
    assert not (folder / PAGE_FILE).exists()
