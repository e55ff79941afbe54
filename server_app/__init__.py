"""What runs at the server around the strategy: a run from start to its model."""

import os

# Synthesis and re-training are thousands of small products. Where other processes
# want the cores too, OpenMP threads that wait by spinning slow them down up to
# fortyfold; sleeping ones cost nothing. Read when torch is loaded, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
