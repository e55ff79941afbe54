"""What a site decides for itself, and no run may change (docs/site-policy.md).

A run's configuration, and every message, come from the server. A node with images of
its own has rules besides: in a TOML file that its ``--node-config`` names with
``policy``, or as single keys of the node configuration. What cannot be read or
understood forbids every run: a rule must not be lost by a slip of the keyboard.
"""

import difflib
import json
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from logging import getLogger
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from clip2fl_common.config import SITES, TEACHER_METHODS, RunConfig, TeacherConfig

logger = getLogger(__name__)

NodeConfig = Mapping[str, bool | int | float | str]

DATA_PATH = "data-path"
POLICY = "policy"
STATE = "site-state"
# What a node's configuration may have besides single rules.
NODE_KEYS = (DATA_PATH, "site", POLICY, STATE)

# Images of a class that enter its gradient at most, where the site fixes them.
SET_SIZE = 32
# Characters of an error that are sent to the server; Flower adds the error's type.
LONGEST_REASON = 240
# A policy has a few lines.
LARGEST_FILE = 2**20

Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Size = Annotated[float, Field(gt=0, le=1e6)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]
Folder = Annotated[str, Field(pattern=r"^/")]


class SiteRefusal(RuntimeError):
    """A site's own rules forbid what it was asked.

    Parameters
    ----------
    reason : str
        For the site's own log.
    sent : str
        The same for the server, without names from the site's disk; by default the
        reason itself, where it speaks of the rules and of the run only.
    """

    def __init__(self, reason: str, sent: str = "") -> None:
        super().__init__(reason)
        self.sent = one_line(sent or reason)


def one_line(text: str) -> str:
    """Return a text as one line of bounded length, without control characters."""
    printable = (c if c.isprintable() else " " for c in text[: 8 * LONGEST_REASON])
    line = " ".join("".join(printable).split())
    if len(line) <= LONGEST_REASON:
        return line
    return f"{line[: LONGEST_REASON - 3]}..."


@dataclass(
    frozen=True,
    config=ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
    ),
)
class SitePolicy:
    """A site's rules; each is a key of the policy file with ``-`` for ``_``."""

    min_class_samples: Positive = 1
    """Different images that enter a class gradient at least. From 2 on, the site also
    fixes which images those are: the same in all rounds and runs."""
    gradient_samples: Positive | None = None
    """Images of a class that enter its gradient at most, where the site fixes them."""
    gradient_cuts: Positive = 1
    """Sets of images of a class, one after the other, of which gradients are sent."""
    min_evaluation_samples: Positive | None = None
    """Different validation images that a class needs for its accuracy to be sent; by
    default ``min_class_samples``."""
    validation_share: Annotated[float, Field(ge=0.001, le=0.9)] | None = None
    """Share of the images that evaluates; by default that of the first run."""
    min_noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Least privacy.gradient-noise-multiplier of a run."""
    max_clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Greatest privacy.gradient-clip-norm of a run, which must have one."""
    teachers: tuple[Fingerprint, ...] | None = None
    """Fingerprints of the teachers that are used, or their beginnings."""
    teacher_folders: tuple[Folder, ...] = ()
    """Absolute folders of this machine from which a run may name a teacher."""
    hub_downloads: bool = False
    """Whether a run may name any model on the Hugging Face hub (``hf-hub:``)."""
    max_runs: Positive | None = None
    """Runs that are answered in all."""
    max_rounds: Positive | None = None
    """Requests to train, and requests to evaluate, that a run may make."""
    max_request_mib: Size | None = None
    """Largest message that is read, in MiB."""
    max_reply_mib: Size | None = None
    """Largest message that is sent, in MiB."""

    @property
    def fixes_images(self) -> bool:
        """Whether the site fixes which images enter class gradients."""
        return self.min_class_samples > 1

    @property
    def set_size(self) -> int:
        """Images of a class that enter its gradient at most, where they are fixed."""
        return self.gradient_samples or max(SET_SIZE, self.min_class_samples)

    @property
    def evaluation_samples(self) -> int:
        """Validation images that a class needs."""
        return self.min_evaluation_samples or self.min_class_samples

    @property
    def needs_ledger(self) -> bool:
        """Whether a rule counts what was answered before."""
        return self.fixes_images or not (self.max_runs is self.max_rounds is None)

    def rules(self) -> dict[str, Any]:
        """Return each rule by its key, as it is in force."""
        in_force = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "gradient_samples": self.set_size if self.fixes_images else None,
            "gradient_cuts": self.gradient_cuts if self.fixes_images else None,
            "min_evaluation_samples": self.evaluation_samples,
        }
        return {_key(name): value for name, value in in_force.items()}

    def violations(self, config: RunConfig) -> Iterator[str]:
        """Yield what a run's configuration asks for and this site does not do."""
        if config.dataset.name != SITES:
            yield (
                f"this node answers only runs with dataset.name = '{SITES}', and the "
                f"run has {config.dataset.name!r}"
            )
        yield from self._gradient_violations(config)
        if self.max_rounds is not None and config.federation.rounds > self.max_rounds:
            yield (
                f"the run has federation.rounds = {config.federation.rounds}, and the "
                f"site's max-rounds is {self.max_rounds}"
            )
        if config.method in TEACHER_METHODS:
            yield from self.teacher_violations(config.teacher)

    def _gradient_violations(self, config: RunConfig) -> Iterator[str]:
        drawn = config.class_gradients.samples_per_class
        if drawn < self.min_class_samples:
            yield (
                f"the run has class-gradients.samples-per-class = {drawn}, and the "
                f"site's min-class-samples is {self.min_class_samples}"
            )
        privacy = config.privacy
        if self.fixes_images and privacy.min_class_samples > self.set_size:
            yield (
                f"the run has privacy.min-class-samples = {privacy.min_class_samples}, "
                f"and the site's gradient-samples is {self.set_size}"
            )
        noise, norm = privacy.gradient_noise_multiplier, privacy.gradient_clip_norm
        if noise < self.min_noise_multiplier:
            yield (
                f"the run has privacy.gradient-noise-multiplier = {noise:g}, and the "
                f"site's min-noise-multiplier is {self.min_noise_multiplier:g}"
            )
        if self.max_clip_norm is not None and not 0 < norm <= self.max_clip_norm:
            yield (
                f"the run has privacy.gradient-clip-norm = {norm:g}, and the site's "
                f"max-clip-norm is {self.max_clip_norm:g}"
            )

    def teacher_violations(
        self, teacher: TeacherConfig, fingerprint: str | None = None
    ) -> Iterator[str]:
        """Yield why a teacher must not be loaded, or used.

        Whether a path exists makes no difference: the answer must not tell.

        Parameters
        ----------
        teacher : TeacherConfig
            What the run wants.
        fingerprint : str or None
            The teacher's, where the request or the loaded teacher says it.
        """
        from clip2fl_common.teacher import HUB_PREFIX, LOCAL_PREFIX  # needs torch

        if self.teachers is not None and (not self.teachers or fingerprint is not None):
            if not any((fingerprint or "").startswith(own) for own in self.teachers):
                named = fingerprint[:12] if fingerprint else teacher.model
                yield f"the run's teacher {named!r} is not among the site's teachers"
        if teacher.model.startswith(HUB_PREFIX) and not self.hub_downloads:
            yield (
                f"the run's teacher.model is from {HUB_PREFIX}, and the site's "
                "hub-downloads is false"
            )
        paths = {}
        if teacher.model.startswith(LOCAL_PREFIX):
            paths["model"] = teacher.model.removeprefix(LOCAL_PREFIX)
        if "/" in teacher.pretrained or teacher.pretrained.startswith("~"):
            paths["pretrained"] = teacher.pretrained
        for key, path in paths.items():
            if not self._offers(path):
                yield (f"teacher.{key} names a path outside the site's teacher-folders")

    def _offers(self, path: str) -> bool:
        try:
            place = Path(path).expanduser().resolve()
            offered = [Path(folder).resolve() for folder in self.teacher_folders]
        except (OSError, RuntimeError, ValueError):
            return False  # no such user, a loop of links, a null byte
        return any(place.is_relative_to(folder) for folder in offered)


def _key(name: str) -> str:
    return name.replace("_", "-")


_adapter: TypeAdapter[SitePolicy] = TypeAdapter(SitePolicy)

RULES = tuple(_key(field.name) for field in fields(SitePolicy))
# A node's configuration has no lists: there they are strings, separated by commas.
LISTS = ("teachers", "teacher-folders")


def is_real_site(node_config: NodeConfig) -> bool:
    """Tell whether a node has images of its own, as far as it was told.

    A node that simulates a client has a partition. Any other is taken for a site, so
    that a misspelt ``data-path`` takes no protection away.
    """
    return DATA_PATH in node_config or "partition-id" not in node_config


def site_policy(node_config: NodeConfig) -> SitePolicy:
    """Return a site's rules, from the node's configuration and the file it names.

    Parameters
    ----------
    node_config : mapping
        What the node was started with.

    Returns
    -------
    SitePolicy

    Raises
    ------
    SiteRefusal
        If a key is unknown or out of range, the file is not usable, or both have the
        same rule with different values.
    """
    if unknown := sorted(set(node_config) - {*NODE_KEYS, *RULES}):
        raise _unusable(f"--node-config: {_unknown(unknown[0], (*NODE_KEYS, *RULES))}")
    own = {
        key: _listed(value) if key in LISTS and isinstance(value, str) else value
        for key, value in node_config.items()
        if key in RULES
    }
    path = node_config.get(POLICY)
    if path is None:
        return _checked(own, "--node-config")
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise _unusable(f"policy = {path!r} in --node-config is no absolute path")
    filed = _read(Path(path))
    for key in sorted(own.keys() & filed.keys()):
        if own[key] != filed[key]:
            raise _unusable(
                f"{key} is {own[key]!r} in --node-config and {filed[key]!r} in {path}; "
                "say it once"
            )
    _checked(filed, path)
    return _checked(filed | own, f"{path} with --node-config")


def policy_file(path: Path) -> SitePolicy:
    """Return the rules of a policy file by itself; raises as `site_policy`."""
    return _checked(_read(path), str(path))


def writable_by_others(path: Path) -> bool:
    """Tell whether other users may change a file."""
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise _unusable(f"policy file {path} is not there, or no file")
        if path.stat().st_size > LARGEST_FILE:
            raise _unusable(f"policy file {path} is larger than 1 MiB")
        if writable_by_others(path):
            logger.warning("policy file %s can be changed by other users", path)
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(f"policy file {path} cannot be read: {error}") from error


def _checked(rules: Mapping[str, Any], place: str) -> SitePolicy:
    if unknown := sorted(set(rules) - set(RULES)):
        raise _unusable(f"{place}: {_unknown(unknown[0], RULES)}")
    try:
        # Only JSON input lets strict types, tuples and floats go together.
        policy = _adapter.validate_json(json.dumps(rules))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        wanted = problem["msg"].replace("Input should be ", "").replace("String", "it")
        raise _unusable(
            f"{place}: {key} = {problem['input']!r}, but it must be {wanted}"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _unusable(f"{place}: {error}") from error
    if policy.set_size < policy.min_class_samples:
        raise _unusable(
            f"{place}: gradient-samples = {policy.set_size} is less than "
            f"min-class-samples = {policy.min_class_samples}"
        )
    for key in ("gradient-samples", "gradient-cuts"):
        if key in rules and not policy.fixes_images:
            raise _unusable(
                f"{place}: {key} has no effect unless min-class-samples is 2 or more"
            )
    return policy


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _unknown(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
    return f"{key} is no rule and no key of a site{hint}"


def _unusable(reason: str) -> SiteRefusal:
    return SiteRefusal(
        f"no run is answered, as this site's own rules are not usable: {reason}",
        "the site's own rules are not usable; the site's own log says more",
    )
