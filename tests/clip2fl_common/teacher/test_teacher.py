"""Teachers: exact caches, identity by fingerprint, errors with a remedy."""

import copy
import json
import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from client_app.round import _check_code, _check_teacher
from clip2fl_common.data import demo
from clip2fl_common.devices import tensor_cores, tf32_state
from clip2fl_common.files import cache_dir
from clip2fl_common.provenance import code_fingerprint
from clip2fl_common.teacher import (
    Network,
    Teacher,
    TeacherError,
    load_teacher,
    public_name,
)
from clip2fl_common.teacher import teacher as teachers
from clip2fl_common.teacher.demo import DATA_PATH, weight_paths
from clip2fl_common.teacher.facts import known_facts, note_facts
from clip2fl_common.teacher.feature_cache import TABLE, FeatureCache, content_keys


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """Return the demo's teacher with an empty cache."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    return load_teacher("demo")


def _next(value: float) -> float:
    """Return the next float32 above a value."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def test_teacher_is_known_by_its_fingerprint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with a GPU has stored a scale that differs in the last digit."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    facts = load_teacher("demo").network.facts
    other = replace(facts, logit_scale=_next(facts.logit_scale))
    note_facts("demo", "", [DATA_PATH, *weight_paths()], other)
    teacher = load_teacher("demo")
    assert teacher.logit_scale == other.logit_scale != facts.logit_scale
    # Loads the network, which computes the facts again, here.
    assert teacher.image_features(images(1)).shape == (1, 512)


class _ScaleOnDevice:
    """A logit scale on a device whose ``exp`` is off by one in the last digit."""

    def __init__(self, scale: torch.Tensor) -> None:
        self._scale = scale

    def detach(self) -> "_ScaleOnDevice":
        return self

    def float(self) -> "_ScaleOnDevice":
        return self

    def exp(self) -> torch.Tensor:
        return torch.tensor(_next(float(self._scale.exp())))

    def cpu(self) -> torch.Tensor:
        return self._scale


def test_facts_are_computed_on_the_cpu(teacher: Teacher) -> None:
    here = teacher.network
    scale = teacher._model.logit_scale.detach()

    class OnDevice(torch.nn.Module):
        """Return the teacher's weights; only the scale is replaced."""

        logit_scale = _ScaleOnDevice(scale)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return here.model.state_dict()

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            return here.model.named_modules()

    there = Network(OnDevice(), here.tokenizer, here.preprocess)
    assert there.facts == here.facts


def images(count: int) -> torch.Tensor:
    """Return drawn images [N, 3, 32, 32]."""
    return torch.from_numpy(demo.draw_images("test", 0, count))


def test_features_are_those_of_open_clip(teacher: Teacher) -> None:
    batch = images(4)
    network = teacher._model
    transform = image_transform_v2(
        PreprocessCfg(**teacher.network.preprocess), is_train=False
    )
    own = torch.stack(
        [transform(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in batch]
    )
    with torch.no_grad():
        expected = network.encode_image(own, normalize=True)
    torch.testing.assert_close(
        teacher.image_features(batch), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (40, 40)])
def test_preprocessing_of_other_sizes_agrees(
    teacher: Teacher, shape: tuple[int, int]
) -> None:
    height, width = shape
    rows = np.linspace(0, 1, height)[:, None, None]
    columns = np.linspace(0, 1, width)[None, :, None]
    smooth = (255 * rows * columns * np.array([1.0, 0.7, 0.4])).astype(np.uint8)
    config = PreprocessCfg(**teacher.network.preprocess)
    transform = image_transform_v2(config, is_train=False)
    expected = transform(Image.fromarray(smooth))
    ours = teacher.preprocess(torch.from_numpy(smooth).permute(2, 0, 1)[None])[0]
    # Pillow and torch round an interpolated grey level of 255 differently.
    level = 1 / 255 / min(config.std)
    assert (ours - expected).abs().max() <= 2 * level
    assert (ours - expected).abs().mean() <= level / 2


def test_features_are_computed_once(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = images(6)
    first = teacher.cached_image_features(batch[:4])
    torch.testing.assert_close(first, teacher.image_features(batch[:4]))
    computed: list[int] = []
    original = Teacher.image_features

    def counted(self: Teacher, missing: torch.Tensor) -> torch.Tensor:
        computed.append(len(missing))
        return original(self, missing)

    monkeypatch.setattr(Teacher, "image_features", counted)
    assert torch.equal(teacher.cached_image_features(batch[:4]), first)
    assert computed == []
    assert torch.equal(teacher.cached_image_features(batch)[:4], first)
    assert computed == [2]


def test_feature_does_not_depend_on_what_else_is_computed(teacher: Teacher) -> None:
    """To the last digit, which the number of samples in a pass changes."""
    batch = images(70)
    whole = teacher.image_features(batch)
    for count in (1, 2, 7):
        few = teacher.image_features(batch[20 : 20 + count])
        assert torch.equal(few, whole[20 : 20 + count])
    teacher.cached_image_features(batch[:69])
    assert torch.equal(teacher.cached_image_features(batch), whole)
    names = ["star", "ring", "small red circle"]
    apart = torch.cat([teacher.text_features([name]) for name in names])
    assert torch.equal(apart, teacher._encode([f"a photo of a {n}" for n in names]))


def test_no_images_have_no_features(teacher: Teacher) -> None:
    width = teacher.text_features(["star"]).shape[1]
    assert teacher.image_features(images(1)[:0]).shape == (0, width)


def test_large_batch_takes_no_memory_for_a_few_images(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may ask a site for batches of a million."""
    passes = []
    original = teacher._model.encode_image

    def watched(pixels: torch.Tensor) -> Any:
        passes.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr(teacher._model, "encode_image", watched)
    monkeypatch.setattr(teacher, "batch_size", 1_000_000)
    assert teacher.image_features(images(2)).shape == (2, 512)
    assert teacher.image_features(images(300)).shape == (300, 512)
    assert passes == [256, 300]


def test_features_are_computed_without_tf32(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch lets a GPU round the factors of convolutions, unless it is told not to."""
    states = []
    for name in ("encode_image", "encode_text"):
        original = getattr(teacher._model, name)

        def watched(*given: Any, original: Any = original) -> Any:
            states.append(tf32_state())
            return original(*given)

        monkeypatch.setattr(teacher._model, name, watched)
    with tensor_cores("all"):
        teacher.image_features(images(1))
        teacher.text_features(["star"])
        assert tf32_state() == (True, True)
    assert states == [(False, False)] * 2


def test_interrupted_pass_keeps_the_batches_that_are_done(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Teacher.image_features
    computed: list[int] = []

    def interrupted(self: Teacher, missing: torch.Tensor) -> torch.Tensor:
        computed.append(len(missing))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return original(self, missing)

    monkeypatch.setattr(teacher, "batch_size", 4)
    monkeypatch.setattr(Teacher, "image_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        teacher.cached_image_features(images(10))
    teacher.cached_image_features(images(10))
    assert computed == [4, 4, 2, 2]


def test_equal_images_keep_the_feature_that_is_stored(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the place in a batch changes a feature's last digits."""

    def by_place(self: Teacher, missing: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(missing)).float()[:, None]

    monkeypatch.setattr(Teacher, "image_features", by_place)
    batch = images(2)[[0, 1, 0, 1]]
    assert teacher.cached_image_features(batch).flatten().tolist() == [0, 1, 0, 1]
    assert teacher.cached_image_features(batch).flatten().tolist() == [0, 1, 0, 1]


def test_damaged_cache_costs_time_not_the_run(
    teacher: Teacher, caplog: pytest.LogCaptureFixture
) -> None:
    batch = images(2)
    expected = teacher.image_features(batch)
    path = FeatureCache(teacher.fingerprint).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a database" * 100)
    assert torch.equal(teacher.cached_image_features(batch), expected)
    assert str(path) in caplog.text


def test_store_keeps_the_first_value_and_teachers_apart(tmp_path: Path) -> None:
    store, other = FeatureCache("a" * 64, tmp_path), FeatureCache("b" * 64, tmp_path)
    keys = content_keys(images(2))
    store.put(keys, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    store.put(keys[:1], torch.tensor([[9.0, 9.0]]))
    assert store.get([*keys, b"?" * 16])[keys[0]].tolist() == [1.0, 2.0]
    assert other.get(keys) == {}
    with sqlite3.connect(store.path) as connection:
        count = connection.execute(f"SELECT count(*) FROM {TABLE}").fetchone()
    assert count == (2,)


def test_key_depends_on_pixels_and_size() -> None:
    flat = torch.arange(48, dtype=torch.uint8)
    keys = {
        content_keys(flat.reshape(1, 3, 4, 4))[0],
        content_keys(flat.reshape(1, 3, 2, 8))[0],
        content_keys(flat.flip(0).reshape(1, 3, 4, 4))[0],
    }
    assert len(keys) == 3


def test_prompt_decides_the_prototypes(teacher: Teacher) -> None:
    teacher.prompt = "{class}, drawn: {class}"
    prototypes = teacher.text_features(["star", "ring"])
    tokens = open_clip.tokenize(
        ["star, drawn: star", "ring, drawn: ring"], teacher._model.context_length
    )
    with torch.no_grad():
        expected = teacher._model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(prototypes, expected)


def test_fingerprint_follows_the_weights(teacher: Teacher) -> None:
    again = load_teacher("demo")
    assert again.fingerprint == teacher.fingerprint
    with torch.no_grad():
        next(again._model.visual.parameters()).view(-1)[0] += 1
    changed = Teacher(lambda: replace(again.network), "changed")
    assert changed.fingerprint != teacher.fingerprint
    with pytest.raises(TeacherError, match="fingerprint .* here, but .* at the server"):
        _check_teacher(changed, teacher.fingerprint)


def test_fingerprint_follows_the_activation(teacher: Teacher) -> None:
    """Both networks have the same weights, and other features."""
    network = copy.deepcopy(teacher.network)
    (place, _), *_ = (
        found
        for found in network.model.named_modules()
        if isinstance(found[1], nn.GELU)
    )
    network.model.set_submodule(place, open_clip.transformer.QuickGELU())
    changed = Teacher(lambda: replace(network), "changed")
    assert not torch.equal(
        changed.text_features(["star"]), teacher.text_features(["star"])
    )
    assert changed.fingerprint != teacher.fingerprint


def test_fingerprint_is_the_same_by_name_and_from_a_folders_json(
    teacher: Teacher,
) -> None:
    """JSON makes lists of tuples."""
    preprocess = json.loads(json.dumps(teacher.network.preprocess))
    assert any(isinstance(value, list) for value in preprocess.values())
    tuples = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in preprocess.items()
    }
    first, second = (
        replace(teacher.network, preprocess=kept).facts for kept in (preprocess, tuples)
    )
    assert first == second


@pytest.mark.parametrize(
    ("pretrained", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)]
)
def test_network_has_the_activation_that_its_weights_were_trained_with(
    pretrained: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip only warns. The weights are not here, and the network is small."""
    size = {"width": 8, "layers": 1}
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "ViT-B-32",
        {
            "embed_dim": 8,
            "vision_cfg": {**size, "head_width": 8, "image_size": 32, "patch_size": 32},
            "text_cfg": {**size, "heads": 1, "context_length": 8, "vocab_size": 99},
        },
    )
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: "w")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *a, **k: None)
    model, _, _ = teachers._load_open_clip("ViT-B-32", pretrained)
    found = {type(module) for module in model.modules()}
    assert (open_clip.transformer.QuickGELU in found) == quick
    assert (nn.GELU in found) != quick


def never() -> Network:
    """Fail if a teacher is loaded."""
    pytest.fail("the teacher was loaded")


def test_known_teacher_is_not_loaded(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time, fingerprint, scale, texts and images all come from disk."""
    names, batch = ["star", "ring"], images(3)
    expected = teacher.text_features(names), teacher.cached_image_features(batch)
    monkeypatch.setattr(teachers, "_load_network", lambda *_: never())
    again = load_teacher("demo")
    assert again.fingerprint == teacher.fingerprint
    assert again.logit_scale == teacher.logit_scale
    assert torch.equal(again.text_features(names), expected[0])
    assert torch.equal(again.cached_image_features(batch), expected[1])
    with pytest.raises(pytest.fail.Exception):
        again.text_features(["arrow"])


@pytest.fixture
def own_folder(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a folder with the demo's teacher, shifted by the value in its file."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "weights").write_text("0")

    def load(model: str, pretrained: str) -> tuple[Any, Any, Any]:
        network = copy.deepcopy(teacher.network)
        shift = float((folder / "weights").read_text())
        with torch.no_grad():
            next(network.model.parameters()).view(-1)[0] += shift
        return network.model, network.tokenizer, network.preprocess

    monkeypatch.setattr(teachers, "_load_open_clip", load)
    return folder


@pytest.mark.parametrize("change", ["content", "time"])
def test_changed_file_is_another_teacher(own_folder: Path, change: str) -> None:
    """A reset of size and modification time does not help: the inode's time differs."""
    name = f"local-dir:{own_folder}"
    first = load_teacher(name)
    assert known_facts(name, "") == first.network.facts
    before = (own_folder / "weights").stat()
    (own_folder / "weights").write_text("1")
    if change == "time":
        os.utime(own_folder / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_facts(name, "") is None
    assert load_teacher(name).fingerprint != first.fingerprint


def test_teacher_that_changes_while_in_use_is_refused(own_folder: Path) -> None:
    load_teacher(f"local-dir:{own_folder}")
    known = load_teacher(f"local-dir:{own_folder}")
    (own_folder / "weights").write_text("1")
    with pytest.raises(TeacherError, match="has changed while it was in use"):
        known.image_features(images(1))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": [["/x"]], "facts": {}}'])
def test_damaged_facts_are_noted_again(teacher: Teacher, text: str) -> None:
    (place,) = (cache_dir() / "teachers").iterdir()
    place.write_text(text)
    assert known_facts("demo", "") is None
    assert load_teacher("demo").fingerprint == teacher.fingerprint
    assert known_facts("demo", "") == teacher.network.facts


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("demo", "demo"),
        ("ViT-B/32 (laion2b_s34b_b79k)", "ViT-B/32 (laion2b_s34b_b79k)"),
        ("ViT-B-32 (metaclip-400m)", "ViT-B-32 (metaclip-400m)"),
        ("hf-hub:org/model", "hf-hub:org/model"),
        ("local-dir:/srv/ann/teacher", "local-dir"),
        ("local-dir:/srv/a (b)/teacher", "local-dir"),
        ("ViT-B-32 (/srv/ann/weights.pt)", "ViT-B-32 (own weights)"),
        ("ViT-B-32 (/srv/a (b)/w)", "ViT-B-32 (own weights)"),
        ("ViT-B-32 (~ann/weights)", "ViT-B-32 (own weights)"),
        ("ViT-B-32 (ann.pt)", "ViT-B-32 (own weights)"),
    ],
)
def test_public_name_has_no_path(name: str, public: str) -> None:
    assert public_name(name) == public


def test_client_of_another_checkout_refuses() -> None:
    _check_code(code_fingerprint())
    with pytest.raises(RuntimeError, match="is not the server's"):
        _check_code("another")


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", "", "not an open_clip model; did you mean ViT-B-32"),
        ("ViT-B-32", "opneai", "'opneai' is not a tag of ViT-B-32; .*openai"),
        ("local-dir:/nowhere", "", "/nowhere has no open_clip_config.json"),
    ],
)
def test_unknown_teacher(model: str, pretrained: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher(model, pretrained)


def test_weights_that_cannot_be_had_name_cache_and_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", refused)
    with pytest.raises(TeacherError) as error:
        load_teacher("ViT-B-32", "openai")
    for part in ("ViT-B-32", "openai", "hub", "local-dir:", 'teacher.model="demo"'):
        assert part in str(error.value)
