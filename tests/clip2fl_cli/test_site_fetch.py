"""A site lists, checks and copies what has arrived, and predicts with nothing else."""

import errno
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip2fl import load_model
from clip2fl_cli import model_keys
from clip2fl_cli.federation import Federation
from clip2fl_cli.model_keys import key_file, trusted_keys
from clip2fl_common.data.datasets import Normalization
from clip2fl_common.models import build_model
from clip2fl_common.signed_folder import public_key_of, sign_folder, verify_folder
from server_app.delivery import ModelCard, save_model
from server_app.signing import public_key_file, signing_key
from tests.clip2fl_cli.commands import refused, run

MADE = datetime(2026, 11, 27, 15, 30, tzinfo=UTC)


class Site:
    """A site with a policy, whose models are signed by a key in ``server``."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.key = folder / "server" / "signing.key"
        self.public = public_key_file(self.key)
        self.models = folder / "models"
        self.policy = folder / "policy.toml"
        self.policy.write_text(
            f'models-folder = "{self.models}"\n'
            f'model-key = "{public_key_of(str(self.public))}"\n'
        )
        self.image = folder / "image.png"
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(self.image)
        self._model = model

    def arrive(self, name: str = "run", days: int = 0) -> Path:
        """Store a model as the node does; return its folder."""
        folder = self.models / ".new"
        folder.mkdir(parents=True)
        shutil.copy(self._model, folder)
        (folder / "card.json").write_text("{}")
        names = ("card.json", "model.safetensors")
        made = MADE + timedelta(days)
        manifest = sign_folder(folder, name, made, names, signing_key(self.key))
        return folder.rename(self.models / manifest.name)


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep trusted keys out of the user's configuration folder."""
    monkeypatch.setattr(
        "platformdirs.user_config_dir", lambda *_: str(tmp_path / "settings")
    )


@pytest.fixture
def unsigned(tmp_path: Path) -> Path:
    """Return a run's folder, as far as predict needs it."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(1)
    network = build_model("resnet8-slim", 3, 16)
    normalization = Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    card = ModelCard("resnet8-slim", 16, ("a", "b", "c"), 32, normalization, {})
    save_model(folder / "model.safetensors", network, network.classifier, card)
    return folder


@pytest.fixture
def site(tmp_path: Path, unsigned: Path) -> Site:
    """Return a site at which nothing has arrived."""
    (tmp_path / "site").mkdir()
    return Site(tmp_path / "site", unsigned / "model.safetensors")


def test_before_anything_arrives_it_says_what_to_do(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "site", "fetch", "--policy", site.policy) == 1
    said = capsys.readouterr().err
    assert f"no model has arrived in {site.models}" in said
    assert "delivery.signing-key" in said and "clip2fl deliver RUN" in said
    (site.models / ".incoming-x").mkdir(parents=True)
    assert run(monkeypatch, "site", "fetch", "--policy", site.policy) == 1
    assert "A part of a model is there" in capsys.readouterr().err


def test_site_without_the_rules_is_told_which(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.policy.write_text("min-class-samples = 2\n")
    line = refused(monkeypatch, capsys, "site", "fetch", "--policy", site.policy)
    assert "has no models-folder, so this site takes no models" in line
    missing = site.policy.with_name("none.toml")
    line = refused(monkeypatch, capsys, "site", "fetch", "--policy", missing)
    assert "is not there" in line and "--models" in line


def test_models_are_listed_with_the_newest_first(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old, bad = site.arrive(days=1), site.arrive("old"), site.arrive("bad", -1)
    (bad / "card.json").write_text("[]")
    # Neither what the key has not signed nor a copy under another name is a model.
    (site.models / "stranger").mkdir()
    shutil.copytree(new, site.models / "copy")
    assert run(monkeypatch, "site", "fetch", "--policy", site.policy) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [new.name, old.name, bad.name]
    assert lines[0].endswith("the newest") and lines[1].endswith("older")
    assert "card.json is not the file that the server signed" in lines[2]
    arguments = ("--models", site.models, "--public-key", site.public, "--json")
    assert run(monkeypatch, "site", "fetch", *arguments) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["copied"] is None and answer["refused"] == []
    assert [m["newest"] for m in answer["models"]] == [True, False, False]
    assert [m["problem"] is None for m in answer["models"]] == [True, True, False]
    assert not key_file().exists()


def flip_manifest(stored: Path, to: Path) -> None:
    (stored / "manifest.json").write_bytes(
        (stored / "manifest.json").read_bytes().replace(b"2026", b"2027", 1)
    )


def remove_signature(stored: Path, to: Path) -> None:
    (stored / "manifest.sig").unlink()


def swap(stored: Path, to: Path) -> None:
    """Put the older model under the newer one's name."""
    shutil.rmtree(stored)
    shutil.copytree(to, stored)


@pytest.mark.parametrize("damage", [flip_manifest, remove_signature, swap])
def test_older_model_does_not_take_the_place_of_a_damaged_one(
    site: Site,
    damage: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    new, old = site.arrive(days=1), site.arrive("old")
    damage(new, old)
    fetch = ("site", "fetch", "--policy", site.policy)
    assert run(monkeypatch, *fetch) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [new.name, old.name]
    assert lines[1].endswith("perhaps not the newest")
    assert run(monkeypatch, *fetch, "--json") == 2
    answer = json.loads(capsys.readouterr().out)
    assert [m["newest"] for m in answer["models"]] == [False]
    assert [m["name"] for m in answer["refused"]] == [new.name]
    assert str(site.models) in answer["refused"][0]["problem"]

    output = tmp_path / "out"
    for name in ((), ("--name", "run"), ("--name", new.name)):
        line = refused(monkeypatch, capsys, *fetch, output, *name)
        assert "it may be the newest model" in line and new.name in line
        assert not output.exists()
    assert run(monkeypatch, *fetch, output, "--name", "old") == 0
    assert f"{new.name}" in capsys.readouterr().err
    assert (output / "manifest.json").is_file()


def test_model_alone_without_its_signature_has_arrived(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.arrive() / "manifest.sig").unlink()
    assert run(monkeypatch, "site", "fetch", "--policy", site.policy) == 2
    assert "manifest.sig is missing" in capsys.readouterr().out


def test_model_before_a_damaged_one_is_not_the_newest(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new, _ = site.arrive(days=1), site.arrive("old")
    (new / "card.json").write_text("[]")
    assert run(monkeypatch, "site", "fetch", "--json", "--policy", site.policy) == 2
    answer = json.loads(capsys.readouterr().out)
    assert [m["newest"] for m in answer["models"]] == [False, False]


def test_fetched_model_predicts_until_it_is_changed(
    site: Site,
    unsigned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    stored, output = site.arrive(), tmp_path / "there" / "model"
    assert run(monkeypatch, "site", "fetch", output, "--policy", site.policy) == 0
    assert f"clip2fl predict --model {output}" in capsys.readouterr().out
    assert verify_folder(output, public_key_of(str(site.public))).name == stored.name
    own = predicted(monkeypatch, capsys, "--model", unsigned, site.image)
    # With the key that was used to fetch, and with any key that is given.
    for more in ((), ("--public-key", site.public)):
        for model in (output, output / "model.safetensors"):
            arguments = ("--model", model, *more, site.image)
            assert predicted(monkeypatch, capsys, *arguments) == own
    assert load_model(output, site.public).class_names

    changed = bytearray((output / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (output / "model.safetensors").write_bytes(changed)
    for command in (
        ("predict", "--model", output, site.image),
        ("predict", "--model", output / "model.safetensors", site.image),
        ("predict", "--model", output, "--public-key", site.public, site.image),
    ):
        line = refused(monkeypatch, capsys, *command)
        assert "model.safetensors is not the file that the server signed" in line
    capsys.readouterr()
    export = ("export", "--model", output, "--output", tmp_path / "out")
    assert run(monkeypatch, *export) == 2
    assert "is not the file that the server signed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def predicted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str | Path,
) -> object:
    """Return what predict answers."""
    capsys.readouterr()
    assert run(monkeypatch, "predict", "--json", "--top", 10, *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_signed_folder_needs_a_key_and_a_key_needs_a_signed_folder(
    site: Site,
    unsigned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    stored = site.arrive()
    line = refused(monkeypatch, capsys, "predict", "--model", stored, site.image)
    assert "no server's key is known here" in line and "--public-key" in line
    other = public_key_file(tmp_path / "other.key")
    arguments = ("predict", "--model", stored, site.image, "--public-key", other)
    line = refused(monkeypatch, capsys, *arguments)
    assert "another key signed them; do not use this model" in line
    # Whoever removes the signature does not get around a key that is given.
    (stored / "manifest.json").unlink()
    for folder in (stored, unsigned):
        line = refused(
            *(monkeypatch, capsys, "predict", "--model", folder, site.image),
            *("--public-key", site.public),
        )
        assert "manifest.json is missing" in line


def test_changed_model_is_not_copied(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    stored, output = site.arrive(), tmp_path / "out"
    (stored / "more.txt").write_text("x")
    arguments = ("site", "fetch", output, "--policy", site.policy)
    line = refused(monkeypatch, capsys, *arguments)
    assert "did not sign" in line and "clip2fl deliver RUN" in line
    assert not output.exists() and not key_file().exists()


def test_key_that_cannot_be_remembered_is_told(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The home of a container may be read-only. The model is there all the same."""
    site.arrive()

    def refuse(key: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(model_keys, "trust", refuse)
    output = tmp_path / "out"
    assert run(monkeypatch, "site", "fetch", output, "--policy", site.policy) == 0
    said = capsys.readouterr()
    assert f"clip2fl predict --model {output}" in said.out
    key = public_key_of(str(site.public))
    assert f"--public-key {key}" in said.err.replace("\n", " ")
    own = ("--public-key", key, "--model", output, site.image)
    assert predicted(monkeypatch, capsys, *own)


def test_folder_with_content_stays(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    site.arrive()
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    for place, said in ((output, "is not empty, and stays"), (file, "is no folder")):
        arguments = ("site", "fetch", place, "--policy", site.policy)
        assert said in refused(monkeypatch, capsys, *arguments)
    assert [path.name for path in output.iterdir()] == ["mine"]
    (output / "mine").unlink()
    assert run(monkeypatch, "site", "fetch", output, "--policy", site.policy) == 0
    assert (output / "manifest.json").is_file()


def test_older_model_is_copied_by_name_only_and_called_older(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    new, old = site.arrive(days=1), site.arrive("old")
    fetch = ("site", "fetch", "--policy", site.policy)
    assert run(monkeypatch, *fetch, tmp_path / "a") == 0
    assert "older" not in capsys.readouterr().err
    digits = public_key_of(str(site.public))
    assert verify_folder(tmp_path / "a", digits).name == new.name
    for name in ("old", old.name):
        assert run(monkeypatch, *fetch, tmp_path / name, "--name", name) == 0
        assert f"{old.name} of 2026-11-27 15:30 is older" in capsys.readouterr().err
        assert verify_folder(tmp_path / name, digits).name == old.name
    line = refused(monkeypatch, capsys, *fetch, tmp_path / "b", "--name", "x")
    assert "no model is called 'x'" in line and old.name in line


def test_several_keys_may_be_trusted_and_damage_is_named(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    stored = site.arrive()
    key_file().parent.mkdir()
    key_file().write_text("0" * 64 + "\n")
    predict = ("predict", "--model", stored, site.image)
    assert "another key signed them" in refused(monkeypatch, capsys, *predict)
    output = tmp_path / "out"
    assert run(monkeypatch, "site", "fetch", output, "--policy", site.policy) == 0
    assert len(key_file().read_text().split()) == 2
    assert run(monkeypatch, *predict) == 0
    key_file().write_text("")  # as after the only key was removed by hand
    assert trusted_keys() == []
    key_file().write_text("no key\n")
    assert "no public key" in refused(monkeypatch, capsys, *predict)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(("finished:completed", ""), 0), (("finished:failed", "no site"), 1)],
)
def test_deliver_starts_a_run_that_only_delivers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    outcome: tuple[str, str],
    status: int,
) -> None:
    asked: list[str] = []
    sent: list[str] = []
    plain = Federation.__init__

    def connect(self: Federation, address: str, *rest: Any) -> None:
        asked.append(address)
        plain(self, address, *rest)

    def start(_: Federation, app: Path, run_config: Path) -> str:
        sent.append(run_config.read_text("utf-8"))
        return "5"

    monkeypatch.setattr(Federation, "__init__", connect)
    monkeypatch.setattr(Federation, "active", lambda _: [])
    monkeypatch.setattr(Federation, "start", start)
    monkeypatch.setattr(Federation, "follow", lambda *_: outcome)
    arguments = ("deliver", tmp_path / "a run", "--root-certificates", "ca.crt")
    assert run(monkeypatch, *arguments) == status
    assert ("no site" in capsys.readouterr().out) == bool(status)
    assert run(
        monkeypatch, *arguments, "--signing-key", "/k", "--superlink", "h:1"
    ) == (status)
    assert asked == ["127.0.0.1:8000", "h:1"]
    assert all(f'delivery.run = "{tmp_path}/a run"' in text for text in sent)
    assert 'delivery.signing-key = "/k"' in sent[1]


def test_signing_key_prints_what_a_policy_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = tmp_path / "keys" / "signing.key"
    assert run(monkeypatch, "signing-key", key) == 0
    printed = capsys.readouterr().out
    digits = public_key_of(f"{key}.pub")
    assert printed == f'public key: {key}.pub\nmodel-key = "{digits}"\n'
    assert run(monkeypatch, "signing-key", key, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"file": f"{key}.pub", "key": digits}
    key.chmod(0o644)
    assert "chmod 600" in refused(monkeypatch, capsys, "signing-key", key)
