"""The data sets by name, with their images as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from clip2fl_common.config import SITES, listed_names
from clip2fl_common.config import Dataset as DatasetConfig
from clip2fl_common.config import Partition as PartitionConfig
from clip2fl_common.data import demo, hugging_face
from clip2fl_common.data.image_cache import file_digests
from clip2fl_common.data.image_files import (
    DatasetError,
    class_folders,
    is_folder,
    labelled_images,
    site_files,
)
from clip2fl_common.data.image_formats import IMAGE_SUFFIXES
from clip2fl_common.data.image_lists import read_image_list
from clip2fl_common.data.image_reading import read_image
from clip2fl_common.data.image_tables import Columns, Table, class_numbers, read_table
from clip2fl_common.data.sources import (
    ArraySource,
    FileSource,
    ImageSource,
    LabelArray,
    LoadedImages,
)
from clip2fl_common.partition import (
    PartitionError,
    long_tail,
    long_tail_counts,
    long_tail_partition,
    natural_partition,
    quantity_partition,
    shard_partition,
)
from clip2fl_common.shown import listed, shown

__all__ = [
    "DatasetError",
    "FileSource",
    "ImageDataset",
    "ImageSource",
    "LoadedImages",
    "Normalization",
    "load_dataset",
    "open_site",
    "partition_indices",
    "read_image",
    "validating",
]


@dataclass(frozen=True)
class Normalization:
    """Channel mean and deviation of images scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 images [N, 3, H, W]; return them as float."""
        # On a CPU it costs nothing, and an export to ONNX must have tensors of its own.
        place = _copied if images.device.type == "cpu" else _kept
        mean, std = place(self.mean, self.std, images.device)
        return (images.float() / 255 - mean) / std


def _copied(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both on a device, shape [3, 1, 1]."""
    # Training may use them later, and so no tensors of the inference mode.
    with torch.inference_mode(False):
        moved = torch.tensor((mean, std), device=device)[:, :, None, None]
        return moved[0], moved[1]


# Each copy to a GPU waits until the GPU has nothing to do.
_kept = lru_cache(maxsize=16)(_copied)


CIFAR10_NORMALIZATION = Normalization(
    (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
)
CIFAR100_NORMALIZATION = Normalization(
    (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
)
IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageDataset:
    """A data set: training and test images and the names of the classes.

    Attributes
    ----------
    name : str
        The name in the configuration.
    class_names : tuple of str
        C names, as the teacher's prompt contains them.
    train, test : ImageSource
        The two splits.
    normalization : Normalization
        Normalization of the student's input.
    image_size : int
        Side of the images in pixels.
    imbalance_factor : float
        Imbalance factor of the long tail that is still to be cut from ``train``.
    owners : tuple of str
        Client that each training image comes from; empty if unknown.
    """

    name: str
    class_names: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    normalization: Normalization
    image_size: int
    imbalance_factor: float = 1.0
    owners: tuple[str, ...] = ()


def load_dataset(config: DatasetConfig) -> ImageDataset:
    """Open a data set; each process keeps the last one that it opened.

    Parameters
    ----------
    config : Dataset
        The ``dataset`` group of the run configuration.

    Returns
    -------
    ImageDataset

    Raises
    ------
    DatasetError
        Names the folder or file, its content and what is expected.
    """
    return _load_dataset(config)


@lru_cache(maxsize=1)
def partition_indices(
    config: DatasetConfig, partition: PartitionConfig, seed: int
) -> tuple[LabelArray, ...]:
    """Return each client's indices into the training images.

    Parameters
    ----------
    config : Dataset
        The ``dataset`` group of the run configuration.
    partition : Partition
        The ``partition`` group of the run configuration.
    seed : int
        Seed of the partition.

    Returns
    -------
    tuple of ndarray of int64
        The images of the long tail, divided: see `clip2fl_common.partition`.

    Raises
    ------
    DatasetError, PartitionError
        If the images are missing, or cannot be divided in this way.
    """
    dataset = load_dataset(config)
    labels, classes = dataset.train.labels, len(dataset.class_names)
    factor, clients, alpha = (
        dataset.imbalance_factor,
        partition.clients,
        partition.alpha,
    )
    if partition.kind == "dirichlet":
        return tuple(long_tail_partition(labels, classes, factor, clients, alpha, seed))
    kept = long_tail(labels, classes, factor, seed)
    if partition.kind == "shards":
        return tuple(shard_partition(kept, clients, partition.shards, seed))
    if partition.kind == "quantity":
        return tuple(quantity_partition(kept, clients, alpha, seed))
    if not dataset.owners:
        raise PartitionError(
            "partition.kind = 'natural' needs the client of each training image, but "
            f"there is no column dataset.client-column = {shown(config.client_column)}"
        )
    return tuple(natural_partition(kept, dataset.owners, clients))


def forget_datasets() -> None:
    """Look at files again the next time, in a process that has read them before."""
    _load_dataset.cache_clear()
    partition_indices.cache_clear()


@lru_cache(maxsize=1)
def _load_dataset(config: DatasetConfig) -> ImageDataset:
    opened = {
        "demo": _demo,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "imagenet-lt": _imagenet_lt,
        "image-folder": _image_folder,
        "list": _listed,
        "hugging-face": _hugging_face,
        SITES: _no_images,
    }[config.name](config)
    if len(opened.class_names) < 2:
        raise DatasetError(
            f"dataset.name = {config.name!r} has {len(opened.class_names)} class "
            f"({', '.join(opened.class_names)}); classification needs at least two"
        )
    return opened


def _demo(config: DatasetConfig) -> ImageDataset:
    # Only the images that the tail keeps are drawn, so a partition keeps all of them.
    classes = len(demo.CLASS_NAMES)
    counts = long_tail_counts(
        config.demo_train_per_class, classes, config.imbalance_factor
    )

    def drawn(split: demo.Split, counts: Sequence[int]) -> ArraySource:
        images, labels = demo.demo_split(split, counts)
        return ArraySource(torch.from_numpy(images), labels, config.image_size)

    return ImageDataset(
        "demo",
        demo.CLASS_NAMES,
        drawn("train", counts),
        drawn("test", [config.demo_test_per_class] * classes),
        IMAGENET_NORMALIZATION,
        config.image_size,
    )


def _cifar(config: DatasetConfig) -> ImageDataset:
    # Imported here, because the import takes more than a second, and each message
    # starts a ClientApp process.
    from torchvision.datasets import CIFAR10, CIFAR100

    kind, normalization = {
        "cifar10": (CIFAR10, CIFAR10_NORMALIZATION),
        "cifar100": (CIFAR100, CIFAR100_NORMALIZATION),
    }[config.name]
    root = Path(config.root).expanduser()
    try:
        try:
            splits = [kind(str(root), train=train) for train in (True, False)]
        except RuntimeError:  # not complete; a folder without the right to write works
            root.mkdir(parents=True, exist_ok=True)
            # Several clients may start at once; only one of them downloads.
            with FileLock(root / f".{config.name}.lock"):
                splits = [
                    kind(str(root), train=train, download=True)
                    for train in (True, False)
                ]
    except (OSError, RuntimeError) as error:
        raise DatasetError(
            f"dataset.name = {config.name!r}: not complete in dataset.root = {root} "
            f"and cannot be downloaded ({error}); with no network, copy the extracted "
            f"folder {kind.base_folder} there"
        ) from error
    train, test = (
        ArraySource(
            torch.from_numpy(split.data).permute(0, 3, 1, 2),
            np.asarray(split.targets, dtype=np.int64),
            config.image_size,
        )
        for split in splits
    )
    names = tuple(name.replace("_", " ") for name in splits[0].classes)
    return ImageDataset(
        config.name,
        names,
        train,
        test,
        normalization,
        config.image_size,
        config.imbalance_factor,
    )


def _image_folder(config: DatasetConfig) -> ImageDataset:
    root = Path(config.root).expanduser()
    folders = _class_folders(root / "train")
    names = [name for name, _ in folders]
    labels = {name: label for label, name in enumerate(names)}
    test_folders = _class_folders(root / "test")
    if unknown := [folder.name for name, folder in test_folders if name not in labels]:
        raise DatasetError(
            f"{shown(root / 'test')} has folders that {shown(root / 'train')} has not: "
            f"{listed(unknown, most=20)}; known classes: "
            f"{', '.join(folder.name for _, folder in folders)}"
        )
    train = _folder_source(root / "train", folders, labels, config)
    test = _folder_source(root / "test", test_folders, labels, config)
    for label, (_, folder) in enumerate(folders):
        if not (train.labels == label).any():
            raise DatasetError(
                f"class {folder.name!r} would be held by nobody: {shown(folder)} has "
                f"no image ({', '.join(IMAGE_SUFFIXES)}); add some or remove the folder"
            )
    return ImageDataset(
        "image-folder",
        tuple(names),
        train,
        replace(test, trained_on=train.paths),
        IMAGENET_NORMALIZATION,
        config.image_size,
        config.imbalance_factor,
    )


def _listed(config: DatasetConfig) -> ImageDataset:
    columns = Columns(
        config.image_column or "path",
        config.label_column or "label",
        config.client_column,
    )
    train, test = (
        read_table(Path(file).expanduser(), columns)
        for file in (config.train_list, config.test_list)
    )
    return _of_tables(config, config.root, train, test, ())


def _hugging_face(config: DatasetConfig) -> ImageDataset:
    files = hugging_face.unpacked(config)
    train, test = (
        read_table(file, hugging_face.COLUMNS) for file in (files.train, files.test)
    )
    return _of_tables(config, "", train, test, files.class_names)


def _of_tables(
    config: DatasetConfig, folder: str, train: Table, test: Table, names: Sequence[str]
) -> ImageDataset:
    """Return the images of two lists, with paths from ``folder`` or the lists' own."""
    if config.class_names:
        names = listed_names(config.class_names)
    names, *labels = class_numbers(train, test, names)
    sources = []
    for table, numbers in zip((train, test), labels, strict=True):
        root = Path(folder).expanduser() if folder else table.file.parent
        paths = [root / entry.path for entry in table.entries]
        sources.append(_file_source(paths, numbers, config))
    return ImageDataset(
        config.name,
        tuple(names),
        sources[0],
        replace(sources[1], trained_on=sources[0].paths),
        IMAGENET_NORMALIZATION,
        config.image_size,
        config.imbalance_factor,
        tuple(entry.client for entry in train.entries) if train.has_clients else (),
    )


def _class_folders(folder: Path) -> list[tuple[str, Path]]:
    if not is_folder(folder):
        raise DatasetError(
            f"{shown(folder)} is not a folder that this user can see; dataset.root "
            "must hold train/<class>/<image> and test/<class>/<image>"
        )
    folders = class_folders(folder)
    if not folders:
        raise DatasetError(
            f"{shown(folder)} has no class folders; it must hold <class>/<image>"
        )
    return folders


def _folder_source(
    root: Path,
    folders: Sequence[tuple[str, Path]],
    labels: Mapping[str, int],
    config: DatasetConfig,
) -> FileSource:
    files = labelled_images((labels[name], folder) for name, folder in folders)
    if not files:
        raise DatasetError(
            f"{shown(root)} has class folders but no image "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    return _file_source(
        [path for path, _ in files], [label for _, label in files], config
    )


def _file_source(
    paths: Sequence[Path], labels: Sequence[int], config: DatasetConfig
) -> FileSource:
    return FileSource(
        tuple(paths),
        np.asarray(labels, dtype=np.int64),
        config.image_size,
        config.skip_unreadable,
    )


def _no_images(config: DatasetConfig) -> ImageDataset:
    """Return what a server knows about the sites' images: classes and size."""
    none = ArraySource(
        torch.empty(0, 3, config.image_size, config.image_size, dtype=torch.uint8),
        np.empty(0, dtype=np.int64),
        config.image_size,
    )
    return _site_dataset(config, none, none)


def open_site(config: DatasetConfig, folder: Path) -> ImageDataset:
    """Open a site's own images, divided into training and validation.

    The split depends only on the content of each image file. It does not depend on the
    other files in the folder, and equal files are in the same split at all sites. A
    larger share only adds validation images.

    Parameters
    ----------
    config : Dataset
        The ``dataset`` group of the run configuration.
    folder : Path
        Contains ``<class>/<image>``, for any of the run's classes.

    Returns
    -------
    ImageDataset
        With the validation images as ``test``, which may be empty.

    Raises
    ------
    DatasetError
        If the folder is not usable (see `site_files`), or no training image is left.
    """
    files = site_files(folder, listed_names(config.class_names))
    paths = [path for path, _ in files]
    labels = np.asarray([label for _, label in files], dtype=np.int64)
    validates = validating(paths, config.validation_share)
    if validates.all():
        raise DatasetError(
            f"all {len(paths)} images of {shown(folder)} serve validation; add images "
            f"or lower dataset.validation-share (now {config.validation_share})",
            "no image is left to train on",
        )
    train, validation = (
        _file_source(
            [paths[i] for i in np.flatnonzero(chosen)], labels[chosen].tolist(), config
        )
        for chosen in (~validates, validates)
    )
    return _site_dataset(config, train, validation)


def validating(paths: Sequence[Path], share: float) -> npt.NDArray[np.bool_]:
    """Return which of a site's images serve validation.

    Parameters
    ----------
    paths : sequence of Path
        N image files.
    share : float
        Share of the images that serve validation, in the mean.

    Returns
    -------
    ndarray of bool, shape [N]
    """
    chosen: npt.NDArray[np.bool_] = file_digests(paths) < share * 2.0**64
    return chosen


def _site_dataset(
    config: DatasetConfig, train: ImageSource, validation: ImageSource
) -> ImageDataset:
    return ImageDataset(
        SITES,
        listed_names(config.class_names),
        train,
        validation,
        IMAGENET_NORMALIZATION,
        config.image_size,
    )


def _imagenet_lt(config: DatasetConfig) -> ImageDataset:
    root = Path(config.root).expanduser()
    if not is_folder(root):
        raise DatasetError(
            f"dataset.root = {shown(root)} is not a folder that this user can see"
        )
    train = _listed_source(root, Path(config.train_list).expanduser(), config)
    test = _listed_source(root, Path(config.test_list).expanduser(), config)
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    names = _imagenet_names(classes)
    present = np.bincount(train.labels, minlength=classes)
    if missing := np.flatnonzero(present == 0).tolist():
        raise DatasetError(
            f"dataset.train-list = {config.train_list} has no image of class "
            f"{', '.join(map(str, missing[:10]))}, so nobody would hold it"
        )
    # The lists are already long-tailed, so no images are removed.
    return ImageDataset(
        "imagenet-lt",
        names,
        train,
        test,
        IMAGENET_NORMALIZATION,
        config.image_size,
    )


def _imagenet_names(classes: int) -> tuple[str, ...]:
    """Return the class names that open_clip ships for ImageNet's 1,000 classes."""
    from open_clip import IMAGENET_CLASSNAMES

    if classes > len(IMAGENET_CLASSNAMES):
        raise DatasetError(
            f"the lists name {classes} classes, but ImageNet has "
            f"{len(IMAGENET_CLASSNAMES)}"
        )
    return tuple(IMAGENET_CLASSNAMES[:classes])


def _listed_source(root: Path, list_file: Path, config: DatasetConfig) -> FileSource:
    return _file_source(*read_image_list(list_file, root), config)
