"""The check of configuration keys finds what it is for."""

from pathlib import Path

import pytest

from scripts.check_config_keys import ROOT, key_comments, problems

PYPROJECT = """
[tool.flwr.app.config]
# Fixes what is drawn at random.
seed = 7
model.name = "a#b"  # Architecture.
# Side in pixels.
dataset.image-size = 32
"""
CONFIG = """
class Model:
    name: str

class Dataset:
    image_size: int

class RunConfig:
    seed: int
    model: Model
    dataset: Dataset
"""
SERVER = """
def main(context: Context) -> None:
    config = RunConfig.from_run_config(context.run_config)
    print(config.seed)
    load(config.dataset)

class Session:
    def name(self) -> str:
        model = self.config.model
        return model.name
"""
COMMON = """
from clip2fl_common.config import Dataset as DatasetConfig

def load(config: DatasetConfig) -> int:
    return config.image_size
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Return a small app without a problem."""
    for name, text in {
        "pyproject.toml": PYPROJECT,
        "clip2fl_common/config.py": CONFIG,
        "clip2fl_common/data/datasets.py": COMMON,
        "server_app/app.py": SERVER,
        "conf/demo.toml": 'seed = 8\n[model]\nname = "b"\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    """Replace a part of a file that must be there."""
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_sound_app_has_no_problems(app: Path) -> None:
    """Reads by alias, by annotation and through an attribute are all seen."""
    assert list(problems(app)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "key", "reason"),
    [
        ("server_app/app.py", "config.seed", "seed", "seed", "nothing reads"),
        ("server_app/app.py", "model.name", "other.name", "model.name", "nothing read"),
        (
            "clip2fl_common/data/datasets.py",
            "return config.image_size",
            "config.image_size = 3",
            "dataset.image-size",
            "nothing reads",
        ),
        ("pyproject.toml", "# Side in pixels.", "", "dataset.image-size", "no comment"),
        ("pyproject.toml", "  # Architecture.", "", "model.name", "no comment"),
        ("clip2fl_common/config.py", "seed: int", "sead: int", "seed", "no field"),
        ("pyproject.toml", "seed = 7", "", "seed", "no such key"),
        ("conf/demo.toml", "seed", "sead", "sead", "no such key"),
        ("conf/demo.toml", "[model]", "[modal]", "modal.name", "no such key"),
    ],
)
def test_problem_is_found(
    app: Path, file: str, old: str, new: str, key: str, reason: str
) -> None:
    """A dead, undocumented, untyped or unknown key is named with the reason."""
    replace(app / file, old, new)
    assert any(f" {key}: {reason}" in problem for problem in problems(app))


def test_comparison_is_looked_into(app: Path) -> None:
    """Its own keys are none of the run configuration; those of its variants are."""
    comparison = app / "conf" / "compare.toml"
    comparison.write_text(
        'experiment = "demo.toml"\nseeds = [1]\nbaseline = "a"\n'
        "[settings]\nseed = 3\n[variants.a]\nseeds = [2]\nseed = 4\n"
        "[variants.b]\nmodel.name = 'x'\n",
        "utf-8",
    )
    assert list(problems(app)) == []
    replace(comparison, "seed = 4", "sead = 4")
    replace(comparison, "[settings]\nseed", "[settings]\nseet")
    found = list(problems(app))
    assert len(found) == 2
    assert all("conf/compare.toml: " in p and "no such key" in p for p in found)


def test_same_name_of_another_variable_is_no_read(app: Path) -> None:
    """An argument of another type hides the configuration of the same name."""
    replace(app / "clip2fl_common/data/datasets.py", ": DatasetConfig", ": Other")
    assert any("dataset.image-size: nothing reads" in p for p in problems(app))


def test_comment_belongs_to_one_key() -> None:
    """The comment above a key does not serve the key below it; lines are joined."""
    text = "[tool.flwr.app.config]\n# One,\n# two.\na = 1\nb = 2\nd = '#' # Four.\n"
    text += "[tool.flwr.app.config.g]\n# Three.\nc = 3\n[other]\n# Five.\ne = 4\n"
    assert key_comments(text) == {"a": "One, two.", "d": "Four.", "g.c": "Three."}


def test_this_app_has_no_problems() -> None:
    """The keys of this app are documented, typed and read."""
    assert list(problems(ROOT)) == []
