"""Check a site's own rules, and a run's configuration against them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client_app.preflight import Finding, Level
from client_app.site_epsilon import answer_cost, implied_fields
from client_app.site_keys import site_keys
from client_app.site_ledger import LedgerError, SiteLedger
from client_app.site_policy import (
    SitePolicy,
    SiteRefusal,
    policy_file,
    writable_by_others,
)
from clip2fl_common.config import TEACHER_METHODS, RunConfig
from clip2fl_common.epsilon import answers_within
from clip2fl_common.secure.statements import SecureError


def check_policy(
    path: Path | None, config: RunConfig | None, teacher: Path | None = None
) -> Iterator[Finding]:
    """Yield each rule, and each conflict of a run with the rules.

    Parameters
    ----------
    path : Path or None
        The site's policy file.
    config : RunConfig or None
        A run's configuration.
    teacher : Path or None
        The site's own folder of the teacher.

    Yields
    ------
    Finding
    """
    policy = SitePolicy()
    if path is None:
        yield Finding(
            "ok",
            "policy",
            "no policy: the run decides which images enter class gradients, and how "
            "well they are protected (docs/site-policy.md)",
        )
    else:
        try:
            policy = policy_file(path)
        except SiteRefusal as error:
            yield Finding(
                "problem",
                "policy",
                str(error),
                "correct the file (docs/site-policy.md)",
            )
            return
        if writable_by_others(path):
            yield Finding(
                "warning",
                "policy",
                f"{path} can be changed by other users",
                f"chmod go-w {path}",
            )
        rules = ", ".join(
            f"{key} = {_shown(value)}" for key, value in policy.rules().items()
        )
        yield Finding("ok", "policy", f"{path}: {rules}")
        if policy.models_folder is not None:
            yield _check_models(Path(policy.models_folder))
    yield from _key_findings(policy)
    if config is None:
        return
    policy = policy.with_teacher(teacher)
    problems = list(policy.violations(config))
    if policy.teachers and config.method in TEACHER_METHODS and not problems:
        problems += _teacher_problems(policy, config)
    for problem in problems:
        yield Finding(
            "problem",
            "policy",
            f"this site would refuse the run: {problem}",
            "change the run's configuration, or the site's policy",
        )
    if policy.max_epsilon is not None and not problems:
        yield _epsilon_finding(policy, config)


def _epsilon_finding(policy: SitePolicy, config: RunConfig) -> Finding:
    """Return how many answers of a run the whole budget of epsilon allows."""
    each = answer_cost(config, implied_fields(config))
    answers = answers_within(policy.max_epsilon or 0.0, each, policy.epsilon_delta)
    text = (
        f"max-epsilon = {policy.max_epsilon:g} allows {answers} answers with the noise "
        "of this run, if none was given before"
    )
    if answers:
        return Finding("ok", "epsilon", text)
    return Finding(
        "problem", "epsilon", text, "more noise in the run, or a greater max-epsilon"
    )


def _check_models(folder: Path) -> Finding:
    """Return whether the node can store models; the folder itself may be missing."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Finding("ok", "models", f"delivered models go to {folder}")
    return Finding(
        "problem",
        "models",
        f"models-folder = {folder}, but this user cannot write into {place}",
        f"make {folder}, owned by the node's user, or name another folder",
    )


def _key_findings(policy: SitePolicy) -> Iterator[Finding]:
    try:
        found = site_keys(policy)
    except SecureError as error:
        yield Finding("problem", "keys", str(error), "see docs/secure-aggregation.md")
        return
    if found is not None:
        identity, trust = found
        yield Finding(
            "ok",
            "keys",
            f"this site is {identity.name} in secure sums; it trusts "
            f"{', '.join(sorted(trust.keys))}",
        )


def _teacher_problems(policy: SitePolicy, config: RunConfig) -> list[str]:
    from clip2fl_common.teacher import TeacherError, load_teacher

    try:
        teacher = load_teacher(config.teacher.model, config.teacher.pretrained)
    except (TeacherError, ValueError):
        return []  # check_teacher reports the reason
    return list(policy.teacher_violations(config.teacher, teacher.fingerprint))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def site_share(folder: Path, policy: Path | None, asked: float) -> float:
    """Return the share of validation images that the node will use.

    Parameters
    ----------
    folder : Path
        Folder of the site's record; the first run's share is in it.
    policy : Path or None
        The site's policy file, whose own share comes first.
    asked : float
        The share that the run asks for.
    """
    own, ledger = readable_rules(policy).validation_share, SiteLedger(folder)
    if own is not None:
        return own
    try:
        if ledger.path.exists():
            return ledger.validation_share(asked, keep=False)
    except LedgerError:
        pass  # `check_ledger` tells it
    return asked


def check_ledger(folder: Path, policy: Path | None) -> Finding:
    """Return whether the site can write its record of what it has answered.

    Parameters
    ----------
    folder : Path
        Folder of the record.
    policy : Path or None
        The site's policy file; some rules need the record.

    Returns
    -------
    Finding
    """
    ledger = SiteLedger(folder)
    rules = readable_rules(policy)
    fix = "let this user write there; no budget is kept without it"
    level: Level = "problem" if policy else "warning"
    if not ledger.path.exists():
        # Do not create the folder here: it must belong to the node's own user.
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if os.access(place, os.W_OK | os.X_OK):
            return Finding("ok", "ledger", f"{ledger.path}: nothing answered yet")
        return Finding(level, "ledger", f"{place} cannot be written to", fix)
    try:
        told = f"{ledger.path}: {ledger.runs()} runs answered so far"
        if rules.max_epsilon is not None:
            told += f", epsilon = {ledger.spent(rules):.4g} of {rules.max_epsilon:g}"
    except LedgerError as error:
        return Finding(level, "ledger", str(error), fix)
    return Finding("ok", "ledger", told)


def readable_rules(path: Path | None) -> SitePolicy:
    """Return the rules of a policy file; `check_policy` reports one with faults."""
    try:
        return policy_file(path) if path else SitePolicy()
    except SiteRefusal:
        return SitePolicy()
