"""Names that settings choose from; this module needs neither torch nor pydantic."""

from typing import Literal

Precision = Literal["half", "full"]
"""Of uploaded values. ``half``: bfloat16; ``full``: float32."""
OptimizerName = Literal["sgd", "momentum", "adam", "muon"]
"""Optimizers of local training (client_app/optimizers.py)."""
TF32 = Literal["off", "convolutions", "all"]
"""Which float32 products an NVIDIA GPU may compute with factors of 10 bits."""
