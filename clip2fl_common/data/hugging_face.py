"""Hugging Face data sets, from a saved folder or the hub, unpacked once as files.

The images lie inside Arrow files. They are written to the cache as they are, without
decoding, with a list of them for each split. Everything after that is the same as for
the user's own files and lists: checks, limits, caches, and images that cannot be read.
No program that comes with a data set is run: ``datasets`` has not done so since 4.0.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from clip2fl_common.config import HUB_NAME
from clip2fl_common.config import Dataset as DatasetConfig
from clip2fl_common.data.image_cache import cache_key, note_use, remove_unused
from clip2fl_common.data.image_files import (
    DatasetError,
    class_name,
    is_folder,
    look_into,
    name_fault,
    without_joiners,
)
from clip2fl_common.data.image_formats import IMAGE_SUFFIXES, suffix_of
from clip2fl_common.data.image_tables import INSTALL, Columns
from clip2fl_common.files import (
    FILE_MODE,
    FOLDER_MODE,
    cache_dir,
    private_folder,
    replacing_folder,
    replacing_private,
)
from clip2fl_common.shown import listed, short, shown

logger = getLogger(__name__)

# Number of the unpacked form; raise it if that changes.
FORM = 1
NAMES = "class_names.json"
COLUMNS = Columns("path", "label", "client")
# The first version that runs no program of a data set, and reads no pickle.
OLDEST = 4
# What flwr-datasets calls a client's folder.
_PARTITION = re.compile(r"partition_(\d+)")


@dataclass(frozen=True)
class _Part:
    """Images that lie together: a ``datasets.Dataset``, and its place for messages."""

    data: Any
    place: str
    client: str = ""


@dataclass(frozen=True)
class Unpacked:
    """A data set as files.

    Attributes
    ----------
    train, test : Path
        Lists of the images, with the columns `COLUMNS`.
    class_names : tuple of str
        The classes in the order of the data set's ClassLabel; empty if it has none.
    """

    train: Path
    test: Path
    class_names: tuple[str, ...]


def unpacked(config: DatasetConfig) -> Unpacked:
    """Return a Hugging Face data set as files; the first time, unpack it.

    Parameters
    ----------
    config : Dataset
        The ``dataset`` group of the run configuration.

    Returns
    -------
    Unpacked

    Raises
    ------
    DatasetError
        If the data set, a split, a column, an image or a class is missing, or the cache
        cannot be written.
    """
    place = cache_dir() / "hugging-face" / _key(config)
    try:
        private_folder(place.parent)
        # Several clients may start at once; only one of them unpacks.
        with FileLock(f"{place}.lock", mode=FILE_MODE):
            note_use(place / NAMES)
            if not (place / NAMES).exists():
                _unpack(config, place)
            remove_unused(place.parent, NAMES)
        names = json.loads((place / NAMES).read_text("utf-8"))
    except OSError as error:
        raise DatasetError(
            f"cannot unpack dataset.root = {shown(config.root)} into {place.parent} "
            f"({shown(error)}). Make room there or set CLIP2FL_CACHE_DIR to another "
            "folder."
        ) from None
    return Unpacked(place / "train.csv", place / "test.csv", tuple(names))


def _key(config: DatasetConfig) -> str:
    """Return a name for what is unpacked, without importing ``datasets``."""
    purpose = [
        *(FORM, config.train_split, config.test_split),
        *(config.image_column, config.label_column, config.client_column),
    ]
    if HUB_NAME.fullmatch(config.root):
        return cache_key([], json.dumps([*purpose, config.root]))
    root = Path(config.root).expanduser()
    if not is_folder(root):
        raise DatasetError(
            f"dataset.root = {shown(root)} is not a folder that this user can see"
        )
    # Not by a search below the root, which would not enter folders that are links.
    folders = [place for place, _ in _train_folders(config)] + [
        root / config.test_split
    ]
    files = [
        file
        for folder in folders
        for kind in ("*.arrow", "*.json")
        for file in sorted(folder.glob(kind))
    ]
    return cache_key(files, json.dumps([*purpose, str(root)]))


def _train_folders(config: DatasetConfig) -> list[tuple[Path, str]]:
    """Return the saved folders of training images, each with its client's number."""
    root = Path(config.root).expanduser()
    clients = sorted(
        (int(number[1]), place)
        for place in look_into(root).folders
        if (number := _PARTITION.fullmatch(place.name))
    )
    return [(place, str(number)) for number, place in clients] or [
        (root / config.train_split, "")
    ]


def _unpack(config: DatasetConfig, place: Path) -> None:
    hub = HUB_NAME.fullmatch(config.root)
    splits = _on_hub(config, hub) if hub else _saved_splits(config)
    logger.info("unpacking the images of %s into %s", shown(config.root), place)
    with replacing_folder(place, FOLDER_MODE) as folder:
        names = _classes(config, [*splits[0], *splits[1]])
        for split, parts in zip(("train", "test"), splits, strict=True):
            rows = list(_rows(config, parts, folder, split))
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            with replacing_private(folder / f"{split}.csv") as file:
                file.write(text.getvalue().encode("utf-8", "surrogateescape"))
        with replacing_private(folder / NAMES) as file:
            file.write(json.dumps(names).encode())


def _library() -> ModuleType:
    try:
        # Imported here, because the import takes seconds.
        import datasets
    except ImportError:
        raise DatasetError(
            f"dataset.name = 'hugging-face' needs the package datasets: {INSTALL}"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        raise DatasetError(
            f"datasets {datasets.__version__} may run programs of a data set; use "
            f"version {OLDEST} or newer: {INSTALL}"
        )
    library: ModuleType = datasets
    return library


def _on_hub(config: DatasetConfig, hub: re.Match[str]) -> list[list[_Part]]:
    library = _library()
    name, revision = hub.groups()
    try:
        found = library.load_dataset(name, revision=revision)
    except Exception as error:  # of the network, the hub, or one of many formats
        raise DatasetError(
            f"dataset.root = {shown(config.root)} cannot be loaded ({shown(error)}); "
            "with no network, save it elsewhere (datasets.save_to_disk) and set "
            "dataset.root to that folder"
        ) from error
    for key, split in (("train", config.train_split), ("test", config.test_split)):
        if split not in found:
            raise DatasetError(
                f"dataset.root = {shown(config.root)} has no split '{split}', but "
                f"{listed(found)}: choose one with dataset.{key}-split"
            )
    return [
        [_Part(found[split], f"split '{split}' of {name}")]
        for split in (config.train_split, config.test_split)
    ]


def _saved_splits(config: DatasetConfig) -> list[list[_Part]]:
    test = Path(config.root).expanduser() / config.test_split
    return [
        [_saved(place, "train", client) for place, client in _train_folders(config)],
        [_saved(test, "test")],
    ]


def _saved(folder: Path, key: str, client: str = "") -> _Part:
    if not (folder / "state.json").is_file():
        raise DatasetError(
            f"{shown(folder)} is no data set saved by datasets.save_to_disk (it has no "
            f"state.json). dataset.root must hold the folders <dataset.train-split> "
            "(or partition_0, partition_1 and so on of flwr-datasets) and "
            f"<dataset.test-split>; set dataset.{key}-split, or save the split there"
        )
    library = _library()
    try:
        return _Part(library.Dataset.load_from_disk(str(folder)), shown(folder), client)
    except Exception as error:  # many kinds for a damaged folder
        raise DatasetError(f"{shown(folder)} cannot be read: {shown(error)}") from error


def _column(part: _Part, named: str, kind: str) -> str:
    """Return the column of images or classes: the named one, or the only one."""
    features = part.data.features
    key = {"Image": "dataset.image-column", "ClassLabel": "dataset.label-column"}[kind]
    if named in features:
        return named
    if named:
        raise DatasetError(
            f"{part.place} has no column {key} = {shown(named)}, but "
            f"{listed(features, most=20)}"
        )
    found: list[str] = [
        name for name, feature in features.items() if type(feature).__name__ == kind
    ]
    if len(found) != 1:
        raise DatasetError(
            f"{part.place} has {len(found)} columns of type {kind}; name one of "
            f"{listed(found or features, most=20)} with {key}"
        )
    return found[0]


def _classes(config: DatasetConfig, parts: Sequence[_Part]) -> list[str]:
    """Return the names of the ClassLabel, which all parts must share; empty: none."""
    first, *others = (
        [class_name(name) for name in getattr(feature, "names", None) or []]
        for part in parts
        for feature in [
            part.data.features[_column(part, config.label_column, "ClassLabel")]
        ]
    )
    for part, names in zip(parts[1:], others, strict=True):
        if names != first:
            raise DatasetError(
                f"{part.place} has other classes than {parts[0].place}: "
                f"{listed(names)}, not {listed(first)}"
            )
    for name in first:
        if fault := name_fault(name):
            raise DatasetError(
                f"{parts[0].place}: the class {short(name)} has {fault}; correct the "
                "names of its ClassLabel"
            )
    seen = [without_joiners(name) for name in first]
    if len(set(seen)) < len(seen):
        twice = [name for n, name in enumerate(seen) if name in seen[:n]]
        raise DatasetError(
            f"{parts[0].place} has two classes of one name: {listed(twice)}"
        )
    return first


def _rows(
    config: DatasetConfig, parts: Sequence[_Part], folder: Path, split: str
) -> Iterator[list[str]]:
    """Write the images of a split; yield its list, the header first."""
    with_clients = split == "train" and all(
        part.client or config.client_column in part.data.features for part in parts
    )
    yield [COLUMNS.path, COLUMNS.label, *[COLUMNS.client] * with_clients]
    count = 0
    for part in parts:
        image = _column(part, config.image_column, "Image")
        label = _column(part, config.label_column, "ClassLabel")
        names = getattr(part.data.features[label], "names", None)
        for row, values in enumerate(_encoded(part, image)):
            where = f"{part.place}, row {row}"
            number = values[label]
            if names and number is not None and not 0 <= number < len(names):
                number = None  # the hub's mark of a split without classes is -1
            cells = [names[number] if names and number is not None else number]
            if with_clients:
                cells.append(part.client or values[config.client_column])
            if any(type(cell) not in (str, int) or cell == "" for cell in cells):
                raise DatasetError(
                    f"{where}: found the class and client {shown(cells)}; they must be "
                    "texts or whole numbers, and none may be missing"
                )
            path = _file(values[image], folder / f"{split}-{count}", where)
            yield [path, *map(str, cells)]
            count += 1


def _encoded(part: _Part, image: str) -> Iterator[dict[str, Any]]:
    """Yield the rows with the images as they are stored: bytes or a path."""
    try:
        # Without the format of a saved data set, which may decode images.
        plain = part.data.with_format(None)
        yield from plain.cast_column(image, _library().Image(decode=False))
    except Exception as error:  # a column of any other type, a damaged file
        raise DatasetError(
            f"{part.place}: no images can be read from dataset.image-column = "
            f"{shown(image)} ({shown(error)})"
        ) from error


def _file(stored: Any, name: Path, where: str) -> str:
    """Write an image; return its file's name, or the path that is stored instead."""
    stored = stored or {}
    path = stored.get("path") or ""
    if (data := stored.get("bytes")) is None:
        if not os.path.isabs(path):
            raise DatasetError(
                f"{where}: found no image, and no absolute path of one "
                f"('{shown(path)}'); save the data set with its images "
                "(datasets.save_to_disk)"
            )
        return str(path)
    suffix = suffix_of(path)
    file = name.with_name(name.name + (suffix if suffix in IMAGE_SUFFIXES else ""))
    with open(file, "xb", opener=_private) as new:
        new.write(data)
    return file.name


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, FILE_MODE)
