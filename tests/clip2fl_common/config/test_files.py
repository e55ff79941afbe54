"""Files and command lines from people are read, or refused in one line."""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip2fl_common.config import ConfigError
from clip2fl_common.config import files as config_files
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.files import (
    complete_config,
    merge_run_config,
    parse_overrides,
    toml_pair,
)
from tests.defaults import ROOT, default_config


def refused_file(path: Path) -> str:
    """Return the one-line error message for a file of settings."""
    with pytest.raises(ConfigError) as error:
        merge_run_config(ROOT, path, [])
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 700
    assert message.startswith(f"--run-config {path}: ")
    return message.removeprefix(f"--run-config {path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "seed = 1979-05-27",
            r"seed = datetime.date(1979, 5, 27), but it must be a st",
        ),
        (
            "seed = 07:32:00",
            "seed = datetime.time(7, 32), but it must be a string, a n",
        ),
        ("seed = 1979-05-27T07:32:00Z", "seed = datetime.datetime(1979, 5, 27"),
        ("seed = [1, 2]", "seed = a list, but it must be a string, a number"),
        ("[[client]]\nepochs = 1", "client = a list, but it must be a string, a num"),
        ("seed = {}", "seed is a table, but it must be a string, a number"),
        ("[seed]", "seed is a table, but it must be a string, a number"),
        ("seed = {a = 1}", "seed is a table, but it must be a string, a number"),
        ("client.epochs.x = 1", "client.epochs is a table, but it must be"),
        ('"client.epochs" = 1', "the part 'client.epochs' of a key must be letters"),
        ('client."epochs.x" = 1', "the part 'epochs.x' of a key must be letters"),
        ('"" = 1', "the part '' of a key must be letters"),
        ('client."" = 1', "client.: the part '' of a key must be letters"),
        ('"a\\nb" = 1', "the part 'a\\nb' of a key must be letters"),
        ("seed = 9223372036854775808", "seed = an integer of 64 bits, but it must be"),
        ("seed = 0x" + "f" * 99, "seed = an integer of 396 bits, but it must be with"),
        ("seed = " + "9" * 5000, "4300 digits"),
        ("fedprox.mu = inf", "fedprox.mu = inf, but it must be a finite number"),
        ("fedprox.mu = -nan", "fedprox.mu = nan, but it must be a finite number"),
        ("fedprox.mu = 1e999", "fedprox.mu = inf, but it must be a finite number"),
        ("seed = " + "[" * 100_000, "is nested too deeply"),
        ("seed = " + "{a=" * 5000 + "1" + "}" * 5000, "is nested too deeply"),
        (".".join("a" * 5000) + " = 1", "does not exist"),
        ("oops = 1", "run configuration key 'oops' does not exist; pyproject.toml has"),
        ("client.epoch = 1", "'client.epoch' does not exist; did you mean 'client.ep"),
        ("seed = 1\nseed = 2", "Cannot overwrite a value"),
        ("seed = 1\n[seed]", "Cannot overwrite a value"),
        ("seed", "Expected '=' after a key"),
        ("seed = '''\x01'''", "at line 1, column 1"),
        (b"seed = 1\xff", "is not UTF-8 text (byte 8)"),
        ("seed = 1".encode("utf-16"), "is not UTF-8 text (byte 0)"),
        (b"\xed\xa0\x80 = 1", "is not UTF-8 text"),
        (b"\xef\xbb\xbfseed = 1", "begins with a byte-order mark"),
        (b"seed = 1\n#" + b"x" * 2**22, "is longer than 4,194,304 bytes"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_odd_files_are_refused_in_one_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "conf.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused_file(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (
            lambda path: path.mkdir(),
            "cannot be read (it is a folder, a pipe or a device, and no file)",
        ),
        (os.mkfifo, "cannot be read (it is a folder, a pipe or a device, and no file)"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels"),
        (
            lambda path: path.symlink_to("/dev/zero"),
            "cannot be read (it is a folder, a p",
        ),
    ],
    ids=["missing", "folder", "pipe", "loop", "device"],
)
def test_what_is_no_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "conf.toml"
    make(path)
    assert message in refused_file(path)


def test_names_that_no_file_can_have() -> None:
    assert "cannot be read (File name too long)" in refused_file(Path("x" * 300))
    for path in (Path("a\0b"), Path("a\nb")):
        with pytest.raises(ConfigError, match="cannot be read") as error:
            merge_run_config(ROOT, path, [])
        assert str(error.value).startswith(f"--run-config {str(path)!r}: ")
        with pytest.raises(ConfigError, match="cannot be read") as error:
            merge_run_config(ROOT, None, [], path)
        assert str(error.value).startswith(f"--resume {str(path)!r}: ")


@pytest.mark.parametrize(
    "pair",
    [
        *("seed=1979-05-27", "seed=[1,2]", "seed={}", "seed=" + "[" * 10_000),
        *("seed=9223372036854775808", "seed=" + "9" * 5000, "fedprox.mu=inf"),
        *("fedprox.mu=nan", "a..b=1", ".seed=1", "sèed=1", "seed=1979-99-99"),
        *("run.dir='\udcff'", "seed=", "seed=nan" + "x" * 10**5, "run.name='a\nb'"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_odd_pairs_are_refused_in_one_line(pair: str) -> None:
    with pytest.raises(
        ConfigError, match="--set: cannot read .*strings need quotes"
    ) as e:
        parse_overrides([pair])
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 700


@pytest.mark.parametrize(
    "text", ["\N{CAT FACE} {class}", 'a "b" c', "it's", "\\", "a\tb\x7f", " = x=1"]
)
def test_written_pairs_are_read_again(text: str) -> None:
    pairs = [toml_pair("run.name", text), toml_pair("seed", 8)]
    assert parse_overrides([" ".join(pairs)]) == {"run.name": text, "seed": 8}


def test_tables_in_pairs_are_settings_or_unknown() -> None:
    assert parse_overrides(["client={epochs=3} seed=0x10"]) == {
        "client.epochs": 3,
        "seed": 16,
    }
    with pytest.raises(ConfigError, match=r"'seed\.a' does not exist"):
        merge_run_config(ROOT, None, ["seed={a=1}"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"seed": [1]}', "seed = a list, but it must be"),
        ('{"seed": NaN}', "seed = nan, but it must be a finite number"),
        ('{"seed": 1e999}', "seed = inf, but it must be a finite number"),
        ('{"seed": 9223372036854775808}', "an integer of 64 bits"),
        ('{"run.name": "\\ud800"}', "valid Unicode text"),
        ('{"seed": null}', "seed = None, but it must be"),
        ("[1]", "cannot be read"),
        ("7", "cannot be read"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"oops": 1}', "'oops' does not exist"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_odd_configurations_of_interrupted_runs_are_refused(
    tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "config.json").write_text('{"config": ' + config + "}", "utf-8")
    with pytest.raises(ConfigError) as error:
        merge_run_config(ROOT, None, [], tmp_path)
    assert str(error.value).startswith(f"--resume {tmp_path}: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_pipe_in_the_place_of_an_interrupted_run_is_not_waited_for(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="--resume .*cannot be read .*a pipe"):
        merge_run_config(ROOT, None, [], tmp_path)


def test_merged_text_is_toml_whatever_the_strings() -> None:
    """JSON leaves one character unescaped that TOML does not accept."""
    text = merge_run_config(
        ROOT, None, ["run.name='\"\\' client.learning-rate=1e-7", 'run.dir="\\u007f"']
    )
    assert flatten(tomllib.loads(text)) == {
        "run.name": '"\\',
        "client.learning-rate": 1e-7,
        "run.dir": "\x7f",
    }


def test_longest_class_names_fit_into_a_file(tmp_path: Path) -> None:
    names = ", ".join(f"{n:05}{'犬' * 40}" for n in range(10_000))
    file = tmp_path / "conf.toml"
    file.write_text(
        f'dataset.name = "sites"\ndataset.class-names = "{names}"\n', "utf-8"
    )
    config = complete_config(merge_run_config(ROOT, file, []))
    assert config.dataset.class_names == names


def test_complete_configuration_is_defaults_and_changes() -> None:
    config = complete_config(merge_run_config(ROOT, None, ["seed=8"]))
    assert config.to_flat() == {**default_config(), "seed": 8}
    with pytest.raises(ConfigError, match=r"client\.epochs = 0, but it must be"):
        complete_config("client.epochs = 0\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", r"has no \[tool.flwr.app\]"),
        ("tool = 7", r"has no \[tool.flwr.app\]"),
        ("[tool.flwr]\napp = []", r"has no \[tool.flwr.app\]"),
        ("[tool.flwr.app.config]\nx = [1]", "x = a list"),
        ("x", "Expected '='"),
    ],
)
def test_folder_without_an_app_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "pyproject.toml").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        config_files.default_settings(tmp_path)
    assert "pyproject.toml" in str(error.value)


def test_nested_tables_become_dotted_keys() -> None:
    nested = {"a": {"b": {"c": 1}, "d": "x"}, "e": True, "f": {}}
    assert flatten(nested) == {"a.b.c": 1, "a.d": "x", "e": True}
    deep: dict[str, object] = {"x": 1}
    for _ in range(5000):
        deep = {"a": deep}
    assert flatten(deep) == {"a." * 5000 + "x": 1}
    assert json.dumps(flatten({"a": {"b": 1}}, "run.")) == '{"run.a.b": 1}'


def test_one_client_sees_each_photograph_as_often_as_twenty_do() -> None:
    """The upper bound differs from protocol S only in the clients."""
    shared, alone = (
        flatten(tomllib.loads((ROOT / "conf" / name).read_text("utf-8")))
        for name in ("photos-quick.toml", "photos-one-client.toml")
    )

    def passes(settings: dict[str, Any]) -> float:
        rounds, epochs = settings["federation.rounds"], settings["client.epochs"]
        drawn, clients = (
            settings["federation.clients-per-round"],
            settings["partition.clients"],
        )
        return float(rounds * epochs * drawn / clients)

    assert passes(alone) == passes(shared)
    differing = {key for key in shared if alone.get(key) != shared[key]}
    assert differing <= {
        "client.epochs",
        "federation.clients-per-round",
        "partition.alpha",
        "partition.clients",
    }
