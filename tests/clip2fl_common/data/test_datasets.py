"""Data sets load the right images; errors name the faulty folder or file."""

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clip2fl_common.config import Dataset, Partition, Scalar
from clip2fl_common.data import sources
from clip2fl_common.data.datasets import (
    DatasetError,
    FileSource,
    ImageSource,
    LoadedImages,
    Normalization,
    load_dataset,
    partition_indices,
    read_image,
)
from clip2fl_common.partition import PartitionError
from tests.defaults import run_config


def folder_config(root: Path, **changes: Scalar) -> Dataset:
    """Return the ``dataset`` group for an image folder."""
    settings = {"dataset__" + key: value for key, value in changes.items()}
    return run_config(
        **{
            "dataset__name": "image-folder",
            "dataset__root": str(root),
            "dataset__image_size": 8,
            "dataset__imbalance_factor": 1.0,
            **settings,
        }
    ).dataset


def write_images(root: Path, counts: dict[str, int]) -> Path:
    """Write grey PNGs: counts by ``split/class``."""
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 10 * i).save(root / place / f"{i}.png")
    return root


TREE = {"train/big_cat": 3, "train/dog": 2, "test/big_cat": 1, "test/dog": 1}


def test_image_folder(tmp_path: Path) -> None:
    dataset = load_dataset(folder_config(write_images(tmp_path, TREE)))
    assert dataset.class_names == ("big cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    loaded = dataset.train.load(np.array([4, 1]))
    assert loaded.images.shape == (2, 3, 8, 8)
    assert loaded.labels.tolist() == [1, 0]
    assert loaded.images[1].unique().tolist() == [10]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": 0}, "train has no class folders"),
        ({"val/a": 1}, "train is not a folder that this user can see.*train/<class>"),
        ({"train/a": 2, "test/a": 1}, "has 1 class .*at least two"),
        ({**TREE, "train/eel": 0}, "class 'eel' would be held by nobody"),
        ({**TREE, "test/eel": 1}, "folders that .* has not: eel; known .*big_cat, dog"),
    ],
)
def test_bad_folders_are_named(
    tmp_path: Path, tree: dict[str, int], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(folder_config(write_images(tmp_path, tree)))


def test_normalization_is_by_channel_and_copied_to_a_device_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy waits until a GPU has nothing to do."""
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(torch.uint8)
    normalization = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    found = normalization(images)
    for channel, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(found[:, channel].double(), expected)
    with torch.inference_mode():
        normalization(images.to("meta"))
    again = pickle.loads(pickle.dumps(normalization))
    assert again == normalization and hash(again) == hash(normalization)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("copied again"))
    # Training is possible where the copy was made in the inference mode.
    pixels = images.to("meta", torch.float32).requires_grad_()
    again(pixels).sum().backward()
    assert pixels.grad is not None


def test_unreadable_images_are_named_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, TREE)
    (tmp_path / "train" / "dog" / "0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"")
    source = load_dataset(folder_config(tmp_path)).train
    with pytest.raises(DatasetError, match=r"2 of 5 images.*0\.png.*skip-unreadable"):
        source.load(np.arange(5))

    source = load_dataset(folder_config(tmp_path, skip_unreadable=True)).train
    loaded = source.load(np.arange(5))
    assert loaded.labels.tolist() == [0, 0, 0]
    assert [Path(name).name for name in loaded.unreadable] == ["0.png", "1.png"]
    backwards = source.load(np.array([4, 2, 3]))
    assert (loaded.left_out, backwards.left_out) == ((3, 4), (0, 2))
    with pytest.raises(DatasetError, match="none of 2 .*nothing is left"):
        source.open(np.array([3, 4]))
    # A part of a larger set, or a set of no files at all.
    for part in (np.array([3, 4]), np.array([], dtype=np.int64)):
        nothing = source.load(part)
        assert (len(nothing.labels), len(nothing.unreadable)) == (0, len(part))
        assert nothing.images.shape == (0, *loaded.images.shape[1:])


@pytest.fixture
def folder_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSource:
    """Return five images in files; decoded ones go to a cache folder of the test."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    root = write_images(tmp_path / "images", TREE)
    return load_dataset(folder_config(root, skip_unreadable=True)).train


def same(one: LoadedImages, other: LoadedImages) -> bool:
    """Return whether two loads gave the same images."""
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and one.unreadable == other.unreadable
    )


def test_opened_images_are_decoded_once(
    folder_source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices = np.array([4, 0, 1])
    expected = folder_source.load(indices)
    opened = folder_source.open(indices)
    assert same(opened, expected)
    monkeypatch.setattr(
        sources, "read_picture", lambda *_: pytest.fail("decoded again")
    )
    opened.images[0] = 0  # reaches neither the file nor the next reader
    assert same(folder_source.open(indices), expected)


def test_changed_file_is_decoded_again(
    folder_source: ImageSource, tmp_path: Path
) -> None:
    folder_source.open(np.arange(5))
    changed = tmp_path / "images" / "train" / "dog" / "0.png"
    Image.new("L", (8, 8), 77).save(changed)
    os.utime(changed, ns=(1, 1))
    assert folder_source.open(np.arange(5)).images[3].unique().tolist() == [77]


@pytest.mark.parametrize("name", ["pixels.bin", "refused.json"])
def test_damaged_decoded_images_are_made_again(
    folder_source: ImageSource, tmp_path: Path, name: str
) -> None:
    expected = folder_source.load(np.arange(5))
    folder_source.open(np.arange(5))
    (file,) = (tmp_path / "cache").rglob(name)
    file.write_bytes(file.read_bytes()[:-3])
    assert same(folder_source.open(np.arange(5)), expected)


def test_full_disk_costs_time_only(
    folder_source: ImageSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expected = folder_source.load(np.arange(5))
    assert same(folder_source.open(np.arange(5)), expected)
    assert "No space left" in caplog.text and "CLIP2FL_CACHE_DIR" in caplog.text
    assert not list((tmp_path / "cache").rglob("*incomplete*"))


def test_opened_images_leave_unreadable_ones_out(
    folder_source: ImageSource, tmp_path: Path
) -> None:
    (tmp_path / "images" / "train" / "big_cat" / "2.png").write_bytes(b"no image")
    expected = folder_source.load(np.arange(5))
    assert len(expected.unreadable) == 1
    for _ in range(2):
        assert same(folder_source.open(np.arange(5)), expected)
    strict = load_dataset(folder_config(tmp_path / "images")).train
    with pytest.raises(DatasetError, match="1 of 5 images cannot be read"):
        strict.open(np.arange(5))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (12, 8), (255, 0, 0)).convert(mode).save(file)
    image = read_image(file, 4)
    assert image.shape == (3, 4, 4)
    grey = np.full((3, 4, 4), 76)
    red = np.stack([np.full((4, 4), value) for value in (255, 0, 0)])
    np.testing.assert_allclose(image, grey if mode == "L" else red, atol=2)


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    upright = read_image(tmp_path / "x.png", 8)
    np.testing.assert_array_equal(upright[0], np.rot90(picture[:, :, 0], -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_undone(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    """The result equals rotating the whole image first, then cropping and scaling."""
    rows, columns = np.linspace(0, 255, 48)[:, None], np.linspace(255, 0, 80)
    picture = Image.fromarray(((rows + columns) / 2).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{suffix}"
    picture.save(file, exif=exif)
    with Image.open(file) as image:
        whole = ImageOps.exif_transpose(image).convert("RGB")
    expected = ImageOps.fit(whole, (16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(
        read_image(file, 16).transpose(1, 2, 0),
        np.asarray(expected).astype(float),
        atol=1,
    )


@pytest.mark.parametrize("style", ["plain", "json lines", "json pairs"])
def test_public_lists(tmp_path: Path, style: str) -> None:
    write_images(tmp_path, {"n 1": 2, "n2": 1})
    entries = [("n 1/0.png", 0), ("n 1/1.png", 0), ("n2/0.png", 1)]
    lines = [f"{path} {label}" for path, label in entries]
    text = {
        "plain": "\n".join(lines) + "\n",
        "json lines": json.dumps(lines),
        "json pairs": json.dumps(entries),
    }[style]
    (tmp_path / "list.txt").write_text(text)
    source = load_dataset(list_config(tmp_path)).train
    assert source.labels.tolist() == [0, 0, 1]
    assert isinstance(source, FileSource)
    assert source.paths[2] == tmp_path / "n2" / "0.png"


def list_config(root: Path) -> Dataset:
    """Return the ``dataset`` group of ImageNet-LT's format."""
    listing = str(root / "list.txt")
    return folder_config(
        root, name="imagenet-lt", train_list=listing, test_list=listing
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\n", r"list\.txt, entry 2: expected 'path label'.*'b\.jpg'"),
        ("a.jpg cat\n", "entry 1: expected 'path label'"),
        ("a.jpg 0\nb.jpg 2\n", "no image of class 1, so nobody would hold it"),
        ("\n", "list .* is empty"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_dataset(list_config(tmp_path))


def test_cifar_in_the_place_of_a_file_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"dataset\.root = .*file.*File exists"):
        load_dataset(folder_config(tmp_path / "file", name="cifar10"))


def test_cifar_that_cannot_be_had_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", refused
    )
    with pytest.raises(DatasetError, match=r"dataset\.root.*cifar-10-batches-py"):
        load_dataset(folder_config(tmp_path, name="cifar10"))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        # The values of the published code.
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_cifar_is_read_as_torchvision_holds_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """A stand-in with pixels that differ by image, row, column and colour."""

    class Stored:
        base_folder = "stored"

        def __init__(self, root: str, train: bool, download: bool = False) -> None:
            assert root == str(tmp_path) and not download
            count = 12 if train else 4
            self.data = np.random.default_rng(train).integers(
                0, 256, (count, 32, 32, 3), np.uint8
            )
            self.targets = [n % 3 for n in range(count)]
            self.classes = ["aquarium_fish", "bear", "cat"]

    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", Stored)
    changes = {"image_size": 32, "imbalance_factor": 2.0}
    dataset = load_dataset(folder_config(tmp_path, name=name, **changes))
    assert dataset.class_names == ("aquarium fish", "bear", "cat")
    assert (dataset.normalization.mean, dataset.normalization.std) == (mean, std)
    assert dataset.imbalance_factor == 2.0
    for source, train in ((dataset.train, True), (dataset.test, False)):
        stored = Stored(str(tmp_path), train)
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == stored.targets
        loaded = source.load(np.array([3, 1]))
        assert loaded.labels.tolist() == [0, 1]
        for image, n in zip(loaded.images.numpy(), (3, 1), strict=True):
            for c in range(3):
                assert (image[c] == stored.data[n, :, :, c]).all()


def test_demo_is_long_tailed_and_partitioned_whole() -> None:
    config = run_config()
    parts = partition_indices(config.dataset, config.partition, 7)
    labels = load_dataset(config.dataset).train.labels
    # 20 * 0.1 ** (k / 9), cut to whole images.
    assert np.bincount(labels).tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_client_without_images_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"partition\.clients = 500.*78"):
        partition_indices(run_config().dataset, Partition(clients=500), 7)


# As torchvision's reference models have them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_demo_is_normalised_as_imagenet() -> None:
    found = load_dataset(run_config().dataset).normalization
    assert (found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_imagenet_lt_has_the_thousand_class_names_and_the_normalisation(
    tmp_path: Path,
) -> None:
    """Delivered models predict these names, in this order."""
    write_images(tmp_path, {"n": 1})
    lines = [f"n/0.png {label}\n" for label in range(1000)]
    (tmp_path / "list.txt").write_text("".join(lines))
    dataset = load_dataset(list_config(tmp_path))
    names = dataset.class_names
    assert (len(names), len(set(names))) == (1000, 998)
    assert [names[n] for n in (0, 134, 517, 999)] == [
        *("tench", "crane bird", "construction crane", "toilet paper")
    ]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest.startswith("571ae1c583b4be7d")
    found = dataset.normalization
    assert (found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)
