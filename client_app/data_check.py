"""Check a node's images before it takes part: which are used, which not, and why.

The check reads one image at a time. It escapes all characters in
names from the disk that do not print as themselves.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client_app.preflight import Finding
from clip2fl_common.data.image_files import (
    DatasetError,
    Listing,
    class_name,
    images_below,
    is_folder,
    look_into,
    name_faults,
)
from clip2fl_common.data.image_formats import IMAGE_SUFFIXES, missing_decoder, suffix_of
from clip2fl_common.data.image_reading import UnreadableImageError, read_picture
from clip2fl_common.shown import listed, shown

# Number of unreadable images that are named.
NAMED = 20
# Number of examples of other findings.
EXAMPLES = 3
INDENT = f"\n{'':<22}"


def count_images(folder: Path) -> int:
    """Return the number of images in class folders; 0 if they cannot be listed."""
    try:
        return sum(len(look_into(p).images) for p in look_into(folder).folders)
    except DatasetError:
        return 0  # check_data reports the reason


def check_data(
    folder: Path,
    known: Sequence[str],
    image_size: int,
    skip_unreadable: bool,
    validation_share: float,
) -> Iterator[Finding]:
    """Yield the findings about the images ``<class>/<image>`` in a folder.

    Parameters
    ----------
    folder : Path
        The node's data-path.
    known : sequence of str
        The run's classes.
    image_size : int
        Side in pixels to which images are scaled.
    skip_unreadable : bool
        Whether the run skips unreadable images.
    validation_share : float
        Share of the images that serve validation.

    Yields
    ------
    Finding
        Contains names from the disk: for the site's staff, not for the server.
    """
    if not is_folder(folder):
        yield Finding(
            "problem",
            "data",
            f"{shown(folder)} is not a folder",
            "mount the images there, or correct data-path",
        )
        return
    try:
        top = look_into(folder)
    except DatasetError as error:
        yield _not_listed(error)
        return
    yield from _check_classes(top, known)
    read = _Read()
    listings = [top]
    for place in top.folders:
        name = class_name(place.name)
        if name not in known:
            continue
        try:
            listing = look_into(place)
        except DatasetError as error:
            yield _not_listed(error)
            continue
        listings.append(listing)
        for path in listing.images:
            read.add(name, path, folder, image_size)
    yield from read.findings(folder, known, skip_unreadable)
    yield from _check_division(read.paths, validation_share)
    yield from _ignored(folder, listings)


@dataclass
class _Read:
    """The result of reading images.

    Attributes
    ----------
    paths : list of Path
        Good images.
    counts, kinds : Counter
        Good images by class, and by the kind of file.
    scaled : set of str
        Kinds of file with values of more than 8 bits.
    several : list of str
        Files that hold several pictures.
    unreadable : list of str
        Files that cannot be read, with the reasons.
    """

    paths: list[Path] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    scaled: set[str] = field(default_factory=set)
    several: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def add(self, name: str, path: Path, folder: Path, image_size: int) -> None:
        """Read one image of a class."""
        within = shown(path.relative_to(folder))
        try:
            picture = read_picture(path, image_size)
        except UnreadableImageError as error:
            self.unreadable.append(f"{within}: {error.reason}")
            return
        self.paths.append(path)
        self.counts[name] += 1
        self.kinds[picture.kind] += 1
        if picture.scaled:
            self.scaled.add(picture.kind)
        if picture.several:
            self.several.append(within)

    def findings(
        self, folder: Path, known: Sequence[str], skip_unreadable: bool
    ) -> Iterator[Finding]:
        """Yield the findings about the images read so far."""
        total = sum(self.counts.values())
        if total:
            by_class = [f"{n} {self.counts[n]}" for n in known if self.counts[n]]
            yield Finding(
                "ok",
                "data",
                f"{total} images in {shown(folder)}: {', '.join(by_class)}",
            )
            kinds = [
                f"{kind}: {n}{', scaled to 8 bit' if kind in self.scaled else ''}"
                for kind, n in self.kinds.most_common()
            ]
            yield Finding("ok", "kinds", "; ".join(kinds))
        else:
            yield Finding(
                "problem",
                "data",
                f"no readable image in a class folder of {shown(folder)}",
                f"put images into <class>/<image> ({', '.join(IMAGE_SUFFIXES)})",
            )
        if self.several:
            yield Finding(
                "warning",
                "pictures",
                f"{_files(len(self.several))} several pictures (pages, an animation), "
                f"for example {listed(self.several, EXAMPLES)}",
                "nothing, if the first picture of each is right: only it is used",
            )
        if self.unreadable:
            yield self._unreadable(total, skip_unreadable)

    def _unreadable(self, total: int, skip_unreadable: bool) -> Finding:
        more = len(self.unreadable) - NAMED
        named = "".join(INDENT + line for line in self.unreadable[:NAMED])
        return Finding(
            "warning" if skip_unreadable else "problem",
            "images",
            f"{len(self.unreadable)} of {total + len(self.unreadable)} cannot be read"
            + named
            + (f"{INDENT}and {more} more" if more > 0 else ""),
            "repair, convert or remove them"
            + (
                "; the run leaves them out"
                if skip_unreadable
                else ", or run with dataset.skip-unreadable=true"
            ),
        )


def _check_division(paths: Sequence[Path], share: float) -> Iterator[Finding]:
    """Yield what is wrong with the division into training and validation images."""
    if not paths:
        return  # reported already
    # Imported here, because it imports torch, which takes seconds.
    from clip2fl_common.data.datasets import validating

    count = int(validating(paths, share).sum())
    if count == len(paths):
        yield Finding(
            "problem",
            "division",
            f"all {count} readable images serve validation, none training "
            f"(validation share {share:g})",
            "add images, or lower validation-share in the site's policy or "
            "dataset.validation-share",
        )
    elif count == 0:
        yield Finding(
            "warning",
            "division",
            f"none of {len(paths)} readable images serves validation (validation share "
            f"{share:g}), so this site cannot evaluate models",
            "nothing, if other sites evaluate; else add images or raise the share",
        )


def _check_classes(top: Listing, known: Sequence[str]) -> Iterator[Finding]:
    """Yield the faults in the names of the class folders."""
    for fault in name_faults(top.folders):
        yield Finding("problem", "classes", fault, "rename or merge the folders")
    unknown = [p.name for p in top.folders if class_name(p.name) not in known]
    if unknown:
        yield Finding(
            "problem",
            "classes",
            f"folders that are no class of the run: {listed(unknown, NAMED)}; "
            f"known: {', '.join(known)}",
            "rename or move them, or have them added to dataset.class-names",
        )


def _ignored(folder: Path, listings: Sequence[Listing]) -> Iterator[Finding]:
    """Yield the entries of the folders that are not used, grouped by reason."""
    top, *classes = listings
    if top.images:
        yield Finding(
            "warning",
            "images",
            f"{len(top.images)} images lie beside the class folders, for example "
            f"{listed((p.name for p in top.images), EXAMPLES)}",
            "move them into the folder of their class",
        )
    nested = [(place, images_below(place)) for c in classes for place in c.folders]
    if nested:
        places = [f"{place.relative_to(folder)} ({n} images)" for place, n in nested]
        yield Finding(
            "warning",
            "images",
            f"{len(nested)} folders in class folders, with "
            f"{sum(n for _, n in nested)} images: {listed(places, NAMED)}",
            "move the images up into the folder of their class",
        )
    missing = Counter(
        (suffix_of(path.name), missing_decoder(suffix_of(path.name)))
        for listing in classes
        for path in listing.not_decoded
    )
    for (suffix, fix), count in missing.items():
        yield Finding(
            "warning",
            "images",
            f"{count} {suffix} images, which the Pillow of this machine cannot read",
            fix,
        )
    special = [
        f"{path.relative_to(folder)} ({kind})"
        for listing in listings
        for path, kind in listing.special
    ]
    if special:
        yield Finding(
            "warning",
            "images",
            f"{len(special)} entries are no files: {listed(special, NAMED)}",
            "remove them",
        )
    others = [path for listing in listings for path in listing.other]
    if others:
        suffixes = Counter(suffix_of(path.name) for path in others)
        kinds = (f"{s or 'no suffix'} {n}" for s, n in suffixes.most_common())
        yield Finding(
            "warning",
            "images",
            f"{_files(len(others))} no suffix of an image: {listed(kinds, NAMED)}; "
            f"for example {listed((path.name for path in others), EXAMPLES)}",
            "nothing, if they are not images: the suffix decides what is an image",
        )
    system = [path.name for listing in listings for path in listing.system]
    if system:
        yield Finding(
            "ok",
            "system",
            f"{len(system)} hidden entries or entries of an operating system: "
            f"{listed(dict.fromkeys(system), EXAMPLES)}",
        )


def _files(count: int) -> str:
    return "1 file has" if count == 1 else f"{count} files have"


def _not_listed(error: DatasetError) -> Finding:
    return Finding("problem", "data", str(error), "give that user the right to read it")
