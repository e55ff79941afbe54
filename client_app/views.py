"""Views: a fixed set of augmented pictures of each image, for consistent distillation.

Beyer et al. (2022, "Knowledge distillation: A good teacher is patient and consistent")
show the teacher the same augmented picture as the student. A teacher pass in each step
would be too slow here. So each image has K views, of which each epoch takes one. The
teacher sees each view once, and its features are stored.

A view depends only on the image's content, the number of the view and the kind. So it
is made again whenever it is needed, and clients, partitions and runs share its
features.
"""

import hashlib
import time
from dataclasses import dataclass
from logging import getLogger

import numpy as np
import torch
from torch.nn import functional

from client_app.augmentation import FLIP_PROBABILITY, crop_flip
from client_app.training import PixelImages
from clip2fl_common.config.types import ViewKind
from clip2fl_common.teacher import Teacher
from clip2fl_common.teacher.feature_cache import content_keys

# Flower's log shows the lines of a client at this level, other logs only warnings.
log = getLogger("flwr")
# A pass over views that takes longer is logged, and its progress once a minute.
LONG_S = 10.0
LOG_EVERY_S = 60.0

LEAST_AREA = 0.35
MAX_ASPECT = 4 / 3
MAX_COLOUR_CHANGE = 0.4
# Random numbers of one view; 64 bytes are the longest hash of BLAKE2b.
NUMBERS = 8


@dataclass(frozen=True)
class ViewRecipe:
    """How views are made.

    Attributes
    ----------
    number : int
        K, the number of views of each image.
    kind : str
        crop-flip or resized-crop.
    padding : int
        crop-flip: black pixels around an image before its crop.
    """

    number: int
    kind: ViewKind
    padding: int


def view_numbers(keys: list[bytes], views: list[int], kind: ViewKind) -> torch.Tensor:
    """Return the random numbers of views, which are a hash of image, view and kind.

    Parameters
    ----------
    keys : list of bytes, length n
        Keys of the images' content (`content_keys`).
    views : list of int, length n
        Number of the view of each image, from 0.
    kind : str
        Kind of view.

    Returns
    -------
    Tensor of float64, shape [n, 8]
        Numbers from 0 to below 1.
    """
    hashes = b"".join(
        hashlib.blake2b(key + view.to_bytes(4, "little"), person=kind.encode()).digest()
        for key, view in zip(keys, views, strict=True)
    )
    # The upper 53 bits are a float64's precision.
    bits = np.frombuffer(hashes, dtype="<u8").reshape(-1, NUMBERS) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def make_views(
    pixels: torch.Tensor, numbers: torch.Tensor, recipe: ViewRecipe
) -> torch.Tensor:
    """Return one view of each image.

    Each view is the same whatever other images are in the batch.

    Parameters
    ----------
    pixels : Tensor of uint8, shape [n, 3, H, W]
        RGB images.
    numbers : Tensor of float64, shape [n, 8]
        Random numbers of the views (`view_numbers`), on the CPU.
    recipe : ViewRecipe
        How views are made.

    Returns
    -------
    Tensor of uint8, shape [n, 3, H, W]
        On the device of the images.
    """
    if recipe.kind == "resized-crop":
        return _jitter(_resized_crop(pixels, numbers), numbers).to(torch.uint8)
    top, left = (numbers[:, :2] * (2 * recipe.padding + 1)).long().unbind(dim=1)
    mirrored = numbers[:, 2] < FLIP_PROBABILITY
    return crop_flip(pixels, recipe.padding, top, left, mirrored)


def _resized_crop(pixels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Cut a rectangle from each image, scale it to the image's size, maybe mirror it.

    Returns
    -------
    Tensor of float32, shape [n, 3, H, W]
        Grey levels from 0 to 255, interpolated linearly.
    """
    height, width = pixels.shape[2:]
    area = LEAST_AREA + (1 - LEAST_AREA) * numbers[:, 0]
    aspect = MAX_ASPECT ** (2 * numbers[:, 1] - 1)
    wide, high = (
        (share.sqrt().clamp(max=1)) for share in (area * aspect, area / aspect)
    )
    columns = (torch.arange(width) + 0.5) / width
    columns = torch.where(
        numbers[:, 4, None] < FLIP_PROBABILITY, columns.flip(0), columns
    )
    rows = (torch.arange(height) + 0.5) / height
    # Shares of the image's sides: the corner, and the way from there.
    x = ((1 - wide) * numbers[:, 2])[:, None] + columns * wide[:, None]
    y = ((1 - high) * numbers[:, 3])[:, None] + rows * high[:, None]
    shape = len(pixels), height, width
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], 3)
    return functional.grid_sample(
        pixels.float(),
        (2 * grid - 1).to(pixels.device, torch.float32),
        padding_mode="border",
        align_corners=False,
    )


def _jitter(levels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Scale brightness, then contrast, then saturation of each image by 0.6 to 1.4.

    Parameters and result are grey levels [n, 3, H, W] from 0 to 255; the result is
    rounded.
    """
    factors = 1 + MAX_COLOUR_CHANGE * (2 * numbers[:, 5:8, None, None, None] - 1)
    brightness, contrast, saturation = factors.to(levels.device, torch.float32).unbind(
        1
    )
    # Sums of whole numbers are exact, so that they do not depend on the batch.
    levels = (levels * brightness).clamp(0, 255).round()
    mean = levels.double().mean(dim=(1, 2, 3), keepdim=True).float()
    levels = ((levels - mean) * contrast + mean).clamp(0, 255)
    grey = ((levels[:, 0] + levels[:, 1] + levels[:, 2]) / 3)[:, None]
    return ((levels - grey) * saturation + grey).clamp(0, 255).round()


@dataclass(frozen=True)
class ChosenViews:
    """The views on which a client trains in one round: one of each image an epoch.

    Attributes
    ----------
    images : PixelImages, N of them
        The client's images.
    recipe : ViewRecipe
        How views are made.
    places : Tensor of int64, shape [V]
        Image of each of the V different views that the round takes.
    numbers : Tensor of float64, shape [V, 8]
        Random numbers of these views.
    rows : Tensor of int64, shape [epochs, N]
        Which of the V views each epoch takes of each image.
    logits : Tensor, shape [V, C]
        The teacher's logits of the views, on the images' device.
    """

    images: PixelImages
    recipe: ViewRecipe
    places: torch.Tensor
    numbers: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor

    def batch(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an epoch's views of some images, with the teacher's logits.

        Parameters
        ----------
        epoch : int
            Epoch, from 0.
        indices : Tensor of int64, shape [n]
            Images, on the CPU.

        Returns
        -------
        tuple of Tensor
            Normalised pictures [n, 3, H, W] and logits [n, C], on the images' device.
        """
        rows = self.rows[epoch, indices]
        images = self.images
        pictures = _pictures(images, self.places[rows], self.numbers[rows], self.recipe)
        normalised = images.normalize(pictures.to(images.device))
        return normalised, self.logits[rows.to(self.logits.device)]


def choose_views(
    images: PixelImages,
    recipe: ViewRecipe,
    epochs: int,
    generator: torch.Generator,
    teacher: Teacher,
    prototypes: torch.Tensor,
) -> ChosenViews:
    """Choose a view of each image for each epoch, and show them to the teacher.

    Only views that the round takes are made, so the teacher's passes are spread over
    the rounds. It sees each view once in all rounds. Features are stored after each
    batch, so that a client that is killed loses at most one batch.

    Parameters
    ----------
    images : PixelImages, N of them
        The client's images.
    recipe : ViewRecipe
        How views are made; the number is above 0.
    epochs : int
        Passes over the images in this round.
    generator : torch.Generator
        CPU generator of the choice.
    teacher : Teacher
        The teacher.
    prototypes : Tensor, shape [C, d]
        Its unit text features of the classes.

    Returns
    -------
    ChosenViews
    """
    choice = torch.randint(recipe.number, (epochs, len(images)), generator=generator)
    different, rows = torch.unique(
        torch.arange(len(images)) * recipe.number + choice, return_inverse=True
    )
    places, views = different // recipe.number, different % recipe.number
    keys = content_keys(images.pixels)
    numbers = view_numbers(
        [keys[place] for place in places.tolist()], views.tolist(), recipe.kind
    )
    # In batches that do not depend on what is stored, so that the last digits do not.
    logits = []
    progress = _Progress(teacher.name, len(different))
    for batch in torch.arange(len(different)).split(teacher.batch_size):
        features = teacher.cached_image_features(
            _pictures(images, places[batch], numbers[batch], recipe)
        )
        logits.append(teacher.logit_scale * features @ prototypes.T)
        progress.note(int(batch[-1]) + 1)
    return ChosenViews(
        images, recipe, places, numbers, rows, torch.cat(logits).to(images.device)
    )


class _Progress:
    """Log how long the teacher's pass over views takes, if it is long."""

    def __init__(self, teacher: str, total: int) -> None:
        self._teacher, self._total = teacher, total
        self._started = self._logged = 0.0
        self._first = 0
        self._announced = False

    def note(self, done: int) -> None:
        """Log an estimate once two batches are done, and the progress each minute."""
        now = time.monotonic()
        if not self._first:
            # The first batch may load the teacher, so that it tells too much.
            self._started, self._first = now, done
            return
        left = self._total - done
        seconds = (now - self._started) / (done - self._first) * left
        if self._announced and now - self._logged >= LOG_EVERY_S:
            text = "teacher %s: %d of %d views done; at most about %.0f s to go"
            log.info(text, self._teacher, done, self._total, seconds)
            self._logged = now
        elif not self._announced and seconds >= LONG_S:
            text = "teacher %s looks at %d views, once; this takes at most about %.0f s"
            log.info(text, self._teacher, self._total, seconds)
            self._announced, self._logged = True, now


def _pictures(
    images: PixelImages,
    places: torch.Tensor,
    numbers: torch.Tensor,
    recipe: ViewRecipe,
) -> torch.Tensor:
    """Return views [n, 3, H, W], uint8, of the images at these places [n]."""
    chosen = images.pixels[places.to(images.pixels.device)]
    return make_views(chosen, numbers, recipe)
