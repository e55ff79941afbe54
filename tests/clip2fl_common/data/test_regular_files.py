"""Only regular files of bounded size are read, and reading never waits."""

import os
from pathlib import Path

import pytest

from clip2fl_common.data import regular_files
from clip2fl_common.data.image_cache import NO_DIGEST, file_digests
from clip2fl_common.data.image_reading import UnreadableImageError, read_image
from clip2fl_common.data.regular_files import MAX_FILE_BYTES, NotReadError, open_regular
from tests.special_files import SPECIAL, make_special_files


def test_file_and_link_to_a_file_elsewhere_are_read(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "x.png").write_bytes(b"content")
    (tmp_path / "site" / "x.png").symlink_to(tmp_path / "x.png")
    for path in (tmp_path / "x.png", tmp_path / "site" / "x.png"):
        with open_regular(path) as file:
            assert (file.size, file.read()) == (7, b"content")


@pytest.mark.parametrize("name", SPECIAL)
def test_pipes_sockets_and_devices_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    make_special_files(tmp_path)
    with pytest.raises(NotReadError) as caught:
        open_regular(tmp_path / name)
    assert str(caught.value) == f"it is {SPECIAL[name]}, no regular file"
    with pytest.raises(UnreadableImageError, match=r"no regular file"):
        read_image(tmp_path / name, 8)
    assert file_digests([tmp_path / name]).tolist() == [NO_DIGEST]


def test_pipe_that_takes_a_files_place_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is a file at the first check, and a pipe when it is opened."""
    make_special_files(tmp_path)
    (tmp_path / "file").write_text("x")
    facts = (tmp_path / "file").stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: facts)
    with pytest.raises(NotReadError, match="named pipe"):
        open_regular(tmp_path / "pipe.png")


def test_folders_empty_and_huge_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 2**20)  # takes no room
    for name, reason in (
        ("folder.png", "it is a folder, no regular file"),
        ("empty.png", "the file is empty"),
        ("huge.png", "it has 513 MiB; files of at most 512 MiB are read"),
    ):
        with pytest.raises(NotReadError) as caught:
            open_regular(tmp_path / name)
        assert str(caught.value) == reason
    assert not _opens(Path("/proc/self/mem"))


def _opens(path: Path) -> bool:
    try:
        open_regular(path).close()
    except OSError:
        return False
    return True


def test_handles_are_closed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    make_special_files(tmp_path)
    for path in tmp_path.iterdir():
        if _opens(path):
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_more_is_given_away_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with open_regular(tmp_path / "x") as file:
        file.allow(60)
        # What lies beyond the end does not count, and takes no memory.
        file.seek(50)
        assert file.read(2**40) == bytes(range(50, 100))
        assert file.read(10) == b""
        file.seek(0)
        with pytest.raises(NotReadError, match="holds too much"):
            file.read(11)
        assert file.read(10) == bytes(range(10))
        file.seek(99)
        with pytest.raises(NotReadError, match="holds too much"):
            file.read()


def test_growing_file_is_hashed_to_the_size_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"before")
    expected = file_digests([tmp_path / "a"])
    check = regular_files._check

    def grow(facts: os.stat_result) -> None:
        check(facts)
        with open(tmp_path / "b", "ab") as file:
            file.write(b" after")

    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"before")
    calls = iter([check, grow])
    monkeypatch.setattr(regular_files, "_check", lambda facts: next(calls)(facts))
    assert file_digests([tmp_path / "b"]).tolist() == expected.tolist()
