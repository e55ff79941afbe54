"""Lists of images and their classes, in the format of the public long-tailed sets."""

import json
from pathlib import Path

from clip2fl_common.data.image_files import DatasetError
from clip2fl_common.data.regular_files import open_regular
from clip2fl_common.shown import shown

# Digits of a class number, far beyond the classes of any data set.
MAX_DIGITS = 9


def read_image_list(list_file: Path, root: Path) -> tuple[list[Path], list[int]]:
    """Read a list with ``path label`` per line, or JSON of such lines or pairs.

    Parameters
    ----------
    list_file : Path
        The list.
    root : Path
        Folder to which the list's paths are relative.

    Returns
    -------
    list of Path, list of int
        At least one file, and the class of each.

    Raises
    ------
    DatasetError
        If the list cannot be read, or an entry has another form; names the entry.
    """
    paths, labels = [], []
    for number, line in enumerate(_lines(list_file), start=1):
        entry = " ".join(map(str, line)) if isinstance(line, list) else str(line)
        if not entry.strip():
            continue
        path, _, label = entry.strip().rpartition(" ")
        valid = path and "\0" not in path and label.isdecimal()
        if not valid or len(label) > MAX_DIGITS:
            raise DatasetError(
                f"{shown(list_file)}, entry {number}: expected 'path label', found "
                f"'{shown(entry)}'"
            )
        paths.append(root / path)
        labels.append(int(label))
    if not paths:
        raise DatasetError(f"the image list {shown(list_file)} is empty")
    return paths, labels


def _lines(list_file: Path) -> list[object]:
    try:
        with open_regular(list_file) as file:
            # Excel begins a file with a mark. Names of files may contain any byte.
            text = file.read().decode("utf-8-sig", "surrogateescape")
        if not text.lstrip().startswith("["):
            return list(text.splitlines())
        lines: list[object] = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"cannot read the image list {shown(list_file)}: {shown(error)}"
        ) from None
    return lines
