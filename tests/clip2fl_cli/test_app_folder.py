"""Flower receives only the app, without other files of the folder."""

from pathlib import Path

from clip2fl_cli.app_folder import write_app_folder
from clip2fl_common.project import PROJECT
from clip2fl_common.provenance import ALL_CODE, code_fingerprint
from tests.defaults import ROOT


def test_own_app_is_its_packages_and_what_describes_it(tmp_path: Path) -> None:
    write_app_folder(PROJECT, tmp_path / "app")
    names = {entry.name for entry in (tmp_path / "app").iterdir()}
    assert names == {"pyproject.toml", "LICENSE", "README.md", *ALL_CODE}
    # Clients refuse another checkout's code by this hash.
    copied = code_fingerprint(tmp_path / "app", ALL_CODE)
    assert copied == code_fingerprint(ROOT, ALL_CODE)
    folder = "clip2fl_common/teacher"
    for file in (ROOT / folder).glob("demo_teacher*.json"):
        assert (tmp_path / "app" / folder / file.name).read_bytes() == file.read_bytes()


def test_other_app_is_copied_without_what_no_bundle_may_contain(tmp_path: Path) -> None:
    app = tmp_path / "app"
    kept = ("pyproject.toml", "LICENSE", ".gitignore", "inner/x.py", "inner/x.json")
    dropped = (".venv/x.py", "inner/__pycache__/x.py", "inner/x.npz", "x.toml.bak")
    for name in (*kept, *dropped):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(name)
    write_app_folder(app, tmp_path / "copy")
    found = {
        str(file.relative_to(tmp_path / "copy"))
        for file in (tmp_path / "copy").rglob("*")
        if file.is_file()
    }
    assert found == set(kept)
