"""A copy of the checkout, as a fresh clone has it."""

import shutil
import subprocess
from pathlib import Path

from tests.defaults import ROOT
from tests.tools import cannot_run, needed_tool


def copy_of_checkout(folder: Path) -> Path:
    """Copy what git knows, as a fresh clone has it; return the copy."""
    # Git reads no checkout of another user, such as one mounted into a container.
    git = [needed_tool("git"), "-c", f"safe.directory={ROOT}"]
    listed = subprocess.run(
        [*git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        cannot_run("this is no git checkout")
    app = folder / "clip2fl"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (app / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, app / name)
    return app
