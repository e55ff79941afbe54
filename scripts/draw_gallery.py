"""Make what docs/gallery.md shows with the program itself.

The program trains the demo and its comparison into build/gallery. Then the pictures of
their reports are copied, pages are photographed with Chromium, and the outputs of the
commands are written into the page::

    python -m scripts.draw_gallery    # as the files in conf/ say
    python -m scripts.draw_gallery --seed 7 --set 'federation.rounds=6'    # shorter

Complete runs in build/gallery are not repeated. Remove the folder to renew them, for
example after a change of settings.
"""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from server_app.file_names import CONFIG, METRICS

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("build/gallery")
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "assets" / "gallery"
# Figures of the two reports that the page shows.
OF_RUN = ("accuracy", "classes", "clients", "features", "confusion", "costs")
OF_COMPARISON = ("ranking", "accuracy", "classes")
# Pixels of a photographed page.
WIDTH, HEIGHT = 1280, 900
# Lines of rounds that the page shows, at the beginning and at the end of an output.
FIRST, LAST = 3, 2
WAIT_S = 0.5
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class GalleryError(RuntimeError):
    """A command failed, or a program is missing; says which."""


def main() -> None:
    """Train what is missing, and renew the page and its pictures."""
    parser = argparse.ArgumentParser(description="Renew docs/gallery.md.")
    parser.add_argument("--set", default="", dest="settings", metavar="KEY=VALUE ...")
    parser.add_argument(
        "--seed", type=int, action="append", default=[], help="of the comparison"
    )
    options = parser.parse_args()
    settings = ["--set", options.settings] if options.settings else []
    seeds = [word for seed in options.seed for word in ("--seed", str(seed))]
    folder = ROOT / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train(folder, settings)
        compare = ["compare", "conf/demo-compare.toml", "--runs", str(RUNS), *seeds]
        output_of([*compare, *settings])
        PICTURES.mkdir(parents=True, exist_ok=True)
        demo, comparison = folder / "demo", folder / "demo-compare"
        copy_figures(demo, OF_RUN, PICTURES)
        copy_figures(comparison, OF_COMPARISON, PICTURES)
        for report in (demo, comparison):
            address = (report / "report.html").as_uri()
            photograph(address, PICTURES / f"{report.name}-report.png")
        shutil.copyfile(folder / "watch.png", PICTURES / "watch.png")
    except GalleryError as error:
        sys.exit(f"draw_gallery: {error}")
    page = PAGE.read_text("utf-8")
    for name in ("run", "status"):
        page = with_output(page, name, (folder / f"{name}.txt").read_text("utf-8"))
    command = shlex.join(["clip2fl", *compare, *settings])
    PAGE.write_text(with_output(page, "compare", f"$ {command}\n"), "utf-8")


def train(folder: Path, settings: Sequence[str]) -> None:
    """Train the demo, unless this was done; look at it in the middle of the run.

    Parameters
    ----------
    folder : Path
        Receives the run's folder ``demo``, the output ``run.txt``, and from the middle
        of the run ``status.txt`` and ``watch.png``.
    settings : sequence of str
        Further arguments of ``clip2fl run``.

    Raises
    ------
    GalleryError
        If the run does not complete; has its output.
    """
    done, run = folder / "run.txt", folder / "demo"
    if done.exists():
        return
    # What an interrupted call has left.
    shutil.rmtree(run, ignore_errors=True)
    place = f'run.dir="{folder}" run.name="{run.name}"'
    asked = ["run", "--run-config", "conf/demo.toml", *settings]
    with (folder / "run.part").open("w+", encoding="utf-8") as output:
        running = subprocess.Popen(
            _command([*asked, "--set", place]),
            cwd=ROOT,
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while running.poll() is None and not _half_done(run):
                time.sleep(WAIT_S)
            if running.poll() is None:
                said = output_of(["status", str(run)])
                text = f"$ clip2fl status {RUNS / run.name}\n{said}"
                (folder / "status.txt").write_text(text, "utf-8")
                with watched(run) as address:
                    photograph(address, folder / "watch.png")
            running.wait()
        finally:
            running.terminate()
            running.wait()
        output.seek(0)
        said = output.read().replace(f"{ROOT}{os.sep}", "")
    if running.returncode:
        raise GalleryError(f"the demo failed:\n{said}")
    if not (folder / "watch.png").exists():
        raise GalleryError("the demo ended before it could be watched: more rounds")
    command = shlex.join(["clip2fl", *asked])
    done.write_text(f"$ {command}\n{shortened(said)}", "utf-8")


def _half_done(run: Path) -> bool:
    """Return whether a run has completed half of its rounds."""
    try:
        config = json.loads((run / CONFIG).read_text("utf-8"))["config"]
        written = (run / METRICS).read_text("utf-8").count("\n")
    except OSError:
        return False
    return written >= int(config["federation.rounds"]) / 2


def output_of(arguments: Sequence[str]) -> str:
    """Return what the command prints, without this machine's paths.

    Raises
    ------
    GalleryError
        If it fails; has what it printed.
    """
    done = subprocess.run(
        _command(arguments),
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise GalleryError(f"clip2fl {shlex.join(arguments)} failed:\n{done.stdout}")
    return done.stdout.replace(f"{ROOT}{os.sep}", "")


def _command(arguments: Sequence[str]) -> list[str]:
    print(shlex.join(["clip2fl", *arguments]), flush=True)
    return [sys.executable, "-m", "clip2fl_cli.app", *arguments]


def _environment() -> dict[str, str]:
    # Tables keep their width, whatever terminal this is.
    return {**os.environ, "COLUMNS": "100"}


def copy_figures(folder: Path, names: Sequence[str], target: Path) -> None:
    """Copy figures of a report, as SVG with the report's name in front.

    Parameters
    ----------
    folder : Path
        A run's or comparison's folder with its report.
    names : sequence of str
        The figures.
    target : Path
        Folder of the copies.
    """
    for name in names:
        source = folder / "figures" / f"{name}.svg"
        shutil.copyfile(source, target / f"{folder.name}-{name}.svg")


@contextmanager
def watched(run: Path) -> Iterator[str]:
    """Serve the live page of a run, and lend its address."""
    with subprocess.Popen(
        _command(["watch", str(run)]), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as page:
        try:
            assert page.stdout is not None
            yield page.stdout.readline().split()[-1]
        finally:
            page.terminate()


def photograph(address: str, file: Path) -> None:
    """Write a picture of a page as a browser shows it.

    Parameters
    ----------
    address : str
        The page.
    file : Path
        The PNG file, with 256 colours to save space.

    Raises
    ------
    GalleryError
        If there is no browser, or it makes no picture.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise GalleryError(f"no browser found: install one of {', '.join(BROWSERS)}")
    # Chromium's sandbox does not work for root, as in most containers.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "page.png"
        done = subprocess.run(
            [
                *(browser, "--headless", *sandbox, "--hide-scrollbars"),
                f"--user-data-dir={scratch}/profile",
                f"--window-size={WIDTH},{HEIGHT}",
                # Time for the live page to ask for its numbers.
                "--virtual-time-budget=5000",
                f"--screenshot={picture}",
                address,
            ],
            capture_output=True,
            text=True,
        )
        if not picture.exists():
            raise GalleryError(f"{browser} made no picture:\n{done.stderr}")
        small = io.BytesIO()
        with Image.open(picture) as image:
            image.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    file.write_bytes(small.getvalue())


def shortened(output: str) -> str:
    """Return an output with dots in place of the rounds in the middle."""
    lines = output.splitlines()
    rounds = [n for n, line in enumerate(lines) if re.match(r"round \d+/\d+:", line)]
    dropped = rounds[FIRST:-LAST]
    if len(dropped) < 2:
        return output
    kept = [line for n, line in enumerate(lines) if n not in dropped[1:]]
    kept[dropped[0]] = "..."
    return "\n".join([*kept, ""])


def with_output(page: str, name: str, output: str) -> str:
    """Return the page with another text in one of its blocks.

    Parameters
    ----------
    page : str
        Markdown with the line ``<!-- output: NAME -->`` before the block.
    name : str
        Name of the block.
    output : str
        The new text.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If the page has not exactly one such block.
    """
    block = re.compile(
        rf"(<!-- output: {re.escape(name)} -->\n\n```text\n).*?(```\n)", re.DOTALL
    )
    text = "\n".join([*output.rstrip().splitlines(), ""])
    page, found = block.subn(lambda match: f"{match[1]}{text}{match[2]}", page)
    if found != 1:
        raise ValueError(f"{found} blocks are called {name!r}, but it must be one")
    return page


if __name__ == "__main__":
    main()
