"""The files of the demo teacher: what is packed is what is loaded."""

import base64
import json
from pathlib import Path

import torch

from clip2fl_common.teacher.demo import DATA_PATH, load_demo_model, weight_paths
from scripts.train_demo_teacher import pack, write_model


def test_packing_the_shipped_teacher_again_gives_the_shipped_files(
    tmp_path: Path,
) -> None:
    model, tokenizer, _ = load_demo_model()
    document = json.loads(DATA_PATH.read_text("utf-8"))
    token_ids, tensors = pack(model, tokenizer)
    assert token_ids == document["token_ids"]
    checksum = document.pop("sha256")
    copy = tmp_path / "copy.json"
    write_model(copy, document, tensors)
    assert json.loads(copy.read_text("utf-8"))["sha256"] == checksum
    for written, shipped in zip(weight_paths(copy), weight_paths(), strict=True):
        assert written.read_bytes() == shipped.read_bytes()


def test_weights_arrive_bit_by_bit(tmp_path: Path) -> None:
    """Through both files, from weights that no shipped model has."""
    model, tokenizer, _ = load_demo_model()
    document = json.loads(DATA_PATH.read_text("utf-8"))
    for weight in model.state_dict().values():
        if weight.is_floating_point() and weight.ndim:
            weight.mul_(0.5)
    path = tmp_path / "teacher.json"
    _, tensors = pack(model, tokenizer)
    write_model(path, document, tensors)
    pieces = [json.loads(part.read_text("utf-8")) for part in weight_paths(path)]
    assert all(pieces) and base64.b64decode("".join(pieces)) == tensors
    loaded = load_demo_model(path)[0].state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        # Halving is exact in float16, but for the smallest numbers.
        stored = weight.half().float() if weight.is_floating_point() else weight
        if name == "logit_scale":
            stored = weight
        torch.testing.assert_close(loaded[name], stored, rtol=0, atol=0)
