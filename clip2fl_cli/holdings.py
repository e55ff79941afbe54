"""The partition of the training images among clients, before any training."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip2fl_cli.output import write_file
from clip2fl_common.config import SITES, ConfigError, RunConfig
from clip2fl_common.data.datasets import (
    forget_datasets,
    load_dataset,
    partition_indices,
)
from clip2fl_common.partition import class_counts
from clip2fl_common.shown import listed, shown

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of a heat map's file; matplotlib's other formats need other programs."""


@dataclass(frozen=True)
class Holdings:
    """Training images by client and class.

    Attributes
    ----------
    class_names : tuple of str
        Names of the C classes.
    counts : ndarray of int64, shape [K, C]
        One row per client.
    """

    class_names: tuple[str, ...]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, config: RunConfig) -> "Holdings":
        """Divide the data set as a run with this configuration would.

        Raises
        ------
        ConfigError
            If the sites have images of their own.
        """
        if config.dataset.name == SITES:
            raise ConfigError(
                f"dataset.name = {SITES!r}: each site has images of its own, so there "
                "is no partition to show; clip2fl doctor counts a site's images"
            )
        forget_datasets()  # files may have changed since a notebook's last call
        dataset = load_dataset(config.dataset)
        parts = partition_indices(config.dataset, config.partition, config.seed)
        names = dataset.class_names
        return cls(names, class_counts(parts, dataset.train.labels, len(names)))

    def draw(self, file: str | os.PathLike[str]) -> None:
        """Write the heat map; the file's suffix decides its format.

        Parameters
        ----------
        file : path
            Its name ends with one of `FORMATS`.

        Raises
        ------
        ValueError
            If the suffix is none of `FORMATS`.
        OutputError
            If the file cannot be written; an existing link is replaced.
        """
        file = Path(file)
        if file.suffix.lower() not in FORMATS:
            raise ValueError(
                f"--figure {shown(file)}: the name must end with {listed(FORMATS)}"
            )
        from matplotlib import rc_context

        from clip2fl_cli.charts import STYLE
        from clip2fl_cli.figures import heat_map

        order = np.argsort(-self.counts.sum(axis=0), kind="stable")
        figure = heat_map(
            self.counts[:, order],
            rows=[str(client) for client in range(len(self.counts))],
            columns=[self.class_names[c] for c in order],
            row_title="client",
            column_title="class, most frequent first",
            bar_title="training images",
        ).figure()
        drawn = io.BytesIO()
        with rc_context(STYLE):
            figure.savefig(drawn, format=file.suffix.removeprefix("."), dpi=200)
        write_file(file, drawn.getvalue())
