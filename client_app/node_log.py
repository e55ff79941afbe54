"""A site's own log: a line for each request and its answer, in a file that is rotated.

The file lies beside the site's record (`client_app.own_site.state_folder`). It may hold
names from the site's disk, so it stays there, and only the node's user can read it.
Several messages may be answered at the same time, each in a process of its own.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from statistics import fmean
from typing import IO, Any

from filelock import FileLock, Timeout

from client_app.own_site import data_folder, state_folder
from client_app.site_policy import NodeConfig, SiteRefusal, is_real_site
from clip2fl_common import messages
from clip2fl_common.data.datasets import DatasetError
from clip2fl_common.shown import shown

FILE = "node.log"
# About 30,000 lines in each file.
FILE_BYTES = 5 * 2**20
OLD_FILES = 3
# A line takes milliseconds. After this time it is left out rather than waited for.
LOCK_S = 2.0
PACKAGES = ("client_app", "clip2fl_common")


class SharedFile(RotatingFileHandler):
    """Append lines to a file that other processes append to and rotate, too.

    A line that cannot be written, for example on a full disk, is left out: the site's
    answer matters more.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            maxBytes=FILE_BYTES,
            backupCount=OLD_FILES,
            encoding="utf-8",
            delay=True,
        )
        # Names that are not UTF-8 are escaped.
        self.errors = "backslashreplace"
        self._lock = FileLock(f"{path}.lock", timeout=LOCK_S, mode=0o600)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; the file is open only meanwhile, so that others rotate it."""
        try:
            with self._lock:
                super().emit(record)
                self._release()
        except (OSError, Timeout):
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Do nothing: the line is also on standard error."""

    def _release(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None  # as FileHandler.close does

    def _open(self) -> Any:
        return open(
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=_private,
        )


class _Line(logging.Formatter):
    """One printable line: time in UTC, level, run, kind of request, round, text."""

    def __init__(self, about: str) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        text = shown(record.getMessage())
        return f"{when} {record.levelname} {self._about}: {text}"


@contextmanager
def logging_to_site(
    node_config: NodeConfig, run: int, kind: str, server_round: int | None
) -> Iterator[None]:
    """Send this program's log to the site's file and to standard error meanwhile.

    Parameters
    ----------
    node_config : mapping
        The node's configuration. A node that simulates a client has no log.
    run : int
        Flower's id of the run.
    kind : str
        Kind of the request.
    server_round : int or None
        The round; None for a query.
    """
    if not is_real_site(node_config):
        yield
        return
    about = f"run {run} {kind}"
    if server_round is not None:
        about += f" round {server_round}"
    handlers: list[logging.Handler] = [_Console()]
    if file := _file(node_config):
        handlers.append(SharedFile(file))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    for handler in handlers:
        handler.setFormatter(_Line(about))
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)


class _Console(logging.StreamHandler[IO[str]]):
    """Standard error as it is when a line comes."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


def described(metrics: Mapping[str, Any] | None, size: int) -> str:
    """Return what an answer says, for the site's log.

    Parameters
    ----------
    metrics : mapping or None
        Metrics of a reply to a train request or an evaluation request. None: the answer
        to a query. In secure aggregation the number of images is in the masked sums,
        and the log says nothing but the size.
    size : int
        Size of the answer in bytes.
    """
    answered = f"answered, {size / 1e6:.2f} MB"
    if metrics is None or messages.NUM_EXAMPLES not in metrics:
        return answered
    values = dict(metrics)
    images = f"{values[messages.NUM_EXAMPLES]:,} images"
    unreadable = values["unreadable-images"]
    seconds = ", ".join(
        f"{name.removeprefix('seconds-')} {value:.1f} s"
        for name, value in values.items()
        if name.startswith("seconds-")
    )
    if messages.CLASSES in values:
        accuracies = "; ".join(
            f"{name.removeprefix(messages.RECALL)} {fmean(recall):.1f} %"
            for name, recall in values.items()
            if name.startswith(messages.RECALL) and recall
        )
        found = f"balanced accuracy: {accuracies or 'no class with enough images'}"
    else:
        found = (
            f"loss {values['loss']:.4f}, distillation loss "
            f"{values['distillation-loss']:.4f}"
        )
    return f"{answered}: {images}, {unreadable} unreadable; {found}; {seconds}"


def _file(node_config: NodeConfig) -> Path | None:
    try:
        folder = state_folder(node_config, data_folder(node_config))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (SiteRefusal, DatasetError, OSError):
        return None  # the answer to the request says why
    return folder / FILE


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
