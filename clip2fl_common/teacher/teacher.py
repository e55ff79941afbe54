"""The frozen vision-language teacher behind one small interface.

Any open_clip model can be the teacher: by name and pretrained tag, from a local folder
(``local-dir:``), from the Hugging Face hub (``hf-hub:``), or the tiny model that comes
with the program (``demo``). open_clip is imported only when a teacher is loaded, since
the import takes seconds.
"""

import contextlib
import difflib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from clip2fl_common.devices import tensor_cores
from clip2fl_common.teacher.demo import DATA_PATH, load_demo_model, weight_paths
from clip2fl_common.teacher.facts import TeacherFacts, known_facts, note_facts
from clip2fl_common.teacher.feature_cache import FeatureCache, content_keys, text_keys

LOCAL_PREFIX = "local-dir:"
HUB_PREFIX = "hf-hub:"
# Tags of open_clip's weights; anything else is a file.
_TAG = re.compile(r"[\w-]+")
DEMO = "demo"
# A pass with fewer samples than `Teacher.batch_size` is filled up to this number. The
# size of a batch may be a million, which must not take memory for a single image.
MOST_FILLED = 256

Tokenizer = Callable[[list[str]], torch.Tensor]


class TeacherError(RuntimeError):
    """The teacher cannot be loaded, or is not the one that the run expects."""


class OtherTeacherError(TeacherError):
    """Server and client have different teachers; names both, without paths."""


@dataclass(frozen=True)
class Network:
    """A loaded open_clip model with its tokenizer and preprocessing.

    Attributes
    ----------
    model : nn.Module
        open_clip model with ``encode_image``, ``encode_text`` and ``logit_scale``.
    tokenizer : callable
        Texts to token ids [N, L].
    preprocess : mapping
        The model's own preprocessing: size, mean, std, interpolation, resize_mode.
    """

    model: nn.Module
    tokenizer: Tokenizer
    preprocess: Mapping[str, Any]

    @cached_property
    def facts(self) -> TeacherFacts:
        """Fingerprint and scale, computed from the weights.

        Both are computed on the CPU in float32, wherever the model is: the last digit
        of ``exp`` differs from device to device.
        """
        model = cast(Any, self.model)
        return TeacherFacts(
            _fingerprint(model, self.preprocess),
            float(model.logit_scale.detach().cpu().float().exp()),
        )


class Teacher:
    """A frozen open_clip model, which is loaded only if a feature is not on disk.

    Parameters
    ----------
    load : callable
        Returns the network.
    name : str
        Name of the teacher in reports.
    device : torch.device or str
        Device of the network.
    prompt : str
        Prompt of a class; ``{class}`` is replaced by the class name.
    batch_size : int
        Images in one forward pass.
    facts : TeacherFacts or None
        Known facts about the teacher; None loads the teacher to compute them.
    """

    def __init__(
        self,
        load: Callable[[], Network],
        name: str,
        device: torch.device | str = "cpu",
        prompt: str = "a photo of a {class}",
        batch_size: int = 64,
        facts: TeacherFacts | None = None,
    ) -> None:
        self._load = load
        self._device = torch.device(device)
        self.name = name
        self.prompt = prompt
        self.batch_size = batch_size
        self._facts = facts or self.network.facts
        self._feature_cache = FeatureCache(self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """Hash of layers, weights and preprocessing."""
        return self._facts.fingerprint

    @property
    def logit_scale(self) -> float:
        """Factor of the cosine between image and text."""
        return self._facts.logit_scale

    @cached_property
    def network(self) -> Network:
        """The network; loaded on first use.

        Raises
        ------
        TeacherError
            If its fingerprint differs from the known one.
        """
        network = self._load()
        known = self.__dict__.get("_facts")
        # Only the fingerprint identifies a teacher. The scale is a floating-point
        # result, which may come from another process on another device.
        if known is not None and network.facts.fingerprint != known.fingerprint:
            raise TeacherError(
                f"teacher {self.name} has changed while it was in use: its fingerprint "
                f"is {network.facts.fingerprint[:12]} and was {known.fingerprint[:12]}"
            )
        network.model.eval().requires_grad_(False).to(self._device)
        return network

    @property
    def _model(self) -> Any:
        # open_clip's models are nn.Modules with methods that nn.Module does not know.
        return self.network.model

    @torch.no_grad()
    def text_features(self, class_names: Sequence[str]) -> torch.Tensor:
        """Return the class prototypes.

        Parameters
        ----------
        class_names : sequence of str, length C
            Names as the prompt contains them.

        Returns
        -------
        Tensor of float32, shape [C, d]
            Unit text features, on the CPU.
        """
        texts = [self.prompt.replace("{class}", name) for name in class_names]
        return self._cached(
            text_keys(texts), lambda at: self._encode([texts[i] for i in at])
        )

    def _encode(self, texts: list[str]) -> torch.Tensor:
        return self._unit_features(
            self._model.encode_text,
            (
                self.network.tokenizer(texts[start : start + self.batch_size])
                for start in range(0, len(texts), self.batch_size)
            ),
        )

    @torch.no_grad()
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images' features, computed without the cache.

        Parameters
        ----------
        images : Tensor of uint8, shape [N, 3, H, W]
            RGB images.

        Returns
        -------
        Tensor of float32, shape [N, d]
            Unit features, on the CPU.
        """
        return self._unit_features(
            lambda pixels: self._model.encode_image(self.preprocess(pixels)),
            iter(images.split(self.batch_size)),
        )

    def _unit_features(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        chunks: Iterator[torch.Tensor],
    ) -> torch.Tensor:
        """Return unit features [N, d] on the CPU; chunks have at most a batch's size.

        Features are stored, and read by other processes and devices. So all passes have
        the same number of samples, on which the last digits depend, and none is rounded
        to TF32. A chunk that is too small is filled with copies of its first sample.
        """
        filled = min(self.batch_size, MOST_FILLED)
        features = []
        with tensor_cores("off"):
            for chunk in chunks:
                missing = max(filled - len(chunk), 0)
                # No images at all have features too, of the shape [0, d].
                first = (
                    chunk[:1] if len(chunk) else chunk.new_zeros(1, *chunk.shape[1:])
                )
                fill = first.expand(missing, *chunk.shape[1:])
                whole = torch.cat([chunk, fill]).to(self._device)
                features.append(encode(whole)[: len(chunk)].float())
        return functional.normalize(torch.cat(features), dim=1).cpu()

    def cached_image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images' features, from the disk if they are there.

        Parameters
        ----------
        images : Tensor of uint8, shape [N, 3, H, W]
            RGB images without augmentation, or views of them.

        Returns
        -------
        Tensor of float32, shape [N, d]
            Equal to `image_features`; missing features are computed and stored.
        """
        return self.cached_features(content_keys(images), lambda at: images[at])

    def cached_features(
        self, keys: list[bytes], pictures: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor:
        """Return pictures' features, from the disk if they are there.

        Parameters
        ----------
        keys : list of bytes, length N
            The pictures' keys (`content_keys`).
        pictures : callable
            Returns the pictures at these places, uint8 [n, 3, H, W]. It is called
            before each pass of the teacher, with places that have no stored features.

        Returns
        -------
        Tensor of float32, shape [N, d]
            As `cached_image_features`.
        """
        if not keys:
            return torch.empty(0, self.text_features(["anything"]).shape[1])
        return self._cached(keys, lambda at: self.image_features(pictures(at)))

    def _cached(
        self, keys: list[bytes], compute: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor:
        """Return features [N, d] from disk; compute and store the missing ones."""
        known = self._feature_cache.get(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        # Stored batch by batch: an interruption loses at most one.
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            computed = compute(batch)
            self._feature_cache.put([keys[i] for i in batch], computed)
            # The first of equal samples counts, as on disk: its last digits may differ.
            for i, feature in zip(batch, computed, strict=True):
                known.setdefault(keys[i], feature)
        return torch.stack([known[key] for key in keys])

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize, crop and normalise a batch as the model's own transform would.

        Parameters
        ----------
        images : Tensor of uint8, shape [N, 3, H, W]
            RGB images.

        Returns
        -------
        Tensor of float32, shape [N, 3, size, size]
        """
        # Imported here, because the import takes more than a second.
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as images_functional

        preprocess = self.network.preprocess
        size = preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        mode = InterpolationMode(preprocess["interpolation"])
        if preprocess["resize_mode"] == "squash":
            target = [height, width]
        else:
            scale = max(height / images.shape[2], width / images.shape[3])
            target = [
                max(side, round(length * scale))
                for side, length in zip((height, width), images.shape[2:], strict=True)
            ]
        if list(images.shape[2:]) != target:
            images = images_functional.resize(images, target, mode, antialias=True)
        images = images_functional.center_crop(images, [height, width])
        normalized: torch.Tensor = images_functional.normalize(
            images.float() / 255,
            list(preprocess["mean"]),
            list(preprocess["std"]),
        )
        return normalized


def load_teacher(
    model: str,
    pretrained: str = "",
    device: torch.device | str = "cpu",
    *,
    prompt: str = "a photo of a {class}",
    batch_size: int = 64,
) -> Teacher:
    """Load a frozen teacher.

    Parameters
    ----------
    model : str
        open_clip name, ``local-dir:PATH``, ``hf-hub:NAME`` or ``demo``.
    pretrained : str
        open_clip tag of the weights, for a model given by name.
    device : torch.device or str
        Device of the network.
    prompt : str
        Prompt of a class; ``{class}`` is replaced by the class name.
    batch_size : int
        Images in one forward pass.

    Returns
    -------
    Teacher

    Raises
    ------
    TeacherError
        If the name is unknown or the weights are not available; lists the places that
        were searched and the remedies.
    """
    name = f"{model} ({pretrained})" if pretrained else model
    facts = known_facts(model, pretrained)
    teacher = Teacher(
        lambda: _load_network(model, pretrained),
        name,
        device,
        prompt,
        batch_size,
        facts,
    )
    if facts is None:
        files = _files(model, pretrained)
        if files:
            note_facts(model, pretrained, files, teacher.network.facts)
    return teacher


def public_name(name: str) -> str:
    """Return a teacher's name without a path of this machine.

    Parameters
    ----------
    name : str
        `Teacher.name`.

    Returns
    -------
    str
        ``local-dir`` for a folder, ``MODEL (own weights)`` for a weight file; names of
        open_clip and of the hub unchanged.
    """
    if name.startswith(LOCAL_PREFIX):
        return LOCAL_PREFIX.removesuffix(":")
    model, separator, weights = name.partition(" (")
    if separator and not _TAG.fullmatch(weights.removesuffix(")")):
        return f"{model} (own weights)"
    return name


def _load_network(model: str, pretrained: str) -> Network:
    network = Network(
        *(load_demo_model() if model == DEMO else _load_open_clip(model, pretrained))
    )
    if network.preprocess["resize_mode"] not in ("shortest", "squash"):
        raise TeacherError(
            f"teacher.model = {model!r} wants resize mode "
            f"{network.preprocess['resize_mode']!r}; only 'shortest' and 'squash' are "
            "supported"
        )
    return network


def _files(model: str, pretrained: str) -> list[Path]:
    """Return the files from which a teacher was just loaded.

    Empty if they are unknown; the teacher is then loaded each time.
    """
    if model == DEMO:
        return [DATA_PATH, *weight_paths()]
    if model.startswith(LOCAL_PREFIX):
        folder = Path(model.removeprefix(LOCAL_PREFIX)).expanduser()
        return sorted(path for path in folder.iterdir() if path.is_file())
    if Path(pretrained).is_file():
        return [Path(pretrained).resolve()]
    from open_clip.pretrained import (
        download_pretrained,
        download_pretrained_from_hf,
        get_pretrained_cfg,
    )

    try:
        if model.startswith(HUB_PREFIX):
            name = model.removeprefix(HUB_PREFIX)
            found = [
                download_pretrained_from_hf(name),
                download_pretrained_from_hf(name, filename="open_clip_config.json"),
            ]
        else:
            config = get_pretrained_cfg(model.replace("/", "-"), pretrained)
            found = [download_pretrained(config)]
    # As in `_load_open_clip`; here it only means that nothing can be stored.
    except Exception:
        return []
    # The hub's cache links file names to contents.
    files = [Path(path).resolve() for path in found if path]
    return files if all(path.is_file() for path in files) else []


def _load_open_clip(
    model: str, pretrained: str
) -> tuple[nn.Module, Tokenizer, Mapping[str, Any]]:
    import open_clip

    by_name = not model.startswith((LOCAL_PREFIX, HUB_PREFIX))
    if by_name:
        _check_name(model, pretrained, open_clip.list_models(), open_clip)
    elif model.startswith(LOCAL_PREFIX):
        folder = Path(model.removeprefix(LOCAL_PREFIX)).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise TeacherError(
                f"teacher.model = {model!r}: {folder} has no open_clip_config.json; "
                "give the folder of an open_clip checkpoint (configuration and weights)"
            )
        model = f"{LOCAL_PREFIX}{folder}"
    try:
        with _root_handlers_kept():
            network = open_clip.create_model(
                model,
                pretrained=pretrained or None,
                require_pretrained=True,
                force_quick_gelu=by_name and _needs_quick_gelu(model, pretrained),
            )
            tokenizer = open_clip.get_tokenizer(model)
    # open_clip and the hub client raise anything from OSError to RuntimeError here,
    # and each of these errors means that there are no usable weights.
    except Exception as error:
        tag = f" with teacher.pretrained = {pretrained!r}" if pretrained else ""
        raise TeacherError(
            f"teacher.model = {model!r}{tag}: no usable weights "
            f"({type(error).__name__}: {error}). Looked in {_looked_in(model)} and, if "
            "there is a network, on the hub. Ways out: choose another model "
            "(teacher.model, teacher.pretrained); copy the checkpoint to this machine "
            'and set teacher.model="local-dir:/absolute/path"; or use the built-in '
            'teacher.model="demo"'
        ) from error
    return network, tokenizer, dict(network.visual.preprocess_cfg)


def _needs_quick_gelu(model: str, pretrained: str) -> bool:
    """Return whether a tag's weights were trained with CLIP's approximate GELU.

    OpenAI's were. With the exact GELU of the plain names, open_clip computes other
    features from them, and only warns.
    """
    from open_clip.pretrained import get_pretrained_cfg

    config = get_pretrained_cfg(model.replace("/", "-"), pretrained)
    return bool(config.get("quick_gelu", False))


@contextlib.contextmanager
def _root_handlers_kept() -> Iterator[None]:
    """Remove the root log handler that open_clip's logging calls install.

    With this handler, every line of Flower's own logger would be printed twice.
    """
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        yield
    finally:
        root.handlers[:] = handlers


def _looked_in(model: str) -> str:
    if model.startswith(LOCAL_PREFIX):
        return model.removeprefix(LOCAL_PREFIX)
    from huggingface_hub.constants import HF_HUB_CACHE

    return f"{HF_HUB_CACHE} and {os.path.expanduser('~/.cache/clip')}"


def _check_name(
    model: str, pretrained: str, known: Sequence[str], open_clip: Any
) -> None:
    if model not in known and model.replace("/", "-") not in known:
        close = difflib.get_close_matches(model, known, n=3)
        raise TeacherError(
            f"teacher.model = {model!r} is not an open_clip model"
            + (f"; did you mean {', '.join(close)}?" if close else "")
        )
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    if pretrained not in tags and not Path(pretrained).is_file():
        raise TeacherError(
            f"teacher.pretrained = {pretrained!r} is not a tag of {model}; choose one "
            f"of {', '.join(tags) or '(none is published)'}, or give a weight file"
        )


def _fingerprint(model: nn.Module, preprocess: Mapping[str, Any]) -> str:
    """Hash layers, weights and preprocessing.

    Layers without weights count too, since two activations may share all weights.
    """
    # A name gives open_clip's preprocessing as tuples, a folder's JSON as lists.
    described = sorted(
        (key, tuple(value) if isinstance(value, list) else value)
        for key, value in preprocess.items()
    )
    digest = hashlib.sha256(repr(described).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__name__}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()
