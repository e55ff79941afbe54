"""Following a file of lines."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_app.foreign_files import ForeignFileError
from server_app.growing_file import GrowingFile

LONGEST = 20


class Reader:
    """A followed file, with the lines and restarts that it has told."""

    def __init__(self, path: Path, max_bytes: int = 10**6) -> None:
        self.file = GrowingFile(path, LONGEST, max_bytes)
        self.lines: list[bytes | None] = []
        self.restarts = 0

    def read(self) -> list[bytes | None]:
        """Return all lines since the last restart."""
        self.file.read(self.lines.append, self._restart)
        return self.lines

    def _restart(self) -> None:
        self.lines.clear()
        self.restarts += 1


@given(
    content=st.lists(
        st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=8
    ).map(b"\n".join),
    cuts=st.lists(st.integers(0, 250), max_size=6).map(sorted),
)
def test_each_line_comes_once_and_never_in_part(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("growing") / "lines"
    reader = Reader(path)
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        with path.open("ab") as file:
            file.write(content[start:end])
        complete = path.read_bytes().split(b"\n")[:-1]
        expected = [line if len(line) <= LONGEST else None for line in complete]
        assert reader.read() == expected
    assert reader.restarts == 0


def test_another_file_in_its_place_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    reader = Reader(path)
    assert reader.read() == []
    path.write_bytes(b"a\nb\n")
    assert reader.read() == [b"a", b"b"]
    (tmp_path / "new").write_bytes(b"c\nd\ne\n")
    os.replace(tmp_path / "new", path)
    assert reader.read() == [b"c", b"d", b"e"]
    path.write_bytes(b"f\n")
    assert reader.read() == [b"f"]
    path.unlink()
    assert reader.read() == []
    assert reader.restarts == 3


def test_long_line_is_skipped_wherever_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    reader = Reader(path)
    path.write_bytes(b"x" * 3_000_000)
    reader = Reader(path, max_bytes=10**7)
    assert reader.read() == []
    with path.open("ab") as file:
        file.write(b"xx\nshort\n")
    assert reader.read() == [None, b"short"]


def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ForeignFileError, match="fifo is a FIFO"):
        Reader(tmp_path / "fifo").read()
    (tmp_path / "large").write_bytes(b"x\n" * 50)
    with pytest.raises(ForeignFileError, match="more than 99 bytes"):
        Reader(tmp_path / "large", max_bytes=99).read()
