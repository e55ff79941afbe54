"""A teacher in a folder, as small as open_clip makes one."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file


def write_teacher(folder: Path, seed: int) -> None:
    """Write a tiny open_clip model with random weights.

    Parameters
    ----------
    folder : Path
        The folder to make.
    seed : int
        Seed of the weights.
    """
    config = {
        "embed_dim": 512,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
