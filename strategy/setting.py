"""What a method is built from."""

from dataclasses import dataclass

import torch

from clip2fl_common.config import RunConfig
from clip2fl_common.teacher import Teacher
from strategy.clients import Clients


@dataclass(frozen=True)
class Setting:
    """Everything from which a method may be built.

    Attributes
    ----------
    clients : Clients
        Who trains when, and which node to ask.
    config : RunConfig
        The run's configuration, from which a method takes its own settings.
    class_names : tuple of str
        Names of the C classes.
    device : torch.device
        Where the server computes.
    teacher : Teacher or None
        There for methods with ``needs_teacher``, else None.
    """

    clients: Clients
    config: RunConfig
    class_names: tuple[str, ...]
    device: torch.device
    teacher: Teacher | None

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)
