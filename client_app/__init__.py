"""What runs where the data is: local training and class gradients."""

import atexit
import gc
import sys
from importlib import import_module


def _thaw() -> None:
    # Torch's compiler brings triton, whose extension reports objects left at the end.
    if "triton" in sys.modules:
        gc.unfreeze()


# In a deployment every message is a process of its own. Looking for garbage among all
# that torch's import makes, and once more when the process ends, took a fifth of a
# message's CPU time; what is frozen is not looked at.
if gc.isenabled():
    gc.disable()
    import_module("torch")
    gc.freeze()
    gc.enable()
    atexit.register(_thaw)
