"""A comparison: which runs it has, and running those that are not there yet."""

import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TextIO, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client_app.shared_training import FOLDER_VARIABLE
from clip2fl_cli.configuration import defaults, resolve
from clip2fl_cli.runs import FinishedRun, is_complete
from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.dotted_keys import flatten
from clip2fl_common.provenance import ALL_CODE, code_fingerprint
from scripts.simulate import RunResult, simulate
from server_app.resume import ResumeError, load_newest

# Where a run goes and what watches it do not change its outcome.
WITHOUT_INFLUENCE = ("run.dir", "run.name", "run.trackers", "run.resume")


class ComparisonError(ValueError):
    """A comparison's file or folder is not as it should be; says what to do."""


class _File(BaseModel):
    """The TOML file of a comparison."""

    model_config = ConfigDict(extra="forbid", strict=True)

    experiment: str
    seeds: Annotated[list[int], Field(min_length=1)]
    baseline: str
    share_local_training: bool = Field(default=False, alias="share-local-training")
    settings: dict[str, Any] = {}
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes
    ----------
    variant : str
        What is compared: a method with settings.
    seed : int
        Its seed.
    config : RunConfig
        Its configuration, folder included.
    """

    variant: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Where it leaves its results."""
        return Path(self.config.run.dir) / self.config.run.name


@dataclass(frozen=True)
class Comparison:
    """Variants, each with some seeds, and the one that the others are set against.

    Attributes
    ----------
    name : str
        From the file's name.
    baseline : str
        A variant.
    folder : Path
        Where its runs and results lie.
    plan : tuple of PlannedRun
        Seed by seed, so that all variants are there early.
    shares_local_training : bool
        Whether what clients train is kept until all runs are there, so that variants
        which differ at the server only train once.
    """

    name: str
    baseline: str
    folder: Path
    plan: tuple[PlannedRun, ...]
    shares_local_training: bool = False

    @property
    def local_training(self) -> Path:
        """Where local models are kept that runs have in common."""
        return self.folder / "local-training"

    @classmethod
    def read(
        cls,
        file: Path,
        runs: Path,
        overrides: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> "Comparison":
        """Read a comparison's file and check every run's configuration.

        Parameters
        ----------
        file : Path
            TOML with ``experiment`` (a run configuration, relative to this file),
            ``seeds``, ``baseline``, ``[settings]`` for all and one table of settings
            for each of ``[variants]``; ``seeds`` in a variant are its own;
            ``share-local-training``, false by default.
        runs : Path
            Folder under which the comparison has its own.
        overrides : sequence of str
            ``key=value`` pairs for all variants.
        seeds : sequence of int
            Instead of all seeds in the file.

        Returns
        -------
        Comparison

        Raises
        ------
        ComparisonError
            If the file is not as described.
        ConfigError
            If a variant's configuration is not allowed.
        """
        content = _parse(file)
        folder = runs.resolve() / file.stem
        of_variant: dict[str, list[PlannedRun]] = {}
        for variant, table in content.variants.items():
            own_seeds = seeds or table.get("seeds", content.seeds)
            own = flatten({**content.settings} | _without(table, "seeds"))
            of_variant[variant] = [
                PlannedRun(
                    variant,
                    seed,
                    _configured(file, content, own, overrides, folder, variant, seed),
                )
                for seed in own_seeds
            ]
        longest = max(map(len, of_variant.values()))
        plan = [
            planned[n]
            for n in range(longest)
            for planned in of_variant.values()
            if n < len(planned)
        ]
        return cls(
            file.stem,
            content.baseline,
            folder,
            tuple(plan),
            content.share_local_training,
        )

    def finished(self) -> dict[str, list[FinishedRun]]:
        """Return each variant's complete runs."""
        found: dict[str, list[FinishedRun]] = {}
        for run in self.plan:
            if is_complete(run.folder):
                found.setdefault(run.variant, []).append(FinishedRun.read(run.folder))
        return found

    def missing(self) -> list[PlannedRun]:
        """Return the runs that are still to be made.

        Raises
        ------
        ComparisonError
            If a complete run was made with another configuration.
        """
        missing = []
        for run in self.plan:
            if is_complete(run.folder):
                _check_same(run)
            else:
                missing.append(run)
        return missing


class Watcher(Protocol):
    """Is told how a comparison goes on; what a run prints goes to it as well."""

    def started(self, run: PlannedRun) -> TextIO:
        """Return where the log of a run that is about to start shall go."""

    def ended(self, run: PlannedRun, result: RunResult) -> None:
        """Take note of how a run ended."""


def complete(comparison: Comparison, watcher: Watcher) -> Iterator[PlannedRun]:
    """Make the missing runs, one after the other; a failure does not stop the others.

    An interrupted run goes on from its last checkpoint. Where that is not possible
    (there is none yet, or it is another code's or configuration's), what it has left is
    set aside, and the run starts again.

    Parameters
    ----------
    comparison : Comparison
        What is to be complete.
    watcher : Watcher
        Follows it.

    Yields
    ------
    PlannedRun
        Each run that did not complete.
    """
    for run in comparison.missing():
        going_on = _can_go_on(run)
        if not going_on:
            _set_aside(run.folder)
        output = watcher.started(run)
        with _local_training_shared(comparison):
            result = (
                simulate(resume=run.folder, output=output)
                if going_on
                else _begin(run, output)
            )
        watcher.ended(run, result)
        if not result.completed:
            yield run
    if not comparison.missing() and comparison.local_training.exists():
        shutil.rmtree(comparison.local_training)


@contextmanager
def _local_training_shared(comparison: Comparison) -> Iterator[None]:
    """Have simulations keep their local models with the comparison, if it shares."""
    if comparison.shares_local_training:
        os.environ[FOLDER_VARIABLE] = str(comparison.local_training)
    try:
        yield
    finally:
        os.environ.pop(FOLDER_VARIABLE, None)


def _begin(run: PlannedRun, output: TextIO) -> RunResult:
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        # JSON writes booleans, numbers and strings exactly as TOML does.
        for key, value in run.config.to_flat().items():
            file.write(f"{key} = {json.dumps(value, ensure_ascii=False)}\n")
        file.flush()
        return simulate(run_config=Path(file.name), output=output)


def _parse(file: Path) -> _File:
    try:
        content = _File.model_validate(tomllib.loads(file.read_text("utf-8")))
    except OSError as error:
        raise ComparisonError(f"cannot read the comparison {file}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ComparisonError(f"{file}: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ComparisonError(
            f"{file} is no comparison ({problems}); see conf/demo-compare.toml"
        ) from None
    if content.baseline not in content.variants:
        raise ComparisonError(
            f"{file}: baseline = {content.baseline!r} is none of the variants "
            f"{', '.join(content.variants)}"
        )
    return content


def _configured(
    file: Path,
    content: _File,
    own: Mapping[str, object],
    overrides: Sequence[str],
    folder: Path,
    variant: str,
    seed: int,
) -> RunConfig:
    config = resolve(
        file.parent / content.experiment, overrides, cast(Mapping[str, Scalar], own)
    )
    place: dict[str, Scalar] = {
        "seed": seed,
        "run.dir": str(folder),
        "run.name": f"{variant}-seed{seed}",
    }
    return RunConfig.from_run_config({**config.to_flat(), **place})


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def _check_same(run: PlannedRun) -> None:
    # A key that is newer than the run had its default.
    found = {**defaults(), **FinishedRun.read(run.folder).config}
    for key, wanted in run.config.to_flat().items():
        if key not in WITHOUT_INFLUENCE and found[key] != wanted:
            raise ComparisonError(
                f"{run.folder} was made with {key} = {found[key]!r}, but the "
                f"comparison now wants {wanted!r}: choose another folder with --runs, "
                "or remove that one"
            )


def _can_go_on(run: PlannedRun) -> bool:
    """Whether the folder holds a checkpoint of this very run."""
    try:
        newest = load_newest(run.folder)
    except ResumeError:
        return False
    wanted = run.config.to_flat()
    return newest.made_with["code"] == code_fingerprint(packages=ALL_CODE) and all(
        newest.config.get(key) == value
        for key, value in wanted.items()
        if key not in WITHOUT_INFLUENCE
    )


def _set_aside(folder: Path) -> None:
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.part{number}")).exists():
            number += 1
        folder.rename(aside)
