"""Try hostile input on the real ServerApp and ClientApps::

    python -m tests.hostile                # all of it, some minutes
    python -m tests.hostile --every 20     # every twentieth case

Each case may take 10 s, all together 3 GiB more than the process has at its start, and
no file outside the folders of the case is touched. The server's run completes or ends
with an error of its own; a ClientApp answers, and tells nothing of what is on its disk.
Exit status: 0 all cases went so; 1 some did not, and each is named.
"""  # noqa: D400, D415 (a command line ends it)

import argparse
import copy
import logging
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from flwr.app import Context, Message, RecordDict

import strategy.grid
import strategy.site_clients
from client_app.app import app
from clip2fl_common.config import RunConfig
from server_app.app import main as server_main
from tests.defaults import run_config
from tests.flower_private import act_as_flower_process
from tests.hostile.configurations import hostile_configurations
from tests.hostile.folders import honest_folder, hostile_folders
from tests.hostile.guard import (
    LIMIT_S,
    Guard,
    TookTooLongError,
    bound_memory,
    own_temporary_folder,
)
from tests.hostile.replies import Change, hostile_answers, hostile_replies
from tests.in_process_grid import InProcessGrid

SECRET = "the-content-of-a-private-key"
HIDDEN = "name-of-a-private-folder"
OWN_MODULES = ("clip2fl_common", "server_app", "strategy", "client_app")

Case = TypeVar("Case")
Failure = tuple[str, str]


def small_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the flat configuration of a small run of sites."""
    settings = {
        "method": "fedavg",
        "dataset__name": "sites",
        "dataset__class_names": "circle, triangle, square, star",
        "dataset__validation_share": 0.3,
        "dataset__skip_unreadable": True,
        "federation__rounds": 1,
        "federation__clients_per_round": 2,
        "run__dir": str(folder),
        "run__name": "run",
        "device": "cpu",
    }
    return run_config(**{**settings, **changes}).to_flat()


class Grid(InProcessGrid):
    """A grid whose ClientApps see any configuration, and whose answers may change.

    Parameters
    ----------
    flat : mapping of str to scalar
        The run's configuration as clients get it.
    sites : sequence of Path
        One folder a node.
    change : callable or None
        Takes the request and reply of the first site; returns what arrives.
    kinds : collection of str
        Types of the messages that are changed.
    """

    def __init__(
        self,
        flat: Mapping[str, Any],
        sites: Iterable[Path],
        change: Change | None = None,
        kinds: Iterable[str] = ("train",),
    ) -> None:
        nodes = [
            {"data-path": str(folder), "site": f"site-{number}"}
            for number, folder in enumerate(sites)
        ]
        super().__init__(cast(RunConfig, _Flat(flat)), len(nodes), 1, None, nodes)
        self.change, self.kinds = change, set(kinds)
        self.messages: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the ClientApps' replies, the first site's changed."""
        requests = list(messages)
        self.messages += copy.deepcopy(requests)
        replies = super().send_and_receive(requests, timeout=timeout)
        by_node = {request.metadata.dst_node_id: request for request in requests}
        first = self._ids[0]
        return [
            self.change(by_node[first], reply)
            if self.change
            and reply.metadata.src_node_id == first
            and reply.metadata.message_type in self.kinds
            and not reply.has_error()
            else reply
            for reply in replies
        ]


class _Flat:
    """Stands for a configuration that may be none."""

    def __init__(self, flat: Mapping[str, Any]) -> None:
        self._flat = dict(flat)

    def to_flat(self) -> dict[str, Any]:
        return dict(self._flat)


def serve(grid: Grid, flat: Mapping[str, Any]) -> str:
    """Run the ServerApp; return what is wrong with how it ended, if anything."""
    context = Context(1, 0, {}, RecordDict(), cast(Any, dict(flat)))
    try:
        server_main(grid, context)
    except Exception as error:
        return _judged(error)
    return ""


def _judged(error: Exception) -> str:
    """Return what is wrong with an error that a user gets to see."""
    text = str(error)
    own = type(error).__module__.split(".")[0] in OWN_MODULES
    if not own and not isinstance(error, FileExistsError | FileNotFoundError):
        return "traceback:\n" + "".join(traceback.format_exception(error))
    if SECRET in text or HIDDEN in text:
        return f"tells a secret: {text[:300]}"
    return ""


def answer(message: Message, flat: Mapping[str, Any], site: Path) -> str:
    """Have a site's ClientApp answer; return what is wrong with that, if anything."""
    context = Context(
        1,
        message.metadata.dst_node_id,
        cast(Any, {"data-path": str(site), "site": "site-0"}),
        RecordDict(),
        cast(Any, dict(flat)),
    )
    try:
        reply = app(copy.deepcopy(message), context)
    except Exception as error:
        return _judged(error)
    said = str(reply.error.reason) if reply.has_error() else ""
    if SECRET in said or HIDDEN in said or len(said) > 1000 or "\n" in said:
        return f"says too much: {said[:300]!r}"
    return ""


class Trial:
    """All cases, in a folder of their own.

    Parameters
    ----------
    folder : Path
        Where everything lies.
    every : int
        Take every so manieth case.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.guard = Guard()
        self.guard.install()
        self.cache = folder / "cache"
        self.cache.mkdir()
        os.environ["CLIP2FL_CACHE_DIR"] = str(self.cache)
        # torch's compiler makes a folder when it is imported.
        self.torch = folder / "torch"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.torch)
        self.counts: dict[str, int] = {}
        self.failures: list[Failure] = []
        self.slowest = 0.0
        self.sites = [honest_folder(folder / f"honest-{n}", 100 * n) for n in (0, 1)]

    def _chosen(self, kind: str, cases: Iterable[Case]) -> Iterator[Case]:
        for number, case in enumerate(cases):
            if number % self.every == 0:
                self.counts[kind] = self.counts.get(kind, 0) + 1
                yield case

    def _try(self, name: str, case: Callable[[Path], str], *folders: Path) -> None:
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        started = time.monotonic()
        try:
            with self.guard.watch(place, self.cache, self.torch, *folders):
                wrong = case(place)
        except TookTooLongError:
            wrong = f"took longer than {LIMIT_S} s"
        except MemoryError:
            wrong = "took too much memory"
        if not wrong and self.guard.touched:
            wrong = f"touched {'; '.join(sorted(set(self.guard.touched))[:5])}"
        self.slowest = max(self.slowest, time.monotonic() - started)
        if wrong:
            self.failures.append((name, wrong))
            print(f"FAILED {name!r}: {wrong}", flush=True)

    def configurations(self) -> None:
        """Send hostile configurations to server and site."""
        outside = self.folder / "outside"
        private = outside / "train" / HIDDEN
        private.mkdir(parents=True)
        (private / "1.png").write_bytes(b"no image")
        secret = outside / "key"
        secret.write_text(f"{SECRET}\n", "utf-8")
        pipe = outside / "pipe"
        os.mkfifo(pipe)
        places = {
            "secret": secret,
            "fifo": pipe,
            "folder": outside,
            "images": self.sites[1],
        }
        honest = small_run(self.folder / "captured")
        grid = Grid(honest, self.sites)
        assert serve(grid, honest) == ""
        first = grid._ids[0]
        requests = {
            message.metadata.message_type: message
            for message in grid.messages
            if message.metadata.dst_node_id == first
        }
        assert set(requests) == {"query", "train", "evaluate"}
        for name, flat in self._chosen(
            "configurations", hostile_configurations(honest, places)
        ):

            def at_the_site(_: Path, flat: dict[str, Any] = flat) -> str:
                said = [answer(m, flat, self.sites[0]) for m in requests.values()]
                return "; ".join(filter(None, said))

            self._try(f"site: {name}", at_the_site, self.sites[0])

            def at_the_server(place: Path, flat: dict[str, Any] = flat) -> str:
                same = flat["run.dir"] == honest["run.dir"]
                whole = {**flat, "run.dir": str(place)} if same else flat
                # Other data sets are the server's own business, and so are teachers
                # that are downloaded, which takes the time that it takes.
                teacher = flat["teacher.model"]
                downloads = teacher in ("RN50", "ViT-B-32") or "hub:" in teacher
                if flat["dataset.name"] != honest["dataset.name"] or downloads:
                    return ""
                return serve(Grid(whole, self.sites), whole)

            # The folders that it is told to write to are given to it.
            told = (flat["run.dir"], flat["run.resume"] or self.cache)
            given = [Path(str(path).replace("\0", "")) for path in told]
            self._try(f"server: {name}", at_the_server, *self.sites, *given)

    def folders(self) -> None:
        """Let one of two sites have a hostile folder."""
        for name, make in self._chosen("site folders", hostile_folders()):

            def case(place: Path, make: Callable[[Path], None] = make) -> str:
                site = honest_folder(place / "site", 300)
                make(site)
                flat = small_run(place, federation__clients_per_round=1)
                return serve(Grid(flat, [site, self.sites[1]]), flat)

            self._try(f"folder: {name}", case, *self.sites)

    def replies(self) -> None:
        """Let one of two sites answer what it should not."""
        kinds = {
            "replies to train": (("train",), hostile_replies()),
            "answers to query and evaluate": (
                ("query", "evaluate"),
                hostile_answers(),
            ),
        }
        for kind, (types, cases) in kinds.items():
            for number, (name, change) in enumerate(self._chosen(kind, cases)):

                def case(
                    place: Path,
                    change: Change = change,
                    types: tuple[str, ...] = types,
                    method: str = ("fedavg", "creff")[number % 2],
                ) -> str:
                    flat = small_run(
                        place,
                        method=method,
                        federation__rounds=2,
                        federation__clients_per_round=1 if "query" in types else 2,
                        federation__min_replies=1,
                    )
                    return serve(Grid(flat, self.sites, change, types), flat)

                self._try(f"{kind}: {name}", case, *self.sites)


def main() -> int:
    """Try all cases; return the exit status."""
    parser = argparse.ArgumentParser(description="Try hostile input on the real apps.")
    parser.add_argument("--every", type=int, default=1, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    act_as_flower_process()
    strategy.grid.POLL_S = 0.0
    for name in ("WAIT_S", "ASK_AGAIN_S"):
        setattr(strategy.site_clients, name, 0.0)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    folder = own_temporary_folder()
    try:
        trial = Trial(folder, options.every)
        bound_memory()
        for part in (trial.configurations, trial.folders, trial.replies):
            part()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tried = ", ".join(f"{count} {kind}" for kind, count in trial.counts.items())
    print(
        f"{tried}: {len(trial.failures)} failed; slowest case {trial.slowest:.1f} s, "
        f"{peak:.2f} GiB at most"
    )
    return 1 if trial.failures else 0


if __name__ == "__main__":
    sys.exit(main())
