"""Damaged and hostile run folders and models: refused in one line, nothing written.

Each case changes one file of a folder that all three commands accept.
"""

import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip2fl_cli import exporting
from clip2fl_common.data.datasets import Normalization
from clip2fl_common.models import build_model
from server_app.delivery import ModelCard, save_model
from server_app.tensor_files import save_tensors
from tests.clip2fl_cli.commands import refused, run, tree
from tests.clip2fl_cli.made_up import write_run

CONFIG, METRICS = "config.json", "metrics.jsonl"
MODEL, ARTIFACTS = "model.safetensors", "artifacts.safetensors"
DIM = 4

Damage = Callable[[Path], object]


def sound_artifacts() -> dict[str, torch.Tensor]:
    """Return what a run of two classes and three clients keeps for its report."""
    return {
        "clients_by_class": torch.tensor([[1, 100], [1, 100], [1, 100]]),
        "confusion.fedavg": torch.tensor([[5, 5], [4, 6]]),
        "features": torch.randn(2, 3, DIM).bfloat16(),
        "text_features": torch.randn(2, DIM),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a sound run with a model and artifacts."""
    write_run(tmp_path / "a-run", [50.0, 60.0])
    torch.manual_seed(0)
    network = build_model("resnet8-slim", 2, DIM)
    card = ModelCard(
        "resnet8-slim",
        DIM,
        ("rare", "common"),
        32,
        Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        {"method": "fedavg", "seed": 1, "teacher": None},
    )
    save_model(tmp_path / "a-run" / MODEL, network, network.classifier, card)
    save_tensors(tmp_path / "a-run" / ARTIFACTS, sound_artifacts())
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    return tmp_path / "a-run"


def arguments(command: str, folder: Path) -> list[str | int | Path]:
    """Return the arguments of a command on a run's folder."""
    found: dict[str, list[str | int | Path]] = {
        "report": ["report", folder],
        "predict": ["predict", "--model", folder, folder.parent / "x.png"],
        "export": ["export", "--model", folder, "--output", folder.parent / "out"],
    }
    return found[command]


def test_folder_without_damage_is_accepted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, the cases below would prove nothing."""
    monkeypatch.setattr(exporting, "MEASURED_SECONDS", 0.01)
    for command in ("report", "predict", "export"):
        assert run(monkeypatch, *arguments(command, folder)) == 0


def content(text: str | bytes) -> Damage:
    """Return a damage that writes this instead of the file."""
    data = text.encode() if isinstance(text, str) else text
    return lambda file: file.write_bytes(data)


def changed(*path: str | int, to: object) -> Damage:
    """Return a damage that sets a field of a JSON file."""

    def damage(file: Path) -> None:
        document = json.loads(file.read_text())
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        file.write_text(json.dumps(document))

    return damage


def without(*path: str) -> Damage:
    """Return a damage that removes a field of a JSON file."""

    def damage(file: Path) -> None:
        document = json.loads(file.read_text())
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        file.write_text(json.dumps(document))

    return damage


def replaced(old: str, new: str) -> Damage:
    """Return a damage that changes the text of a file."""

    def damage(file: Path) -> None:
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new, 1))

    return damage


def in_place(make: Callable[[Path], object]) -> Damage:
    """Return a damage that puts something else in the place of the file."""

    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def listening(file: Path) -> None:
    """Leave a socket; its name may be short only."""
    before = os.getcwd()
    os.chdir(file.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(before)


def tensors(**changes: torch.Tensor) -> Damage:
    """Return a damage of some artifacts; ``__`` in a name is a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return lambda file: save_tensors(file, {**sound_artifacts(), **named})


def raw_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors file's header and the rest."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file: Path, header: Mapping[str, Any] | bytes, rest: bytes) -> None:
    """Write a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def card(field: str | None, to: object = None) -> Damage:
    """Return a damage that sets a field of a model's card, or the card itself."""

    def damage(file: Path) -> None:
        header, rest = raw_header(file)
        fields = json.loads(header["__metadata__"]["card"])
        if field is None:
            header["__metadata__"]["card"] = to
        else:
            fields[field] = to
            header["__metadata__"]["card"] = json.dumps(fields)
        with_header(file, header, rest)

    return damage


def state(name: str, tensor: torch.Tensor | None) -> Damage:
    """Return a damage that sets or removes a tensor of a model."""

    def damage(file: Path) -> None:
        from safetensors.torch import load_file

        header, _ = raw_header(file)
        found = load_file(file)
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
        save_tensors(file, found, header["__metadata__"])

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Return a damage of a safetensors header."""

    def damage(file: Path) -> None:
        fields, rest = raw_header(file)
        change(fields)
        with_header(file, fields, rest)

    return damage


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
WEIGHT = "classifier.weight"

# Kinds of entries that may be in the place of a file.
NO_FILES: dict[str, Damage] = {
    "a folder": in_place(lambda file: file.mkdir()),
    "a FIFO": in_place(os.mkfifo),
    "a socket": in_place(listening),
    "a device": in_place(lambda file: file.symlink_to("/dev/zero")),
    "symbolic links": in_place(lambda file: file.symlink_to(file.name)),
    "No such file": in_place(lambda file: file.symlink_to("nowhere")),
}

# Damage of config.json, and the expected message besides the file's name.
CONFIGS: dict[str, tuple[Damage, str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "empty": (content(""), "is empty"),
    "not JSON": (content("{"), "is not JSON"),
    "a list": (content("[]"), "must be an object"),
    "a number": (content("1"), "must be an object"),
    "not UTF-8": (content(b'{"a": "\xff"}'), "is not UTF-8"),
    "UTF-16": (content("{}".encode("utf-16")), "is not UTF-8"),
    "nested": (content(DEEP), "is nested too deeply"),
    "nested lists": (content("[" * 200_000), "is nested too deeply"),
    "too large": (content(b"{" + b" " * 40_000_000 + b"}"), "too large"),
    "twice": (replaced('"code"', '"code": "x", "code"'), "'code' comes twice"),
    "NaN": (replaced('"test_images": 20', '"test_images": NaN'), "NaN is no number"),
    "many digits": (replaced('"test_images": 20', '"test_images": ' + "9" * 5000),
                    "5,000 digits"),
    "large number": (changed("test_images", to=10**19), "test_images = "),
    "half a character": (replaced('"rare"', r'"\ud800"'), "half of a character"),
    "empty object": (content("{}"), "config is missing"),
    "no seed": (without("config", "seed"), "config.seed is missing"),
    "text seed": (changed("config", "seed", to="7"), "config.seed = '7'"),
    "negative seed": (changed("config", "seed", to=-1), "config.seed = -1"),
    "no method": (without("config", "method"), "config.method is missing"),
    "method is a list": (changed("config", "method", to=[]), "config.method = []"),
    "value is a list": (changed("config", "x", to=[1]), "config.x"),
    "rounds": (changed("config", "federation.rounds", to=0), "federation.rounds = 0"),
    "no names": (changed("class_names", to=[]), "class_names = []"),
    "names are text": (changed("class_names", to="ab"), "class_names = 'ab'"),
    "empty name": (changed("class_names", 0, to=""), "class_names.0 = ''"),
    "number for a name": (changed("class_names", 1, to=3), "class_names.1 = 3"),
    "long name": (changed("class_names", 0, to="x" * 10_000), "class_names.0"),
    "many names": (changed("class_names", to=["x"] * 50_000), "class_names"),
    "three names": (changed("class_names", to=["a", "b", "c"]),
                    "train_images_per_class has 2 entries, but class_names has 3"),
    "counts": (changed("train_images_per_class", to=[1]),
               "train_images_per_class has 1 entries"),
    "negative count": (changed("train_images_per_class", 0, to=-1),
                       "train_images_per_class.0 = -1"),
    "no groups": (without("shot_groups"), "shot_groups is missing"),
    "rule": (changed("shot_groups", "rule", to="luck"), "shot_groups.rule = 'luck'"),
    "group": (changed("shot_groups", "many", to=[7]), "shot_groups must name"),
    "group twice": (changed("shot_groups", "few", to=[1]), "each of the 2 class_names"),
    "no group": (changed("shot_groups", "few", to=[]), "class_names exactly once"),
    "negative group": (changed("shot_groups", "few", to=[-1]), "shot_groups.few.0"),
    "versions": (changed("versions", to=["torch"]), "versions = ['torch']"),
    "code": (changed("code", to=None), "code = None"),
    "teacher": (changed("teacher", to="demo"), "teacher = 'demo'"),
    "teacher's accuracy": (changed("teacher", "zero_shot", "top1", to=101),
                           "teacher.zero_shot.top1 = 101"),
    "teacher's classes": (changed("teacher", "zero_shot", "per_class", to=[]),
                          "teacher.zero_shot.per_class has 0 entries"),
    "huge float": (replaced('"top1": 91.0', '"top1": 1e999'), "zero_shot.top1 = inf"),
    "true for a number": (changed("test_images", to=True), "test_images = True"),
}  # fmt: skip

# Damage of metrics.jsonl.
LINES: dict[str, tuple[Damage, str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "missing": (lambda file: file.unlink(), "No such file"),
    "empty": (content(""), "is empty"),
    "cut off": (lambda file: os.truncate(file, file.stat().st_size - 20),
                "line 2 is not JSON"),
    "a line less": (lambda file: file.write_text(file.read_text().split("\n")[0]),
                    "has 1 rounds, but config.json says federation.rounds = 2"),
    "empty line": (replaced("\n", "\n\n"), "line 2 is not JSON"),
    "not UTF-8": (content(b"\xff\xfe"), "is not UTF-8"),
    "nested": (content(DEEP), "line 1 is nested too deeply"),
    "a list": (content("[]\n[]\n"), "line 1 holds a list"),
    "NaN": (replaced("1.5", "NaN"), "line 1 is not JSON: NaN is no number"),
    "Infinity": (replaced("1.5", "-Infinity"), "-Infinity is no number"),
    "order": (replaced('"round": 2', '"round": 3'), "line 2 is of round 3"),
    "text": (replaced('"client": 1.5', '"client": "1.5"'), "losses.client = '1.5'"),
    "no seconds": (replaced('"seconds"', '"minutes"'), "seconds is missing"),
    "negative": (replaced('"up": 10', '"up": -10'), "bytes.up = -10"),
    "seconds": (replaced('"clients": 60.0', '"clients": 1e300'), "seconds.clients"),
    "percent": (replaced('"balanced": 50.0', '"balanced": 500'), "balanced = 500"),
    "no balanced": (replaced('"balanced": 50.0', '"balanced": null'),
                    "accuracy.fedavg.balanced = None"),
    "classes": (replaced("[50.0, 52.0]", "[50.0]"),
                "accuracy.fedavg.per_class has 1 entries, but config.json has 2"),
    "no accuracy": (lambda file: file.write_text(
        "\n".join(json.dumps({**json.loads(line), "accuracy": {}})
                  for line in file.read_text().split("\n"))),
        "no round has an accuracy"),
    "twice": (replaced('"round": 1', '"round": 1, "round": 1'), "'round' comes twice"),
    "mechanism": (replaced('"losses"', '"privacy": {"luck": {}}, "losses"'),
                  "privacy.luck"),
}  # fmt: skip

# Damage of artifacts.safetensors.
KEPT: dict[str, tuple[Damage, str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "empty": (content(""), "is no safetensors file"),
    "text": (content("not a safetensors file at all"), "is no safetensors file"),
    "cut off": (lambda file: os.truncate(file, file.stat().st_size - 1), "is cut off"),
    "clients": (tensors(clients_by_class=torch.ones(3, 5, dtype=torch.int64)),
                "'clients_by_class' is int64 [3, 5], but it must be int64 [any, 2]"),
    "floats": (tensors(clients_by_class=torch.ones(3, 2)), "_by_class' is float"),
    "negative": (tensors(clients_by_class=-torch.ones(3, 2, dtype=torch.int64)),
                 "'clients_by_class' holds counts"),
    "sum": (tensors(confusion__fedavg=torch.full((2, 2), 2**62)),
            "holds counts that are negative or add up to more"),
    "confusion": (tensors(confusion__fedavg=torch.ones(3, 3, dtype=torch.int64)),
                  "'confusion.fedavg' is int64 [3, 3]"),
    "other confusion": (tensors(confusion__x=torch.ones(2, dtype=torch.int64)),
                        "'confusion.x' is int64 [2]"),
    "classes": (tensors(features=torch.ones(3, 3, DIM)), "features"),
    "no features": (tensors(features=torch.ones(2, 0, DIM)), "[2, any, any]"),
    "widths": (tensors(text_features=torch.ones(2, 7)), "their widths must agree"),
    "not finite": (tensors(features=torch.full((2, 3, DIM), torch.nan)),
                   "holds values that are no finite numbers"),
    "prototypes": (tensors(text_features=torch.full((2, DIM), torch.inf)),
                   "'text_features' holds values that are no finite"),
}  # fmt: skip

# Damage of model.safetensors, which `predict` and `export` read.
MODELS: dict[str, tuple[Damage, str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "missing": (lambda file: file.unlink(), "does not exist"),
    "empty": (content(""), "is no safetensors file"),
    "7 bytes": (content("1234567"), "is no safetensors file"),
    "long header": (content(struct.pack("<Q", 2**63) + b"{}"), "is no safetensors"),
    "cut off": (lambda file: os.truncate(file, file.stat().st_size - 9), "is cut off"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "its header"),
    "header": (lambda file: with_header(file, b"\xff{}", b""), "header is not UTF-8"),
    "nested header": (lambda file: with_header(file, DEEP.encode(), b""), "too deeply"),
    "header is a list": (lambda file: with_header(file, b"[]", b""), "an object"),
    "header of texts": (lambda file: with_header(file, {"a": "b"}, b""), "header: a"),
    "no metadata": (header(lambda found: found.pop("__metadata__")), "card is missing"),
    "no card": (header(lambda found: found.update(__metadata__={"a": "b"})),
                "card is missing"),
    "offsets": (header(lambda found: found[WEIGHT].update(data_offsets=[0, 4])),
                "cannot be read"),
    "type": (header(lambda found: found[WEIGHT].update(dtype="F16")),
             f"{WEIGHT} is float16"),
    "no type": (header(lambda found: found[WEIGHT].update(dtype="Q4")),
                f"{WEIGHT} is unknown"),
    "negative shape": (header(lambda found: found[WEIGHT].update(shape=[-1])),
                       f"{WEIGHT}.shape.0 = -1"),
    "lacks": (state(WEIGHT, None), f"lacks the tensor {WEIGHT}"),
    "too many": (state("extra", torch.ones(1)), "'extra' too many"),
    "shape": (state(WEIGHT, torch.ones(3, DIM)),
              f"{WEIGHT} is float32 [3, 4], but it must be float32 [2, 4]"),
    "double": (state(WEIGHT, torch.ones(2, DIM).double()), "is float64"),
    "not finite": (state(WEIGHT, torch.full((2, DIM), torch.nan)), "no finite numbers"),
    "variances": (state("bn1.running_var", -torch.ones(16)), "negative variances"),
    "card is text": (card(None, "hello"), "card is not JSON"),
    "card is a list": (card(None, "[]"), "must be an object"),
    "nested card": (card(None, DEEP), "card is nested too deeply"),
    "architecture": (card("architecture", "resnet9"), "'resnet9' is none of resnet8"),
    "another": (card("architecture", "resnet8"), "projection.weight"),
    "width": (card("feature_dim", 10**9), "feature_dim = 1000000000"),
    "no width": (card("feature_dim", 0), "feature_dim = 0"),
    "another width": (card("feature_dim", 8), "[8, 64]"),
    "image size": (card("image_size", 10**6), "image_size = 1000000"),
    "small image size": (card("image_size", 1), "image_size = 1"),
    "size is true": (card("image_size", True), "image_size = True"),
    "size is null": (card("image_size", None), "image_size = None"),
    "no classes": (card("class_names", []), "class_names = []"),
    "class is empty": (card("class_names", ["rare", ""]), "class_names.1 = ''"),
    "many classes": (card("class_names", ["x"] * 40_000), "class_names"),
    "long class": (card("class_names", ["rare", "x" * 1000]), "class_names.1"),
    "classes": (card("class_names", ["a", "b", "c"]), WEIGHT),
    "deviation": (card("normalization", {"mean": [0, 0, 0], "std": [1, 0, 1]}),
                  "normalization.std.1 = 0"),
    "two means": (card("normalization", {"mean": [0, 0], "std": [1, 1, 1]}),
                  "normalization.mean = [0, 0]"),
    "no normalization": (card("normalization", None), "normalization = None"),
    "provenance": (card("provenance", {"a": [1]}), "provenance.a"),
    "unknown field": (card("hello", 1), "hello is not known"),
}  # fmt: skip

FILES = {CONFIG: CONFIGS, METRICS: LINES, ARTIFACTS: KEPT, MODEL: MODELS}
READ_BY = {
    CONFIG: ("report", "export"),
    METRICS: ("report",),
    ARTIFACTS: ("report",),
    MODEL: ("predict", "export"),
}
CASES = [
    pytest.param(command, file, damage, said, id=f"{command}: {file}: {name}")
    for file, damages in FILES.items()
    for name, (damage, said) in damages.items()
    for command in READ_BY[file]
]


@pytest.mark.parametrize(("command", "file", "damage", "said"), CASES)
def test_damage_is_one_line_that_names_file_and_field(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    file: str,
    damage: Damage,
    said: str,
) -> None:
    damage(folder / file)
    before = tree(folder.parent)
    line = refused(monkeypatch, capsys, *arguments(command, folder))
    assert file in line
    assert said in line
    assert tree(folder.parent) == before


def test_model_that_is_no_file_is_no_complete_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for said, damage in NO_FILES.items():
        damage(folder / MODEL)
        assert said in refused(monkeypatch, capsys, "report", folder)
        os.unlink(folder / MODEL) if said != "a folder" else (folder / MODEL).rmdir()
        (folder / MODEL).touch()


def test_large_file_is_refused_without_being_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The header declares ten gigabytes, and the (sparse) file has this size."""
    file = folder / MODEL
    fields, _ = raw_header(file)
    end = 10 * 2**30
    fields[WEIGHT].update(shape=[end // 16, 4], data_offsets=[0, end])
    for name, entry in fields.items():
        if name not in ("__metadata__", WEIGHT):
            entry["data_offsets"] = [0, 4]
    with_header(file, fields, b"")
    os.truncate(file, file.stat().st_size + end)

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the tensors are read")

    monkeypatch.setattr("server_app.tensor_files.safe_open", read)
    line = refused(monkeypatch, capsys, *arguments("predict", folder))
    assert f"{WEIGHT} is float32 [671088640, 4]" in line


def test_no_model_is_built_before_the_card_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card("feature_dim", 10**9)(folder / MODEL)

    def build(*_: object) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr("server_app.delivery.build_model", build)
    refused(monkeypatch, capsys, *arguments("predict", folder))


def test_weights_that_overflow_give_no_prediction(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shape in (("projection.bias", (DIM,)), (WEIGHT, (2, DIM))):
        state(name, torch.full(shape, 3e38))(folder / MODEL)
    line = refused(monkeypatch, capsys, *arguments("predict", folder))
    assert "gives no finite numbers" in line


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "missing": (lambda file: file.unlink(), "No such file"),
    "text": (content("no image"), "cannot be read as an image"),
    "empty": (content(""), "cannot be read as an image"),
    "cut off": (lambda file: os.truncate(file, 60), "cannot be read as an image"),
}


@pytest.mark.parametrize(("damage", "said"), IMAGES.values(), ids=IMAGES)
def test_image_that_cannot_be_read_is_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    said: str,
) -> None:
    damage(folder.parent / "x.png")
    line = refused(monkeypatch, capsys, *arguments("predict", folder))
    assert "x.png" in line
    assert said in line


def test_image_with_a_name_that_is_no_text_can_be_predicted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = folder.parent / os.fsdecode(b"\xff\x1b[2J\n.png")
    (folder.parent / "x.png").rename(odd)
    assert run(monkeypatch, "predict", "--model", folder, odd) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert r"/\xff\x1b[2J\n.png: " in line
    os.truncate(odd, 60)
    line = refused(monkeypatch, capsys, "predict", "--model", folder, odd)
    assert r"/\xff\x1b[2J\n.png cannot be read" in line


def test_runs_of_other_classes_are_not_set_against_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(folder.parent / "b-run", [50.0]).folder
    changed("class_names", 0, to="another")(other / CONFIG)
    line = refused(monkeypatch, capsys, "report", folder, "--against", other)
    assert "b-run has other classes than" in line


def summary(file: Path) -> Path:
    """Write the summary of a comparison of one run; return its folder."""
    write_run(file.parent / "plain-seed1", [50.0])
    file.write_text(
        json.dumps(
            {
                "name": "x",
                "baseline": "plain",
                "runs": {"plain": ["plain-seed1"]},
                "failed": [],
            }
        )
    )
    return file.parent


SUMMARIES: dict[str, tuple[Damage, str]] = {
    **{f"is {said}": (damage, said) for said, damage in NO_FILES.items()},
    "empty": (content(""), "is empty"),
    "no JSON": (content("x"), "is not JSON"),
    "nested": (content(DEEP), "is nested too deeply"),
    "no runs": (changed("runs", to={}), "runs = {}"),
    "no run": (changed("runs", "plain", to=[]), "runs.plain = []"),
    "runs is a list": (changed("runs", to=[]), "runs = []"),
    "outside": (changed("runs", "plain", to=["../x"]), "'../x' has a separator"),
    "above": (changed("runs", "plain", to=[".."]), "'..' is no name of a folder"),
    "absolute": (changed("runs", "plain", to=["/etc"]), "'/etc' has a separator"),
    "NUL": (changed("runs", "plain", to=["a\0b"]), "cannot be seen"),
    "number": (changed("runs", "plain", to=[1]), "runs.plain.0 = 1"),
    "no baseline": (without("baseline"), "baseline is missing"),
    "failed": (changed("failed", to=["x"]), "failed.0 = 'x'"),
    "failed seed": (changed("failed", to=[{"variant": "a", "reason": "b", "seed": -1}]),
                    "failed.0.seed = -1"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), SUMMARIES.values(), ids=SUMMARIES)
def test_damaged_comparison_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    said: str,
) -> None:
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "comparison.json"
    folder = summary(file)
    damage(file)
    before = tree(tmp_path)
    line = refused(monkeypatch, capsys, "report", folder)
    assert "comparison.json" in line
    assert said in line
    assert tree(tmp_path) == before


def test_run_that_is_missing_from_a_comparison_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "comparison.json"
    folder = summary(file)
    changed("runs", "plain", to=["plain-seed1", "plain-seed2"])(file)
    assert "plain-seed2 is no run's folder" in refused(
        monkeypatch, capsys, "report", folder
    )
    other = write_run(folder / "plain-seed2", [50.0], seed=2).folder
    replaced('"fedavg": {', '"another": {')(other / METRICS)
    line = refused(monkeypatch, capsys, "report", folder)
    assert "plain-seed2 has the classifiers another" in line
