"""The client's code, which runs where the data are: training and class gradients."""

import atexit
import gc
import sys
from importlib import import_module


def _thaw() -> None:
    # Torch's compiler loads triton, which reports frozen objects as leaks at exit.
    if "triton" in sys.modules:
        gc.unfreeze()


# In a deployment every message starts a new process. Searching all objects that torch's
# import makes for garbage, once more at exit, took a fifth of a message's CPU time. The
# collector skips frozen objects.
if gc.isenabled():
    gc.disable()
    import_module("torch")
    gc.freeze()
    gc.enable()
    atexit.register(_thaw)
