"""Files that cannot be predicted are named with the reason."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip2fl_cli.prediction import _read
from clip2fl_cli.runs import RunError
from clip2fl_common.shown import shown


def test_refused_files_say_why(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tif")
    os.mkfifo(tmp_path / "pipe.png")
    bomb = tmp_path / os.fsdecode(b"b\xff.png")
    bomb.write_bytes(b"no image")
    for path, text in (
        (tmp_path / "x.tif", "x.tif cannot be read as an image: it holds floating"),
        (tmp_path / "pipe.png", "pipe.png cannot be read as an image: it is a named"),
        (bomb, "b\\xff.png cannot be read as an image: no image that is known"),
        (tmp_path / "absent.png", "cannot be read as an image: No such file"),
    ):
        with pytest.raises(RunError) as caught:
            _read(path, 8, shown(path))
        assert text in str(caught.value)
