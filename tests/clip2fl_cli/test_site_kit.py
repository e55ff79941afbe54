"""Kits: what is in them, which are refused, what joining does to a site."""

import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client_app import preflight
from client_app.preflight import Finding
from client_app.site_policy import RULES, policy_file
from clip2fl_cli.sites import join as joining
from clip2fl_cli.sites import kit_archive, node, service
from clip2fl_cli.sites.folder import SiteFolderError, SiteSettings, installed_node
from clip2fl_cli.sites.join import JoinError, Wishes, join
from clip2fl_cli.sites.keys import public_half
from clip2fl_cli.sites.kit import KitWishError, KitWishes, make_kits
from clip2fl_cli.sites.kit_archive import KitError, read_archive
from clip2fl_cli.sites.registration import RegistrationError, Server
from clip2fl_cli.sites.starts import Start
from clip2fl_common.project import version
from clip2fl_common.signed_folder import public_key_of
from clip2fl_common.site_registry import SiteRegistry
from clip2fl_common.teacher import load_teacher
from server_app.signing import public_key_file
from tests.clip2fl_cli.commands import refused, run
from tests.defaults import ROOT
from tests.deployment.test_register import FakeSuperLink
from tests.flower_private import parse_node_config
from tests.tiny_teacher import write_teacher
from tests.tools import find_tool, need_root, needed_tool

CLASSES = "cat, owl, fox"
RUN = f'method="fedavg" dataset.class-names="{CLASSES}" dataset.image-size=16'
FINGERPRINT = "0" * 64


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use other folders than the user's, and the same umask everywhere."""
    for name in ("XDG_DATA_HOME", "CLIP2FL_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # `node.check` writes to it.
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the keys of a server that nodes reach as fl.example.org."""
    needed_tool("openssl")
    folder = tmp_path_factory.mktemp("server")
    command = [ROOT / "deploy" / "make-keys.sh", "server", folder, "fl.example.org"]
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return folder


@pytest.fixture
def superlink() -> FakeSuperLink:
    return FakeSuperLink()


@pytest.fixture
def server(
    tmp_path: Path,
    keys: Path,
    superlink: FakeSuperLink,
    monkeypatch: pytest.MonkeyPatch,
) -> Server:
    """Return a server whose SuperLink is a stand-in."""

    @contextmanager
    def flower(_: Server) -> Iterator[FakeSuperLink]:
        yield superlink

    monkeypatch.setattr(Server, "flower", flower)
    folder = tmp_path / "server"
    folder.mkdir()
    for name in ("trust", "proxy"):
        (folder / name).symlink_to(keys / name)
    return Server(folder, "127.0.0.1:9")


def make(server: Server, *names: str, **changes: object) -> list[Path]:
    """Make kits for a run without a teacher."""
    wishes = KitWishes(
        "fl.example.org:9092", Path("sites"), [RUN], server.folder.parent / "kits"
    )
    return make_kits(names, server, dataclasses.replace(wishes, **changes))  # type: ignore[arg-type]


def content(path: Path) -> dict[str, bytes]:
    """Return the files of an archive by their path in the kit."""
    with tarfile.open(path) as tar:
        return {
            member.name.partition("/")[2]: file.read()
            for member in tar
            if (file := tar.extractfile(member))
        }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# ---------------------------------------------------------------- making kits


def test_kit_has_what_its_site_needs_and_nothing_of_others(
    server: Server, keys: Path, superlink: FakeSuperLink
) -> None:
    first, second = make(server, "north", "east")
    files = content(first)
    assert set(files) == {"kit.json", *kit_archive.FILES}
    manifest = json.loads(files["kit.json"])
    assert manifest["site"] == "north"
    assert manifest["superlink"] == "fl.example.org:9092"
    assert manifest["version"] == version()
    assert files["ca.crt"] == (keys / "trust" / "ca.crt").read_bytes()
    run_config = tomllib.loads(files["run.toml"].decode())
    assert run_config["dataset"]["class-names"] == CLASSES
    # The key in the kit is the one that is registered under its name, and its own.
    for name, path in (("north", first), ("east", second)):
        site = SiteRegistry.read(server.registry).named(name)
        assert site is not None
        assert public_half(content(path)["key"]) == site.key
        assert superlink.keys[site.key] == site.node
        assert mode(path) == 0o600
    secrets = [p for p in keys.rglob("*") if p.suffix in (".key", ".secret")]
    assert len(secrets) == 5
    for path in secrets:
        assert path.read_bytes() not in b"".join(files.values())
    with tarfile.open(first) as tar:
        modes = {m.name.split("/")[-1]: m.mode for m in tar}
    assert modes.pop("key") == 0o600 and set(modes.values()) == {0o644}


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    content_ = kit_archive.Content(
        "a", "h:1", "1", "", {n: n.encode() for n in reversed(kit_archive.FILES)}
    )
    paths = [tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"]
    for path in paths:
        kit_archive.write_archive(content_, path)
        os.utime(path, (1, 1))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with tarfile.open(paths[0]) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}


def test_teachers_may_have_large_files_with_long_names(tmp_path: Path) -> None:
    name = f"teacher/{'x' * 121}"
    files = dict.fromkeys(kit_archive.FILES, b"") | {name: b"weights"}
    kit_archive.write_archive(
        kit_archive.Content("a" * 40, "h:1", "1", "", files),
        tmp_path / "kit.tar.gz",
    )
    (tmp_path / "out").mkdir()
    assert read_archive(tmp_path / "kit.tar.gz", tmp_path / "out").site == "a" * 40
    assert (tmp_path / "out" / name).read_bytes() == b"weights"
    member = tarfile.TarInfo("open_clip_model.safetensors")
    member.size = 10 * 2**30
    assert member.tobuf(kit_archive.TAR_FORMAT)


def test_run_of_the_server_knows_the_registry_and_sites_do_not(
    server: Server,
) -> None:
    (server.folder / "runs").mkdir()
    key = f'delivery.signing-key="{server.folder}/signing.key"'
    (path,) = make(server, "north", settings=[RUN, 'run.name="first"', key])
    run_config = tomllib.loads((path.parent / "run.toml").read_text("utf-8"))
    assert run_config["federation"]["site-registry"] == str(server.registry)
    assert run_config["run"] == {"name": "first", "dir": str(server.folder / "runs")}
    assert str(server.folder) not in content(path)["run.toml"].decode()
    of_site = tomllib.loads(content(path)["run.toml"].decode())
    assert "run" not in of_site and "delivery" not in of_site


def test_kit_without_a_key_registers_nothing(
    server: Server, superlink: FakeSuperLink
) -> None:
    (path,) = make(server, "north", with_keys=False)
    assert "key" not in content(path) and mode(path) == 0o644
    assert not superlink.keys and not server.registry.exists()
    assert "Have that line run at the server" in content(path)["README.md"].decode()


def test_policy_template_has_every_rule_and_forbids_nothing(
    server: Server, tmp_path: Path
) -> None:
    (path,) = make(server, "north")
    text = content(path)["policy.toml"].decode()
    file = tmp_path / "policy.toml"
    file.write_text(text)
    assert policy_file(file).rules() == policy_file(empty(tmp_path)).rules()
    rules = re.findall(r"^#((\S+) = .*)$", text, flags=re.M)
    assert sorted(key for _, key in rules) == sorted(RULES)
    # Each line is a valid rule when its mark is removed.
    file.write_text("\n".join(line for line, _ in rules))
    policy_file(file)


def test_policy_template_has_the_servers_model_key(
    server: Server, tmp_path: Path
) -> None:
    key = tmp_path / "signing.key"
    run = [RUN, f'delivery.signing-key="{key}"']
    (path,) = make(server, "north", settings=run)
    zeros = f'#model-key = "{"0" * 64}"'
    assert zeros in content(path)["policy.toml"].decode()
    digits = public_key_of(str(public_key_file(key)))
    (path,) = make(server, "east", settings=run)
    text = content(path)["policy.toml"].decode()
    assert f'#model-key = "{digits}"' in text and zeros not in text


def empty(folder: Path) -> Path:
    """Return an empty policy file."""
    path = folder / "empty.toml"
    path.write_text("")
    return path


def test_weights_of_a_local_teacher_are_packed_with_their_fingerprint(
    server: Server, tmp_path: Path
) -> None:
    write_teacher(tmp_path / "weights", seed=0)
    local = f'teacher.model="local-dir:{tmp_path / "weights"}"'
    run_settings = [RUN.replace("fedavg", "clip2fl"), local]
    (path,) = make(server, "north", settings=run_settings)
    expected = load_teacher(f"local-dir:{tmp_path / 'weights'}").fingerprint
    files = content(path)
    assert json.loads(files["kit.json"])["teacher_fingerprint"] == expected
    for file in (tmp_path / "weights").iterdir():
        assert files[f"teacher/{file.name}"] == file.read_bytes()
    (other,) = make(server, "east", settings=run_settings, with_teacher=False)
    assert not any(name.startswith("teacher/") for name in content(other))
    guide = content(other)["README.md"].decode()
    assert "--teacher /folder" in guide
    assert "-v /folder/of/the/teacher:/folder/of/the/teacher:ro" in guide
    with pytest.raises(KitWishError, match=r"has no open_clip_config\.json"):
        make(server, "west", settings=run_settings, teacher=tmp_path)
    (tmp_path / "weights" / "open_clip_model.safetensors").unlink()
    with pytest.raises(KitWishError, match="teacher cannot be packed"):
        make(server, "west", settings=run_settings)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["a/b"], {}, "'a/b' is no name of a site"),
        (["s\u0456te"], {}, "is no name of a site"),
        (["a", "A"], {}, "a and A count as the same name"),
        (["a"], {"address": "fl.example.org"}, "is not HOST:PORT"),
        (["a"], {"address": "fl.example.org:0"}, "is not HOST:PORT"),
        (["a"], {"address": "other.org:9092"}, "made for localhost, fl.example.org, "),
        (["a"], {"settings": ['dataset.name="demo"']}, "dataset.name = 'demo', but"),
        (["a"], {"settings": ["dataset.image-size=3"]}, "dataset.image-size = 3"),
        (["a"], {"run_config": Path("none.toml")}, "cannot be read"),
        (["a"], {"policy": Path("none.toml")}, "none.toml"),
    ],
)
def test_wrong_wishes_are_refused_before_anything_is_made(
    server: Server,
    superlink: FakeSuperLink,
    names: list[str],
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises((ValueError, OSError), match=message.replace(".", r"\.")):
        make(server, *names, **changes)
    assert not superlink.keys
    assert not list(server.folder.parent.glob("kits/*.tar.gz"))


def test_taken_name_and_existing_archive_are_refused(server: Server) -> None:
    (path,) = make(server, "north")
    before = path.read_bytes()
    with pytest.raises(KitWishError, match="may be a site's only copy of its key"):
        make(server, "north", "east")
    path.rename(path.with_suffix(".old"))
    with pytest.raises(KitWishError, match="clip2fl site remove north"):
        make(server, "east", "North")
    assert path.with_suffix(".old").read_bytes() == before
    assert [p.name for p in path.parent.glob("*.tar.gz")] == []
    make(server, "north", with_keys=False)


def test_archives_of_sites_that_are_not_registered_are_removed(
    server: Server, superlink: FakeSuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a key is of no use; that of the first site is registered and stays."""
    register = superlink.register

    def once(name: str, key: str) -> int | None:
        if superlink.keys:
            raise RegistrationError(f"{name} is not registered: no SuperLink")
        return register(name, key)

    monkeypatch.setattr(superlink, "register", once)
    with pytest.raises(RegistrationError, match="east is not registered"):
        make(server, "north", "east")
    assert [p.name for p in server.folder.parent.glob("kits/*.tar.gz")] == [
        "north-kit.tar.gz"
    ]


def test_kit_of_no_server_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(
        monkeypatch,
        capsys,
        *("site", "kit", "a", "--address", "localhost:9092"),
        *("--server", tmp_path, "--output", tmp_path / "kits"),
    )
    assert "ca.crt is no certificate" in line and "--server" in line
    assert not (tmp_path / "kits").exists()


# --------------------------------------------------------------- reading kits

Member = tuple[tarfile.TarInfo, bytes]


def members(path: Path) -> list[Member]:
    """Return the members of an archive with their contents."""
    with tarfile.open(path) as tar:
        return [(m, file.read() if (file := tar.extractfile(m)) else b"") for m in tar]


def packed(path: Path, changed: list[Member]) -> Path:
    """Write an archive of members."""
    with tarfile.open(path, "w:gz") as tar:
        for member, text in changed:
            if member.isreg():
                member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


def named(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Member:
    """Return a member."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b"x" if kind == tarfile.REGTYPE else b""


def without_key(found: list[Member]) -> list[Member]:
    return [m for m in found if not m[0].name.endswith("/key")]


def with_manifest(**changes: object) -> Callable[[list[Member]], list[Member]]:
    def change(found: list[Member]) -> list[Member]:
        (first, text), *others = found
        manifest = json.loads(text)
        manifest.update(changes)
        return [(first, json.dumps(manifest).encode()), *others]

    return change


def with_text(name: str, text: bytes) -> Callable[[list[Member]], list[Member]]:
    return lambda found: [
        (m, text if m.name.endswith(f"/{name}") else old) for m, old in found
    ]


CHANGES: dict[str, tuple[Callable[[list[Member]], list[Member]], str]] = {
    "certificate": (with_text("ca.crt", b"x" * 10), "ca.crt has 10 bytes, and not"),
    "one letter": (
        lambda found: [
            (m, t.replace(b"fedavg", b"creff!") if m.name.endswith("run.toml") else t)
            for m, t in found
        ],
        "run.toml is not what its kit.json says",
    ),
    "nothing": (lambda found: [], "it is empty"),
    "no manifest": (lambda found: found[1:], "begins with 'north-kit/README.md'"),
    "missing": (without_key, "key is missing"),
    "twice": (lambda found: [*found, found[-1]], "is not in its kit.json, or twice"),
    "absolute": (
        lambda found: [*found, named("/etc/cron.d/x")],
        "'/etc/cron.d/x', which is part of no kit",
    ),
    "up": (
        lambda found: [*found, named("north-kit/../../x")],
        "'north-kit/../../x', which is part of no kit",
    ),
    "up in the teacher": (
        lambda found: [*found, named("north-kit/teacher/..")],
        "'north-kit/teacher/..', which is part of no kit",
    ),
    "another folder": (
        lambda found: [*found, named("else/key")],
        "'else/key', which is part of no kit",
    ),
    "unknown": (
        lambda found: [*found, named("north-kit/.bashrc")],
        "'north-kit/.bashrc', which is part of no kit",
    ),
    "link": (
        lambda found: [
            *without_key(found),
            named("north-kit/key", tarfile.SYMTYPE, "/etc/shadow"),
        ],
        "'north-kit/key' is a link or no regular file",
    ),
    "hard link": (
        lambda found: [
            *without_key(found),
            named("north-kit/key", tarfile.LNKTYPE, "north-kit/ca.crt"),
        ],
        "is a link or no regular file",
    ),
    "device": (
        lambda found: [*without_key(found), named("north-kit/key", tarfile.CHRTYPE)],
        "is a link or no regular file",
    ),
    "folder": (
        lambda found: [*found, named("north-kit/teacher/a", tarfile.DIRTYPE)],
        "is a link or no regular file",
    ),
    "name of the site": (with_manifest(site="../x"), "names the site '../x'"),
    "address": (with_manifest(superlink="a b:1"), "superlink: String should match"),
    "later format": (with_manifest(format=2), "format: Input should be 1"),
    "more keys": (with_manifest(more=1), "more: Extra inputs"),
    "listed": (
        with_manifest(files={"../x": {"size": 1, "sha256": FINGERPRINT}}),
        "lists '../x', part of no kit",
    ),
    "without certificate": (with_manifest(files={}), "does not list ca.crt"),
    "no JSON": (with_text("kit.json", b"{"), "Invalid JSON"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_kit_is_refused_and_nothing_is_written_elsewhere(
    server: Server, tmp_path: Path, change: str
) -> None:
    (path,) = make(server, "north")
    function, message = CHANGES[change]
    bad = packed(tmp_path / "bad.tar.gz", function(members(path)))
    place = tmp_path / "deep" / "er" / "place"
    place.mkdir(parents=True)
    before = {p for p in tmp_path.rglob("*") if not p.is_relative_to(place)}
    with pytest.raises(KitError) as error:
        read_archive(bad, place)
    assert message in str(error.value) and str(bad) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert {p for p in tmp_path.rglob("*") if not p.is_relative_to(place)} == before
    assert not any(p.is_symlink() for p in place.rglob("*"))


@pytest.mark.parametrize("length", [0, 10, 200, 1000])
def test_cut_archive_is_damaged(server: Server, tmp_path: Path, length: int) -> None:
    (path,) = make(server, "north")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(path.read_bytes()[:length])
    (tmp_path / "place").mkdir()
    with pytest.raises(KitError, match="is no kit, or is damaged|kit.json"):
        read_archive(cut, tmp_path / "place")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(KitError, match="cannot be read"):
            read_archive(path, tmp_path / "place")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_byte_passes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any byte of the unpacked archive, apart from those that mean nothing."""
    folder = tmp_path_factory.mktemp("changed")
    files = {name: f"content of {name}\n".encode() for name in kit_archive.FILES}
    original = kit_archive.Content("a", "h:1", "1", "", files)
    kit_archive.write_archive(original, folder / "a.tar.gz")
    tar = bytearray(gzip.decompress((folder / "a.tar.gz").read_bytes()))
    place = data.draw(st.integers(0, len(tar) - 1))
    tar[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "b.tar.gz").write_bytes(gzip.compress(bytes(tar)))
    (folder / "out").mkdir()
    try:
        manifest = read_archive(folder / "b.tar.gz", folder / "out")
    except KitError:
        return
    # The manifest may have changed within its own rules, but no other file.
    (folder / "out" / "kit.json").unlink()
    written = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    assert written == files
    assert set(manifest.files) == set(files)


# -------------------------------------------------------------------- joining


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a site's images."""
    for name in ("cat", "owl"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        # By its content, the first image serves validation and the other one training.
        for number in (1, 2):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the server answer; return the addresses at which it was asked."""
    asked: list[str] = []

    def check(address: str, *_: object) -> Iterator[Finding]:
        asked.append(address)
        yield Finding("ok", "server", f"{address} is there")

    monkeypatch.setattr(preflight, "check_server", check)
    return asked


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[node.Node]:
    """Do not become a node; return the nodes that would have started."""
    nodes: list[node.Node] = []
    monkeypatch.setattr(node, "run", lambda found, port: nodes.append(found))
    return nodes


def test_join_installs_checks_and_starts(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
) -> None:
    (kit,) = make(server, "north")
    os.umask(0o022)
    assert join(kit, Wishes(photos)) == 0
    assert reached == ["fl.example.org:9092"]
    (found,) = started
    folder = tmp_path / "XDG_DATA_HOME" / "clip2fl" / "sites" / "north"
    assert found == installed_node(folder)
    assert found.key.read_bytes() == content(kit)["key"]
    assert found.certificate.read_bytes() == content(kit)["ca.crt"]
    assert parse_node_config(found.node_config) == {
        "data-path": str(photos),
        "site": "north",
        "policy": str(folder / "policy.toml"),
        "site-state": str(folder / "state"),
    }
    assert mode(folder) == 0o700 and mode(folder / "key") == 0o600
    assert mode(folder / "state") == mode(folder / "cache") == 0o700
    assert (folder / "key.pub").read_text().split()[:2] == public_half(
        content(kit)["key"]
    ).split()
    # Again: nothing changes, and the node starts again.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.*")}
    assert join(kit, Wishes(photos)) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.*")} == before
    assert started == [found, found]


def test_wrong_class_folder_is_named_and_nothing_is_started(
    server: Server,
    photos: Path,
    reached: list[str],
    started: list[node.Node],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (photos / "owl").rename(photos / "dog")
    (kit,) = make(server, "north")
    assert join(kit, Wishes(photos)) == node.NOTHING_HELPS
    told = capfd.readouterr()
    assert "no class of the run: dog; known: cat, owl, fox" in told.out
    assert "Mend what is listed above" in told.err.replace("\n", " ")
    assert not started
    (photos / "dog").rename(photos / "owl")
    assert join(kit, Wishes(photos)) == 0 and len(started) == 1


def test_server_that_is_away_is_tried_again(
    server: Server, photos: Path, started: list[node.Node], tmp_path: Path
) -> None:
    (kit,) = make(server, "north", address="localhost:9")
    assert join(kit, Wishes(photos)) == node.TRY_AGAIN
    assert not started


@pytest.mark.parametrize("all_checks", [False, True])
def test_node_whose_clock_starts_in_1970_is_tried_again(
    server: Server,
    photos: Path,
    reached: list[str],
    started: list[node.Node],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    all_checks: bool,
) -> None:
    """NTP sets the clock seconds after the boot."""
    (kit,) = make(server, "north")
    assert join(kit, Wishes(photos)) == 0
    (found,) = started
    capfd.readouterr()
    monkeypatch.setattr(preflight, "now", lambda: datetime(1970, 1, 1, tzinfo=UTC))
    assert node.check(found, all_checks=all_checks) == node.TRY_AGAIN
    assert "this machine's clock says 1970-01-01" in capfd.readouterr().out


def test_site_without_images_is_refused_before_anything_is_installed(
    server: Server, tmp_path: Path
) -> None:
    (kit,) = make(server, "north")
    with pytest.raises(JoinError, match="--data .*nowhere is no folder"):
        join(kit, Wishes(tmp_path / "nowhere", tmp_path / "site"))
    assert not (tmp_path / "site").exists()


def test_kit_that_would_fill_the_disk_is_refused(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    """Its manifest may say any size."""
    (kit,) = make(server, "north")
    sizes = json.loads(content(kit)["kit.json"])["files"]
    sizes["teacher/weights"] = {"size": 2**35, "sha256": FINGERPRINT}
    free = shutil.disk_usage(tmp_path).free
    sizes |= {
        f"teacher/{i}": {"size": 2**35, "sha256": FINGERPRINT}
        for i in range(min(free // 2**35, 50))
    }
    bad = packed(tmp_path / "bad.tar.gz", with_manifest(files=sizes)(members(kit)))
    with pytest.raises(JoinError, match="GiB, and .* are free in"):
        join(bad, Wishes(photos, tmp_path / "sites" / "north"))
    assert list((tmp_path / "sites").iterdir()) == []


def test_damaged_kit_leaves_no_folder(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    (kit,) = make(server, "north")
    bad = packed(tmp_path / "bad.tar.gz", without_key(members(kit)))
    with pytest.raises(KitError, match="key is missing"):
        join(bad, Wishes(photos, tmp_path / "sites" / "north"))
    assert list((tmp_path / "sites").iterdir()) == []


def test_fingerprint_of_another_kit_is_refused(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
) -> None:
    kit, other = make(server, "north", "east")
    expected = kit_archive.fingerprint(other)
    for given_ in (expected, kit_archive.fingerprint(kit)[:11]):
        with pytest.raises(JoinError, match="Do not use it"):
            join(kit, Wishes(photos, tmp_path / "site", fingerprint=given_))
    assert not (tmp_path / "site").exists()
    own = kit_archive.fingerprint(kit)[:12].upper()
    assert join(kit, Wishes(photos, tmp_path / "site", fingerprint=own)) == 0


def test_other_site_and_other_folders_are_not_overwritten(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
) -> None:
    kit, other = make(server, "north", "east")
    site = tmp_path / "site"
    assert join(kit, Wishes(photos, site)) == 0
    before = (site / "key").read_bytes()
    with pytest.raises(JoinError, match="is the site north, and the kit is for east"):
        join(other, Wishes(photos, site, update=True))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(JoinError, match="exists and is no site's folder"):
        join(other, Wishes(photos, mine, update=True))
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(JoinError, match="with the images .*--update"):
        join(kit, Wishes(tmp_path, site))
    assert (site / "key").read_bytes() == before
    # An empty folder is as good as none.
    (tmp_path / "new").mkdir()
    assert join(other, Wishes(photos, tmp_path / "new")) == 0


def test_update_takes_the_servers_part_and_keeps_the_sites_own(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
) -> None:
    (kit,) = make(server, "north")
    site = tmp_path / "site"
    join(kit, Wishes(photos, site))
    (site / "policy.toml").write_text("max-runs = 3\n")
    (site / "state" / "mine").write_text("kept")
    key = (site / "key").read_bytes()
    later = [RUN.replace("fox", "fox, hen")]
    output = tmp_path / "later"
    (new,) = make(server, "north", settings=later, output=output, with_keys=False)
    with pytest.raises(JoinError, match="with another kit: --update"):
        join(new, Wishes(photos, site))
    assert join(new, Wishes(photos, site, update=True)) == 0
    assert "hen" in (site / "run.toml").read_text()
    assert (site / "policy.toml").read_text() == "max-runs = 3\n"
    assert (site / "key").read_bytes() == key and (site / "state" / "mine").exists()
    assert SiteSettings.read(site).kit == kit_archive.fingerprint(new)
    assert not [p for p in site.iterdir() if p.name.startswith(".")]


def test_update_of_no_site_installs_none(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    """A forgotten --folder would make a site without rules and record."""
    (kit,) = make(server, "north")
    site = tmp_path / "elsewhere" / "site"
    with pytest.raises(JoinError, match="no site is installed in .* give its --folder"):
        join(kit, Wishes(photos, site, update=True))
    assert not site.parent.exists()


def test_site_makes_its_own_key_and_only_the_public_half_is_printed(
    server: Server,
    superlink: FakeSuperLink,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (kit,) = make(server, "north", with_keys=False)
    site = tmp_path / "site"
    capsys.readouterr()
    assert join(kit, Wishes(photos, site)) == 0
    assert not started  # its key is not registered yet
    told = capsys.readouterr()
    assert "PRIVATE" not in told.out + told.err
    (line,) = [line for line in told.out.splitlines() if line.startswith("clip2fl ")]
    command = subprocess.run(
        ["sh", "-c", f'for word in {line}; do printf "%s\\n" "$word"; done'],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert command[:3] == ["clip2fl", "site", "register"] and len(command) == 4
    half = public_half((site / "key").read_bytes())
    assert run(monkeypatch, *command[1:], "--server", server.folder) == 0
    assert superlink.keys == {half: 2**63}
    assert SiteRegistry.read(server.registry).name_of(2**63) == "north"
    assert mode(site / "key") == 0o600
    assert join(kit, Wishes(photos, site)) == 0 and len(started) == 1


def test_sites_own_teacher_is_checked_by_the_kits_fingerprint(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, seed in (("at server", 0), ("same", 0), ("other", 1)):
        write_teacher(tmp_path / name, seed)
    local = f'teacher.model="local-dir:{tmp_path / "at server"}"'
    (kit,) = make(
        server,
        "north",
        settings=[RUN.replace("fedavg", "clip2fl"), local],
        with_teacher=False,
    )
    (tmp_path / "at server").rename(tmp_path / "elsewhere")
    site = tmp_path / "site"
    other = Wishes(photos, site, teacher=tmp_path / "other")
    assert join(kit, other) == node.NOTHING_HELPS
    assert "install the same weights as the server" in capfd.readouterr().out
    same = dataclasses.replace(other, teacher=tmp_path / "same", update=True)
    assert join(kit, same) == 0
    (found,) = started
    config = parse_node_config(found.node_config)
    assert config["teacher-path"] == str(tmp_path / "same")
    with pytest.raises(JoinError, match=r"has no open_clip_config\.json"):
        join(kit, dataclasses.replace(same, teacher=tmp_path))


def test_packed_teacher_is_the_sites_own(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    started: list[node.Node],
) -> None:
    write_teacher(tmp_path / "weights", seed=0)
    local = f'teacher.model="local-dir:{tmp_path / "weights"}"'
    settings_ = [RUN.replace("fedavg", "clip2fl"), local]
    (kit,) = make(server, "north", settings=settings_)
    (tmp_path / "weights").rename(tmp_path / "gone")
    assert join(kit, Wishes(photos, tmp_path / "site")) == 0
    assert started[0].teacher == tmp_path / "site" / "teacher"

    # A kit for a run with the same teacher leaves it, one with another takes it away.
    site, output = tmp_path / "site", tmp_path / "later"
    for seed, kept in ((0, True), (1, False)):
        shutil.rmtree(tmp_path / "weights", ignore_errors=True)
        write_teacher(tmp_path / "weights", seed=seed)
        (later,) = make(
            *(server, "north"),
            settings=[*settings_, f"federation.rounds={seed + 2}"],
            output=output / str(seed),
            with_keys=False,
            with_teacher=False,
        )
        join(later, Wishes(photos, site, update=True))
        assert (site / "teacher").exists() == kept


# -------------------------------------------------------------------- services


def test_systemd_unit_does_not_start_again_what_somebody_must_mend(
    server: Server,
    photos: Path,
    short_folder: Path,
    reached: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (kit,) = make(server, "north")
    site = short_folder / "site"
    monkeypatch.setattr(Path, "is_dir", no_systemd)
    own = str(os.geteuid())
    assert join(kit, Wishes(photos, site, Start.SYSTEMD, own)) == 0
    lines = (site / "clip2fl-north.service").read_text().splitlines()
    assert f"RestartPreventExitStatus={node.NOTHING_HELPS}" in lines
    assert "Restart=always" in lines
    (start,) = [line for line in lines if line.startswith("ExecStart=")]
    assert start.endswith(f" -m clip2fl_cli.app site start {site}")
    assert f"ReadWritePaths={site}/cache {site}/state" in lines
    # A share with the images is mounted before the node looks for them.
    assert f"RequiresMountsFor={photos}" in lines[: lines.index("[Service]")]
    told = capsys.readouterr().out
    assert "systemctl enable --now clip2fl-north.service" in told
    if verify := find_tool("systemd-analyze"):
        unit = site / "clip2fl-north.service"
        done = subprocess.run([verify, "verify", unit], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    odd = service.ServiceError
    with pytest.raises(odd, match="systemd would misread"):
        service.unit("north", Path("/srv/a b"), "clip2fl")
    mounts = [Path("/mnt/photos"), Path("/mnt/a b"), Path("/mnt/teacher")]
    text = service.unit("north", site, "clip2fl", mounts)
    assert "\nRequiresMountsFor=/mnt/photos /mnt/teacher\n" in text
    assert "RequiresMountsFor" not in service.unit("north", site, "x", mounts[1:2])


def test_site_does_not_replace_a_unit_of_the_server(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    units = (ROOT / "deploy" / "systemd").glob("clip2fl-*.service")
    parts = {path.stem.removeprefix("clip2fl-") for path in units}
    assert parts == set(service.SERVER_PARTS)
    (kit,) = make(server, "proxy")
    wishes = Wishes(photos, tmp_path / "site", Start.SYSTEMD, str(os.geteuid()))
    with pytest.raises(
        service.ServiceError, match="the unit of the server's own proxy"
    ):
        join(kit, wishes)
    assert not (tmp_path / "site").exists()


_is_dir = Path.is_dir


def no_systemd(path: Path) -> bool:
    return path != Path("/run/systemd/system") and _is_dir(path)


def test_compose_file_binds_the_sites_folders_only(
    server: Server,
    photos: Path,
    tmp_path: Path,
    reached: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (kit,) = make(server, "north")
    site = tmp_path / "site $HOME"
    own = str(os.geteuid())
    assert join(kit, Wishes(photos, site, Start.CONTAINER, own)) == 0
    text = (site / "compose.yaml").read_text()
    (made,) = yaml.safe_load(text)["services"].values()
    place = str(site).replace("$", "$$")  # compose would put a variable there
    assert {(v["source"], v["target"], v["read_only"]) for v in made["volumes"]} == {
        (place, place, True),
        (str(photos), str(photos), True),
        (f"{place}/cache", f"{place}/cache", False),
        (f"{place}/state", f"{place}/state", False),
    }
    assert made["user"] == f"{os.geteuid()}:{os.getegid()}"
    assert made["read_only"] is True and made["cap_drop"] == ["ALL"]
    assert made["command"][-4:] == ["--hold", "--port", "9094", place]
    assert made["environment"]["HF_HOME"] == f"{place}/cache/huggingface"
    command = f"docker compose -f '{site}/compose.yaml' up -d"
    assert command in capsys.readouterr().out.splitlines()
    # The compose file does not tell one kit from another.
    assert join(kit, Wishes(photos, site, Start.CONTAINER, own, update=True)) == 0
    assert f"{command} --force-recreate" in capsys.readouterr().out.splitlines()
    assert (site / "compose.yaml").read_text() == text


def test_root_gives_the_folder_to_the_nodes_user(
    server: Server,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the check runs as that user, who must be able to read key and images."""
    need_root("give files away")
    checked: list[tuple[int, int]] = []

    def check(owner: tuple[int, int], _: Path) -> int:
        checked.append(owner)
        return 0

    monkeypatch.setattr(joining, "_check_as", check)
    (kit,) = make(server, "north")
    site = tmp_path / "site"
    assert join(kit, Wishes(photos, site, Start.CONTAINER)) == 0
    assert checked == [(10001, 10001)]
    for path in [site, *site.rglob("*")]:
        assert (path.stat().st_uid, path.stat().st_gid) == (10001, 10001), path
    assert mode(site / "key") == 0o600
    with pytest.raises(JoinError, match="has no user 'nobody-here'.*useradd"):
        join(kit, Wishes(photos, tmp_path / "b", Start.SYSTEMD, "nobody-here"))
    with pytest.raises(JoinError, match="runs the node as the user who calls it"):
        join(kit, Wishes(photos, tmp_path / "b", user="nobody"))
    assert not (tmp_path / "b").exists()


def test_root_makes_folders_that_the_nodes_user_can_enter(
    server: Server,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the umask is; and later root does not run that user's node."""
    need_root("give files away")
    monkeypatch.setattr(joining, "_check_as", lambda *_: 0)
    monkeypatch.setattr(joining, "SYSTEM_FOLDER", tmp_path / "etc" / "sites")
    (kit,) = make(server, "north")
    before = os.umask(0o077)
    try:
        assert join(kit, Wishes(photos, start=Start.CONTAINER)) == 0
    finally:
        os.umask(before)
    site = tmp_path / "etc" / "sites" / "north"
    assert [mode(p) for p in (site, site.parent, site.parent.parent)] == [
        0o700,
        0o755,
        0o755,
    ]
    with pytest.raises(SiteFolderError, match="belongs to the user 10001, and root"):
        join(kit, Wishes(photos, site, update=True))
    assert site.stat().st_uid == 10001


def test_check_as_another_user_fails_where_that_user_cannot_read(
    server: Server, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need_root("run a command as another user")
    (kit,) = make(server, "north")
    tmp_path.chmod(0o700)  # the images are root's alone
    try:
        status = join(kit, Wishes(photos, tmp_path / "site", Start.CONTAINER))
    except JoinError as error:  # this program itself may be root's alone
        assert "install this program where all users" in str(error)
    else:
        told = capfd.readouterr()
        assert status != 0 and "Permission denied" in told.out + told.err
