"""The server's knowledge of a run's images."""

import numpy as np

from server_app.run_data import RunData
from tests.defaults import run_config


def test_simulated_clients_images_are_all_counted() -> None:
    data = RunData.load(run_config())
    assert data.held is not None
    assert data.held.shape == (3, 10)
    assert data.images_per_client == tuple(data.held.sum(axis=1))
    labels = data.dataset.train.labels
    everything = np.sort(np.concatenate(data.parts))
    assert everything.tolist() == list(range(len(labels)))
    assert data.counts() == {
        "train_images_per_class": np.bincount(labels, minlength=10).tolist(),
        "train_images_per_client": data.images_per_client,
    }


def test_of_sites_nothing_is_known() -> None:
    config = run_config(dataset__name="sites", dataset__class_names="a,b,c")
    data = RunData.load(config)
    assert data.class_names == ("a", "b", "c")
    assert data.groups.rule == "listed"
    assert (data.parts, data.held, data.images_per_client) == ((), None, ())
    assert data.counts() == {}
