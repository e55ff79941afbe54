"""Check a node before it takes part in a federation, and print what to fix::

    python -m client_app.doctor --data-path /data/site-a --run-config conf/sites.toml \
        --superlink server:9092 --root-certificates ca.crt --private-key node-a

Exit status: 0 the node can take part; 1 something must be fixed; 2 wrong usage.
"""  # noqa: D400, D415 (a command line ends it)

import argparse
import io
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import cast

from client_app import data_check, preflight
from client_app.own_site import state_folder, with_own_share, with_own_teacher
from client_app.policy_check import check_ledger, check_policy, site_share
from client_app.preflight import Finding
from clip2fl_common.config import (
    SITES,
    TEACHER_METHODS,
    ConfigError,
    RunConfig,
    Scalar,
    defaults,
    listed_names,
)
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.files import read_toml
from clip2fl_common.files import cache_dir
from clip2fl_common.project import experiment


def findings(
    options: argparse.Namespace, config: RunConfig | None
) -> Iterator[Finding]:
    """Yield the findings of all checks, the quick checks first."""
    now = preflight.now()
    if options.root_certificates:
        yield preflight.check_certificate(options.root_certificates, now)
    if options.private_key:
        yield preflight.check_key(options.private_key)
    if options.superlink:
        yield from preflight.check_server(
            options.superlink, options.root_certificates, now
        )
    if config is not None:
        config = with_own_teacher(config, options.teacher_path)
    yield from check_policy(options.policy, config, options.teacher_path)
    yield check_ledger(options.site_state, options.policy)
    if config is None:
        yield preflight.check_disk(cache_dir(), 0, 0)
        yield Finding(
            "ok", "run", "no --run-config: images, device and teacher are not checked"
        )
        return
    asked = config.dataset.validation_share
    share = site_share(options.site_state, options.policy, asked)
    config = with_own_share(config, share)
    dataset = config.dataset
    taught = config.method in TEACHER_METHODS
    yield preflight.check_disk(
        cache_dir(),
        data_check.count_images(options.data_path),
        dataset.image_size,
        config.distillation.views if taught else 0,
    )
    yield from data_check.check_data(
        options.data_path,
        listed_names(dataset.class_names),
        dataset.image_size,
        dataset.skip_unreadable,
        dataset.validation_share,
    )
    yield preflight.check_device(config.device)
    if config.method in TEACHER_METHODS:
        yield preflight.check_teacher(
            config.teacher.model, config.teacher.pretrained, options.teacher_fingerprint
        )
        from client_app.zero_shot_check import check_zero_shot  # needs torch

        yield check_zero_shot(config, options.data_path)


def site_run_config(path: Path) -> RunConfig:
    """Return a run's configuration: the file's values over the defaults.

    Raises
    ------
    ConfigError
        If the file cannot be read, a value is not allowed, or the run is none of sites.
    """
    flat = {**defaults(), **flatten(read_toml(experiment(path)))}
    config = RunConfig.from_run_config(cast(dict[str, Scalar], flat))
    if config.dataset.name != SITES:
        raise ConfigError(
            f"dataset.name = {config.dataset.name!r}, but only 'sites' uses nodes' own "
            "images"
        )
    return config


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Check a node before it takes part in a federation.",
        epilog="Exit status: 0 it can; 1 something must be fixed; 2 wrong usage.",
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        required=True,
        metavar="DIR",
        help="the node's images, <class>/<image>",
    )
    parser.add_argument(
        "--run-config",
        type=Path,
        metavar="TOML",
        help="the run's configuration: classes, image size, teacher, device; without "
        "one, only what no run changes is checked",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="TOML",
        help="the site's own rules (docs/site-policy.md)",
    )
    parser.add_argument(
        "--site-state",
        type=Path,
        metavar="DIR",
        help="the node's record of what it has answered, if --node-config names one",
    )
    parser.add_argument("--superlink", metavar="HOST:PORT", help="the server")
    parser.add_argument(
        "--root-certificates", type=Path, metavar="FILE", help="the server's ca.crt"
    )
    parser.add_argument(
        "--private-key", type=Path, metavar="FILE", help="the node's private key"
    )
    parser.add_argument(
        "--teacher-path",
        type=Path,
        metavar="DIR",
        help="the node's own folder of the run's teacher, if --node-config names one",
    )
    parser.add_argument(
        "--teacher-fingerprint",
        default="",
        metavar="HEX",
        help="the server's, or its beginning (config.json of a run has it)",
    )
    return parser.parse_args(arguments)


def examine(
    arguments: Sequence[str] | None, prog: str, stop_at: Collection[str] = ()
) -> list[Finding]:
    """Check a node and print each finding.

    Parameters
    ----------
    arguments : sequence of str or None
        Options of the command line; None: those of this process.
    prog : str
        Name of the command in its help.
    stop_at : collection of str
        Checks after whose problem no other check is made.

    Returns
    -------
    list of Finding

    Raises
    ------
    ConfigError
        If the run's configuration cannot be used.
    """
    options = _parse(arguments, prog)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without accents still prints accented names, escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    config = None
    if options.run_config:
        try:
            config = site_run_config(options.run_config)
        except ConfigError as error:
            raise ConfigError(f"{options.run_config}: {error}") from None
    if options.site_state is None:
        options.site_state = state_folder({}, options.data_path)
    found = []
    for finding in findings(options, config):
        print(finding, flush=True)
        found.append(finding)
        if finding.level == "problem" and finding.check in stop_at:
            break
    levels = [finding.level for finding in found]
    problems, warnings = levels.count("problem"), levels.count("warning")
    print(f"\n{problems} to fix, {warnings} warnings", flush=True)
    return found


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m client_app.doctor"
) -> int:
    """Run the command line and return its exit status."""
    try:
        found = examine(arguments, prog)
    except ConfigError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    return 1 if any(finding.level == "problem" for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
