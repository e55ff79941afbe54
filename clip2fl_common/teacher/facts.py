"""Facts about a teacher, kept on disk and tied to the teacher's files.

Loading a teacher and hashing its weights takes seconds. In a deployment every message
starts a new process, which often needs only the fingerprint and the features that are
already on disk.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from logging import getLogger
from pathlib import Path
from typing import Any

from clip2fl_common.files import cache_dir, replacing_private

logger = getLogger(__name__)

# Part of the file's name: raise it when the content of the file changes. Format 1 could
# contain a scale that was computed on a GPU; format 2 knew no activations.
FORMAT = 3


@dataclass(frozen=True)
class TeacherFacts:
    """Facts that identify a teacher.

    Attributes
    ----------
    fingerprint : str
        Hash of layers, weights and preprocessing.
    logit_scale : float
        Factor of the cosine between image and text.
    """

    fingerprint: str
    logit_scale: float


def known_facts(model: str, pretrained: str) -> TeacherFacts | None:
    """Return the stored facts of a teacher whose files have not changed.

    Parameters
    ----------
    model, pretrained : str
        As for `clip2fl_common.teacher.load_teacher`.

    Returns
    -------
    TeacherFacts or None
        None if nothing is stored, or if the path, size or change time of a file
        differs.
    """
    try:
        document = json.loads(_place(model, pretrained).read_text("utf-8"))
        if document["files"] != [_state(Path(file[0])) for file in document["files"]]:
            return None
        return TeacherFacts(**document["facts"])
    # If the file is absent or damaged, the facts are stored again.
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def note_facts(
    model: str, pretrained: str, files: Sequence[Path], facts: TeacherFacts
) -> None:
    """Store a teacher's facts with the state of the files they were taken from."""
    place = _place(model, pretrained)
    document = {"files": [_state(path) for path in files], "facts": asdict(facts)}
    try:
        with replacing_private(place) as file:
            file.write(json.dumps(document).encode())
    except OSError as error:
        logger.warning(
            "cannot note the teacher's fingerprint in %s (%s); the teacher is loaded "
            "for every message. Make room there or set CLIP2FL_CACHE_DIR.",
            place.parent,
            error,
        )


def _place(model: str, pretrained: str) -> Path:
    """Return the file for a teacher and the installed version of open_clip.

    Another version of open_clip may build another network from the same weights.
    """
    try:
        library = version("open_clip_torch")
    except PackageNotFoundError:
        library = "unknown"
    key = f"{FORMAT}\0{model}\0{pretrained}\0{library}".encode()
    name = hashlib.blake2b(key, digest_size=16).hexdigest()
    return cache_dir() / "teachers" / f"{name}.json"


def _state(path: Path) -> list[Any]:
    facts = path.stat()
    # A change of content always changes the last of these values.
    return [str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
