"""CLIP2FL with server momentum (Hsu et al. 2019), an extension of ours."""

from strategy.clip2fl import CLIP2FL
from strategy.fedavgm import FedAvgM


class CLIP2FLM(CLIP2FL, FedAvgM):
    """CLIP2FL whose server goes on in the direction of earlier rounds.

    Clients distil and send class gradients as in CLIP2FL; their models are combined as
    in FedAvgM. With momentum beta a constant direction is gone 1 / (1 - beta) times as
    far, which tells where the number of rounds is what limits a run.
    """
