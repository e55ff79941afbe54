"""Check a node's certificate, key and way to the server; its images need a run's file.

    python deploy/check_connection.py HOST:PORT CA KEY

Exit status: 0 the node can connect; 1 something must be fixed.
"""  # noqa: D400, D415 (a command line ends it)

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client_app import preflight


def main(superlink: str, certificates: str, key: str) -> int:
    """Print what the checks find, and return the exit status."""
    now = preflight.now()
    findings = [
        preflight.check_certificate(Path(certificates), now),
        preflight.check_key(Path(key)),
        *preflight.check_server(superlink, Path(certificates), now),
    ]
    for finding in findings:
        print(finding, flush=True)
    print("images: not checked, as RUN_CONFIG names no run's configuration")
    return int(any(finding.level == "problem" for finding in findings))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
