"""What `import clip2fl` offers."""

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clip2fl
from clip2fl_cli.comparison import Comparison, ComparisonError, PlannedRun
from clip2fl_cli.flower_command import SimulationError
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import RunError
from clip2fl_cli.simulation import RunResult
from clip2fl_common.config import ConfigError, RunConfig, defaults
from clip2fl_common.data.datasets import load_dataset
from clip2fl_common.partition import long_tail_partition
from tests.clip2fl_cli.made_up import change_facts
from tests.defaults import ROOT, default_config, run_config
from tests.federation import federate

TINY: dict[str, Any] = {
    "method": "fedavg",
    "dataset": {
        "demo_train_per_class": 20,
        "demo_test_per_class": 3,
        "imbalance_factor": 10.0,
    },
    "partition": {"clients": 3},
    "federation": {"rounds": 2, "clients_per_round": 2},
    "client": {"epochs": 1},
}


@pytest.fixture
def trained(tmp_path: Path, federation_process: None) -> clip2fl.Run:
    """Return a finished run of FedAvg."""
    federate(tmp_path / "trained", "fedavg")
    return clip2fl.Run(str(tmp_path / "trained"))


def test_import_takes_neither_torch_nor_flower() -> None:
    code = (
        "import sys, clip2fl; print(clip2fl.__version__); "
        "assert not {'torch', 'flwr', 'pydantic', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f'\nversion = "{done.stdout.strip()}"\n' in (
        ROOT / "pyproject.toml"
    ).read_text("utf-8")


def test_run_trains_and_knows_what_it_left(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = clip2fl.run(**TINY, seed=3, supernodes=5, timeout=7.5, quiet=True)
    (options,) = asked
    assert (options["supernodes"], options["timeout"]) == (5, 7.5)
    assert options["output"] is None
    # As the documentation of run.dir and run.name says.
    assert run.folder == tmp_path / "data" / "runs" / "fedavg-demo-seed3-4711"
    lines = (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    assert run.metrics == [json.loads(line) for line in lines]
    assert [line["round"] for line in run.metrics] == [1, 2]
    changed = {
        "method": "fedavg",
        "seed": 3,
        "dataset.demo-train-per-class": 20,
        "dataset.demo-test-per-class": 3,
        "dataset.imbalance-factor": 10.0,
        "partition.clients": 3,
        "federation.rounds": 2,
        "federation.clients-per-round": 2,
        "client.epochs": 1,
    }
    assert run.config == {**default_config(), **changed}
    assert len(run.model.class_names) == 10


@pytest.mark.parametrize("kind", ["file", "mapping", "configuration"])
def test_keywords_win_over_a_configuration_of_any_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "clip2fl_cli.holdings.Holdings.of", lambda config: seen.append(config.to_flat())
    )
    keys = {"seed": 3, "client.epochs": 2}
    (tmp_path / "x.toml").write_text("seed = 3\nclient.epochs = 2\n")
    given: Any = {
        "file": str(tmp_path / "x.toml"),
        "mapping": keys,
        "configuration": RunConfig.from_run_config({**default_config(), **keys}),
    }
    monkeypatch.chdir(tmp_path)
    clip2fl.partition(given[kind], client={"epochs": 4}, run={"dir": Path("here")})
    place = {"client.epochs": 4, "run.dir": str(tmp_path / "here")}
    assert seen == [{**default_config(), **keys, **place}]


# As docs/clip2fl-plus.md and docs/method.md list them: of CLIP2FL-Plus and of the
# others; and with more than 50 classes.
PLUS = {
    "client.optimizer": ("muon", "sgd"),
    "client.learning-rate": (0.03, 0.1),
    "distillation.views": (10, 0),
    "ema.decay": (0.6, 0.0),
}
MANY = {"class-gradients.draws": (2, 5), "retraining.epochs": (30, 300)}


@pytest.mark.parametrize("kind", ["configuration", "mapping"])
def test_another_method_has_its_own_defaults(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(method: str, changed: str, **settings: Any) -> dict[str, Any]:
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(
            "clip2fl_cli.holdings.Holdings.of",
            lambda config: seen.append(config.to_flat()),
        )
        before = RunConfig.from_run_config(
            {**defaults(), "method": method, "client.epochs": 9, "ema.decay": 0.3}
        )
        config: Any = before if kind == "configuration" else before.to_flat()
        clip2fl.partition(config, method=changed, **settings)
        return seen[0]

    for method, changed, which in (
        ("clip2fl", "clip2fl-plus", 0),
        ("clip2fl-plus", "fedavg", 1),
    ):
        values = found(method, changed)
        expected = {key: pair[which] for key, pair in PLUS.items()}
        # These two differed from the defaults before.
        expected |= {"ema.decay": 0.3, "client.epochs": 9}
        assert {key: values[key] for key in expected} == expected
    kept = found("clip2fl", "clip2fl-plus", client={"optimizer": "sgd"})
    assert (kept["client.optimizer"], kept["client.learning-rate"]) == ("sgd", 0.03)
    assert found("clip2fl-plus", "clip2fl-plus", seed=1)["client.optimizer"] == "muon"


def test_other_images_have_the_defaults_of_their_number_of_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "clip2fl_cli.holdings.Holdings.of", lambda config: seen.append(config.to_flat())
    )
    few = RunConfig.from_run_config({**defaults(), "retraining.epochs": 77})
    clip2fl.partition(few, dataset={"name": "cifar100", "root": Path("images")})
    (many,) = seen
    assert many["class-gradients.draws"] == MANY["class-gradients.draws"][0]
    assert many["retraining.epochs"] == 77
    clip2fl.partition(many, dataset={"name": "demo", "root": ""})
    assert seen[1]["class-gradients.draws"] == MANY["class-gradients.draws"][1]
    clip2fl.partition(many, seed=3)
    assert seen[2] == {**many, "seed": 3}


def test_keys_that_are_written_by_hand_all_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here somebody wants CLIP2FL-Plus with SGD."""
    seen: list[RunConfig] = []
    monkeypatch.setattr("clip2fl_cli.holdings.Holdings.of", seen.append)
    written = {"method": "clip2fl", "client": {"optimizer": "sgd"}}
    clip2fl.partition(written, method="clip2fl-plus")
    assert (seen[0].client.optimizer, seen[0].client.learning_rate) == ("sgd", 0.03)


def test_a_key_with_two_values_is_refused() -> None:
    twice = {"federation.rounds": 3, "federation": {"rounds": 4}}
    with pytest.raises(
        ConfigError, match=r"federation\.rounds is given twice, as 3 and"
    ):
        clip2fl.partition(twice)
    with pytest.raises(ConfigError, match=r"client\.batch-size is given twice"):
        clip2fl.partition(client={"batch_size": 8, "batch-size": 16})
    same = {"partition.clients": 3, "partition": {"clients": 3}}
    assert len(clip2fl.partition({**TINY, **same}).counts) == 3


def test_values_may_be_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr("clip2fl_cli.holdings.Holdings.of", seen.append)
    clip2fl.partition(
        seed=np.int64(3), partition={"alpha": np.float32(0.25)}, method=np.str_("creff")
    )
    (config,) = seen
    assert (config.seed, config.partition.alpha, config.method) == (3, 0.25, "creff")


def test_images_are_named_with_hyphens_or_underscores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(compared: Comparison, images: Images | None) -> None:
        pytest.fail(f"accepted {images}")

    monkeypatch.setattr("clip2fl_cli.comparison.Comparison.refuse_absent", refuse)
    names: tuple[Any, ...] = ("held_out", "held-out")
    for name in names:
        with pytest.raises(pytest.fail.Exception, match="accepted held-out"):
            clip2fl.compare("demo-compare", tmp_path, images=name)
    wrong: Any = "heldout"
    with pytest.raises(ConfigError, match="'heldout', .* one of all, held-out, tuning"):
        clip2fl.compare("demo-compare", tmp_path, images=wrong)


def test_heat_map_takes_a_path_as_text(tmp_path: Path) -> None:
    clip2fl.partition(**TINY).draw(str(tmp_path / "map.png"))
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.format == "PNG"


def test_wrong_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean partition\.clients"):
        clip2fl.run(partition={"client": 3})
    with pytest.raises(ConfigError, match=r"client\.epochs = 0, but it must be"):
        clip2fl.partition({"client": {"epochs": 0}})
    with pytest.raises(ConfigError, match="seed"):
        clip2fl.partition({"seed": [7]})


def test_comparison_takes_settings_as_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value is checked as it is given, not as text."""
    seen: list[PlannedRun] = []
    monkeypatch.setattr(
        "clip2fl_cli.comparison.Comparison.refuse_absent",
        lambda compared, images: seen.extend(compared.plan),
    )
    monkeypatch.setattr(
        "clip2fl_cli.comparison.Comparison.missing",
        lambda compared: pytest.fail("the settings were accepted"),
    )
    prompt = 'a "\N{CAT FACE}" \\ {class}'
    with pytest.raises(pytest.fail.Exception, match="the settings were accepted"):
        clip2fl.compare("demo-compare", tmp_path, teacher={"prompt": prompt})
    assert {run.config.teacher.prompt for run in seen} == {prompt}
    with pytest.raises(ConfigError, match=r"run\.trackers = None, but it must be"):
        clip2fl.compare("demo-compare", tmp_path, run={"trackers": None})
    with pytest.raises(ComparisonError, match=r"settings: seed .* seeds=\[\.\.\.\]"):
        clip2fl.compare("demo-compare", tmp_path, seed=99)


def test_failed_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = RunResult("finished:failed", "the reason", "", 5)
    monkeypatch.setattr("clip2fl_cli.simulation.simulate", lambda **_: failed)
    with pytest.raises(SimulationError, match=r"\(finished:failed\): the reason"):
        clip2fl.run(**TINY)


def test_partition_of_sites_is_refused() -> None:
    sites = {"name": "sites", "class_names": "cat, dog"}
    with pytest.raises(ConfigError, match="'sites': each site has images of its own"):
        clip2fl.partition(dataset=sites)


def test_partition_is_the_published_one() -> None:
    held = clip2fl.partition(**TINY)
    labels = load_dataset(run_config().dataset).train.labels
    parts = long_tail_partition(labels, 10, 10.0, 3, 0.5, 7)
    expected = [[int(np.sum(labels[part] == c)) for c in range(10)] for part in parts]
    assert held.counts.tolist() == expected
    assert held.class_names[0] == "circle"


def test_comparison_returns_its_table(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text("federation.rounds = 4\n")
    (tmp_path / "c.toml").write_text(
        'experiment = "tiny.toml"\nseeds = [1, 2]\nbaseline = "plain"\n'
        "[variants.plain]\n[variants.adjusted]\nclient.logit-adjustment = 1.0\n"
    )
    found = clip2fl.compare(
        tmp_path / "c.toml", tmp_path / "runs", seeds=[5], quiet=True, **TINY
    )
    assert len(asked) == 2
    assert found.failed == []
    assert [row["variant"] for row in found.summary["rows"]] == ["plain", "adjusted"]
    assert "| plain | fedavg | 5 |" in found.table
    assert found.report == tmp_path / "runs" / "c" / "report.html"
    assert found.report.is_file()
    # Complete runs are not repeated, and any of them can be read.
    clip2fl.compare(
        tmp_path / "c.toml", tmp_path / "runs", seeds=[5], quiet=True, **TINY
    )
    assert len(asked) == 2
    assert len(clip2fl.Run(found.folder / "plain-seed5").metrics) == 2


def test_comparison_warns_of_runs_of_other_code(
    asked: list[dict[str, Any]], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "c.toml").write_text(
        'experiment = "demo"\nseeds = [1]\nbaseline = "plain"\n[variants.plain]\n'
    )
    compare = partial(
        clip2fl.compare, tmp_path / "c.toml", tmp_path / "runs", quiet=True, **TINY
    )
    for _ in range(2):
        found = compare()
    assert not [w for w in recwarn if w.category is UserWarning]
    change_facts(found.folder / "plain-seed1", all_code="another")
    with pytest.warns(UserWarning, match="other code .* runs plain-seed1 in"):
        compare()
    assert len(asked) == 1


def test_model_predicts_on_files_pictures_arrays_and_tensors_alike(
    trained: clip2fl.Run, tmp_path: Path
) -> None:
    """Every class of probability, by the network on the whole image."""
    test = load_dataset(run_config().dataset).test
    pixels = test.load(np.arange(4)).images  # uint8 [4, 3, 32, 32]
    arrays = pixels.numpy().transpose(0, 2, 3, 1)
    files = [tmp_path / f"{n}.png" for n in range(4)]
    for array, file in zip(arrays, files, strict=True):
        Image.fromarray(array).save(file)
    model = clip2fl.load_model(trained.folder / "model.safetensors")
    normal = model.card.normalization(pixels)
    with torch.inference_mode():
        expected = model.network(normal).softmax(1)
    for images in (files, list(map(Image.open, files)), arrays, pixels):
        predictions = model.predict(images)
        for prediction, row in zip(predictions, expected, strict=True):
            found = dict(prediction.classes)
            assert [found[name] for name in model.class_names] == pytest.approx(
                row.tolist(), abs=1e-6
            )
            best = int(row.argmax())
            assert prediction.name == model.class_names[best]
            assert prediction.probability == pytest.approx(float(row[best]), abs=1e-6)
    assert model.predict([]) == []
    assert len(model.predict(files, top=2)[0].classes) == 2
    for top in (0, -1):
        with pytest.raises(ValueError, match=f"top = {top}, but it must be at least 1"):
            model.predict(files, top=top)


def test_picture_of_pillows_is_turned_and_cut_as_its_file_is(
    trained: clip2fl.Run, tmp_path: Path
) -> None:
    values = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)
    picture = Image.fromarray(values)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        from_file, from_picture, unturned = trained.model.predict(
            [tmp_path / "x.png", opened, Image.fromarray(values)]
        )
    assert from_picture == from_file
    assert unturned != from_file


def truncated() -> Image.Image:
    """Return a damaged image that Pillow has opened and not read yet."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-500]))


@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        ("x.png", TypeError, "put a single one in a list"),
        ([np.zeros((8, 8, 3))], TypeError, r"image 0 is float64 \[8, 8, 3\]"),
        ([np.zeros((8, 8), np.uint8)], TypeError, r"image 0 is uint8 \[8, 8\]"),
        ([torch.zeros(8, 8, 3, dtype=torch.uint8)], TypeError, r"shape \[3, H, W\]"),
        ([7], TypeError, "image 0 is int"),
        ([Image.new("F", (8, 8))], RunError, "image 0 cannot be used: .*floating"),
        ([Image.new("RGB", (0, 0))], TypeError, "image 0 is .* without pixels"),
        ([truncated()], RunError, "image 0 cannot be read as an image: .*truncated"),
    ],
    ids=str,
)
def test_what_is_no_image_is_named(
    trained: clip2fl.Run, images: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        trained.model.predict(images)
