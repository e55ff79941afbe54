"""The teacher of the built-in data set: a small open_clip model in three JSON files.

The model is a regular CLIP model (open_clip's classes and tokenizer, trained with the
contrastive loss between images and captions), but tiny and trained on drawn shapes. It
knows only the words of its captions: the files contain the embeddings of these tokens,
and every other token has a zero embedding.

One file describes the model, two contain its weights: Flower publishes only text, and
no file larger than 1 MiB. ``scripts/train_demo_teacher.py`` makes the files.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

DATA_PATH: Final = Path(__file__).with_name("demo_teacher.json")
DATA_FORMAT: Final = "clip2fl-demo-teacher-2"
TOKEN_EMBEDDING: Final = "token_embedding.weight"

Tokenizer = Callable[[str | list[str]], torch.Tensor]


def weight_paths(path: Path = DATA_PATH) -> list[Path]:
    """Return the weight files of the model that a file describes.

    Parameters
    ----------
    path : Path
        The description.

    Returns
    -------
    list of Path
        JSON files of one string each. Joined, the strings are the base64 of a
        safetensors file.
    """
    return [path.with_stem(f"{path.stem}_{number}") for number in (1, 2)]


def build_demo_model(model_config: dict[str, Any]) -> tuple[nn.Module, Tokenizer]:
    """Build an untrained model and its tokenizer from an open_clip configuration.

    Parameters
    ----------
    model_config : dict
        open_clip's ``model_cfg``: embed_dim, vision_cfg, text_cfg.

    Returns
    -------
    model : open_clip.CLIP
        With weights drawn from torch's global generator.
    tokenizer : callable
        Maps a text or a list of N texts to token numbers, int64 [N, context length].
    """
    # Imported here because it takes longer than everything else in this package.
    import open_clip

    model: nn.Module = open_clip.CLIP(**model_config)
    tokenizer: Tokenizer = open_clip.SimpleTokenizer(
        context_length=model_config["text_cfg"]["context_length"]
    )
    return model, tokenizer


def _unpack(document: dict[str, Any], text: str) -> tuple[nn.Module, Tokenizer]:
    import safetensors.torch

    if document["format"] != DATA_FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {DATA_FORMAT!r}")
    data = base64.b64decode(text, validate=True)
    if hashlib.sha256(data).hexdigest() != document["sha256"]:
        raise ValueError("its weights are other ones than it describes")
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in safetensors.torch.load(data).items()
    }
    # All weights drawn here are replaced, so the caller's generator must not advance.
    with torch.random.fork_rng(devices=[]):
        model, tokenizer = build_demo_model(document["open_clip_config"]["model_cfg"])
    table = torch.zeros_like(model.state_dict()[TOKEN_EMBEDDING])
    table[document["token_ids"]] = tensors[TOKEN_EMBEDDING]
    model.load_state_dict(tensors | {TOKEN_EMBEDDING: table})
    return model, tokenizer


def load_demo_model(
    path: Path = DATA_PATH,
) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """Load the teacher of the built-in data set.

    Parameters
    ----------
    path : Path
        Description of the model, by default the one that comes with the program. The
        files of `weight_paths` are beside it.

    Returns
    -------
    model : open_clip.CLIP
        In evaluation mode, float32, on the CPU, without gradients. It takes images of
        [N, 3, 32, 32] and gives features of [N, 512].
    tokenizer : callable
        Maps a text or a list of N texts to token numbers, int64 [N, context length].
    preprocess_config : dict
        open_clip's ``preprocess_cfg``: mean and std of the RGB channels in [0, 1],
        interpolation, resize_mode.

    Raises
    ------
    ValueError
        If a file is missing or damaged; the message names the description and the
        remedy.
    """
    from safetensors import SafetensorError

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        parts = [json.loads(part.read_text("utf-8")) for part in weight_paths(path)]
        model, tokenizer = _unpack(document, "".join(parts))
        preprocess_config = dict(document["open_clip_config"]["preprocess_cfg"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ValueError(
            f"cannot load the demo teacher from {path}: it is missing or damaged "
            f"({type(error).__name__}: {error}). Restore the files from the "
            "distribution, or make them anew: python -m scripts.train_demo_teacher"
        ) from error
    return model.eval().requires_grad_(False), tokenizer, preprocess_config
