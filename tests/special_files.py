"""What is no image but is called so."""

import os
import socket
from pathlib import Path

# How `clip2fl_common.data.regular_files` calls each.
SPECIAL = {
    "pipe.png": "a named pipe (FIFO)",
    "socket.png": "a socket",
    "device.png": "a device",
    "link to pipe.png": "a named pipe (FIFO)",
}


def make_special_files(folder: Path) -> None:
    """Make a named pipe, a link to it, a socket and a link to an endless device."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "pipe.png")
    (folder / "link to pipe.png").symlink_to("pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket.png")
    finally:
        os.chdir(here)
