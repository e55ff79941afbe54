"""Precision of uploaded values; a module of its own, which needs no torch."""

from typing import Literal

Precision = Literal["half", "full"]
"""``half``: bfloat16; ``full``: float32."""
