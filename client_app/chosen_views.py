"""Choose a round's views, and get the teacher's logits of the same pictures."""

import time
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING

import torch

from client_app.mixing import mix_shares, mix_views, partners
from client_app.training import PixelImages
from client_app.views import ViewRecipe, make_views, view_numbers
from clip2fl_common.teacher import Teacher
from clip2fl_common.teacher.feature_cache import content_keys

if TYPE_CHECKING:  # the mathematics needs no package of the configuration
    from clip2fl_common.config.types import ViewKind, ViewMix

# Flower's log shows the lines of a client at this level, other logs only warnings.
log = getLogger("flwr")
# A pass over views that takes longer is logged, and its progress once a minute.
LONG_S = 10.0
LOG_EVERY_S = 60.0
# Bytes of pictures that are made before the teacher looks at them. A round with no more
# keeps them for the training.
KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Mixing:
    """What is mixed into each of V views: the same view of another image.

    Attributes
    ----------
    places : Tensor of int64, shape [V]
        The other image.
    numbers : Tensor of float64, shape [V, 8]
        Random numbers of its view.
    chances : Tensor of float64, shape [V, 8]
        Random numbers of the mixing.
    shares : Tensor of float32, shape [V]
        Share of the first image in the mixed picture.
    """

    places: torch.Tensor
    numbers: torch.Tensor
    chances: torch.Tensor
    shares: torch.Tensor


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
    mixing : Mixing or None
        What is mixed into them.
    pictures : Tensor of uint8, shape [V, 3, H, W], or None
        The views, on the device of the images' pixels. None where they are so large
        that each batch makes them again.
    """

    images: PixelImages
    recipe: ViewRecipe
    places: torch.Tensor
    numbers: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor
    mixing: Mixing | None = None
    pictures: torch.Tensor | None = None

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
        if self.pictures is None:
            pictures = _pictures(
                images, self.recipe, self.places, self.numbers, self.mixing, rows
            )
        else:
            pictures = self.pictures[rows.to(self.pictures.device)]
        normalised = images.normalize(pictures.to(images.device))
        return normalised, self.logits[rows.to(self.logits.device)]

    def mixture(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what an epoch's views of some images are mixed with.

        Parameters
        ----------
        epoch : int
            Epoch, from 0.
        indices : Tensor of int64, shape [n]
            Images, on the CPU.

        Returns
        -------
        tuple of Tensor, or None
            Other images [n] and shares of the first images [n], on the images' device.
            None where views are not mixed.
        """
        if self.mixing is None:
            return None
        rows, device = self.rows[epoch, indices], self.images.device
        return self.mixing.places[rows].to(device), self.mixing.shares[rows].to(device)


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
    numbers = _numbers(keys, places, views, recipe.kind)
    mixing = (
        None if recipe.mix == "none" else _mixing(images, keys, places, views, recipe)
    )
    progress = _Progress(teacher.name, len(different))

    def seen(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pictures in these rows, and the teacher's features of them."""
        pictures = images.pixels.new_empty(len(rows), *images.pixels.shape[1:])
        for part, made in zip(
            rows.split(teacher.batch_size),
            pictures.split(teacher.batch_size),
            strict=True,
        ):
            made[:] = _pictures(images, recipe, places, numbers, mixing, part)

        def missing(at: list[int]) -> torch.Tensor:
            progress.note(int(rows[at[0]]))
            return pictures[at]

        return pictures, teacher.cached_features(content_keys(pictures), missing)

    batch_bytes = images.pixels[:1].nbytes * teacher.batch_size
    at_once = max(1, KEPT_BYTES // batch_bytes) * teacher.batch_size
    logits = []
    for rows_at_once in torch.arange(len(different)).split(at_once):
        pictures, features = seen(rows_at_once)
        # In batches that do not depend on the memory, so that the last digits do not.
        logits += [
            teacher.logit_scale * part @ prototypes.T
            for part in features.split(teacher.batch_size)
        ]
    return ChosenViews(
        images,
        recipe,
        places,
        numbers,
        rows,
        torch.cat(logits).to(images.device),
        mixing,
        pictures if len(different) <= at_once else None,
    )


def _numbers(
    keys: list[bytes],
    places: torch.Tensor,
    views: torch.Tensor,
    kind: "ViewKind | ViewMix",
) -> torch.Tensor:
    """Return the random numbers [V, 8] of views [V] of the images at places [V]."""
    return view_numbers(
        [keys[place] for place in places.tolist()], views.tolist(), kind
    )


def _mixing(
    images: PixelImages,
    keys: list[bytes],
    places: torch.Tensor,
    views: torch.Tensor,
    recipe: ViewRecipe,
) -> Mixing:
    """Return what is mixed into views [V] of the images at places [V]."""
    others = torch.tensor(partners(keys, places.tolist(), views.tolist()))
    chances = _numbers(keys, places, views, recipe.mix)
    height, width = images.pixels.shape[2:]
    return Mixing(
        others,
        _numbers(keys, others, views, recipe.kind),
        chances,
        mix_shares(chances, recipe.mix, height, width),
    )


class _Progress:
    """Log how long the teacher's pass over views takes, if it is long."""

    def __init__(self, teacher: str, total: int) -> None:
        self._teacher, self._total = teacher, total
        self._started = self._logged = 0.0
        self._first = self._batches = 0
        self._announced = False

    def note(self, done: int) -> None:
        """Log an estimate before the third batch, and the progress each minute.

        The first batch may load the teacher, so that it tells too much.
        """
        now = time.monotonic()
        self._batches += 1
        if self._batches <= 2:
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
    recipe: ViewRecipe,
    places: torch.Tensor,
    numbers: torch.Tensor,
    mixing: Mixing | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Return the views [n, 3, H, W], uint8, in these rows [n] of places and numbers."""

    def unmixed(places: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        chosen = images.pixels[places[rows].to(images.pixels.device)]
        return make_views(chosen, numbers[rows], recipe)

    pictures = unmixed(places, numbers)
    if mixing is None:
        return pictures
    others = unmixed(mixing.places, mixing.numbers)
    return mix_views(pictures, others, mixing.chances[rows], recipe.mix)
