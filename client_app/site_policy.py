"""A site's own rules, which no run may change (docs/site-policy.md).

A run's configuration and every message come from the server. A node with images of its
own also has rules. They are in a TOML file that its ``--node-config`` names with
``policy``, or are single keys of the node configuration. A file or key that cannot be
understood forbids every run: a typing error must not disable a rule.
"""

import difflib
import json
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from logging import getLogger
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from client_app.site_epsilon import implied_fields, unprotected
from clip2fl_common.config import (
    SITES,
    TEACHER_METHODS,
    Privacy,
    RunConfig,
    TeacherConfig,
)
from clip2fl_common.messages import GRADIENTS
from clip2fl_common.protection import protection
from clip2fl_common.secure.statements import LEAST_PARTIES
from clip2fl_common.signed_folder import KEY_PATTERN

logger = getLogger(__name__)

NodeConfig = Mapping[str, bool | int | float | str]

DATA_PATH = "data-path"
POLICY = "policy"
STATE = "site-state"
TEACHER_PATH = "teacher-path"
# Keys of a node's configuration that are not rules.
NODE_KEYS = (DATA_PATH, "site", POLICY, STATE, TEACHER_PATH)

# Most images of a class that enter its gradient, if the site fixes them.
SET_SIZE = 32
# Most characters of an error sent to the server; Flower adds the error's type.
LONGEST_REASON = 240
# Most bytes of a policy file, which has a few lines.
LARGEST_FILE = 2**20

Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Size = Annotated[float, Field(gt=0, le=1e6)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]
Folder = Annotated[str, Field(pattern=r"^/")]
PublicKey = Annotated[str, Field(pattern=KEY_PATTERN)]
File = Folder


class SiteRefusal(RuntimeError):
    """A site's own rules forbid a request.

    Parameters
    ----------
    reason : str
        Text for the site's own log.
    sent : str
        Text for the server, without names from the site's disk. Defaults to the
        reason, for reasons that describe only the rules and the run.
    """

    def __init__(self, reason: str, sent: str = "") -> None:
        super().__init__(reason)
        self.sent = one_line(sent or reason)


def one_line(text: str) -> str:
    """Return the text as one short line without control characters."""
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
        populate_by_name=True,
    ),
)
class SitePolicy:
    """A site's rules. Each is a key of the policy file, with ``-`` for ``_``."""

    min_class_samples: Positive = 1
    """Fewest different images of a class that a class gradient or class moments need.
    From 2 on, the site also fixes which images these are: the same in all rounds and
    runs."""
    gradient_samples: Positive | None = None
    """Most images of a class that enter its gradient, if the site fixes them."""
    gradient_cuts: Positive = 1
    """Most sets of images of a class that the site sends gradients of, one set after
    another."""
    min_evaluation_samples: Positive | None = None
    """Fewest different validation images that a class needs for its accuracy to be
    sent; by default ``min_class_samples``."""
    send_confusion_matrix: bool = False
    """Whether the site sends a confusion matrix when the server asks for one, as it
    does in the last round. The sums of its rows are the site's class counts among the
    validation images."""
    validation_share: Annotated[float, Field(ge=0.001, le=0.9)] | None = None
    """Share of the images for validation; by default the share of the first run."""
    min_noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Least privacy.gradient-noise-multiplier of a run, and least
    privacy.moment-noise-multiplier if it asks for class moments."""
    min_model_noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Least privacy.model-noise-multiplier of a run."""
    max_epsilon: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Greatest epsilon that all of the site's answers to train may spend together, over
    all runs. It needs noise on everything that an answer holds."""
    epsilon_delta: Annotated[float, Field(ge=1e-15, lt=1)] = 1e-5
    """The delta for which max-epsilon holds."""
    max_clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Greatest privacy.gradient-clip-norm of a run, which must have one, and greatest
    privacy.moment-clip-norm if it asks for class moments."""
    teachers: tuple[Fingerprint, ...] | None = None
    """Fingerprints (or their first characters) of the allowed teachers."""
    teacher_folders: tuple[Folder, ...] = ()
    """Absolute folders of this machine from which a run may name a teacher."""
    hub_downloads: bool = False
    """Whether a run may name any model on the Hugging Face hub (``hf-hub:``)."""
    max_runs: Positive | None = None
    """Most runs that the site answers."""
    max_rounds: Positive | None = None
    """Most requests of each kind, to train and to evaluate, that a run may make."""
    max_request_mib: Size | None = None
    """Largest request that the site reads, in MiB."""
    max_reply_mib: Size | None = None
    """Largest reply that the site sends, in MiB."""
    models_folder: Folder | None = None
    """Absolute folder in which the site keeps the models that the server delivers; by
    default it takes none."""
    model_key: PublicKey | None = None
    """The server's public key, 64 hexadecimal digits: it must have signed a model."""
    max_model_mib: Size = 1024.0
    """Largest delivered model that the site takes, in MiB."""
    max_models: Positive = 8
    """Most delivered models that the site keeps: the oldest make room for others."""
    listed_in_card: bool = False
    """Whether the card of the delivered model, which all sites get, has this site's
    name, number of training images and accuracy."""
    secure_only: bool = False
    """Whether the site answers only runs with secure aggregation."""
    min_secure_sites: Annotated[int, Field(ge=LEAST_PARTIES, le=1_000_000)] = (
        LEAST_PARTIES
    )
    """Fewest sites in a sum that the site takes part in."""
    identity_key: File | None = None
    """Absolute path of the private key with which the site signs in secure sums."""
    trusted_sites: File | None = None
    """Absolute path of the site's own list of the sites and their public keys."""

    @property
    def fixes_images(self) -> bool:
        """Return whether the site fixes which images enter class gradients."""
        return self.min_class_samples > 1

    @property
    def set_size(self) -> int:
        """Return the most images of a class in its gradient, if the site fixes them."""
        return self.gradient_samples or max(SET_SIZE, self.min_class_samples)

    @property
    def evaluation_samples(self) -> int:
        """Return the fewest validation images that a class needs."""
        return self.min_evaluation_samples or self.min_class_samples

    @property
    def needs_ledger(self) -> bool:
        """Return whether a rule depends on what was answered before."""
        budgets = (self.max_runs, self.max_rounds, self.max_epsilon)
        # In secure sums all images are divided once, whatever the server asks for.
        fixed = self.fixes_images or self.identity_key is not None
        return fixed or any(budget is not None for budget in budgets)

    def with_teacher(self, folder: Path | None) -> "SitePolicy":
        """Return these rules, which also allow the site's own folder of the teacher."""
        if folder is None:
            return self
        return replace(self, teacher_folders=(*self.teacher_folders, str(folder)))

    def rules(self) -> dict[str, Any]:
        """Return each rule's value in force, by key."""
        in_force = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "gradient_samples": self.set_size if self.fixes_images else None,
            "gradient_cuts": self.gradient_cuts if self.fixes_images else None,
            "min_evaluation_samples": self.evaluation_samples,
        }
        return {_key(name): value for name, value in in_force.items()}

    def violations(self, config: RunConfig) -> Iterator[str]:
        """Yield each conflict between a run's configuration and this site's rules."""
        if config.dataset.name != SITES:
            yield (
                f"this node answers only runs with dataset.name = '{SITES}', and the "
                f"run has {config.dataset.name!r}"
            )
        yield from self._gradient_violations(config)
        yield from self._secure_violations(config)
        noise = config.privacy.model_noise_multiplier
        if noise < self.min_model_noise_multiplier:
            yield (
                f"the run has privacy.model-noise-multiplier = {noise:g}, and the "
                "site's min-model-noise-multiplier is "
                f"{self.min_model_noise_multiplier:g}"
            )
        if self.max_epsilon is not None:
            yield from unprotected(config, implied_fields(config))
        if self.max_rounds is not None and config.federation.rounds > self.max_rounds:
            yield (
                f"the run has federation.rounds = {config.federation.rounds}, and the "
                f"site's max-rounds is {self.max_rounds}"
            )
        if config.method in TEACHER_METHODS:
            yield from self.teacher_violations(config.teacher)

    def field_violations(self, field: str, privacy: Privacy) -> Iterator[str]:
        """Yield each reason not to send a field, for lack of clipping or noise.

        Parameters
        ----------
        field : str
            Name of a reply field.
        privacy : Privacy
            The run's settings of privacy.
        """
        required = self.min_noise_multiplier > 0 or self.max_clip_norm is not None
        own = protection(field, privacy)
        if own is None:
            if required:
                yield (
                    f"the run asks for {field}, which have neither clipping nor noise, "
                    "and the site's min-noise-multiplier or max-clip-norm requires them"
                )
            return
        if own.noise < self.min_noise_multiplier:
            yield (
                f"the run has privacy.{own.name}-noise-multiplier = {own.noise:g}, and "
                f"the site's min-noise-multiplier is {self.min_noise_multiplier:g}"
            )
        if self.max_clip_norm is not None and not 0 < own.norm <= self.max_clip_norm:
            yield (
                f"the run has privacy.{own.name}-clip-norm = {own.norm:g}, and the "
                f"site's max-clip-norm is {self.max_clip_norm:g}"
            )

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
        # Of class gradients always: a request may ask for them, whatever the method.
        for field in dict.fromkeys((GRADIENTS, *implied_fields(config))):
            yield from self.field_violations(field, privacy)

    def _secure_violations(self, config: RunConfig) -> Iterator[str]:
        if not config.aggregation.secure:
            if self.secure_only:
                yield (
                    "the run has aggregation.secure = false, and the site's "
                    "secure-only is true"
                )
            return
        if self.identity_key is None or self.trusted_sites is None:
            yield (
                "the run has aggregation.secure = true, and the site has no "
                "identity-key or no trusted-sites"
            )
        if config.federation.clients_per_round < self.min_secure_sites:
            yield (
                f"the run has federation.clients-per-round = "
                f"{config.federation.clients_per_round}, and the site's "
                f"min-secure-sites is {self.min_secure_sites}"
            )

    def teacher_violations(
        self, teacher: TeacherConfig, fingerprint: str | None = None
    ) -> Iterator[str]:
        """Yield each reason not to load or use a teacher.

        The reasons do not depend on whether a path exists, so they do not reveal it.

        Parameters
        ----------
        teacher : TeacherConfig
            The run's teacher.
        fingerprint : str or None
            The teacher's fingerprint, if the request or the loaded teacher gives it.
        """
        from clip2fl_common.teacher import HUB_PREFIX, LOCAL_PREFIX  # needs torch

        if self.teachers is not None and (not self.teachers or fingerprint is not None):
            if not any((fingerprint or "").startswith(own) for own in self.teachers):
                # Without the folder, which may be this site's own.
                named = fingerprint[:12] if fingerprint else teacher.model.split(":")[0]
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
            return False  # unknown user, loop of links, or null byte
        return any(place.is_relative_to(folder) for folder in offered)


def _key(name: str) -> str:
    return name.replace("_", "-")


_adapter: TypeAdapter[SitePolicy] = TypeAdapter(SitePolicy)

RULES = tuple(_key(field.name) for field in fields(SitePolicy))
# A node's configuration holds no lists: these are strings separated by commas.
LISTS = ("teachers", "teacher-folders")


def is_real_site(node_config: NodeConfig) -> bool:
    """Return whether a node has images of its own, by its configuration.

    A node that simulates a client has a partition. Any other node counts as a site, so
    that a misspelt ``data-path`` does not remove its protection.
    """
    return DATA_PATH in node_config or "partition-id" not in node_config


def site_policy(node_config: NodeConfig) -> SitePolicy:
    """Return a site's rules, from the node's configuration and the file it names.

    Parameters
    ----------
    node_config : mapping
        The node's configuration.

    Returns
    -------
    SitePolicy

    Raises
    ------
    SiteRefusal
        If a key is unknown or out of range, if the file cannot be used, or if file and
        node configuration give one rule different values.
    """
    if unknown := sorted(set(node_config) - {*NODE_KEYS, *RULES}):
        raise _unusable(f"--node-config: {_unknown(unknown[0], (*NODE_KEYS, *RULES))}")
    return _given_policy(node_config).with_teacher(teacher_folder(node_config))


def teacher_folder(node_config: NodeConfig) -> Path | None:
    """Return the site's own folder of the teacher, if it has one.

    Raises
    ------
    SiteRefusal
        If ``teacher-path`` is not an absolute path.
    """
    path = node_config.get(TEACHER_PATH)
    if path is None:
        return None
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise _unusable(f"teacher-path = {path!r} in --node-config is no absolute path")
    return Path(path)


def _given_policy(node_config: NodeConfig) -> SitePolicy:
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
    """Return the rules of a policy file alone; raises like `site_policy`."""
    return _checked(_read(path), str(path))


def writable_by_others(path: Path) -> bool:
    """Return whether other users may change a file."""
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
        # Only JSON input allows strict types together with tuples and floats.
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
    if policy.models_folder and not policy.model_key:
        raise _unusable(
            f"{place}: models-folder needs model-key, the public key of the server"
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
