"""Settings of all tests."""

import torch
from hypothesis import settings

# The tensors are small: more threads cost time, and sums then depend on the machine.
torch.set_num_threads(1)

# The same examples everywhere, and no verdict that depends on a machine's speed.
settings.register_profile(
    "clip2fl", derandomize=True, deadline=None, database=None, max_examples=30
)
settings.load_profile("clip2fl")
