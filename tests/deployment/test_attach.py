"""A run on a real SuperLink is started, followed, left, followed again and stopped.

No node is needed: the run waits for sites until it is stopped.
"""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.defaults import ROOT
from tests.deployment.stack import Stack, stack, wait_for

KEEP = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"


def command(made: Stack, *arguments: object) -> list[object]:
    """Return a ``clip2fl`` command for the stack's SuperLink."""
    program = [sys.executable, "-m", "clip2fl_cli.app"]
    certificates = ["--root-certificates", made.ca]
    return ["env", f"--chdir={ROOT}", *program, *arguments, *certificates]


@pytest.mark.slow
def test_run_is_left_followed_again_and_stopped(tmp_path: Path) -> None:
    with stack(tmp_path) as made:
        server, told = made.server, tmp_path / "told"
        hook = f"{sys.executable} -c {json.dumps(KEEP)} {told}"
        server.environment = {**server.environment, "CLIP2FL_HOOK": hook}
        made.start_server()
        settings = f'run.dir="{made.results.parent}" run.name="run"'
        start = ("federate", "--run-config", "sites", "--set", settings, "--detach")
        started = server.run(*command(made, *start), timeout=300)
        (run,) = re.findall(r"^run (\d+)$", started, re.M)
        assert f"to follow it: clip2fl attach {run} " in started

        # Without a number: it is the only run.
        server.start("attach", *command(made, "attach", "--verbose"))
        wait_for("attach", lambda: "waiting for sites" in server.log("attach"), 300)
        attach = server.processes.pop("attach")
        attach.send_signal(signal.SIGINT)
        assert attach.wait(60) == 128 + signal.SIGINT
        assert f"run {run} goes on" in server.log("attach")
        status = [*command(made)[:-2], "status", made.results]
        assert "running, 0 of" in server.run(*status)
        # Twenty seconds and more have passed, and the line has come once.
        assert server.log("attach").count("waiting for sites: 0 of") == 1

        stopped = server.run(*command(made, "stop", run), timeout=300)
        assert f"run {run}: finished:stopped" in stopped
        wait_for("end", lambda: "stopped, 0 of" in server.run(*status), 60)
        again = server.run(*command(made, "attach", run), timeout=300)
        assert "finished:stopped" in again
        assert f'run.resume="{made.results}"' in again
        # Followed twice, the log has each line once.
        log = (made.results / "run.log").read_text("utf-8")
        assert log.count(f" run {run}\n") == 1
        assert log.count("run folder: ") == 1
        gone = server.run(*command(made, "attach"), timeout=300)
        assert "0 runs have not ended (none)" in gone
        # Flower's stop lets the ServerApp tell of its end.
        assert json.loads(told.read_text("utf-8"))["what"] == "run-stopped"
