"""CLIP2FL on Flower, from Python: run, compare, inspect and predict.

Examples
--------
>>> import clip2fl
>>> run = clip2fl.run(method="fedavg", federation={"rounds": 3})
>>> run.model.predict(["photograph.jpg"])[0].name
"""

from clip2fl.api import Compared as Compared
from clip2fl.api import Run as Run
from clip2fl.api import compare as compare
from clip2fl.api import load_model as load_model
from clip2fl.api import partition as partition
from clip2fl.api import run as run

__all__ = [
    "Compared",
    "Run",
    "__version__",
    "compare",
    "load_model",
    "partition",
    "run",
]


def __getattr__(name: str) -> str:
    # Imported on first use, so that importing this package takes no time.
    if name == "__version__":
        from clip2fl_common.project import version

        return version()
    raise AttributeError(f"module 'clip2fl' has no attribute {name!r}")
