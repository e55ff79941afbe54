"""Image files in class folders: listing them, and which of them are used.

This module needs no torch, so that checking a folder is fast and takes little memory.
"""

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path

from clip2fl_common.data.image_formats import IMAGE_SUFFIXES, missing_decoder, suffix_of
from clip2fl_common.data.regular_files import kind_of_file
from clip2fl_common.limits import MAX_NAME_LENGTH
from clip2fl_common.shown import listed, shown

logger = getLogger(__name__)

# Files that operating systems and archive programs leave behind; none is an image.
SYSTEM_NAMES = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "lost+found",
    "$recycle.bin",
    "system volume information",
    "@eadir",
}
FOLDER = "a folder"
# The other half of a file that a Mac wrote to a foreign disk; it has its suffix.
APPLE_DOUBLE = "._"
# Invisible characters that Unicode counts as letters, symbols or marks.
_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
# Zero-width (non-)joiners, which Persian, Hindi and other scripts are written with.
_JOINERS = "\u200c\u200d"
# Control, format (zero width, direction), surrogate (an undecodable byte), line ends.
_REFUSED_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class DatasetError(ValueError):
    """The images are missing, or do not match the configuration.

    Parameters
    ----------
    message : str
        Message with the names of folders and files, for people at the site.
    summary : str
        The message without names from the disk, for everybody else.
    """

    def __init__(self, message: str, summary: str = "the images are not usable"):
        super().__init__(message)
        self.summary = summary


def class_name(text: str) -> str:
    """Return the name of a folder or a list as the teacher's prompt contains it.

    Systems encode accents in two ways; both give the same name.
    """
    return unicodedata.normalize("NFC", text.strip()).replace("_", " ")


@dataclass
class Listing:
    """The entries of a folder by their kind, each list sorted by name.

    Attributes
    ----------
    images : list of Path
        Images by their suffix. This includes files that cannot be opened, such as
        broken links: they are reported, not ignored.
    folders : list of Path
        Folders and links to them.
    not_decoded : list of Path
        Images of a format that this machine cannot read.
    special : list of (Path, str)
        Pipes, devices and sockets, with the kind of each.
    other : list of Path
        Files without an image suffix.
    system : list of Path
        Hidden files, and files that an operating system left behind.
    """

    images: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    not_decoded: list[Path] = field(default_factory=list)
    special: list[tuple[Path, str]] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)
    system: list[Path] = field(default_factory=list)

    def add(self, path: Path, kind: str) -> None:
        """Add an entry; ``kind`` is empty for a file."""
        suffix = suffix_of(path.name)
        is_image = suffix in IMAGE_SUFFIXES and not path.name.startswith(APPLE_DOUBLE)
        if path.name.lower() in SYSTEM_NAMES or (
            path.name.startswith(".") and (kind == FOLDER or not is_image)
        ):
            self.system.append(path)
        elif kind == FOLDER:
            self.folders.append(path)
        elif kind:
            self.special.append((path, kind))
        elif not is_image:
            self.other.append(path)
        elif missing_decoder(suffix):
            self.not_decoded.append(path)
        else:
            self.images.append(path)


def look_into(folder: Path) -> Listing:
    """List a folder's entries by kind, without opening them.

    Raises
    ------
    DatasetError
        If the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: _kind(entry) for entry in entries}
    except OSError as error:
        raise DatasetError(
            f"{shown(folder)} cannot be listed ({error.strerror}); let the user with "
            f"the id {os.getuid()} read it",
            "a folder cannot be listed",
        ) from None
    listing = Listing()
    for name in sorted(kinds):
        listing.add(folder / name, kinds[name])
    return listing


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry or of its link's target; empty for a file."""
    try:
        if entry.is_file():
            return ""
        return kind_of_file(entry.stat().st_mode)
    except OSError:
        return ""  # for example a broken link, which opening the file reports


def class_folders(folder: Path) -> list[tuple[str, Path]]:
    """Return the class folders in a folder with their classes, sorted by folder name.

    The order is that of composed names: whether a disk spells an accent as a part of
    its letter or after it must not number the classes.

    Returns
    -------
    list of tuple of str and Path
        Class names, each once, and folders.

    Raises
    ------
    DatasetError
        If two folders are the same class, a name has characters that cannot be seen,
        or the folder cannot be listed.
    """
    folders = look_into(folder).folders
    if faults := list(name_faults(folders)):
        raise DatasetError(
            f"{shown(folder)}: {'; '.join(faults)}. Rename or merge the folders",
            f"{len(faults)} names of class folders are not usable",
        )
    return [
        (class_name(place.name), place)
        for place in sorted(folders, key=lambda folder: _composed(folder.name))
    ]


def name_faults(folders: Sequence[Path]) -> Iterator[str]:
    """Yield the problems of the names of class folders, in words."""
    same: dict[str, list[Path]] = defaultdict(list)
    for place in folders:
        same[without_joiners(class_name(place.name))].append(place)
        if fault := name_fault(place.name):
            yield f"the folder '{shown(place.name)}' has {fault}"
    for name, places in same.items():
        if places[1:]:
            yield (
                f"the folders {' and '.join(_distinct(p.name) for p in places)} are "
                f"the same class '{shown(name)}'"
            )


def name_fault(name: str) -> str | None:
    """Return what a class's name has that it must not have, in words; None if fine."""
    if hidden := [c for c in name if cannot_be_seen(c)]:
        codes = listed(_code(c) for c in hidden)
        return f"a character in its name that cannot be seen or read ({codes})"
    if len(name) > MAX_NAME_LENGTH:
        return f"a name of more than {MAX_NAME_LENGTH} characters"
    return None


def without_joiners(name: str) -> str:
    """Return a name without zero-width joiners: equal ones look the same."""
    return name.translate(dict.fromkeys(map(ord, _JOINERS)))


def cannot_be_seen(character: str) -> bool:
    """Return whether a class's name must not have a character, as nobody sees it."""
    if character in _JOINERS:
        return False
    category = unicodedata.category(character)
    return category in _REFUSED_CATEGORIES or character in _INVISIBLE


def _code(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"byte 0x{ord(character) - 0xDC00:02x}, no UTF-8"
    return f"U+{ord(character):04X}"


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _distinct(name: str) -> str:
    """Return a name in quotes, with its accents' spelling where there are two."""
    composed = _composed(name)
    if composed == unicodedata.normalize("NFD", name):
        return f"'{shown(name)}'"
    return f"'{shown(name)}' ({'composed' if name == composed else 'split'} accents)"


def site_files(folder: Path, known: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the images ``<class>/<image>`` of a site and their classes.

    Parameters
    ----------
    folder : Path
        The site's own folder; it may contain any of the classes.
    known : sequence of str
        The run's classes.

    Returns
    -------
    list of tuple of Path and int
        File and class, ordered by both.

    Raises
    ------
    DatasetError
        If the folder is missing, has no image, or contains a folder that is no class.
    """
    if not is_folder(folder):
        raise DatasetError(
            f"data-path = {shown(folder)} is not a folder that this node can see; it "
            "must hold <class>/<image>",
            "the data folder is not there",
        )
    labels = {name: label for label, name in enumerate(known)}
    folders = class_folders(folder)
    if unknown := [place.name for name, place in folders if name not in labels]:
        raise DatasetError(
            f"{shown(folder)} has folders that are no class of the run: "
            f"{listed(unknown, most=20)}; known classes: {', '.join(known)}. Rename or "
            "move them, or add them to dataset.class-names",
            "some of its folders are no class of the run",
        )
    found = labelled_images((labels[name], place) for name, place in folders)
    if not found:
        raise DatasetError(
            f"{shown(folder)} has no image in a class folder; it must hold "
            f"<class>/<image> ({', '.join(IMAGE_SUFFIXES)}), with classes from "
            f"{', '.join(known)}",
            "the data folder has no image",
        )
    return found


def labelled_images(folders: Iterable[tuple[int, Path]]) -> list[tuple[Path, int]]:
    """Return the images of class folders; warn of files that are not used.

    Parameters
    ----------
    folders : iterable of tuple of int and Path
        Classes and their folders.

    Returns
    -------
    list of tuple of Path and int
        File and class, ordered by class, then name.

    Raises
    ------
    DatasetError
        If a folder cannot be listed.
    """
    found: list[tuple[int, Path]] = []
    special: list[str] = []
    not_decoded: list[Path] = []
    for label, folder in folders:
        listing = look_into(folder)
        found += [(label, path) for path in listing.images]
        special += [f"{path} ({kind})" for path, kind in listing.special]
        not_decoded += listing.not_decoded
    if special:
        logger.warning("ignored, as they are no files: %s", listed(special))
    if not_decoded:
        logger.warning(
            "%d images are ignored, as this machine cannot read their format: %s; %s",
            len(not_decoded),
            listed(not_decoded),
            missing_decoder(suffix_of(not_decoded[0].name)),
        )
    found.sort(key=lambda image: (image[0], _composed(image[1].name)))
    return [(path, label) for label, path in found]


def images_below(folder: Path) -> int:
    """Count the images in a folder and the folders below it; links are not followed."""
    return sum(
        suffix_of(name) in IMAGE_SUFFIXES and not name.startswith(APPLE_DOUBLE)
        for _, _, names in os.walk(folder)
        for name in names
    )


def is_folder(path: Path) -> bool:
    """Tell whether a path is a folder that can be seen, or a link to one."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False
