"""What a strategy reports of a round, besides the global model."""

from dataclasses import dataclass, field


@dataclass
class RoundRecord:
    """What a round cost and brought.

    Attributes
    ----------
    clients : list of (int or str)
        Partitions, or names of sites, whose replies were used.
    dropped : int
        Replies that were not.
    kept_model : bool
        Whether no model came out of the round: the one before, or an earlier one,
        stays.
    went_back_to : int or None
        Round whose model took the place of a bad one, if that was so.
    left_out : list of (int or str)
        Clients that are left out from here on because they made the bad one.
    participation : str
        Who took part, for the round's line; empty where clients are simulated.
    shortened_updates, shortened_gradients : int
        Models' updates and class gradients that were longer than allowed.
    bytes_down : int
        Arrays sent to all clients.
    upload_bytes, gradient_bytes : list of int
        Arrays received from each of ``clients``, and the class gradients among them.
    losses : dict
        Losses by name: ``client`` and ``distillation`` are the clients', averaged by
        number of images; the others are computed at the server.
    unreadable : int
        Training images left out by the clients.
    seconds : dict
        Wall-clock seconds of each phase at the server; those named ``clients-...``
        are summed over the clients.
    recalls : dict or None
        Sites' mean accuracy on each class in percent (None: no site has it), by head;
        None without sites.
    site_recalls : list of dict
        Each site's own accuracy in percent, by head and class.
    privacy : dict
        What the round and all so far have cost, by mechanism (see `PrivacyLedger`).
    """

    clients: list[int | str] = field(default_factory=list)
    dropped: int = 0
    kept_model: bool = False
    went_back_to: int | None = None
    left_out: list[int | str] = field(default_factory=list)
    participation: str = ""
    shortened_updates: int = 0
    shortened_gradients: int = 0
    bytes_down: int = 0
    upload_bytes: list[int] = field(default_factory=list)
    gradient_bytes: list[int] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    recalls: dict[str, list[float | None]] | None = None
    site_recalls: list[dict[str, dict[int, int]]] = field(default_factory=list)
    privacy: dict[str, dict[str, float]] = field(default_factory=dict)
