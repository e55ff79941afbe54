"""Test that the doctor reports which entries are used, which are not, and why."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from client_app import doctor
from client_app.data_check import check_data, count_images
from client_app.preflight import Finding
from clip2fl_common.data.image_formats import missing_decoder
from tests.defaults import ROOT
from tests.special_files import SPECIAL, make_special_files

KNOWN = ("cat", "dog")


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def fresh_decoders() -> Iterator[None]:
    """Detect the decoders of this machine again before and after a test."""
    missing_decoder.cache_clear()
    yield
    missing_decoder.cache_clear()


def picture(path: Path, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8)).save(path)
    return path


def found(folder: Path, skip: bool = False) -> list[Finding]:
    """Return the findings, after checking that they print in one line."""
    findings = list(check_data(folder, KNOWN, 8, skip, 0.5))
    for finding in findings:
        assert all(line.isprintable() for line in str(finding).splitlines())
    return findings


def one(findings: list[Finding], text: str) -> Finding:
    """Return the only finding that contains a text."""
    (finding,) = (f for f in findings if text in f.text)
    return finding


def test_kinds_of_images_are_counted(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "cat" / f"{n}.png")
    picture(tmp_path / "dog" / "l.png", "L")
    for n in range(2):
        deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
        deep.save(tmp_path / "dog" / f"deep {n}.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "dog" / "f.tif")
    findings = found(tmp_path)
    kinds = one(findings, "16-bit")
    assert kinds.level == "ok"
    assert kinds.text == (
        "8-bit RGB: 3; 16-bit grey: 2, scaled to 8 bit; 8-bit grey: 1"
    )
    refused = one(findings, "cannot be read")
    assert refused.level == "problem"
    assert "dog/f.tif: it holds floating-point numbers; convert it" in refused.text
    assert one(found(tmp_path, skip=True), "cannot be read").level == "warning"


def test_several_pictures_in_a_file_are_a_warning(tmp_path: Path) -> None:
    first = Image.new("L", (8, 8))
    (tmp_path / "cat").mkdir()
    for n in range(2):
        first.save(
            tmp_path / "cat" / f"{n}.gif",
            save_all=True,
            append_images=[Image.new("L", (8, 8), 200)],
        )
    finding = one(found(tmp_path), "several pictures")
    assert finding.level == "warning" and "2 files have" in finding.text
    assert "cat/0.gif" in finding.text and "only it is used" in finding.fix


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    make_special_files(tmp_path / "cat")
    (tmp_path / "cat" / "nothing.png").symlink_to("nowhere")
    (tmp_path / "cat" / "loop.png").symlink_to("loop.png")
    findings = found(tmp_path)
    special = one(findings, "are no files")
    assert special.text.startswith("4 entries are no files")
    for name, kind in SPECIAL.items():
        assert f"cat/{name} ({kind})" in special.text
    refused = one(findings, "cannot be read")
    assert "cat/nothing.png: a link to a file that is not there" in refused.text
    assert "cat/loop.png: a link that leads back to itself" in refused.text
    assert count_images(tmp_path) == 3


def test_every_ignored_kind_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "jpg_2000")
    picture(tmp_path / "cat" / "a.png")
    for name in ("a.txt", "b.TXT", "c.xml", "README", "x.jp2", "y.jp2"):
        (tmp_path / "cat" / name).touch()
    picture(tmp_path / "cat" / "more" / "deeper" / "b.png")
    picture(tmp_path / "cat" / "more" / "c.png")
    picture(tmp_path / "cat" / "folder.png" / "d.png")
    picture(tmp_path / "loose.png")
    (tmp_path / "list.csv").touch()
    findings = found(tmp_path)
    assert one(findings, "1 images in").level == "ok"
    suffixes = one(findings, "no suffix of an image")
    assert "5 files have" in suffixes.text
    assert ".txt 2, .csv 1, no suffix 1, .xml 1" in suffixes.text
    nested = one(findings, "folders in class folders")
    assert "2 folders in class folders, with 3 images" in nested.text
    assert "cat/more (2 images)" in nested.text
    assert "cat/folder.png (1 images)" in nested.text
    assert one(findings, "beside the class folders").text.startswith("1 images lie")
    missing = one(findings, "2 .jp2 images")
    assert missing.level == "warning" and "JPEG2000" in missing.fix


def test_leftovers_of_operating_systems_are_no_fault(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "0001.jpg")
    picture(tmp_path / "cat" / "0002.png", "L")
    (tmp_path / "cat" / "._0001.jpg").write_bytes(b"\0\5\x16\7" + bytes(50))
    picture(tmp_path / "__MACOSX" / "cat" / "x.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).touch()
        (tmp_path / "cat" / name).touch()
    findings = found(tmp_path)
    assert {f.level for f in findings} == {"ok"}
    assert one(findings, "2 images in").check == "data"
    assert "8 hidden entries or entries of an operating system" in findings[-1].text


def test_site_that_could_not_train_is_a_problem(tmp_path: Path) -> None:
    """Unreadable images do not count: a run may leave them out."""
    picture(tmp_path / "cat" / "a.png", "L")
    (tmp_path / "cat" / "b.png").write_bytes(b"no image")
    finding = one(found(tmp_path, skip=True), "validation")
    assert (finding.level, finding.check) == ("problem", "division")
    assert "all 1 readable images serve validation" in finding.text
    picture(tmp_path / "cat" / "c.png")
    assert not any("validation" in f.text for f in found(tmp_path, skip=True))
    (tmp_path / "cat" / "a.png").unlink()
    finding = one(found(tmp_path, skip=True), "validation")
    assert finding.level == "warning"
    assert "none of 1 readable images serves validation" in finding.text


def test_class_folders_that_are_confused_are_problems(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / " cat" / "a.png")
    picture(tmp_path / "d\x1b[31mog" / "a.png")
    findings = found(tmp_path)
    assert one(findings, "the same class 'cat'").level == "problem"
    assert one(findings, "U+001B").level == "problem"
    assert "no class of the run: d\\x1b[31mog" in findings[2].text


def test_hostile_names_do_not_forge_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    data = tmp_path / "data"
    picture(data / "cat" / "a.png")
    for name in (b"b\nOK       data.png", b"\x1b[2K.png", b"caf\xe9.png", b"n\xff.txt"):
        (data / "cat" / os.fsdecode(name)).write_bytes(b"no image")
    config = tmp_path / "run.toml"
    config.write_text(
        'method = "fedavg"\ndevice = "cpu"\ndataset.name = "sites"\n'
        'dataset.class-names = "cat, dog"\n'
    )
    arguments = ["--data-path", str(data), "--run-config", str(config)]
    assert doctor.main(arguments) == 1
    report = capsys.readouterr().out
    report.encode("utf-8")
    assert "cat/b\\nOK       data.png: no image that is known" in report
    assert "cat/\\x1b[2K.png" in report and "cat/caf\\xe9.png" in report
    assert "n\\xff.txt" in report and "\x1b" not in report


def test_terminal_without_accents_shows_names_that_have_them(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "dög" / "a.png")
    config = tmp_path / "run.toml"
    config.write_text(
        'method = "fedavg"\ndevice = "cpu"\ndataset.name = "sites"\n'
        'dataset.class-names = "cat, dög"\n',
        "utf-8",
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "client_app.doctor", "--data-path"),
            *(tmp_path / "data", "--run-config", config),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONIOENCODING": "ascii",
            "CLIP2FL_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 images in" in done.stdout and "d\\xf6g 1" in done.stdout
