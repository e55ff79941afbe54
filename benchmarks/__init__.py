"""Timed comparisons and their dated results."""

import os

# Spinning OpenMP threads wait for each other on shared cores. This slows the published
# loops far more than our code, and would make our speed-ups too large. Torch reads the
# variable when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
