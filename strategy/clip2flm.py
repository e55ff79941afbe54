"""CLIP2FL with server momentum (Hsu et al. 2019), an extension of this project."""

from strategy.clip2fl import CLIP2FL
from strategy.fedavgm import FedAvgM


class CLIP2FLM(CLIP2FL, FedAvgM):
    """CLIP2FL with FedAvgM's server momentum.

    Clients distil and send class gradients as in CLIP2FL; the server combines their
    models as FedAvgM does. If all rounds move the model in the same direction, momentum
    beta moves it 1 / (1 - beta) times as far. This helps a run that has too few rounds.
    """
