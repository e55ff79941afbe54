"""The newest run of a folder of runs, for a page that stays while runs come and go."""

from datetime import datetime
from pathlib import Path
from typing import Any

from clip2fl_cli.live import RunWatch, Status
from clip2fl_common.shown import shown
from server_app.file_names import CONFIG
from server_app.foreign_files import ForeignFileError


class NewestRun:
    """Look at the newest run of a folder again and again, as `RunWatch` at one run.

    The newest run is the one that started or resumed last: it then writes its
    ``config.json``.

    Parameters
    ----------
    folder : Path
        Folder of the runs' folders. It may be missing until the first run starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: Path | None = None
        self._watch: RunWatch | None = None

    def look(self, now: datetime | None = None) -> Status:
        """Return the newest run's state: `RunWatch.look`.

        Raises
        ------
        ForeignFileError
            If there is no run yet, and as `RunWatch.look` does.
        """
        found = _newest(self._folder)
        if found is None:
            raise ForeignFileError(f"{shown(self._folder)} has no run yet")
        if self._watch is None or found != self._run:
            self._run, self._watch = found, RunWatch(found)
        return self._watch.look(now)

    def curves(self) -> dict[str, dict[str, Any]]:
        """Return `RunWatch.curves` of the run at the last look."""
        return {} if self._watch is None else self._watch.curves()

    def log_tail(self) -> list[str]:
        """Return `RunWatch.log_tail` of the run at the last look."""
        return [] if self._watch is None else self._watch.log_tail()


def _newest(folder: Path) -> Path | None:
    started: list[tuple[int, Path]] = []
    # Not through links, which could lead to another user's folders.
    for config in folder.glob(f"*/{CONFIG}"):
        try:
            if not config.parent.is_symlink():
                started.append((config.lstat().st_mtime_ns, config.parent))
        except OSError:  # it has just been removed
            continue
    return max(started)[1] if started else None
