"""What a release says of itself is the same everywhere."""

import re
import tomllib

import yaml

from tests.defaults import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_one_version_everywhere() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest, date = re.findall(r"^## \[(\d[^]]*)\] - (\S+)$", changes, flags=re.M)[0]
    assert PROJECT["version"] == newest == CITATION["version"]
    assert str(CITATION["date-released"]) == date


def test_oldest_python_is_tried() -> None:
    gate = (ROOT / ".github" / "workflows" / "gate.yml").read_text("utf-8")
    tried = yaml.safe_load(gate)["jobs"]["linux"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={tried[0]}"
