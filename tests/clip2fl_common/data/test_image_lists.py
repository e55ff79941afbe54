"""Lists of images: an error names the list."""

import os
from pathlib import Path

import pytest

from clip2fl_common.data.image_files import DatasetError
from clip2fl_common.data.image_lists import read_image_list


def test_paths_of_any_bytes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"caf\xe9 1.jpg 0\nb.jpg 1\n")
    paths, labels = read_image_list(tmp_path / "list", tmp_path)
    assert os.fsencode(paths[0].name) == b"caf\xe9 1.jpg"
    assert labels == [0, 1]


@pytest.mark.parametrize("content", ["a.jpg 0\nb.jpg 1\n", '["a.jpg 0", ["b.jpg", 1]]'])
def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "list").write_text(content, "utf-8-sig")
    paths, labels = read_image_list(tmp_path / "list", tmp_path)
    assert [path.name for path in paths] == ["a.jpg", "b.jpg"]
    assert labels == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, ", "cannot read the image list"),
        (b"[" * 100_000, "cannot read the image list"),
        (b"a.jpg 99999999999999999999\n", "entry 1: expected 'path label'"),
        (b"a\x1b.jpg x\n", r"found 'a\\x1b\.jpg x'"),
        (b"a\0b.jpg 0\n", r"found .a\\x00b"),
        (b"", "the file is empty"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_image_list(tmp_path / "list", tmp_path)
    assert str(tmp_path / "list") in str(caught.value)


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list")
    with pytest.raises(DatasetError, match="named pipe"):
        read_image_list(tmp_path / "list", tmp_path)
