"""Commands in the README and in docs/ exist, with their options, keys and files."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip2fl_common.config.files import merge_run_config
from tests.defaults import ROOT
from tests.tools import needed_tool

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(
    r"(?:\.venv/bin/)?(python|flwr|flower-supernode|make|deploy/[\w.-]+|clip2fl|ray|"
    r"tensorboard|docker|cp|chown|systemctl)\b"
)
# What these do is their own makers' business, or is tried by tests/deployment.
OTHERS = ("ray", "tensorboard", "docker", "cp", "chown", "systemctl")


def documented() -> list[str]:
    """Return the indented lines that are commands, continued ones joined."""
    found = set()
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        # Variables before a command are its environment.
        for line in re.findall(r"^    (?:[A-Z_]+=\S+ +)*(\S.*)$", text, flags=re.M):
            if PROGRAM.match(line):
                found.add(re.sub(r" {2,}# .*", "", line).strip())
    return sorted(found)


def words(line: str) -> list[str]:
    """Return a command's arguments."""
    return shlex.split(line, comments=True)[1:]


def check_python(arguments: list[str]) -> None:
    """Modules of this repository."""
    option, name, *_ = arguments
    assert option == "-m", "the product is the clip2fl command"
    module = ROOT / Path(*name.split("."))
    assert module.with_suffix(".py").is_file() or module.is_dir()


def check_make(arguments: list[str]) -> None:
    """Targets of the Makefile."""
    make = needed_tool("make")
    for target in arguments:
        printed = subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True)
        assert printed.returncode == 0, printed.stderr


def check_flower(program: str, arguments: list[str]) -> None:
    """Options of Flower's own commands."""
    subcommand = [a for a in arguments[:1] if not a.startswith("-")]
    command = [str(Path(sys.executable).with_name(program)), *subcommand, "--help"]
    # Wide, or the help cuts its options.
    shown = subprocess.run(
        command, capture_output=True, text=True, env={"COLUMNS": "300", "PATH": ""}
    )
    assert shown.returncode == 0, shown.stderr
    for option in (a for a in arguments if a.startswith("--")):
        assert option in shown.stdout, option
    for place, argument in enumerate(arguments):
        if argument == "--run-config":
            given = arguments[place + 1]
            if "=" in given:
                merge_run_config(ROOT, None, [given])
            else:
                assert (ROOT / given).is_file()


@pytest.mark.parametrize("line", documented())
def test_documented_commands_can_be_given(line: str) -> None:
    program = PROGRAM.match(line)
    assert program is not None
    name = program[1]
    if name == "python":
        check_python(words(line))
    elif name == "make":
        check_make(words(line))
    elif name.startswith("deploy/"):
        assert shutil.which(ROOT / name)
    elif name in ("flwr", "flower-supernode"):
        check_flower(name, words(line))
    else:
        # tests/clip2fl_cli tries the lines of the clip2fl command.
        assert name == "clip2fl" or name in OTHERS


def test_there_are_commands_of_every_kind() -> None:
    """The search finds them."""
    kinds = {PROGRAM.match(line)[1] for line in documented()}  # type: ignore[index]
    assert kinds >= {"python", "make", "flwr", "clip2fl", "docker"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the repository, and to headings in them."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, heading = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), flags=re.M)
            slugs = {
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                for title in titles
            }
            assert heading in slugs, f"{page.name}: {target}"
