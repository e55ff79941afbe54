"""Every key is read by the methods that the schema names, and by no other."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clip2fl_common.config import KEYS, RunConfig, Scalar
from clip2fl_common.config.keys import fields_of, kebab
from clip2fl_common.config.types import METHODS
from clip2fl_common.config.unread import unread_warning
from clip2fl_common.data.datasets import (
    DatasetError,
    load_dataset,
    partition_indices,
)
from strategy import registry
from tests.defaults import default_config, run_config
from tests.federation import federate, metrics
from tests.site_folders import write_site
from tests.test_sites import federate as federate_sites

pytestmark = pytest.mark.usefixtures("federation_process")

PACKAGES = ("client_app.", "server_app.", "strategy.", "clip2fl_common.")

# Keys of runs with images of the sites' own, of images in a list or an Arrow folder,
# and of another kind of partition.
OF_SITES = {
    "dataset.class-names",
    "dataset.validation-share",
    "dataset.skip-unreadable",
    "federation.site-registry",
    "aggregation.max-site-images",
}
OF_LISTS = {
    "dataset.root",
    "dataset.train-list",
    "dataset.test-list",
    "dataset.image-column",
    "dataset.label-column",
    "dataset.client-column",
}
OF_SPLITS = {"dataset.train-split", "dataset.test-split"}
OF_SHARDS = {"partition.shards"}

# Other values of the keys that not every method reads.
OTHERS: dict[str, Scalar] = {
    "aggregation.trim": 0.4,
    "aggregation.max-gradient-norm": 0.01,
    "distillation.weight": 0.5,
    "distillation.temperature": 1.0,
    "distillation.views": 2,
    "distillation.view-kind": "resized-crop",
    "distillation.view-mix": "mixup",
    "fedprox.mu": 0.5,
    "fedavgm.momentum": 0.3,
    "fedavgm.learning-rate": 0.5,
    "class-gradients.draws": 1,
    "class-gradients.samples-per-class": 5,
    "class-gradients.augment": False,
    "upload.precision": "full",
    "upload.min-cosine": 0.9,
    "privacy.gradient-clip-norm": 0.5,
    "privacy.gradient-noise-multiplier": 0.5,
    "synthesis.features-per-class": 5,
    "synthesis.steps": 7,
    "synthesis.learning-rate": 0.2,
    "synthesis.learning-rate-final": 0.01,
    "synthesis.contrast-weight": 1.0,
    "synthesis.contrast-temperature": 0.5,
    "retraining.init": "warm",
    "retraining.epochs": 2,
    "retraining.batch-size": 8,
    "retraining.learning-rate": 0.1,
    "ccvr.virtual-features": 7,
    "teacher.model": "ViT-B-32",
    "teacher.pretrained": "openai",
    "teacher.prompt": "{class}, drawn",
    "teacher.batch-size": 8,
}


def declared(method: str) -> set[str]:
    """Return the keys that the schema says a method reads."""
    return {name for name, key in KEYS.items() if method in key.methods}


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """Collect the keys that the program reads, its configuration's own code aside."""
    reads: set[str] = set()

    def record(cls: type, prefix: str) -> None:
        keys = {field: f"{prefix}{kebab(field)}" for field in fields_of(cls)}

        def read(self: Any, name: str) -> Any:
            reader = sys._getframe(1).f_globals["__name__"]
            if (
                keys.get(name) in KEYS
                and reader.startswith(PACKAGES)
                and not reader.startswith("clip2fl_common.config.")
            ):
                reads.add(keys[name])
            return object.__getattribute__(self, name)

        patch.setattr(cls, "__getattribute__", read)

    with pytest.MonkeyPatch.context() as patch:
        record(RunConfig, "")
        for name, field in fields_of(RunConfig).items():
            if isinstance(field.annotation, type) and kebab(name) not in KEYS:
                record(field.annotation, f"{kebab(name)}.")
        yield reads


def others(keys: Iterable[str]) -> dict[str, Scalar]:
    """Return other values of keys, as `run_config` takes them."""
    return {key.replace(".", "__").replace("-", "_"): OTHERS[key] for key in keys}


def small_run(folder: Path, method: str, **changes: Any) -> tuple[Any, bytes]:
    """Return what comes out of a run: each round's results, and the model."""
    # In two epochs clients leave the global model, which the proximal term notices.
    # Only the discriminant reads some keys, and every method can deliver it.
    changes = {
        "client__epochs": 2,
        "federation__clients_per_round": 3,
        "head__delivered": "discriminant",
        **changes,
    }
    if method in KEYS["aggregation.trim"].methods:
        changes = {"aggregation__rule": "trimmed-mean", **changes}
    federate(folder, method, **changes)
    return metrics(folder), (folder / "model.safetensors").read_bytes()


def test_schema_knows_the_methods() -> None:
    assert set(METHODS) <= set(registry.METHODS)


def test_there_is_another_value_for_each_key_that_some_methods_do_not_read() -> None:
    partly = {name for name, key in KEYS.items() if set(key.methods) != set(METHODS)}
    assert partly == OTHERS.keys()
    assert all(OTHERS[key] != default_config()[key] for key in OTHERS)


@pytest.mark.parametrize("method", METHODS)
def test_method_reads_its_keys_and_no_other_changes_anything(
    tmp_path: Path, method: str
) -> None:
    # Takes the place of what an earlier test has loaded, which is not read again.
    load_dataset(run_config(dataset__image_size=16).dataset)
    partition_indices.cache_clear()
    with recorded_reads() as reads:
        expected = small_run(tmp_path / "plain", method)
    assert declared(method) - reads == OF_SITES | OF_LISTS | OF_SPLITS | OF_SHARDS
    unread = [key for key in OTHERS if method not in KEYS[key].methods]
    assert small_run(tmp_path / "changed", method, **others(unread)) == expected


# The only teacher without a download, of which the rest is another way to the same.
SAME_TEACHER = {"teacher.model", "teacher.pretrained", "teacher.batch-size"}


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(OTHERS.keys() - SAME_TEACHER))
def test_other_values_do_change_what_comes_out(tmp_path: Path, key: str) -> None:
    """Without this, that a key changes nothing would show nothing."""
    method = KEYS[key].methods[0]
    needed = ["privacy.gradient-clip-norm"] if "noise" in key else []
    needed += ["distillation.views"] if "distillation.view-" in key else []
    changed = small_run(tmp_path / "changed", method, **others([*needed, key]))
    assert changed != small_run(tmp_path / "plain", method, **others(needed))


def test_keys_of_sites_and_lists_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    folders = [
        write_site(tmp_path / f"private-{n}", {"circle": 4, "square": 4}, first=10 * n)
        for n in range(2)
    ]
    with recorded_reads() as reads:
        federate_sites(tmp_path / "run", folders, ["a", "b"], method="fedavg")
    assert OF_SITES <= reads
    listing = tmp_path / "list.csv"
    files = sorted(folders[0].rglob("*.*"))
    listing.write_text(
        "path,label\n"
        + "".join(f"{f.relative_to(folders[0])},{f.parent.name}\n" for f in files),
        "utf-8",
    )
    lists: dict[str, Scalar] = {
        "dataset__name": "list",
        "dataset__root": str(folders[0]),
        "dataset__train_list": str(listing),
        "dataset__test_list": str(listing),
        "dataset__imbalance_factor": 1.0,
        "partition__kind": "shards",
    }
    config = run_config(**lists)
    with recorded_reads() as reads:
        partition_indices(config.dataset, config.partition, config.seed)
    assert OF_LISTS | OF_SHARDS <= reads
    saved = run_config(dataset__name="hugging-face", dataset__root=str(tmp_path))
    with recorded_reads() as reads, pytest.raises(DatasetError, match="state.json"):
        load_dataset(saved.dataset)
    assert OF_SPLITS <= reads


def test_run_warns_of_changed_keys_that_its_method_does_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"fedprox__mu": 0.5, "upload__precision": "full"}
    federate(tmp_path / "run", "fedprox", **changes)
    (line,) = [r.getMessage() for r in caplog.records if "does not read" in r.msg]
    assert line.startswith("method = 'fedprox' does not read class-gradients.draws = 2")
    assert "upload.precision = 'full'" in line
    assert "fedprox.mu" not in line and "client." not in line and "\n" not in line


def test_run_warns_of_settings_of_what_is_switched_off() -> None:
    """But not of a method's own default, and once where the method has no teacher."""
    mixed: dict[str, Any] = {"distillation__view_mix": "mixup"}
    warning = unread_warning(run_config(method="clip2fl", **mixed))
    assert warning is not None and warning.startswith(
        "distillation.views = 0 leaves distillation.view-mix = 'mixup' without effect"
    )
    plus: dict[str, Any] = {"method": "clip2fl-plus", "distillation__views": 0}
    assert unread_warning(run_config(**plus)) is None
    plain = unread_warning(run_config(method="fedavg", **mixed))
    assert plain is not None and plain.count("view-mix") == 1
    used = run_config(method="clip2fl", distillation__views=2, **mixed)
    assert unread_warning(used) is None


def test_defaults_and_unknown_methods_bring_no_warning() -> None:
    for method in (*METHODS, "one-of-my-own"):
        config = RunConfig.from_run_config({**default_config(), "method": method})
        assert unread_warning(config) is None
    changed = run_config(method="one-of-my-own", fedprox__mu=0.5)
    assert unread_warning(changed) is None
