"""What is made from the schema is up to date and says what the code does."""

import json
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field
from pydantic.fields import FieldInfo

from clip2fl_common.config import (
    KEYS,
    ConfigError,
    RunConfig,
    Scalar,
    defaults,
    known_keys,
)
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.types import Rule
from scripts.write_configuration import BEGIN, END, allowed, main, written
from tests.defaults import ROOT, default_config

PAGE = ROOT / "docs" / "configuration.md"


def rows() -> dict[str, list[str]]:
    """Return the page's rows by their key."""
    lines = PAGE.read_text("utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row] for row in cells}


def test_all_is_up_to_date() -> None:
    for name, content in written(ROOT).items():
        assert (ROOT / name).read_text("utf-8") == content, name


def test_flower_gets_the_defaults_of_the_schema() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    block = flatten(project["tool"]["flwr"]["app"]["config"])
    assert block == defaults()
    assert all(type(block[key]) is type(v) for key, v in defaults().items())
    assert {key for key, value in block.items() if value == "auto"} == {
        "device",  # a value of its own
        *(name for name, key in KEYS.items() if key.chosen),
    }


def test_every_key_has_its_default_and_a_meaning() -> None:
    found = rows()
    assert sorted(found) == known_keys()
    block = (ROOT / "pyproject.toml").read_text("utf-8").split(BEGIN)[1].split(END)[0]
    for key, default in defaults().items():
        shown = f'"{default}"' if isinstance(default, str) else str(default).lower()
        if KEYS[key].chosen:
            assert found[key][1].startswith("auto: "), key
        else:
            assert found[key][1] == f"`{shown}`"
        assert len(found[key][5]) > 10
        above = block[: block.index(f"\n{key} = {shown}\n")].splitlines()[-1]
        assert above.startswith("# "), key


def test_page_tells_who_reads_a_key_and_when_it_may_change() -> None:
    found = {key: cells[3:5] for key, cells in rows().items()}
    assert found["seed"] == ["all", "no"]
    assert found["run.trackers"] == ["all", "yes"]
    assert found["fedprox.mu"] == ["fedprox", "no"]
    assert found["synthesis.contrast-weight"] == [
        "clip2fl, clip2flm, clip2fl-plus",
        "no",
    ]
    assert found["checkpoint.every"] == ["all", "yes"]
    assert found["checkpoint.best-metric"] == ["all", "no"]


BOUND = re.compile(r"([≥>≤<]) ([0-9.,e-]+[0-9])")


def accepts(key: str, value: Scalar) -> bool:
    """Tell whether a value is within its key's range."""
    try:
        RunConfig.from_run_config({**default_config(), key: value})
    except ConfigError as error:
        assert key in str(error)
        # A contradiction with another key names both, and no range.
        return "but it must be" not in str(error)
    return True


def test_allowed_values_are_those_that_the_configuration_accepts() -> None:
    """At each limit a value is in range, and just outside it is not."""
    checked = 0
    for key, (_, _, words, *_) in rows().items():
        if not words.startswith(("integer", "number")):
            continue
        for sign, text in BOUND.findall(words):
            limit = float(text.replace(",", ""))
            towards = -math.inf if sign in "≥>" else math.inf
            if words.startswith("integer"):
                inside: Scalar = int(limit)
                outside: Scalar = int(limit) + (-1 if sign in "≥>" else 1)
            else:
                inside, outside = limit, math.nextafter(limit, towards)
            assert accepts(key, inside) == (sign in "≥≤"), (key, inside)
            # Zero may be allowed apart from a range, as a switch.
            assert not accepts(key, outside) or outside == 0, (key, outside)
            checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true, false"),
        (str, "string"),
        (Literal["a", "b"], '`"a"`, `"b"`'),
        (Annotated[int, Field(ge=1)], "integer ≥ 1"),
        (Annotated[float, Field(gt=0, le=1)], "number > 0, ≤ 1"),
        (
            Annotated[float, Field(le=1e6), Rule("0 or ≥ 2", bool, {})],
            "number 0 or ≥ 2, ≤ 1,000,000",
        ),
        (Annotated[str, Rule("a word", bool, {})], "a word"),
    ],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert allowed(FieldInfo.from_annotation(hint)) == words


def validator(kind: str) -> Draft202012Validator:
    """Return what editors check a file by."""
    schema = json.loads((ROOT / "conf" / f"{kind}.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.toml")), ids=str)
def test_files_name_their_schema_and_are_valid(file: Path) -> None:
    text = file.read_text("utf-8")
    kind = "comparison" if "[variants." in text else "run"
    assert text.startswith(f"#:schema ./{kind}.schema.json\n")
    validator(kind).validate(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "sead = 7",
        "client.epoch = 3",
        'seed = "7"',
        "seed = -1",
        "client.epochs = 0",
        "client.epochs = 1.5",
        "client.epochs = true",
        "client = 3",
        "partition.alpha = 0.0",
        "aggregation.trim = 0.5",
        "aggregation.max-length-ratio = 1.0",
        'aggregation.rule = "krum"',
        "dataset.skip-unreadable = 1",
        'device = "cuda:128"',
        'method = "../x"',
        'run.name = ".hidden"',
        'run.dir = "/a\\u0000"',
        'run.trackers = "comet"',
        'teacher.prompt = "a\\nb"',
    ],
)
def test_editors_refuse_what_a_run_refuses(text: str) -> None:
    table = tomllib.loads(text)
    assert not validator("run").is_valid(table)
    with pytest.raises(ConfigError):
        RunConfig.from_run_config({**default_config(), **flatten(table)})  # type: ignore[dict-item]
    comparison = {
        "experiment": "demo.toml",
        "seeds": [7],
        "baseline": "a",
        "settings": {},
        "variants": {"a": {}},
    }
    assert validator("comparison").is_valid(comparison)
    assert not validator("comparison").is_valid({**comparison, "settings": table})
    assert not validator("comparison").is_valid(
        {**comparison, "variants": {"a": table}}
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": []},
        {"seeds": [-1]},
        {"variants": {}},
        {"variants": {"a": {"seeds": ["7"]}}},
        {"share-local-training": 1},
        {"experimant": "demo.toml"},
    ],
    ids=str,
)
def test_editors_check_comparisons(changes: dict[str, Any]) -> None:
    good = {
        "experiment": "demo.toml",
        "seeds": [7],
        "baseline": "a",
        "share-local-training": True,
        "settings": {"client": {"epochs": 3}},
        "variants": {"a": {"seeds": [8], "method": "my-own"}},
    }
    assert validator("comparison").is_valid(good)
    assert not validator("comparison").is_valid({**good, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": "cuda:127", "run.trackers": "mlflow wandb", "run.name": "a.b"},
        {"aggregation.max-length-ratio": 0, "client.learning-rate-final": 1e-9},
        {"method": "one-of-my-own", "dataset.class-names": "Kätzchen, 犬"},
    ],
    ids=str,
)
def test_editors_accept_what_a_run_accepts(changes: dict[str, Scalar]) -> None:
    flat = {**default_config(), **changes}
    RunConfig.from_run_config(flat)
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in flat.items()]
    validator("run").validate(tomllib.loads("".join(lines)))


def test_check_tells_what_to_do_and_writing_does_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in written(ROOT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    stale = (ROOT / "pyproject.toml").read_text("utf-8").replace("seed = 7", "seed = 8")
    (tmp_path / "pyproject.toml").write_text(stale, "utf-8")
    monkeypatch.setattr(sys, "argv", ["write_configuration", "--check"])
    assert main(tmp_path) == 1
    printed = capsys.readouterr().out
    for name in written(ROOT):
        assert f"{name} is out of date: run 'make docs'" in printed
    monkeypatch.setattr(sys, "argv", ["write_configuration"])
    assert main(tmp_path) == 0
    assert (tmp_path / "pyproject.toml").read_text("utf-8") == (
        ROOT / "pyproject.toml"
    ).read_text("utf-8")
    monkeypatch.setattr(sys, "argv", ["write_configuration", "--check"])
    assert main(tmp_path) == 0


def test_lost_place_of_the_block_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\n", "utf-8")
    with pytest.raises(ValueError, match="has lost one of the lines .*make docs"):
        written(tmp_path)
