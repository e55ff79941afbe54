"""Timed comparisons and their dated results."""

import os

# Spinning OpenMP threads wait for each other on shared cores, which slows the published
# loops far more than our code: ratios would flatter us. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
