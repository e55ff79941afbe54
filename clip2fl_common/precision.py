"""Precision of uploaded values, in a module of its own that needs no torch."""

from typing import Literal

Precision = Literal["half", "full"]
"""``half``: bfloat16; ``full``: float32."""
