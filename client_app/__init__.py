"""What runs where the data is: local training and class gradients."""

import gc
from importlib import import_module

# In a deployment every message is a process of its own. Looking for garbage among all
# that torch's import makes, and once more when the process ends, took a fifth of a
# message's CPU time; what is frozen is not looked at.
if gc.isenabled():
    gc.disable()
    import_module("torch")
    gc.freeze()
    gc.enable()
