"""A comparison: the list of its runs, and executing the missing ones.

What reads runs is imported on use: torch takes seconds, and a wrong setting is refused
before.
"""

import operator
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from clip2fl_cli.app_folder import refuse_missing_images
from clip2fl_cli.configuration import as_file, flat_settings, read_toml, resolve
from clip2fl_cli.flower_command import SimulationError
from clip2fl_cli.output import OutputFolder
from clip2fl_cli.run_schema import (
    MAX_RUNS,
    MAX_VARIANTS,
    Images,
    Seed,
    component_problem,
)
from clip2fl_cli.simulation import RunResult, simulate
from clip2fl_common.config import ConfigError, RunConfig, Scalar
from clip2fl_common.config.files import parse_overrides
from clip2fl_common.config.same_run import differences
from clip2fl_common.project import experiment
from clip2fl_common.provenance import (
    ALL_CODE,
    SHARED_TRAINING_VARIABLE,
    code_fingerprint,
)
from clip2fl_common.shown import listed, short, shown
from server_app.folder_lock import in_use
from server_app.foreign_files import ForeignFileError, check

if TYPE_CHECKING:
    from clip2fl_cli.runs import FinishedRun
    from clip2fl_cli.summary import Failure

# A reason fills one cell of a table; the log contains the rest.
MAX_REASON = 300
# A warning names no more runs.
MAX_NAMED = 20

_SEEDS = "write seeds = [...], or give --seed (in Python, seeds=[...])"
_PLACE = "the comparison's file names its folder, and --runs the parent of that folder"
# Keys that a comparison sets for each of its runs, and what decides them.
_OWN_KEYS = {
    "seed": _SEEDS,
    "run.dir": _PLACE,
    "run.name": _PLACE,
    "run.resume": "the command continues unfinished runs by itself",
}
_OTHER_IMAGES = "other test images would be compared"
# Keys that must be the same in all variants, and what a difference would mean.
_SAME_KEYS = {
    "evaluation.tuning-share": "other test images would be held out",
    "evaluation.max-images": "rounds before the last would use other test images",
    "dataset.imbalance-factor": "other classes would be the few-shot ones",
    **dict.fromkeys(
        (
            "dataset.name",
            "dataset.root",
            "dataset.test-list",
            "dataset.test-split",
            "dataset.demo-test-per-class",
        ),
        _OTHER_IMAGES,
    ),
}

_Seeds = Annotated[list[Seed], Field(min_length=1, max_length=MAX_RUNS)]
_seeds: TypeAdapter[list[int]] = TypeAdapter(_Seeds, config=ConfigDict(strict=True))


class ComparisonError(ValueError):
    """A comparison's file or folder is not valid; says what to do."""


class ComparisonFile(BaseModel):
    """The TOML file of a comparison."""

    model_config = ConfigDict(extra="forbid", strict=True)

    experiment: str
    seeds: _Seeds
    baseline: str
    share_local_training: bool = Field(default=False, alias="share-local-training")
    settings: dict[str, Any] = {}
    variants: Annotated[
        dict[str, dict[str, Any]], Field(min_length=1, max_length=MAX_VARIANTS)
    ]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes
    ----------
    variant : str
        Name of the variant: a method with settings.
    seed : int
        Seed of the run.
    config : RunConfig
        Configuration of the run, including its folder.
    """

    variant: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The folder of the run's results."""
        return Path(self.config.run.dir) / self.config.run.name


@dataclass(frozen=True)
class Comparison:
    """Variants, each with some seeds, and the baseline for the others.

    Attributes
    ----------
    name : str
        Name, from the file's name.
    baseline : str
        The variant with which the others are compared.
    folder : Path
        Folder of the runs and results.
    plan : tuple of PlannedRun
        Ordered by seed, so that a result of every variant is available early.
    shares_local_training : bool
        Whether local training is cached until all runs are complete, so that variants
        which differ only at the server train once.
    folders : tuple of Path
        Folders of the runs of all variants in the file, even if only some are to run.
    """

    name: str
    baseline: str
    folder: Path
    plan: tuple[PlannedRun, ...]
    shares_local_training: bool = False
    folders: tuple[Path, ...] = ()

    @property
    def local_training(self) -> Path:
        """The folder of the local models that runs share."""
        return self.folder / "local-training"

    @classmethod
    def read(
        cls,
        file: Path,
        runs: Path,
        overrides: Sequence[str] = (),
        seeds: Sequence[int] = (),
        variants: Sequence[str] = (),
        settings: Mapping[str, Scalar] | None = None,
    ) -> "Comparison":
        """Read a comparison's file and check every run's configuration.

        Parameters
        ----------
        file : Path
            TOML with ``experiment`` (a run configuration, relative to this file, or the
            name of one that comes with the program), ``seeds``, ``baseline``,
            ``[settings]`` for all variants and one table of settings for each of
            ``[variants]``, where ``seeds`` replace the common seeds;
            ``share-local-training``, false by default.
        runs : Path
            Folder in which the comparison gets its own folder.
        overrides : sequence of str
            ``key=value`` pairs for all variants.
        seeds : sequence of int
            Replace all seeds in the file.
        variants : sequence of str
            The only variants to run; all by default.
        settings : mapping or None
            Dotted keys for all variants, which take precedence over the file.

        Returns
        -------
        Comparison

        Raises
        ------
        ComparisonError
            If the file is not as described, a setting has no effect in a comparison, or
            variants would be judged on other test images.
        ConfigError
            If a variant's configuration is not allowed.
        """
        content = _parse(file)
        chosen = _chosen(content, variants)
        none_given = isinstance(seeds, Sequence) and not seeds
        for_all = None if none_given else _checked_seeds(seeds, "--seed")
        if problem := component_problem(file.stem):
            raise ComparisonError(
                f"{shown(file)}: its runs go to a folder of its name, but "
                f"{short(file.stem)} {problem}: rename it"
            )
        folder = runs.resolve() / file.stem
        where = shown(file)
        run_config = experiment(Path(content.experiment), file.parent)
        # Checked first: an error in these settings is not the fault of a variant.
        general = flat_settings(content.settings, f"{where}: settings")
        _refuse_own_keys(general, f"{where}: settings")
        _refuse_own_keys(parse_overrides(overrides), "--set")
        _refuse_own_keys(settings or {}, "settings")
        seeds_of = {
            variant: for_all
            or _checked_seeds(
                table.get("seeds", content.seeds),
                f"{where}: variants.{shown(variant)}.seeds",
            )
            for variant, table in content.variants.items()
        }
        of_variant: dict[str, list[PlannedRun]] = {}
        for variant, table in chosen.items():
            named = f"{where}: variants.{shown(variant)}"
            # Merged key by key: a variant that sets another key of client still gets
            # the common client.epochs.
            of_table = flat_settings(_without(table, "seeds"), named)
            _refuse_own_keys(of_table, named)
            own = {**general, **of_table, **(settings or {})}
            try:
                config = resolve(run_config, overrides, own)
            except ConfigError as error:
                raise ConfigError(f"{named}: {error}") from None
            of_variant[variant] = [
                PlannedRun(variant, seed, _placed(config, folder, variant, seed))
                for seed in seeds_of[variant]
            ]
        _refuse_other_images(of_variant, where)
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
            tuple(
                folder / _folder_name(variant, seed)
                for variant, of_file in seeds_of.items()
                for seed in of_file
            ),
        )

    def refuse_absent(self, images: Images | None) -> None:
        """Raise before the first run if no run will have these test images.

        Raises
        ------
        ComparisonError
            If a part of the test images is wanted, but they are not divided.
        """
        if images in (None, Images.ALL):
            return
        if any(run.config.evaluation.tuning_share == 0 for run in self.plan):
            raise ComparisonError(
                f"--images {images}: evaluation.tuning-share = 0, so the test images "
                "are not divided: set it for all variants, for example to 0.2"
            )

    def finished(self) -> "dict[str, list[FinishedRun]]":
        """Return each variant's complete runs."""
        from clip2fl_cli.runs import FinishedRun, is_complete

        found: dict[str, list[FinishedRun]] = {}
        for run in self.plan:
            if is_complete(run.folder):
                found.setdefault(run.variant, []).append(FinishedRun.read(run.folder))
        return found

    def missing(self) -> list[PlannedRun]:
        """Return the runs that are not complete yet.

        Raises
        ------
        ComparisonError
            If a complete run was made with another configuration.
        """
        from clip2fl_cli.runs import is_complete

        missing = []
        for run in self.plan:
            if is_complete(run.folder):
                _check_same(run)
            else:
                missing.append(run)
        return missing

    def other_code(self) -> str:
        """Return a warning if other code made complete runs, else an empty text."""
        from clip2fl_cli.runs import FinishedRun, is_complete

        present = _present_code()
        others = [
            run.folder.name
            for run in self.plan
            if is_complete(run.folder)
            and FinishedRun.read(run.folder).all_code != present
        ]
        if not others:
            return ""
        return (
            "other code than the present one made the complete runs "
            f"{listed(others, MAX_NAMED)} in {shown(self.folder)}. They are "
            "not repeated: to make them again, remove their folders, or choose another "
            "folder with --runs"
        )


class Watcher(Protocol):
    """Receives the progress of a comparison, and the output of its runs."""

    def started(self, run: PlannedRun) -> TextIO:
        """Return the stream for the log of a run that is about to start."""

    def ended(self, run: PlannedRun, result: RunResult) -> None:
        """Receive the result of a run."""


def complete(comparison: Comparison, watcher: Watcher) -> "Iterator[Failure]":
    """Execute the missing runs one after the other, even if one fails.

    An interrupted run continues from its last checkpoint. If this is not possible (it
    has no checkpoint, or another code or configuration made it), its folder is renamed
    and the run starts again.

    Parameters
    ----------
    comparison : Comparison
        The comparison to complete.
    watcher : Watcher
        Receives the progress.

    Yields
    ------
    Failure
        Each run that did not complete, with the reason.

    Raises
    ------
    ConfigError
        Before the first run, if the images of a missing run are not there; names the
        variant.
    OutputError
        Before the first run, if the comparison's folder cannot be made.
    """
    from clip2fl_cli.summary import Failure

    missing = comparison.missing()
    for run in missing:
        try:
            refuse_missing_images(run.config.dataset)
        except ConfigError as error:
            raise ConfigError(f"variant {shown(run.variant)}: {error}") from None
    with OutputFolder.open(comparison.folder):
        pass
    for run in missing:
        output = watcher.started(run)
        try:
            with _local_training_shared(comparison):
                result = _execute(run, output)
        except (ConfigError, SimulationError, OSError) as error:
            result = RunResult("not-started", str(error), "")
        watcher.ended(run, result)
        if not result.completed:
            lines = (result.details or result.status).strip().splitlines()
            reason = shown(lines[0] if lines else "no reason given")[:MAX_REASON]
            yield Failure(run.variant, run.seed, reason)
    _remove_local_training(comparison)


def _remove_local_training(comparison: Comparison) -> None:
    """Remove the cached local models, unless a run may still need them."""
    from clip2fl_cli.runs import is_complete

    # Another command may execute other variants or seeds.
    if all(map(is_complete, comparison.folders)) and not any(
        map(in_use, comparison.folder.iterdir())
    ):
        # Two commands may end at once.
        shutil.rmtree(comparison.local_training, ignore_errors=True)


@contextmanager
def _local_training_shared(comparison: Comparison) -> Iterator[None]:
    """Cache local models in the comparison's folder, if the comparison shares them."""
    if comparison.shares_local_training:
        os.environ[SHARED_TRAINING_VARIABLE] = str(comparison.local_training)
    try:
        yield
    finally:
        os.environ.pop(SHARED_TRAINING_VARIABLE, None)


def _execute(run: PlannedRun, output: TextIO) -> RunResult:
    # Another command may execute the same comparison. This comes first, as looking for
    # a checkpoint renames damaged ones.
    if in_use(run.folder):
        raise SimulationError(
            f"another run works in {shown(run.folder)}: wait until it ends, or stop it"
        )
    if _can_go_on(run):
        return simulate(resume=run.folder, output=output)
    _set_aside(run.folder)
    with as_file(run.config) as file:
        return simulate(run_config=file, output=output)


def _parse(file: Path) -> ComparisonFile:
    try:
        content = check(read_toml(file), ComparisonFile, shown(file))
    except ForeignFileError as error:
        raise ComparisonError(
            f"the comparison {error}; conf/demo-compare.toml is an example"
        ) from None
    folders: dict[str, str] = {}
    for variant in content.variants:
        # The longest folder name that the variant may get.
        if problem := component_problem(_folder_name(variant, 2**32 - 1)):
            raise ComparisonError(
                f"{shown(file)}: the variant {short(variant)} {problem}, but its runs "
                "go to folders of that name: choose another"
            )
        # On some file systems two such names are the same folder.
        same = unicodedata.normalize("NFKC", variant).casefold()
        if same in folders:
            raise ComparisonError(
                f"{shown(file)}: the variants {short(folders[same])} and "
                f"{short(variant)} have the same name but for case or form: rename one"
            )
        folders[same] = variant
    if content.baseline not in content.variants:
        raise ComparisonError(
            f"{shown(file)}: baseline = {short(content.baseline)} is none of the "
            f"variants {shown(', '.join(content.variants))}"
        )
    return content


def _chosen(content: ComparisonFile, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the chosen variants in the order of the file; all if none is named."""
    if not names:
        return content.variants
    for name in names:
        if name not in content.variants:
            raise ComparisonError(
                f"--variant {shown(name)}: there is no such variant; there are "
                f"{shown(', '.join(content.variants))}"
            )
    if content.baseline not in names:
        raise ComparisonError(
            f"--variant: the baseline {shown(content.baseline)} must be among the "
            "chosen variants, as the others are set against it"
        )
    return {name: v for name, v in content.variants.items() if name in names}


def _refuse_other_images(
    of_variant: Mapping[str, Sequence[PlannedRun]], where: str
) -> None:
    """Raise if variants would be judged on other images or groups of classes."""
    for key, consequence in _SAME_KEYS.items():
        (first, value), *others = (
            (variant, planned[0].config.to_flat()[key])
            for variant, planned in of_variant.items()
        )
        for variant, other in others:
            if other != value:
                raise ComparisonError(
                    f"{where}: {key} is {short(value)} in the variant {shown(first)} "
                    f"and {short(other)} in {shown(variant)}, so {consequence}: set it "
                    "for all variants, in [settings] or with --set"
                )


def _refuse_own_keys(keys: Iterable[str], where: str) -> None:
    """Raise if settings have a key that the comparison sets for each run."""
    for key in keys:
        if key in _OWN_KEYS:
            raise ComparisonError(
                f"{where}: {key} has no effect in a comparison, which sets it for each "
                f"run: {_OWN_KEYS[key]}"
            )


def _checked_seeds(seeds: Any, where: str) -> list[int]:
    try:
        # NumPy's whole numbers, too; True is none.
        found = _seeds.validate_python(
            [s if isinstance(s, bool) else operator.index(s) for s in seeds]
        )
    except (ValidationError, TypeError):
        found = []
    if not found or len(set(found)) < len(found):
        raise ComparisonError(
            f"{where} = {short(seeds)}, but it must be different whole numbers from 0 "
            f"to {2**32 - 1}, at least one"
        )
    return found


def _folder_name(variant: str, seed: int) -> str:
    return f"{variant}-seed{seed}"


def _placed(config: RunConfig, folder: Path, variant: str, seed: int) -> RunConfig:
    """Return a variant's configuration for one seed, with its own folder."""
    place: dict[str, Scalar] = {
        "seed": seed,
        "run.dir": str(folder),
        "run.name": _folder_name(variant, seed),
        "run.resume": "",
    }
    return RunConfig.from_run_config({**config.to_flat(), **place})


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def _check_same(run: PlannedRun) -> None:
    from clip2fl_cli.runs import FinishedRun

    there = FinishedRun.read(run.folder)
    wanted = run.config.for_classes(len(there.class_names))
    for key, then, now in differences(there.config, wanted.to_flat()):
        raise ComparisonError(
            f"{shown(run.folder)} was made with {key} = {short(then)}, but the "
            f"comparison now wants {short(now)}: choose another folder with --runs, or "
            "remove that one"
        )


def _can_go_on(run: PlannedRun) -> bool:
    """Return whether the folder contains a checkpoint of exactly this run."""
    from safetensors import SafetensorError

    from server_app.checkpoints import load_newest

    try:
        newest = load_newest(run.folder)
    # There is no checkpoint, or another program wrote it.
    except (ValueError, KeyError, TypeError, OSError, SafetensorError):
        return False
    same_code = newest.made_with.get("code") == _present_code()
    # Some defaults depend on the number of classes, which the planned run may not know.
    bias = newest.model.get("classifier.bias")
    wanted = run.config if bias is None else run.config.for_classes(len(bias))
    return same_code and not differences(newest.config, wanted.to_flat())


def _present_code() -> str:
    # Read again: in a notebook, files may have changed since the last comparison.
    return code_fingerprint.__wrapped__(packages=ALL_CODE)


def _set_aside(folder: Path) -> None:
    if os.path.lexists(folder):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.part{number}")).exists():
            number += 1
        folder.rename(aside)
