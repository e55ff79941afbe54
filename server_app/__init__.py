"""The server around the strategy: a run from its start to the delivered model."""

import os

# Synthesis and re-training consist of thousands of small matrix products. If other
# processes need the cores too, OpenMP threads that spin while they wait make them up to
# forty times slower; sleeping threads cost nothing. torch reads this setting when it is
# imported, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
