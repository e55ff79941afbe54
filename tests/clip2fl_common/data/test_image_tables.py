"""CSV and Parquet lists become data sets; errors name file, line and column."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip2fl_common.config import ConfigError, Dataset, Partition, Scalar
from clip2fl_common.data.datasets import (
    DatasetError,
    ImageDataset,
    load_dataset,
    partition_indices,
)
from clip2fl_common.data.image_tables import Columns, read_table
from clip2fl_common.partition import PartitionError
from tests.clip2fl_common.data.test_datasets import write_images
from tests.defaults import run_config
from tests.tools import need_package

COLUMNS = Columns("path", "label", "client")
TRAIN = "path,label,client\na/0.png,big_cat,10\na/1.png,big cat,9\nb/0.png,dog,9\n"
TEST = "label,path\ndog,b/1.png\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))


def list_config(folder: Path, **changes: Scalar) -> Dataset:
    """Return the ``dataset`` group for the lists in a folder."""
    settings: dict[str, Scalar] = {
        "name": "list",
        "train_list": str(folder / "train.csv"),
        "test_list": str(folder / "test.csv"),
        "image_size": 8,
        "imbalance_factor": 1.0,
        **changes,
    }
    return run_config(**{f"dataset__{key}": v for key, v in settings.items()}).dataset


def load(
    folder: Path, train: str = TRAIN, test: str = TEST, **changes: Scalar
) -> ImageDataset:
    (folder / "train.csv").write_text(train, "utf-8")
    (folder / "test.csv").write_text(test, "utf-8")
    return load_dataset(list_config(folder, **changes))


def test_paths_are_relative_to_the_list_or_to_the_root(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", {"a": 2, "b": 2})
    lists = tmp_path / "lists"
    lists.mkdir()
    with pytest.raises(DatasetError, match=r"1 of 1 images cannot be read"):
        load(lists).test.load(np.array([0]))
    dataset = load(lists, root=str(tmp_path / "elsewhere"))
    assert dataset.class_names == ("big cat", "dog")
    assert dataset.owners == ("10", "9", "9")
    assert dataset.train.labels.tolist() == [0, 0, 1]
    loaded = dataset.train.open(np.array([1, 0]))
    assert loaded.images[:, 0, 0, 0].tolist() == [10, 0]
    assert dataset.test.load(np.array([0])).labels.tolist() == [1]
    beside = load(tmp_path / "elsewhere")
    assert beside.train.load(np.array([1])).images[0, 0, 0, 0] == 10


def test_same_image_in_both_lists_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {"a": 2, "b": 1})
    dataset = load(tmp_path, test="path,label\na/1.png,dog\n")
    dataset.test.load(np.array([0]))
    assert "1 of 1 test images are also training images" in caplog.text


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    loaded = load(tmp_path, skip_unreadable=True).train.open(np.arange(3))
    assert loaded.left_out == (1,) and loaded.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        ("dog, big cat", "big cat|dog|big_cat", [1, 0, 1]),
        ("dog, cat", "0|1|1", [0, 1, 1]),
        # Names that are numbers themselves: by name if all are names, else by number.
        ("1, 2", "2|1|2", [1, 0, 1]),
        ("1, 2", "0|1|0", [0, 1, 0]),
    ],
)
def test_names_of_the_configuration_give_the_order(
    tmp_path: Path, names: str, labels: str, numbers: list[int]
) -> None:
    rows = "".join(f"{n}.png,{label}\n" for n, label in enumerate(labels.split("|")))
    text = f"path,label\n{rows}"
    dataset = load(tmp_path, text, text, class_names=names)
    assert dataset.class_names == tuple(names.split(", "))
    assert dataset.train.labels.tolist() == numbers
    assert dataset.test.labels.tolist() == numbers


def test_other_columns_and_spreadsheets(tmp_path: Path) -> None:
    """A byte-order mark, quotes, line ends of Windows, empty lines, more columns."""
    text = '\ufeffid,"file", kind\r\n1,"a, b.png", cat \r\n\r\n2,c.png,dog\r\n'
    dataset = load(tmp_path, text, text, image_column="file", label_column="kind")
    assert dataset.class_names == ("cat", "dog") and dataset.owners == ()
    paths: Any = dataset.train
    assert [path.name for path in paths.paths] == ["a, b.png", "c.png"]


def test_paths_of_any_bytes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"path,label\ncaf\xe9 .jpg,a\n")
    (entry,) = read_table(tmp_path / "list.csv", COLUMNS).entries
    assert os.fsencode(entry.path) == b"caf\xe9 .jpg"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("path;label\na;b\n", r"train\.csv has no column 'path'.*are path;label\."),
        ("path,kind\na,b\n", r"no column 'label'.*path, kind.*dataset\.label-column"),
        ("path,label,label\na,b,c\n", r"train\.csv has 2 columns 'label'; rename"),
        ("client,path,label,client\n1,a,b,2\n", r"has 2 columns 'client'"),
        (
            "path,label\na/0.png,cat\nb,dog\na/./0.png,fox\n",
            r"line 4: 'a/\./0\.png' has the class 'fox', and 'cat' in an earl",
        ),
        ("path,label\na,b\n\nc\n", r"train\.csv, line 4: expected 2 values, found 1"),
        ("path,label\na,b\nc, \n", r"line 3: the path, the class or the client is mi"),
        ("path,label\n ,b\n", r"line 2: the path, the class"),
        ("path,label,client\na,b,\n", r"line 2: the path, the class or the client"),
        ("path,label\na\0,b\n", r"train\.csv"),
        ('path,label\n"a,b\n', r"cannot read the list .*train\.csv"),
        ("path,label\n", r"train\.csv has no image"),
        ("\n", r"has no column 'path'"),
        ("path,label\na,0\nb,1\n", r"are numbers; set dataset\.class-names"),
        ("path,label\na,dog\n", "1 class.*at least two"),
        ("path,label\na,cat\nb,fox\n", r"test\.csv, line 2: 'dog' is no class.*cat, f"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load(tmp_path, train)


def test_file_that_is_listed_again_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.csv").write_text(TRAIN)
    read_table(tmp_path / "list.csv", COLUMNS)
    assert not caplog.messages
    # The class in another spelling, and another client.
    (tmp_path / "list.csv").write_text(TRAIN + "a/0.png,big cat,11\n")
    assert len(read_table(tmp_path / "list.csv", COLUMNS).entries) == 4
    (message,) = caplog.messages
    assert "list.csv lists 1 of its files again" in message
    assert message.endswith(": a/0.png (5)")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        # As a spreadsheet on Windows may save it.
        (b"caf\xe9", r"'caf\\xe9' has .*\(byte 0xe9, no UTF-8\).*as UTF-8"),
        ("cat\u200b".encode(), r"'cat\\u200b' has .* be seen or read \(U\+200B\)"),
        (b"c" * 501, "'c{500}' has a name of more than 500 characters"),
    ],
)
def test_class_that_no_result_could_name_is_refused(
    tmp_path: Path, label: bytes, message: str
) -> None:
    (tmp_path / "train.csv").write_bytes(
        b"path,label\na.png,cat\nb.png," + label + b"\nc.png," + label + b"\n"
    )
    (tmp_path / "test.csv").write_text("path,label\nd.png,cat\n", "utf-8")
    with pytest.raises(DatasetError, match=rf"train\.csv, line 3: the class {message}"):
        load_dataset(list_config(tmp_path))


def test_classes_that_look_the_same_are_refused(tmp_path: Path) -> None:
    train = "path,label\na.png,ab\nb.png,a\u200cb\n"
    with pytest.raises(DatasetError, match=r"line 3: .*'a\\u200cb' looks the .* 'ab'"):
        load(tmp_path, train)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train\.csv: .*No such file"):
        load_dataset(list_config(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="named pipe"):
        read_table(tmp_path / "pipe", COLUMNS)


def test_class_without_training_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train\.csv has no image of the class fox"):
        load(tmp_path, class_names="big cat, dog, fox")
    with pytest.raises(DatasetError, match=r"line 4: 'dog' is no class.*are big cat, "):
        load(tmp_path, class_names="big cat, fox")


def test_natural_clients_are_those_of_the_list(tmp_path: Path) -> None:
    load(tmp_path)
    config = list_config(tmp_path)
    natural = Partition(kind="natural", clients=2)
    parts = partition_indices(config, natural, 7)
    assert [part.tolist() for part in parts] == [[1, 2], [0]]
    with pytest.raises(PartitionError, match=r"come from 2 clients.*clients=2"):
        partition_indices(config, Partition(kind="natural", clients=3), 7)
    unnamed = list_config(tmp_path, client_column="hospital")
    with pytest.raises(PartitionError, match="no column .*client-column = hospital"):
        partition_indices(unnamed, natural, 7)


def test_every_kind_of_partition_can_be_chosen() -> None:
    config = run_config().dataset
    images = len(load_dataset(config).train.labels)
    found = set()
    for partition in (
        Partition(clients=4),
        Partition(clients=4, kind="shards"),
        Partition(clients=4, kind="shards", shards=3),
        Partition(clients=4, kind="quantity"),
        Partition(clients=4, kind="quantity", alpha=9.0),
    ):
        parts = partition_indices(config, partition, 7)
        assert sorted(np.concatenate(parts).tolist()) == list(range(images))
        found.add(str([part.tolist() for part in parts]))
    assert len(found) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset__name": "list"}, "dataset.train-list is empty"),
        ({"partition__kind": "natural"}, "dataset.name = 'demo' does not tell"),
        ({"partition__kind": "shards", "partition__shards": 40}, "for each shard"),
        (
            {"dataset__name": "hugging-face", "dataset__root": "hf-hub:a/b"},
            "hf-hub:OWNER/NAME@REVISION",
        ),
        # A reader of local files for datasets.load_dataset, and no name on the hub.
        (
            {"dataset__name": "hugging-face", "dataset__root": "hf-hub:csv@main"},
            "hf-hub:OWNER/NAME@REVISION",
        ),
        (
            {"dataset__name": "hugging-face", "dataset__root": "hf-hub:../b@main"},
            "hf-hub:OWNER/NAME@REVISION",
        ),
        ({"dataset__name": "hugging-face", "dataset__root": "a/b"}, "is relative"),
        (
            {
                "dataset__name": "list",
                "dataset__train_list": "/a",
                "dataset__test_list": "/b",
                "dataset__root": "c",
            },
            "dataset.root = 'c' is relative",
        ),
        (
            {
                "dataset__name": "list",
                "dataset__train_list": "/a",
                "dataset__test_list": "/b",
                "dataset__class_names": "a, a",
            },
            "dataset.name = 'list' needs at least two different names",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(**changes)


def test_parquet_equals_csv(tmp_path: Path) -> None:
    need_package("pyarrow")
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "list.csv").write_text("path,label,client\na,0,x\nb,3,y\n", "utf-8")
    columns = {"client": ["x", "y"], "more": [0.5, 1.0], "label": [0, 3]}
    columns["path"] = pyarrow.array(["a", "b"]).dictionary_encode()
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    expected = read_table(tmp_path / "list.csv", COLUMNS)
    found = read_table(tmp_path / "list.parquet", COLUMNS)
    assert found.has_clients and expected.has_clients
    assert [e[1:] for e in found.entries] == [e[1:] for e in expected.entries]
    assert [entry.row for entry in found.entries] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a", "b"], "label": [0.0, 1.0]}, "row 1: found a value of type flo"),
        ({"path": ["a", "b"], "label": [True, False]}, "row 1: found .* type bool"),
        ({"path": ["a", None], "label": [0, 1]}, "row 2: the path, the class or"),
        ({"path": ["a"], "kind": [0]}, "no column 'label'; its columns are path, kind"),
        ({"path": [], "label": []}, "has no image"),
    ],
)
def test_bad_parquet_is_named(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    need_package("pyarrow")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "l.parquet")
    with pytest.raises(DatasetError, match=rf"l\.parquet.*{message}"):
        read_table(tmp_path / "l.parquet", COLUMNS)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    need_package("pyarrow")
    (tmp_path / "l.parquet").write_bytes(b"PAR1 is no Parquet file PAR1")
    with pytest.raises(DatasetError, match=r"cannot read the list .*l\.parquet"):
        read_table(tmp_path / "l.parquet", COLUMNS)


def test_parquet_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match="needs pyarrow: pip install 'datasets>=4'"):
        read_table(tmp_path / "l.parquet", COLUMNS)
