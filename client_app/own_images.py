"""The images of this client: a site's own folder, or a simulated partition."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from clip2fl_common.config import SITES, RunConfig
from clip2fl_common.datasets import (
    DatasetError,
    ImageDataset,
    LoadedImages,
    load_dataset,
    open_site,
    partition_indices,
)
from clip2fl_common.teacher import OtherTeacherError, TeacherError

NodeConfig = Mapping[str, bool | int | float | str]


class SiteError(RuntimeError):
    """A site cannot do what it was asked; says so without a name from its disk."""


def training_images(
    config: RunConfig, node_config: NodeConfig, partition: int
) -> tuple[ImageDataset, LoadedImages]:
    """Return the site's images, or those of the partition asked for.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    node_config : mapping
        What the node was started with.
    partition : int
        Which partition to train on, where clients are simulated.

    Returns
    -------
    ImageDataset
        The data set.
    LoadedImages
        This client's training images.

    Raises
    ------
    DatasetError
        If they are not where, or not what, they should be.
    """
    if config.dataset.name == SITES:
        dataset = open_own_site(config, node_config)
        return dataset, dataset.train.open(np.arange(len(dataset.train.labels)))
    dataset = load_dataset(config.dataset)
    parts = partition_indices(
        config.dataset, config.partition.clients, config.partition.alpha, config.seed
    )
    return dataset, dataset.train.open(parts[partition])


def validation_images(
    config: RunConfig, node_config: NodeConfig
) -> tuple[ImageDataset, LoadedImages]:
    """Return the site's images that evaluate; see `training_images`."""
    dataset = open_own_site(config, node_config)
    indices = np.arange(len(dataset.test.labels))
    # Nothing can be kept of no images.
    source = dataset.test
    return dataset, source.open(indices) if len(indices) else source.load(indices)


def open_own_site(config: RunConfig, node_config: NodeConfig) -> ImageDataset:
    """Open the folder that the node was started with."""
    folder = node_config.get("data-path")
    if not isinstance(folder, str) or not Path(folder).is_absolute():
        raise DatasetError(
            f"dataset.name = 'sites', but this node's data-path is {folder!r}: start "
            "it with --node-config 'data-path=\"/absolute/folder\"'",
            "the node has no absolute data-path in its --node-config",
        )
    return open_site(config.dataset, Path(folder))


def min_class_samples(config: RunConfig, node_config: NodeConfig) -> int:
    """Return the images that a class needs here to have its gradient sent.

    A node may ask for more than the run does, never for less.

    Raises
    ------
    SiteError
        If the node's own number is not a positive integer.
    """
    own = node_config.get("min-class-samples", 1)
    if not isinstance(own, int) or own < 1:
        raise SiteError(
            f"min-class-samples in the node's --node-config is {own!r}; it must be a "
            "positive integer"
        )
    return max(own, config.privacy.min_class_samples)


@contextlib.contextmanager
def names_kept_here(config: RunConfig) -> Iterator[None]:
    """Keep names of a site's folders and files out of the error that is sent.

    Flower sends an exception's text to the server. The whole one is in the node's own
    log, as the cause.
    """
    try:
        yield
    except (OtherTeacherError, SiteError, FloatingPointError):
        raise  # they speak of the run, not of the site
    except Exception as error:
        if config.dataset.name != SITES:
            raise
        reason = f"it stopped with {type(error).__name__}"
        if isinstance(error, DatasetError):
            reason = error.summary
        elif isinstance(error, TeacherError):
            reason = "its teacher cannot be loaded"
        raise SiteError(f"{reason}; the site's own log says more") from error
