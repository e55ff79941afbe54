"""Every invalid key is refused with its name, its value and the remedy."""

import tomllib
from pathlib import Path

import pytest

from clip2fl_common.config import ConfigError, RunConfig, Scalar, defaults
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.same_run import differences
from clip2fl_common.config.unread import unread_warning
from tests.defaults import ROOT, default_config


def test_round_trip() -> None:
    flat = default_config()
    assert RunConfig.from_run_config(flat).to_flat() == flat


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeed": 3}, "seeed is not a key .* did you mean seed"),
        ({"synthesis.stepz": 3}, r"did you mean synthesis\.steps"),
        ({"seed": "7"}, "seed = '7'.*integer"),
        ({"seed": -1}, "seed = -1.*greater than or equal to 0"),
        ({"client.epochs": True}, r"client\.epochs = True.*integer"),
        ({"federation.rounds": 1.5}, r"federation\.rounds = 1\.5.*integer"),
        ({"dataset.imbalance-factor": 0.5}, r"imbalance-factor = 0\.5.*equal to 1"),
        ({"partition.alpha": 0.0}, r"partition\.alpha = 0\.0.*or equal to 0\.001"),
        ({"distillation.temperature": 0.0}, r"temperature = 0\.0.*or equal to 0\.001"),
        ({"synthesis.contrast-temperature": -1.0}, r"= -1\.0.*or equal to 0\.001"),
        ({"client.learning-rate": float("nan")}, "learning-rate = nan.*finite"),
        ({"client.logit-adjustment": -1.0}, r"logit-adjustment = -1\.0.*0 or ≥ 1e-9"),
        ({"fedavgm.momentum": 1.0}, r"fedavgm\.momentum = 1\.0.*less than 1"),
        ({"fedavgm.learning-rate": 1.5}, r"learning-rate = 1\.5.*than or equal to 1"),
        ({"synthesis.learning-rate-final": -1.0}, r"rate-final = -1\.0.*0 or ≥ 1e-9"),
        ({"upload.precision": "quarter"}, r"precision = 'quarter'.*'half' or 'full'"),
        ({"upload.min-cosine": 0.0}, r"min-cosine = 0\.0.*equal to 0\.01"),
        ({"upload.min-cosine": 1.01}, r"min-cosine = 1\.01.*less than or equal to 1"),
        (
            {"method": "fedavgm", "aggregation.rule": "median"},
            "aggregation.rule = 'median', .*'fedavgm'.*the clients' mean; set .*'mean'",
        ),
        (
            {"method": "clip2flm", "aggregation.rule": "trimmed-mean"},
            "aggregation.rule = 'trimmed-mean', .*'clip2flm'.*'mean'",
        ),
        ({"partition.clients": 3}, "clients-per-round = 5 is more than .* = 3"),
        (
            {"federation.min-replies": 6},
            "min-replies = 6 is more than .* = 5: no round",
        ),
        (
            {"aggregation.secure": True, "aggregation.rule": "median"},
            "aggregation.secure = true and aggregation.rule = 'median'",
        ),
        (
            {"aggregation.secure": True, "method": "ccvr"},
            "aggregation.secure = true and method = 'ccvr'.*each client; choose",
        ),
        (
            {"aggregation.secure": True, "method": "fednova"},
            "aggregation.secure = true and method = 'fednova'",
        ),
        (
            {"aggregation.secure": True, "upload.min-cosine": 0.99},
            r"aggregation.secure = true and upload.min-cosine = 0\.99",
        ),
        (
            {
                "aggregation.secure": True,
                "privacy.update-noise-multiplier": 1.0,
                "aggregation.max-update-norm": 1.0,
            },
            r"aggregation.secure = true and privacy.update-noise-multiplier = 1\.0",
        ),
        (
            {"aggregation.secure": True, "federation.clients-per-round": 2},
            "aggregation.secure = true and federation.clients-per-round = 2: .* 3 a",
        ),
        (
            {"aggregation.secure": True, "federation.min-replies": 2},
            "aggregation.secure = true and federation.min-replies = 2: .*least 3",
        ),
        (
            {"privacy.model-noise-multiplier": 1.0},
            r"model-noise-multiplier = 1\.0, but aggregation.max-update-norm = 0",
        ),
        (
            {
                "privacy.model-noise-multiplier": 1.0,
                "privacy.update-noise-multiplier": 2.0,
                "aggregation.max-update-norm": 1.0,
            },
            r"model-noise-multiplier = 1\.0 and privacy.update-noise-mul.*one of them",
        ),
        *(
            (
                {"model.name": name, "dataset.image-size": size},
                f"model.name = '{name}' and dataset.image-size = {size}: .*one image",
            )
            for name, size in (("resnet18", 32), ("resnet50", 8))
        ),
        ({"aggregation.rule": "krum"}, r"aggregation\.rule = 'krum'.*'median'"),
        ({"aggregation.trim": 0.5}, r"aggregation\.trim = 0\.5.*less than 0\.5"),
        ({"aggregation.max-update-norm": -1.0}, r"max-update-norm = -1\.0"),
        ({"dataset.name": "cifar10"}, r"dataset\.root is empty"),
        ({"dataset.name": "mnist"}, r"dataset\.name = 'mnist'.*'cifar10'"),
        (
            {"dataset.name": "image-folder", "dataset.root": "data"},
            r"dataset\.root = 'data' is relative",
        ),
        (
            {"dataset.name": "sites", "dataset.class-names": "cat"},
            r"class-names = 'cat'.*at least two different names",
        ),
        (
            {"dataset.name": "sites", "dataset.class-names": "big cat, dog, big_cat"},
            "at least two different names",
        ),
        (
            {"dataset.name": "sites", "dataset.class-names": "cat,,dog"},
            "at least two different names",
        ),
        (
            {
                "dataset.name": "sites",
                "dataset.class-names": "cat, dog",
                "dataset.validation-share": 0.0,
            },
            r"validation-share = 0\.0.*let the sites keep some",
        ),
        (
            {
                "dataset.name": "sites",
                "dataset.class-names": "cat, dog",
                "evaluation.tuning-share": 0.2,
            },
            r"tuning-share = 0\.2.*no test images to divide: set it to 0\.0",
        ),
        (
            {
                "dataset.name": "sites",
                "dataset.class-names": "cat, dog",
                "checkpoint.best-metric": "top1",
            },
            r"best-metric = 'top1'.*'sites' no top-1 accuracy.*'balanced'",
        ),
        (
            {"dataset.validation-share": 1.0},
            r"share = 1\.0.*less than 1",
        ),
        ({"run.dir": "runs"}, r"run\.dir = 'runs' is relative"),
        ({"run.resume": "runs/a"}, r"run\.resume = 'runs/a' is relative"),
        ({"checkpoint.keep": 0}, r"checkpoint\.keep = 0.*greater than or equal to 1"),
        ({"checkpoint.best-metric": "f1"}, r"best-metric = 'f1'.*'balanced'"),
        ({"teacher.model": "local-dir:t"}, r"teacher\.model = 't' is relative"),
        ({"teacher.prompt": "a photo"}, r"teacher\.prompt = 'a photo' has no {class}"),
    ],
)
def test_bad_input_is_named(change: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_run_config({**default_config(), **change})


def test_sites_need_no_partition() -> None:
    """Each node is a client, so more may be sampled than there are partitions."""
    changes: dict[str, Scalar] = {
        "dataset.name": "sites",
        "dataset.class-names": "cat, dog",
        "federation.clients-per-round": 50,
    }
    RunConfig.from_run_config({**default_config(), **changes})


def test_missing_key_is_named() -> None:
    flat = default_config()
    del flat["retraining.epochs"]
    with pytest.raises(ConfigError, match=r"retraining\.epochs is missing"):
        RunConfig.from_run_config(flat)


def test_all_problems_are_listed_at_once() -> None:
    bad: dict[str, Scalar] = {"seed": -1, "client.epochs": 0, "oops": 1}
    with pytest.raises(ConfigError) as error:
        RunConfig.from_run_config({**default_config(), **bad})
    assert all(key in str(error.value) for key in ("seed", "client.epochs", "oops"))


def experiments() -> list[Path]:
    """Return the files in conf/ that are not comparisons."""
    files = sorted((ROOT / "conf").glob("*.toml"))
    return [f for f in files if "[variants." not in f.read_text("utf-8")]


@pytest.mark.parametrize("file", experiments(), ids=str)
def test_experiments_parse(file: Path) -> None:
    paths = {f"dataset.{leaf}": "/x" for leaf in ("root", "train-list", "test-list")}
    experiment = flatten(tomllib.loads(file.read_text("utf-8")))
    RunConfig.from_run_config({**default_config(), **paths, **experiment})  # type: ignore[dict-item]


def test_drawn_shapes_with_default_settings_are_the_default() -> None:
    demo = flatten(tomllib.loads((ROOT / "conf" / "shapes.toml").read_text("utf-8")))
    defaults = default_config()
    assert {key: defaults[key] for key in demo} == demo


def test_a_method_brings_defaults_of_its_own() -> None:
    """`auto` takes the method's; a value that is written always counts."""
    plus = RunConfig.from_run_config({**defaults(), "method": "clip2fl-plus"})
    assert (plus.client.optimizer, plus.client.learning_rate) == ("muon", 0.03)
    assert plus.distillation.views > 0 and plus.ema.decay == 0.6
    published = RunConfig.from_run_config(defaults())
    assert (published.client.optimizer, published.client.learning_rate) == ("sgd", 0.1)
    assert (published.distillation.views, published.ema.decay) == (0, 0.0)
    own: dict[str, Scalar] = {
        "method": "clip2fl-plus",
        "client.optimizer": "sgd",
        "ema.decay": 0.0,
    }
    written = RunConfig.from_run_config({**defaults(), **own})
    assert (written.client.optimizer, written.ema.decay) == ("sgd", 0.0)
    assert written.client.learning_rate == 0.03


def test_only_keys_with_defaults_by_method_may_be_auto() -> None:
    with pytest.raises(ConfigError, match=r"rounds = 'auto', .*integer$"):
        RunConfig.from_run_config({**defaults(), "federation.rounds": "auto"})
    with pytest.raises(ConfigError, match=r"learning-rate = 'fast', .* or 'auto'$"):
        RunConfig.from_run_config({**defaults(), "client.learning-rate": "fast"})


MANY = "class-gradients.draws", "upload.min-cosine", "retraining.epochs"


def of_classes(flat: dict[str, Scalar], classes: int | None = None) -> list[Scalar]:
    """Return what a run takes for the keys whose default depends on the classes."""
    config = RunConfig.from_run_config(flat, classes).to_flat()
    return [config[key] for key in MANY]


def test_the_number_of_classes_chooses_some_defaults() -> None:
    """Few classes keep the published values, and a value that is written counts."""
    published, many = [5, 1.0, 300], [2, 0.99, 30]
    assert of_classes(defaults()) == published  # the demo has ten
    lists = dict.fromkeys(("dataset.train-list", "dataset.test-list"), "/x")
    imagenet = {"dataset.name": "imagenet-lt", "dataset.root": "/x", **lists}
    assert of_classes({**defaults(), **imagenet}) == many
    sites = {
        "dataset.name": "sites",
        "dataset.class-names": ",".join(map(str, range(51))),
    }
    assert of_classes({**defaults(), **sites}) == many
    own = dict(zip(MANY, (7, 0.9, 3), strict=True))
    assert of_classes({**defaults(), **imagenet, **own}) == [7, 0.9, 3]


def test_keys_wait_until_the_images_tell_the_classes() -> None:
    """A folder's classes are unknown at first; writing and reading changes nothing."""
    folder = {**defaults(), "dataset.name": "image-folder", "dataset.root": "/x"}
    config = RunConfig.from_run_config(folder)
    assert of_classes(folder) == ["auto"] * 3
    assert RunConfig.from_run_config(config.to_flat()) == config
    assert unread_warning(config) is None
    for classes, expected in ((50, [5, 1.0, 300]), (51, [2, 0.99, 30])):
        known = config.for_classes(classes)
        assert of_classes(config.to_flat(), classes) == expected
        assert "auto" not in {**known.to_flat(), "device": ""}.values()
        assert known.for_classes(10) == known


def test_defaults_of_many_classes_are_no_changes() -> None:
    """A method that does not read them brings no warning of unread keys."""
    lists = dict.fromkeys(("dataset.train-list", "dataset.test-list"), "/x")
    imagenet = {"dataset.name": "imagenet-lt", "dataset.root": "/x", **lists}
    config = RunConfig.from_run_config({**defaults(), **imagenet, "method": "fedavg"})
    assert config.class_gradients.draws == 2
    assert unread_warning(config) is None


def test_secure_sums_need_whole_gradients_only_where_gradients_are_sent() -> None:
    """Above 50 classes the default is to send factors."""
    many: dict[str, Scalar] = {
        "dataset.name": "cifar100",
        "dataset.root": "/x",
        "aggregation.secure": True,
    }
    RunConfig.from_run_config({**defaults(), **many, "method": "fedavg"})
    with pytest.raises(ConfigError, match=r"upload.min-cosine = 0\.99: factors"):
        RunConfig.from_run_config({**defaults(), **many, "method": "creff"})


def test_sizes_are_checked_with_the_classes_of_the_images() -> None:
    folder = {**defaults(), "dataset.name": "image-folder", "dataset.root": "/x"}
    config = RunConfig.from_run_config({**folder, "upload.min-cosine": 1.0})
    assert config.for_classes(1000).upload.min_cosine == 1
    with pytest.raises(ConfigError, match=r"whole class gradients.* 20000 classes"):
        config.for_classes(20_000)


def test_changes_are_told_from_the_defaults_of_the_method() -> None:
    """A run of before a key had other defaults is compared with those it had."""
    plus = RunConfig.from_run_config({**defaults(), "method": "clip2fl-plus"})
    assert unread_warning(plus) is None
    now = plus.to_flat()
    then = {key: value for key, value in now.items() if key != "ema.decay"}
    assert differences(then, now) == []
    assert differences({**then, "method": "clip2fl"}, now)
