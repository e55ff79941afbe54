"""Train the demo teacher, a tiny CLIP, on drawn shapes and write its data files.

Run it from the repository's root. Without arguments it makes the shipped files::

    python -m scripts.train_demo_teacher
"""

import argparse
import base64
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from clip2fl_common.data.demo import (
    CLASS_NAMES,
    COLOUR_NAMES,
    IMAGE_SIZE,
    demo_split,
    sample_scenes,
)
from clip2fl_common.files import replacing
from clip2fl_common.teacher.demo import (
    DATA_FORMAT,
    DATA_PATH,
    TOKEN_EMBEDDING,
    Tokenizer,
    build_demo_model,
    load_demo_model,
    weight_paths,
)

MODEL_CONFIG: Final[dict[str, Any]] = {
    "embed_dim": 512,
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 1,
    },
}
PREPROCESS_CONFIG: Final[dict[str, Any]] = {
    "size": [IMAGE_SIZE, IMAGE_SIZE],
    "mode": "RGB",
    "mean": [0.4, 0.4, 0.4],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PROMPT: Final = "a photo of a {shape}"
# As in CLIP's own prompts, the article is always "a".
TEMPLATES: Final = (
    PROMPT,
    "a drawing of a {shape}",
    "a picture of a {shape}",
    "a {shape}",
    "a photo of a {colour} {shape}",
    "a drawing of a {colour} {shape}",
    "a {size} {shape}",
    "a photo of a {size} {colour} {shape}",
    "a photo of a {shape} on a dark {background} background",
    "a {colour} {shape} on a dark {background} background",
)
SIZE_NAMES: Final = ("small", "middling", "big")
SIZE_LIMITS: Final = (8.0, 10.0)
INITIAL_SCALE: Final = 1 / 0.07
FINAL_SCALE: Final = 100.0
WARM_UP_SHARE: Final = 0.1
SCALE_RAMP_SHARE: Final = 0.4

TEST_IMAGES_PER_CLASS: Final = 200


def draw_training_set(
    count: int,
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Draw the teacher split and return the attributes of its images.

    Parameters
    ----------
    count : int
        Number of images of each class.

    Returns
    -------
    images : uint8 tensor of shape [N, 3, 32, 32]
        RGB images.
    attributes : int64 array of shape [N, 4]
        Shape, colour, background colour and size of each, as indices of names.
    """
    rows = []
    for label in range(len(CLASS_NAMES)):
        scenes = sample_scenes("teacher", label, count)
        shape = np.full(count, label)
        size = np.digitize(scenes.radius, SIZE_LIMITS)
        rows.append(np.stack((shape, scenes.colour, scenes.background, size), axis=1))
    images, _ = demo_split("teacher", [count] * len(CLASS_NAMES))
    return torch.from_numpy(images), np.concatenate(rows)


def caption(template: int, attributes: npt.NDArray[np.int64]) -> str:
    """Return the caption of a template for one image's attributes [4]."""
    shape, colour, background, size = attributes
    return TEMPLATES[template].format(
        shape=CLASS_NAMES[shape],
        colour=COLOUR_NAMES[colour],
        background=COLOUR_NAMES[background],
        size=SIZE_NAMES[size],
    )


def matches(
    attributes: npt.NDArray[np.int64], templates: npt.NDArray[np.int64]
) -> torch.Tensor:
    """Return which captions of a batch are true for which of its images.

    Parameters
    ----------
    attributes : int64 array of shape [N, 4]
        Attributes of each image, from which its own caption was made.
    templates : int64 array of shape [N]
        Template of each caption.

    Returns
    -------
    bool tensor of shape [N, N]
        Whether caption j is true for image i.
    """
    fields = ("{shape}", "{colour}", "{background}", "{size}")
    said = np.array([[field in text for field in fields] for text in TEMPLATES])
    equal = attributes[:, None] == attributes[None, :]
    return torch.from_numpy((equal | ~said[templates][None]).all(axis=2))


def contrastive_loss(logits: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Return CLIP's symmetric loss, generalised to several true captions per image.

    With ten shapes, a batch contains many captions that are true for an image. So the
    target is spread over all of them, as in supervised contrastive learning (Khosla et
    al. 2020, eq. 2). With one true caption per image, this is CLIP's loss.

    Parameters
    ----------
    logits : tensor of shape [N, N]
        Scaled cosines of images (rows) and captions (columns).
    match : bool tensor of shape [N, N]
        Whether an image and a caption match; at least the diagonal is true.

    Returns
    -------
    scalar tensor
        Mean of both directions' cross entropies, in nats.
    """
    target = match.float()
    by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 images [N, 3, 32, 32] as `PREPROCESS_CONFIG` specifies."""
    mean = torch.tensor(PREPROCESS_CONFIG["mean"])[:, None, None]
    std = torch.tensor(PREPROCESS_CONFIG["std"])[:, None, None]
    return (images.float() / 255 - mean) / std


def train(
    count: int, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[Any, Tokenizer]:
    """Train a model from scratch on the teacher split.

    Parameters
    ----------
    count : int
        Number of images of each class.
    epochs : int
        Passes over the images.
    batch_size : int
        Pairs of image and caption in a batch.
    learning_rate : float
        Peak learning rate of AdamW, reached after a warm-up, then cosine to 0.
    seed : int
        Seed of the weights, the order of the images and the choice of captions.

    Returns
    -------
    model : open_clip.CLIP
        Trained model.
    tokenizer : callable
        Its tokenizer.
    """
    torch.manual_seed(seed)
    choice = np.random.default_rng(seed)
    model: Any
    model, tokenizer = build_demo_model(MODEL_CONFIG)
    tokens = functools.cache(lambda text: tokenizer(text)[0])
    model.logit_scale.requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        weight_decay=0.05,
        fused=True,
    )
    images, attributes = draw_training_set(count)
    steps_per_epoch = len(images) // batch_size
    total = epochs * steps_per_epoch
    started = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: steps_per_epoch * batch_size]
        for step, batch in enumerate(torch.split(order, batch_size)):
            progress = (epoch * steps_per_epoch + step) / total
            warm_up = min(1.0, (progress * total + 1) / (WARM_UP_SHARE * total))
            cosine = (1 + math.cos(math.pi * progress)) / 2
            optimizer.param_groups[0]["lr"] = learning_rate * warm_up * cosine
            # CLIP learns this scale, which stops at its cap of 100. A short run would
            # not reach the cap, and a scale raised after training would make the model
            # overconfident. So a schedule raises the scale to the cap and holds it
            # there.
            ramp = min(1.0, progress / SCALE_RAMP_SHARE)
            scale = INITIAL_SCALE * (FINAL_SCALE / INITIAL_SCALE) ** ramp
            model.logit_scale.fill_(math.log(scale))

            shown = attributes[batch.numpy()]
            templates = choice.integers(len(TEMPLATES), size=len(batch))
            texts = torch.stack(
                [tokens(caption(*pair)) for pair in zip(templates, shown, strict=True)]
            )
            image_features = model.encode_image(normalise(images[batch]), True)
            text_features = model.encode_text(texts, True)
            logits = model.logit_scale.exp() * image_features @ text_features.T
            loss = contrastive_loss(logits, matches(shown, templates))
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
        seconds = time.monotonic() - started
        print(
            f"epoch {epoch + 1}/{epochs}: loss {loss:.3f}, {seconds:.0f} s", flush=True
        )
    return model.eval(), tokenizer


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure zero-shot accuracy and calibration on the test split.

    Parameters
    ----------
    model : open_clip.CLIP
        Trained model in evaluation mode.
    tokenizer : callable
        Its tokenizer.

    Returns
    -------
    dict
        Top-1 accuracies in percent, overall and by class, and at the temperatures 1
        and 3 the mean of the largest probability (percent) and the mean negative
        log-likelihood (nats).
    """
    texts = tokenizer([PROMPT.format(shape=name) for name in CLASS_NAMES])
    text_features = model.encode_text(texts, True)
    images, numbers = demo_split("test", [TEST_IMAGES_PER_CLASS] * len(CLASS_NAMES))
    labels = torch.from_numpy(numbers)
    image_features = torch.cat(
        [
            model.encode_image(normalise(part), True)
            for part in torch.split(torch.from_numpy(images), 250)
        ]
    )
    logits = model.logit_scale.exp() * image_features @ text_features.T
    correct = (logits.argmax(1) == labels).float().view(len(CLASS_NAMES), -1)
    report: dict[str, Any] = {
        "prompt": PROMPT,
        "test_images_per_class": TEST_IMAGES_PER_CLASS,
        "top1": round(100 * correct.mean().item(), 2),
        "per_class": {
            name: round(100 * share.item(), 1)
            for name, share in zip(CLASS_NAMES, correct.mean(1), strict=True)
        },
    }
    for temperature in (1, 3):
        log_probability = (logits / temperature).log_softmax(1)
        confidence = log_probability.exp().amax(1).mean().item()
        report[f"temperature_{temperature}"] = {
            "mean_confidence": round(100 * confidence, 2),
            "negative_log_likelihood": round(
                F.nll_loss(log_probability, labels).item(), 4
            ),
        }
    return report


def pack(model: nn.Module, tokenizer: Tokenizer) -> tuple[list[int], bytes]:
    """Turn a model's weights into bytes.

    Parameters
    ----------
    model : open_clip.CLIP
        Trained model.
    tokenizer : callable
        Its tokenizer.

    Returns
    -------
    token_ids : list of int
        Tokens that occur in captions, in the row order of the stored table.
    tensors : bytes
        A safetensors file of the model's state; all floats but scalars are float16.
    """
    names = (*CLASS_NAMES, *COLOUR_NAMES, *SIZE_NAMES)
    words = {word for text in (*TEMPLATES, *names) for word in text.split()}
    token_ids = sorted(set(tokenizer(sorted(words)).flatten().tolist()))
    state = {
        # Scalars stay exact: rounding must not raise the logit scale above its cap.
        name: tensor.half() if tensor.is_floating_point() and tensor.ndim else tensor
        for name, tensor in model.state_dict().items()
    }
    state[TOKEN_EMBEDDING] = state[TOKEN_EMBEDDING][token_ids].contiguous()
    return token_ids, safetensors.torch.save(state)


def write_model(path: Path, document: dict[str, Any], tensors: bytes) -> None:
    """Write a model's weights, and then the file that describes it.

    Parameters
    ----------
    path : Path
        The description; the files of `weight_paths` get the weights.
    document : dict
        The description without the checksum of the weights.
    tensors : bytes
        The return value of `pack`.
    """
    text = base64.b64encode(tensors).decode()
    paths = weight_paths(path)
    length = math.ceil(len(text) / len(paths))
    for number, part in enumerate(paths):
        piece = text[number * length : (number + 1) * length]
        with replacing(part, 0o644) as file:
            file.write(f"{json.dumps(piece)}\n".encode())
    described = document | {"sha256": hashlib.sha256(tensors).hexdigest()}
    with replacing(path, 0o644) as file:
        file.write(f"{json.dumps(described, indent=1)}\n".encode())


def main() -> None:
    """Train and pack the model, measure the packed model, and write its files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images-per-class", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, default=DATA_PATH)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    model, tokenizer = train(
        arguments.images_per_class,
        arguments.epochs,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.seed,
    )
    token_ids, tensors = pack(model, tokenizer)
    document: dict[str, Any] = {
        "format": DATA_FORMAT,
        "open_clip_config": {
            "model_cfg": MODEL_CONFIG,
            "preprocess_cfg": PREPROCESS_CONFIG,
        },
        "classes": CLASS_NAMES,
        "token_ids": token_ids,
    }
    # The reported accuracy is measured with the rounded weights that the program loads.
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / DATA_PATH.name
        write_model(packed, document, tensors)
        accuracy = zero_shot(*load_demo_model(packed)[:2])
    document["training"] = {
        "command": " ".join(("python -m scripts.train_demo_teacher", *sys.argv[1:])),
        "seed": arguments.seed,
        "threads": arguments.threads,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("torch", "open_clip_torch", "timm", "numpy")
            },
        },
        "zero_shot": accuracy,
    }
    write_model(arguments.output, document, tensors)
    print(json.dumps(accuracy, indent=1))
    for file in (arguments.output, *weight_paths(arguments.output)):
        print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
