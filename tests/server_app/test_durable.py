"""Files and folders are replaced whole, and are on disk before the old ones go."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_app.durable import replaced_whole, write_whole


def test_text_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    write_whole(path, "first")
    write_whole(path, "größer")
    assert path.read_text("utf-8") == "größer"

    def write_text(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "never there")
    assert path.read_text("utf-8") == "größer"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "round"
    for content in ("old", "new"):
        with replaced_whole(place) as folder:
            folder.mkdir()
            (folder / content).write_text(content, "utf-8")
            assert not (place / content).exists()
        assert [file.name for file in place.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt), replaced_whole(place) as folder:
        folder.mkdir()
        (folder / "newer").touch()
        raise KeyboardInterrupt
    assert [file.name for file in place.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [place]


def test_what_a_killed_program_left_is_no_obstacle(tmp_path: Path) -> None:
    with replaced_whole(tmp_path / "round") as folder:
        left = folder
        folder.mkdir()
    left.mkdir()
    (left / "half").touch()
    with replaced_whole(tmp_path / "round") as folder:
        folder.mkdir()
        (folder / "whole").touch()
    assert [file.name for file in (tmp_path / "round").iterdir()] == ["whole"]
    assert not left.exists()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the order of synchronisation and renaming."""
    made: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        made.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        made.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    yield made


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux' /proc")
def test_content_is_on_disk_before_the_name_and_the_name_at_the_end(
    tmp_path: Path, calls: list[str]
) -> None:
    write_whole(tmp_path / "file", "text")
    assert calls == [
        "sync .file.incomplete",
        "rename file",
        f"sync {tmp_path.name}",
    ]
    calls.clear()
    with replaced_whole(tmp_path / "folder") as folder:
        folder.mkdir()
        (folder / "inner").touch()
    assert calls == [
        "sync inner",
        "sync .folder.incomplete",
        "rename folder",
        f"sync {tmp_path.name}",
    ]
