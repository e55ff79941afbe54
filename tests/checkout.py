"""A copy of the checkout, as a fresh clone has it."""

import shutil
import subprocess
from pathlib import Path

from tests.defaults import ROOT


def copy_of_checkout(folder: Path) -> Path:
    """Copy what git knows, as a fresh clone has it; return the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    app = folder / "clip2fl"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (app / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, app / name)
    return app
