"""Load a client's images: a site's own folder, or a simulated partition."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from client_app.own_site import OwnSite
from client_app.site_policy import NodeConfig, SiteRefusal, is_real_site, one_line
from clip2fl_common.config import ConfigError, RunConfig
from clip2fl_common.data.datasets import (
    DatasetError,
    FileSource,
    ImageDataset,
    ImageSource,
    LoadedImages,
    load_dataset,
    open_site,
    partition_indices,
)
from clip2fl_common.data.image_cache import file_digests
from clip2fl_common.secure.statements import SecureError
from clip2fl_common.teacher import OtherTeacherError, TeacherError


class SiteError(RuntimeError):
    """A site cannot do a request; the message contains no name from its disk."""


class OtherCodeError(RuntimeError):
    """The client's code differs from the server's; the message names a local folder."""


def training_images(
    config: RunConfig, site: OwnSite | None, partition: int
) -> tuple[ImageDataset, LoadedImages]:
    """Return the site's images, or the images of the requested partition.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    site : OwnSite or None
        This node, if it has images of its own.
    partition : int
        Number of the partition to train on, for simulated clients.

    Returns
    -------
    ImageDataset
        The data set.
    LoadedImages
        This client's training images.

    Raises
    ------
    DatasetError
        If the images are missing or cannot be used.
    """
    if site is not None:
        dataset = open_site(config.dataset, site.folder)
        return dataset, dataset.train.open(np.arange(len(dataset.train.labels)))
    dataset = load_dataset(config.dataset)
    parts = partition_indices(config.dataset, config.partition, config.seed)
    return dataset, dataset.train.open(parts[partition])


def gradient_images(
    config: RunConfig, site: OwnSite | None, dataset: ImageDataset, loaded: LoadedImages
) -> dict[int, torch.Tensor] | None:
    """Return which images enter the class gradients, if the site fixes them.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    site : OwnSite or None
        This node, if it has images of its own.
    dataset, loaded : ImageDataset and LoadedImages
        As `training_images` returned them.

    Returns
    -------
    dict of int to Tensor of int64, or None
        See `OwnSite.gradient_images`.
    """
    if site is None or not site.policy.fixes_images:
        return None
    digests, readable = _digests(dataset.train, loaded)
    there = list(zip(dataset.train.labels.tolist(), digests, strict=True))
    return site.gradient_images(
        config, dataset.class_names, loaded.labels, readable, there
    )


def validation_images(
    config: RunConfig, site: OwnSite | None
) -> tuple[ImageDataset, LoadedImages]:
    """Return the site's validation images, of classes with enough images.

    Raises
    ------
    DatasetError
        As in `training_images`; also if the client is simulated.
    """
    if site is None:
        raise DatasetError(
            f"this node has no data-path, and dataset.name = {config.dataset.name!r} "
            "is evaluated at the server",
            "the node has no data-path in its --node-config",
        )
    dataset = open_site(config.dataset, site.folder)
    source = dataset.test
    indices = np.arange(len(source.labels))
    # There is nothing to cache without images.
    loaded = source.open(indices) if len(indices) else source.load(indices)
    least = site.policy.evaluation_samples
    if least == 1:
        return dataset, loaded
    # Copies of one image count once: as one of the images that a class must have, and
    # in the accuracy, which would otherwise be that image's own.
    first: dict[tuple[int, int], int] = {}
    contents = zip(loaded.labels.tolist(), _digests(source, loaded)[1], strict=True)
    for place, content in enumerate(contents):
        first.setdefault(content, place)
    different = torch.zeros(len(loaded.labels), dtype=torch.bool)
    different[list(first.values())] = True
    counts = torch.bincount(
        loaded.labels[different], minlength=len(dataset.class_names)
    )
    kept = different & (counts[loaded.labels] >= least)
    if kept.all():
        return dataset, loaded
    return dataset, replace(
        loaded, images=loaded.images[kept], labels=loaded.labels[kept]
    )


def _digests(source: ImageSource, loaded: LoadedImages) -> tuple[list[int], list[int]]:
    """Return the digests of all files, and of the readable ones, in order."""
    assert isinstance(source, FileSource)
    digests = file_digests(source.paths).tolist()
    left_out = set(loaded.left_out)
    readable = [digest for place, digest in enumerate(digests) if place not in left_out]
    assert len(readable) == len(loaded.labels)
    return digests, readable


@contextlib.contextmanager
def names_kept_here(node_config: NodeConfig) -> Iterator[None]:
    """Keep names of a site's folders and files out of errors that reach the server.

    Flower sends an exception's text to the server. The node's own log holds the full
    text, as the cause. The node's own configuration decides whether it is a site, since
    the run's configuration comes from the server.
    """
    try:
        yield
    except (SiteRefusal, SecureError, FloatingPointError):
        raise  # their texts are written for the server
    except Exception as error:
        if not is_real_site(node_config):
            raise
        if isinstance(error, DatasetError):
            raise DatasetError(
                str(error), one_line(f"{error.summary}; the site's own log says more")
            ) from error
        raise SiteError(one_line(_reason(error))) from error


def _reason(error: Exception) -> str:
    # The texts of these three describe the run, not the site.
    if isinstance(error, SiteError | OtherTeacherError | ConfigError):
        return str(error)
    if isinstance(error, OtherCodeError):
        return (
            "the client code here is not the server's: install the same version on both"
        )
    reason = f"it stopped with {type(error).__name__}"
    if isinstance(error, TeacherError):
        reason = "its teacher cannot be loaded"
    return f"{reason}; the site's own log says more"
