"""The inputs from which a method is built."""

from dataclasses import dataclass, field

import torch

from clip2fl_common.config import RunConfig
from clip2fl_common.teacher import Teacher
from strategy.clients import Clients
from strategy.events import Events


@dataclass(frozen=True)
class Setting:
    """All inputs from which a method may be built.

    Attributes
    ----------
    clients : Clients
        The run's clients: draws those that train and knows their nodes.
    config : RunConfig
        The run's configuration, from which a method takes its own settings.
    class_names : tuple of str
        Names of the C classes.
    device : torch.device
        Device on which the server computes.
    teacher : Teacher or None
        The teacher for methods with ``needs_teacher``; None for the others.
    events : Events
        Told what happens in a round.
    run : str
        Flower's id of the run.
    """

    clients: Clients
    config: RunConfig
    class_names: tuple[str, ...]
    device: torch.device
    teacher: Teacher | None
    events: Events = field(default_factory=Events)
    run: str = ""

    @property
    def num_classes(self) -> int:
        """Return the number of classes C."""
        return len(self.class_names)
