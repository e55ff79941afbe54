r"""Start a run on a SuperLink, follow it to its end and tell whether it completed.

``flwr run --stream`` ends with status 0 even when the ServerApp failed, and with the
connection when the SuperLink restarts, while the run goes on. This follows the run
itself::

    python clip2fl_cli/federation.py --superlink 127.0.0.1:8000 \
        --root-certificates keys/ca.crt --run-config conf/sites.toml

Start it at the server: Flower's Control API must not be reachable from elsewhere.
Exit status: 0 the run completed; 1 it did not; 2 wrong usage.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip2fl_cli.simulation import (
    ANSI,
    NOISE,
    ROOT,
    copy_app,
    merge_run_config,
    not_negative,
    refuse_bad_config,
)

PROFILE = "server"
RETRY_SECONDS = 3.0
# Each look starts two processes of about a second; a round takes longer than this.
LOOK_SECONDS = 15.0


class Federation:
    """A SuperLink and the means to talk to it.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of its Control API.
    certificates : Path
        The federation's ca.crt.
    folder : Path
        Where Flower's settings for this connection go.
    patience : float
        Seconds for which the SuperLink may be away.
    """

    def __init__(
        self, address: str, certificates: Path, folder: Path, patience: float
    ) -> None:
        (folder / "config.toml").write_text(
            f"[superlink.{PROFILE}]\n"
            f"address = {json.dumps(address)}\n"
            f"root-certificates = {json.dumps(str(certificates.resolve()))}\n",
            "utf-8",
        )
        self._flwr = str(Path(sys.executable).with_name("flwr"))
        self._environment = dict(
            os.environ,
            FLWR_HOME=str(folder),
            FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_UPDATE_CHECK="1",
        )
        self._patience = patience

    def start(self, app: Path, run_config: Path) -> str:
        """Start a run and return its id.

        Raises
        ------
        RuntimeError
            If it is refused or the SuperLink stays away.
        """
        deadline = time.monotonic() + self._patience
        while True:
            answer = self._ask(
                *("run", str(app), PROFILE, "--run-config", str(run_config))
            )
            if started := re.search(r"Successfully started run (\d+)", answer):
                return started[1]
            if "refused" not in answer.lower() or time.monotonic() > deadline:
                raise RuntimeError(f"the run was not started: {answer.strip()}")
            time.sleep(RETRY_SECONDS)

    def follow(self, run: str) -> tuple[str, str]:
        """Print the run's log to its end; return its status and details."""
        shown = 0
        last_seen = time.monotonic()
        while True:
            status = self._status(run)
            if status is not None:
                last_seen = time.monotonic()
                # It ends in empty lines, where the next ones will stand.
                lines = self._ask("log", run, PROFILE, "--show").rstrip().splitlines()
                for line in lines[shown:]:
                    if not NOISE.match(line) and "Starting logstream" not in line:
                        print(line, flush=True)
                shown = max(shown, len(lines))
                if status[0].startswith("finished"):
                    return status
            elif time.monotonic() - last_seen > self._patience:
                return "unknown", f"no SuperLink for {self._patience:.0f} s"
            time.sleep(LOOK_SECONDS)

    def _status(self, run: str) -> tuple[str, str] | None:
        answer = self._ask("ls", PROFILE, "--run-id", run, "--format", "json")
        try:
            (found,) = json.loads(answer)["runs"]
            return str(found["status"]), str(found["status-details"])
        except (ValueError, KeyError):
            return None

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(
            [self._flwr, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        return ANSI.sub("", done.stdout)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Start a run on a SuperLink and follow it to its end.",
        epilog="Exit status: 0 only if the run completed.",
    )
    parser.add_argument("--superlink", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument(
        "--root-certificates", type=Path, required=True, metavar="FILE", help="ca.crt"
    )
    parser.add_argument("--run-config", type=Path, metavar="TOML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="'KEY=VALUE ...'", dest="pairs"
    )
    parser.add_argument(
        "--patience",
        type=not_negative,
        default=300.0,
        metavar="S",
        help="seconds for which the SuperLink may be away (default: 300)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="clip2fl-") as directory:
        folder = Path(directory)
        try:
            text = merge_run_config(ROOT, options.run_config, options.pairs)
            refuse_bad_config(ROOT, text)
        except (ValueError, OSError) as error:
            print(f"federate.py: {error}", file=sys.stderr)
            return 2
        (folder / "run-config.toml").write_text(text, "utf-8")
        copy_app(ROOT, folder / "app")
        federation = Federation(
            options.superlink, options.root_certificates, folder, options.patience
        )
        try:
            run = federation.start(folder / "app", folder / "run-config.toml")
        except RuntimeError as error:
            print(f"federate.py: {error}", file=sys.stderr)
            return 1
        print(f"run {run}", flush=True)
        status, details = federation.follow(run)
    print(f"{status} ({details})", flush=True)
    return 0 if status == "finished:completed" else 1


if __name__ == "__main__":
    sys.exit(main())
