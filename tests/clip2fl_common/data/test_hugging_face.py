"""Hugging Face data sets, made here and saved, become files once, and then data."""

import errno
import io
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip2fl_common.config import Dataset, Partition, Scalar
from clip2fl_common.data import hugging_face
from clip2fl_common.data.datasets import (
    DatasetError,
    FileSource,
    forget_datasets,
    load_dataset,
    partition_indices,
)
from tests.defaults import run_config
from tests.tools import need_package

NAMES = ("wild_cat", "dog", "ant")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(root: Path | str, **changes: Scalar) -> Dataset:
    """Return the ``dataset`` group for a saved folder."""
    settings: dict[str, Scalar] = {
        "name": "hugging-face",
        "root": str(root),
        "image_size": 8,
        "imbalance_factor": 1.0,
        **changes,
    }
    return run_config(**{f"dataset__{key}": v for key, v in settings.items()}).dataset


def picture(grey: int, kind: str = "PNG") -> dict[str, Any]:
    """Return an image as an Arrow table holds it."""
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, kind)
    return {"bytes": file.getvalue(), "path": f"any/{grey}.{kind.lower()}"}


def made(
    greys: Sequence[int | dict[str, Any] | None],
    labels: Sequence[Any],
    names: Sequence[str] | None = NAMES,
    **more: Sequence[Any],
) -> Any:
    """Return a data set of grey images, with a ClassLabel if there are names."""
    need_package("datasets")
    import datasets

    images = [picture(grey) if isinstance(grey, int) else grey for grey in greys]
    data = datasets.Dataset.from_dict({"image": images, "label": labels, **more})
    data = data.cast_column("image", datasets.Image())
    if names:
        data = data.cast_column("label", datasets.ClassLabel(names=list(names)))
    return data


def saved(root: Path, **splits: Any) -> Path:
    """Save each split as ``DatasetDict.save_to_disk`` does."""
    for split, data in splits.items():
        data.save_to_disk(root / split)
    return root


def small(root: Path, **more: Sequence[Any]) -> Path:
    return saved(
        root,
        train=made([10, 20, 30, 40], [0, 2, 1, 2], **more),
        test=made([50, 20], [1, 0]),
    )


def grey(loaded: Any) -> list[int]:
    return [int(value) for value in loaded.images[:, 0, 0, 0]]


def test_saved_dictionary_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need_package("datasets")
    import datasets

    splits = {
        "train": made([10, 20, 30, 40], [0, 2, 1, 2]),
        "test": made([50, 20], [1, 0]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    dataset = load_dataset(config(tmp_path / "saved"))
    assert dataset.class_names == ("wild cat", "dog", "ant")
    assert dataset.train.labels.tolist() == [0, 2, 1, 2] and dataset.owners == ()
    assert grey(dataset.train.open(np.array([3, 0]))) == [40, 10]
    assert grey(dataset.test.load(np.arange(2))) == [50, 20]
    assert "1 of 2 test images are also training images" in caplog.text


def test_images_are_unpacked_once_as_they_are_and_for_their_owner_only(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg = picture(30, "JPEG")
    root = saved(
        tmp_path / "saved", train=made([10, jpeg], [0, 1]), test=made([1, 2], [0, 1])
    )
    settings = config(root, class_names="wild cat, dog")
    source = load_dataset(settings).train
    assert isinstance(source, FileSource)
    assert [path.name for path in source.paths] == ["train-0.png", "train-1.jpeg"]
    assert source.paths[1].read_bytes() == jpeg["bytes"]
    for path in own_cache.rglob("*"):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected
    # Later processes do not need the package, which takes seconds to import.
    load_dataset(run_config().dataset)
    monkeypatch.setitem(sys.modules, "datasets", None)
    again = load_dataset(settings).train
    assert isinstance(again, FileSource) and again.paths == source.paths


def test_changed_folder_is_unpacked_again(tmp_path: Path) -> None:
    root = small(tmp_path / "saved")
    assert len(load_dataset(config(root)).train.labels) == 4
    load_dataset(run_config().dataset)
    saved(root, train=made([1, 2, 3], [0, 1, 2]))
    assert load_dataset(config(root)).train.labels.tolist() == [0, 1, 2]


def test_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, as which tests may run, may list every folder."""
    (tmp_path / "saved").mkdir()

    def denied(folder: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(DatasetError, match=r"saved cannot be listed \(Permission deni"):
        load_dataset(config(tmp_path / "saved"))


def test_images_that_nobody_used_for_a_month_are_removed(
    tmp_path: Path, own_cache: Path
) -> None:
    roots = [small(tmp_path / name) for name in "abc"]

    def opened(root: Path) -> Path:
        load_dataset(run_config().dataset)  # a process keeps the last data set
        source = load_dataset(config(root)).train
        assert isinstance(source, FileSource)
        return source.paths[0].parent

    used, old = opened(roots[0]), opened(roots[1])
    long_ago = time.time() - 31 * 24 * 3600
    for path in (own_cache / "hugging-face").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    assert opened(roots[0]) == used  # in use again
    assert used.is_dir() and not old.exists()
    assert opened(roots[2]).is_dir() and used.is_dir()


def test_partitions_of_flwr_datasets_are_natural_clients(tmp_path: Path) -> None:
    """Its folders partition_0, partition_1, ... are in the order of their numbers."""
    parts = {
        f"partition_{n}": made([n] * (1 + n % 2), [n % 3] * (1 + n % 2))
        for n in range(11)
    }
    root = saved(tmp_path / "saved", **parts, test=made([50], [0]))
    settings = config(root)
    found = partition_indices(settings, Partition(kind="natural", clients=11), 7)
    train = load_dataset(settings).train
    for n, part in enumerate(found):
        assert grey(train.load(part)) == [n] * (1 + n % 2)


def test_columns_can_be_named(tmp_path: Path) -> None:
    """Classes as texts, clients as numbers, and a format that decodes images."""
    train = made(
        [1, 2, 3], ["dog", "cat", "dog"], None, writer=[7, 7, 10], id=[0, 1, 2]
    )
    train = train.add_column("thumbnail", [picture(n) for n in range(3)])
    train = train.cast_column("thumbnail", train.features["image"])
    root = saved(
        tmp_path / "saved",
        train=train.with_format("numpy"),
        validation=made([4], ["cat"], None),
    )
    keys = {
        "image_column": "image",
        "label_column": "label",
        "test_split": "validation",
    }
    settings = config(root, client_column="writer", **keys)
    dataset = load_dataset(settings)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [1, 0, 1]
    assert grey(dataset.train.load(np.arange(3))) == [1, 2, 3]
    parts = partition_indices(settings, Partition(kind="natural", clients=2), 7)
    assert [part.tolist() for part in parts] == [[0, 1], [2]]


def test_class_names_order_and_number_the_classes(tmp_path: Path) -> None:
    root = small(tmp_path / "saved")
    ordered = load_dataset(config(root, class_names="ant, wild_cat, dog"))
    assert ordered.class_names == ("ant", "wild cat", "dog")
    assert ordered.train.labels.tolist() == [1, 0, 2, 0]
    # Names that are numbers, as of digits that count from 1.
    root = saved(
        tmp_path / "digits",
        train=made([1, 2, 3], [2, 0, 1], ("1", "2", "3")),
        test=made([4], [0], ("1", "2", "3")),
    )
    digits = load_dataset(config(root))
    assert digits.class_names == ("1", "2", "3")
    assert digits.train.labels.tolist() == [2, 0, 1]
    assert digits.test.labels.tolist() == [0]


def test_images_outside_of_the_data_set_stay_where_they_are(tmp_path: Path) -> None:
    """A folder of images, as the hub has them, is read without a copy."""
    file = tmp_path / "outside.png"
    file.write_bytes(picture(33)["bytes"])
    outside = {"bytes": None, "path": str(file)}
    train = made([outside, 2], [0, 1], NAMES[:2])
    parts = [hugging_face._Part(train, "here")]
    folder = tmp_path / "unpacked"
    folder.mkdir()
    rows = list(hugging_face._rows(config("/x"), parts, folder, "train"))
    assert rows == [["path", "label"], [str(file), NAMES[0]], ["train-1.png", NAMES[1]]]
    assert [place.name for place in folder.iterdir()] == ["train-1.png"]


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    bad = {"bytes": b"no image", "path": None}
    root = saved(
        tmp_path / "saved", train=made([1, bad, 3], [0, 1, 2]), test=made([4], [0])
    )
    with pytest.raises(DatasetError, match=r"1 of 3 .*train-1 \(no image that is know"):
        load_dataset(config(root)).train.load(np.arange(3))
    skipping = load_dataset(config(root, skip_unreadable=True)).train
    loaded = skipping.open(np.arange(3))
    assert loaded.left_out == (1,) and grey(loaded) == [1, 3]


def test_data_set_of_the_hub_is_loaded_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_package("datasets")
    import datasets

    asked = []
    splits = {
        "train": made([1, 2], [0, 1], NAMES[:2]),
        "test": made([3], [0], NAMES[:2]),
    }

    def answer(*args: str, **kwargs: str) -> Any:
        asked.append((args, kwargs))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    dataset = load_dataset(config("hf-hub:somebody/pets@0123abc"))
    assert grey(dataset.train.load(np.arange(2))) == [1, 2]
    load_dataset(run_config().dataset)
    load_dataset(config("hf-hub:somebody/pets@0123abc"))
    # Once, and nothing that would run a program of the data set.
    assert asked == [(("somebody/pets",), {"revision": "0123abc"})]
    with pytest.raises(
        DatasetError, match=r"no split 'dev', but train, test.*test-spl"
    ):
        load_dataset(config("hf-hub:somebody/pets@0123abc", test_split="dev"))

    def refused(*_: str, **__: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(DatasetError, match=r"pets@other cannot be loaded \(no network"):
        load_dataset(config("hf-hub:somebody/pets@other"))


def damaged(root: Path) -> Path:
    for file in small(root).rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    return root


def without_image(root: Path) -> Path:
    return saved(root, train=made([1, None], [0, 1]), test=made([1], [0]))


def with_relative_path(root: Path) -> Path:
    """Take the place of a folder that is written by hand: saving reads the files."""
    elsewhere = {"bytes": None, "path": "../secret.png"}
    data = made([1], [0])
    part = hugging_face._Part(
        data.from_dict({"image": [elsewhere], "label": [0]}, features=data.features),
        "here",
    )
    root.mkdir()
    list(hugging_face._rows(config("/x"), [part], root, "train"))
    return root


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda root: root, {}, r"saved is not a folder"),
        (
            lambda root: saved(root, train=made([1], [0])),
            {},
            r"saved/test is no data set saved by .* set dataset\.test-split",
        ),
        (damaged, {}, r"saved/train cannot be read"),
        (
            small,
            {"image_column": "img"},
            r"train has no column dataset\.image-column = ",
        ),
        (
            small,
            {"image_column": "label"},
            r"no images .*image-column = label",
        ),
        (small, {"label_column": "kind"}, r"label-column = kind, but image, label"),
        (
            lambda root: saved(
                root, train=made([1], ["a"], None), test=made([1], ["b"], None)
            ),
            {},
            r"train has 0 columns of type ClassLabel; name one of image, label with da",
        ),
        (
            lambda root: saved(root, train=made([1], [0]), test=made([1, 2], [0, -1])),
            {},
            r"saved/test, row 1: found the class and client \[None\]",
        ),
        (
            lambda root: saved(
                root, train=made([1], [0.5], None), test=made([1], [0.5], None)
            ),
            {"label_column": "label"},
            r"train, row 0: found the class and client \[0\.5\]",
        ),
        (
            lambda root: saved(
                root, train=made([1], [0], writer=[None]), test=made([1], [0])
            ),
            {"client_column": "writer"},
            r"row 0: found the class and client \['wild_cat', None\]",
        ),
        (
            lambda root: saved(
                root, train=made([1], [0]), test=made([1], [0], NAMES[::-1])
            ),
            {},
            r"test has other classes than .*train: ant, dog, wild cat, not wild cat,",
        ),
        (
            lambda root: saved(
                root,
                train=made([1], [0], ("a b", "a_b")),
                test=made([1], [0], ("a b", "a_b")),
            ),
            {},
            r"two classes of one name: a b",
        ),
        (
            lambda root: saved(
                root,
                train=made([1], [0], ("ab", "a\u200bb")),
                test=made([1], [0], ("ab", "a\u200bb")),
            ),
            {},
            r"the class 'a\\u200bb' has a character .*\(U\+200B\).*ClassLabel",
        ),
        (without_image, {}, r"train, row 1: found no image, and no absolute path"),
        (with_relative_path, {}, r"row 0: found no image.*'\.\./secret\.png'"),
        (
            lambda root: saved(root, train=made([1, 2], [0, 1]), test=made([1], [0])),
            {},
            r"no image of the class ant",
        ),
    ],
)
def test_faults_are_named(
    tmp_path: Path,
    own_cache: Path,
    make: Callable[[Path], Path],
    changes: dict[str, Scalar],
    message: str,
) -> None:
    need_package("datasets")
    with pytest.raises(DatasetError, match=message):
        load_dataset(config(make(tmp_path / "saved"), **changes))
    # Nothing incomplete stays, neither visible nor hidden.
    whole = [path.parent for path in own_cache.rglob(hugging_face.NAMES)]
    kept = [path for path in own_cache.glob("hugging-face/*") if path.is_dir()]
    assert sorted(kept) == sorted(whole)


def test_missing_or_old_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
        (tmp_path / "saved" / split / "state.json").write_text(json.dumps({}))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"needs the package datasets: pip install "):
        load_dataset(config(tmp_path / "saved"))

    class Old:
        __version__ = "3.6.0"

    monkeypatch.setitem(sys.modules, "datasets", Old)
    with pytest.raises(
        DatasetError, match=r"datasets 3\.6\.0 may run programs.*4 or n"
    ):
        load_dataset(config(tmp_path / "saved"))


def test_splits_that_are_links_are_those_of_their_own_root(tmp_path: Path) -> None:
    """A search below the root does not enter links."""
    for n, root in enumerate(("one", "two")):
        images = made([n] * 3, range(3)), made([10 + n], [0])
        saved(tmp_path / f"disk {n}", train=images[0], test=images[1])
        (tmp_path / root).mkdir()
        for split in ("train", "test"):
            (tmp_path / root / split).symlink_to(tmp_path / f"disk {n}" / split)
    for n, root in enumerate(("one", "two")):
        dataset = load_dataset(config(tmp_path / root))
        assert grey(dataset.train.load(np.arange(1))) == [n]
        assert grey(dataset.test.load(np.arange(1))) == [10 + n]
    saved(tmp_path / "disk 1", train=made([99] * 3, range(3)))
    forget_datasets()
    assert grey(load_dataset(config(tmp_path / "two")).train.load(np.arange(1))) == [99]
