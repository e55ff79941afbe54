"""The ways in which a site's node can be started."""

from enum import StrEnum


class Start(StrEnum):
    """How the node is started."""

    FOREGROUND = "foreground"
    SYSTEMD = "systemd"
    CONTAINER = "container"
    NONE = "none"
