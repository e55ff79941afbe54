"""The record of a round that a strategy reports besides the global model."""

from dataclasses import dataclass, field

from clip2fl_common.messages import Evaluation
from clip2fl_common.messages.evaluation_sums import SummedEvaluation
from strategy.requests import Unused


@dataclass(frozen=True)
class Trained:
    """A site's training in a round, from its used reply.

    Attributes
    ----------
    images : int
        Number of training images that the site claims.
    unreadable : int
        Number of training images that it skipped as unreadable.
    seconds : float
        Its own measurement of its work.
    bytes : int
        Size of the arrays in the reply.
    """

    images: int
    unreadable: int
    seconds: float
    bytes: int


@dataclass
class RoundRecord:
    """Costs and results of a round.

    Attributes
    ----------
    clients : list of (int or str)
        Partitions, or names of sites, whose replies were used.
    dropped : int
        Number of replies that were not used.
    kept_model : bool
        Whether the round made no model, so that the previous or an earlier one stays.
    lost : str
        Why the round has no sum, with secure aggregation; empty if it has one.
    went_back_to : int or None
        Round whose model replaced a bad one, if any.
    left_out : list of (int or str)
        Clients that are left out from now on because they made the bad model.
    participation : str
        Which part of the sites trained, for the round's log line; empty for simulated
        clients.
    shortened_updates, shortened_gradients : int
        Number of updates and of class gradients that were longer than allowed.
    bytes_down : int
        Bytes of the arrays sent to all clients together.
    upload_bytes, gradient_bytes : list of int
        Bytes of the arrays received from each of ``clients``, and of the class
        gradients among them.
    losses : dict
        Losses by name. ``client`` and ``distillation`` are means over the clients,
        weighted by number of images; the server computes the others.
    unreadable : int
        Number of training images that the clients skipped as unreadable.
    seconds : dict
        Wall-clock seconds of each phase at the server; those named ``clients-...``
        are summed over the clients.
    recalls : dict or None
        Mean accuracy over sites for each class in percent, by head; None for a class
        that no site has. The whole is None without sites.
    trained : dict
        The used reply of each site; empty without sites.
    evaluations : dict
        Each site's own evaluation; empty without sites and with secure sums.
    summed : SummedEvaluation or None
        The evaluations of all sites together, with secure sums.
    unused : list of Unused
        Clients whose replies are missing or not used.
    privacy : dict
        Cost of this round and of all rounds so far, by mechanism (see `PrivacyLedger`).
    """

    clients: list[int | str] = field(default_factory=list)
    dropped: int = 0
    kept_model: bool = False
    lost: str = ""
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
    trained: dict[str, Trained] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    summed: SummedEvaluation | None = None
    unused: list[Unused] = field(default_factory=list)
    privacy: dict[str, dict[str, float]] = field(default_factory=dict)
