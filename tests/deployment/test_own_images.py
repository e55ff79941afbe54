"""The commands of docs/own-images.md, as they are printed, with real processes.

They run in a network namespace of their own, so the ports of the page are free.
"""

import json
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.data import demo
from tests.defaults import ROOT
from tests.deployment.stack import Machine, missing, wait_for
from tests.site_folders import write_site
from tests.tiny_teacher import write_teacher
from tests.tools import cannot_run

PAGE = ROOT / "docs" / "own-images.md"
# The command runs this checkout's code, wherever it is called.
COMMAND = """#!{python}
import sys
sys.path.insert(0, {root!r})
from clip2fl_cli.app import main
main()
"""
# The page's run is for photographs, with a teacher that is downloaded.
# Far longer than any command takes on two idle cores.
WAIT_S = 2400.0
SMALL = {
    "dataset.image-size": 32,
    "federation.rounds": 1,
    "client.epochs": 1,
    "class-gradients.draws": 2,
    "synthesis.steps": 5,
    "retraining.epochs": 10,
    "model.name": "resnet8-slim",
    "teacher.pretrained": "",
}


def section(title: str) -> str:
    """Return a section of the page."""
    text = PAGE.read_text("utf-8")
    (found,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert isinstance(found, str)
    return found


def commands() -> list[str]:
    """Return the page's commands in their order."""
    text = section("3. Give the commands")
    block = re.findall(r"(?:^ {4}\S.*\n)+", text, flags=re.M)[0]
    return [line.strip() for line in block.splitlines()]


def run_file() -> dict[str, object]:
    """Return the page's run configuration, by dotted key."""
    text = section("2. Write the run's configuration")
    (toml,) = re.findall(r"```toml\n(.*?)```", text, flags=re.S)
    return flatten(tomllib.loads(toml))


def held() -> dict[str, list[str]]:
    """Return each site's classes, as the page shows its folders."""
    sites: dict[str, list[str]] = {}
    for line in section("1. Put the images into folders").splitlines():
        if found := re.fullmatch(r" {4}photos/(\w+)/", line):
            sites[found[1]] = []
        elif found := re.fullmatch(r" {8}(\w+)/\S.*", line):
            classes = sites[list(sites)[-1]]
            classes += [found[1]] if found[1] not in classes else []
    return sites


def test_page_has_eight_commands_of_one_federation() -> None:
    lines = commands()
    assert len(lines) == 8 and lines[0] == "make install"
    assert all(line.startswith(".venv/bin/clip2fl ") for line in lines[1:])
    sites = held()
    assert len(sites) == 3
    known = str(run_file()["dataset.class-names"]).split(", ")
    assert {name for classes in sites.values() for name in classes} == set(known)
    # None of them is a class of the drawn images, or of any file in conf/.
    assert not set(known) & set(demo.CLASS_NAMES)
    joined = [shlex.split(line) for line in lines if " site join " in line]
    assert [words[3:] for words in joined] == [
        [f"kits/{name}-kit.tar.gz", "--data", f"photos/{name}"] for name in sites
    ]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Return a machine with the page's folders, where its commands can be given."""
    if reason := missing():
        cannot_run(reason)
    made = Machine(
        "own",
        tmp_path,
        {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        },
    )
    subprocess.run(["ip", "netns", "add", made.namespace], check=True)
    try:
        made.run("ip", "link", "set", "lo", "up")
        command = tmp_path / ".venv" / "bin" / "clip2fl"
        command.parent.mkdir(parents=True)
        command.write_text(COMMAND.format(python=sys.executable, root=str(ROOT)))
        command.chmod(0o755)
        drawn = dict(zip(("cat", "owl", "fox"), demo.CLASS_NAMES, strict=False))
        for first, (site, classes) in enumerate(held().items()):
            folder = tmp_path / "photos" / site
            for number, name in enumerate(classes):
                write_site(folder, {drawn[name]: 24 - 12 * number}, 100 * first)
                (folder / drawn[name]).rename(folder / name)
        (folder.parent / "north" / "cat" / "0.png").rename(
            folder.parent / "north" / "cat" / "1.jpg"
        )
        yield made
    finally:
        made.kill_all()
        subprocess.run(["ip", "netns", "del", made.namespace])


@pytest.mark.slow
def test_commands_lead_from_folders_to_a_model(machine: Machine) -> None:
    folder = machine.folder
    write_teacher(folder / "weights", seed=0)
    settings = {
        **run_file(),
        **SMALL,
        # It has another path at the sites: their kits carry it.
        "teacher.model": f"local-dir:{folder / 'weights'}",
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    (folder / "mine.toml").write_text("".join(lines), "utf-8")

    _, serve, kit, *joins, federate, predict = commands()

    def start(label: str, line: str) -> None:
        machine.start(label, "/bin/sh", "-c", f"exec {line}")

    def ends(label: str, line: str) -> str:
        start(label, line)
        status = machine.processes[label].wait(WAIT_S)
        assert status == 0, machine.log(label)
        return machine.log(label)

    start("serve", serve)
    wait_for("server", lambda: "is ready" in machine.log("serve"), WAIT_S)
    told = ends("kit", kit)
    assert len(joins) == 3 and told.count("-kit.tar.gz  ") == 3
    for site, line in zip(held(), joins, strict=True):
        start(site, line)
    wait_for(
        "nodes", lambda: all("SuperNode ID" in machine.log(s) for s in held()), WAIT_S
    )
    for site in held():
        assert "\n0 to fix," in machine.log(site)
    log = ends("federate", federate)
    assert "finished:completed" in log
    metrics = folder / "server" / "runs" / "first" / "metrics.jsonl"
    rounds = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    assert [sorted(r["clients"]) for r in rounds] == [["east", "north", "west"]]
    assert all(r["dropped_replies"] == 0 for r in rounds)
    classes = "|".join(held()["north"] + held()["west"])
    assert re.search(rf"1\.jpg: ({classes}) [\d.]+ %", ends("predict", predict))

    site = ".venv/bin/clip2fl site {} --server server"
    listed = ends("list", f"{site.format('list')} --json")
    states = {row["name"]: row["state"] for row in json.loads(listed)}
    assert states == dict.fromkeys(held(), "online")
    assert "west: removed" in ends("remove", site.format("remove west"))
    left = json.loads(ends("left", f"{site.format('list')} --json"))
    assert [row["name"] for row in left] == ["north", "east"]

    # Nobody else can read a key or a secret of the server or a site.
    private = [p for p in folder.rglob("*") if is_private(p)]
    assert len(private) > 8
    for path in private:
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def is_private(path: Path) -> bool:
    """Return whether a file has a private key or a secret."""
    if path.name.endswith("-kit.tar.gz") or path.suffix == ".secret":
        return True
    if not path.is_file() or path.stat().st_size > 10_000 or path.is_symlink():
        return False
    return b"PRIVATE KEY-----\n" in path.read_bytes()[:100]
