"""Final accuracy of each aggregation rule when one of eight clients attacks.

    python -m benchmarks.attack conf/shapes.toml --seed 7

The attacker trains like the others, but sends its update and its class gradients with
flipped sign and ten times as large. (It keeps variances from falling below zero, which
the server would notice.) Every rule runs with and without the attacker. The norm bounds
are the median norms in the run with the mean rule and without an attacker.

All clients train in this process, without Flower's processes. Complete runs are not
repeated; interrupted runs continue.
"""

import argparse
import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from benchmarks.measure import RESULTS, write_results
from clip2fl_common import messages
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.config import RunConfig, Scalar, defaults
from clip2fl_common.config.dotted_keys import flatten
from clip2fl_common.config.files import parse_overrides
from clip2fl_common.project import PROJECT
from server_app.app import main as server_main
from server_app.run_folder import rounds_with_checkpoint
from strategy.robust import gradient_norm
from strategy.safeguards import NoRepliesError
from tests.flower_private import act_as_flower_process
from tests.in_process_grid import InProcessGrid, client_of

CLIENTS = 8
ATTACKER = 0
FACTOR = -10.0
LENGTH_RATIO = 10.0
# File in the folder of a run that broke down; holds the reason.
BROKEN = "broken.txt"
COLUMNS = ("balanced", "many", "medium", "few")


@dataclass
class Observer:
    """Read all train replies before the server does; one client's may be changed.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    attacks : bool
        Whether the client `ATTACKER` attacks.

    Attributes
    ----------
    update_norms, gradient_norms : list of float
        Norms in all honest replies.
    """

    config: RunConfig
    attacks: bool
    update_norms: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)

    def __call__(self, request: Message, reply: Message) -> Message:
        """Return the reply that reaches the server."""
        if reply.has_error():
            return reply
        attacks = self.attacks and client_of(reply) == ATTACKER
        content = reply.content.array_records
        sent = messages.arrays_to_numpy(request.content.array_records[messages.ARRAYS])
        local = messages.arrays_to_numpy(content[messages.ARRAYS])
        updates = {name: values - sent[name] for name, values in local.items()}
        if attacks:
            forged = {name: sent[name] + FACTOR * u for name, u in updates.items()}
            for name in forged:
                if name.endswith(messages.VARIANCE):
                    forged[name] = np.maximum(forged[name], 0)
            reply.content[messages.ARRAYS] = messages.numpy_to_arrays(forged)
        else:
            squares = [float(np.square(u).sum()) for u in updates.values()]
            self.update_norms.append(sum(squares) ** 0.5)
        if messages.GRADIENTS in content:
            upload = self.config.upload
            num_classes, dim = sent["classifier.weight"].shape
            wanted = messages.GradientFormat(num_classes, dim, upload)
            honest = messages.gradients_from_arrays(content[messages.GRADIENTS], wanted)
            if attacks:
                forged_gradients = {
                    c: ClassGradient(FACTOR * g.weight, FACTOR * g.bias)
                    for c, g in honest.items()
                }
                reply.content[messages.GRADIENTS] = messages.gradients_to_arrays(
                    forged_gradients, upload.precision
                )
            else:
                self.gradient_norms += [gradient_norm(g) for g in honest.values()]
        return reply


def run(folder: Path, settings: Mapping[str, Scalar], attacks: bool) -> Observer:
    """Run a federation into a folder, or the rest of an interrupted run.

    Parameters
    ----------
    folder : Path
        The run's folder.
    settings : mapping
        Configuration that differs from the defaults.
    attacks : bool
        Whether one client attacks.

    Returns
    -------
    Observer
        With the norms of the honest replies in the rounds of this call.
    """
    place: dict[str, Scalar] = {
        "run.dir": str(folder.parent),
        "run.name": folder.name,
        "run.resume": str(folder) if rounds_with_checkpoint(folder) else "",
    }
    config = RunConfig.from_run_config({**defaults(), **settings, **place})
    observer = Observer(config, attacks)
    act_as_flower_process()
    grid = InProcessGrid(config, nodes=CLIENTS, tamper=observer)
    context = Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat()))
    if not (folder / BROKEN).exists():
        try:
            server_main(grid, context)
        except NoRepliesError as error:
            # Every client's loss is NaN with such a model.
            (folder / BROKEN).write_text(str(error), "utf-8")
    norms = folder / "norms.json"
    if observer.update_norms:
        content = [observer.update_norms, observer.gradient_norms]
        norms.write_text(json.dumps(content), "utf-8")
    elif norms.is_file():  # the run was complete
        observer.update_norms, observer.gradient_norms = json.loads(
            norms.read_text("utf-8")
        )
    return observer


def rules(calm: Observer) -> dict[str, dict[str, Scalar]]:
    """Return the settings of each rule, with bounds from a run without an attacker."""
    bounds: dict[str, Scalar] = {
        "aggregation.max-update-norm": statistics.median(calm.update_norms)
    }
    if calm.gradient_norms:
        bounds["aggregation.max-gradient-norm"] = statistics.median(calm.gradient_norms)
    return {
        "norm bound": bounds,
        "median": {"aggregation.rule": "median"},
        "trimmed mean": {
            "aggregation.rule": "trimmed-mean",
            "aggregation.trim": 1 / CLIENTS,
        },
    }


def last_accuracy(folder: Path) -> dict[str, Any]:
    """Return the delivered classifier's accuracy in the last round, and the round."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    last = json.loads(lines[-1])
    accuracy: dict[str, Any] = next(iter(last["accuracy"].values()))
    end = f"{last['round']}" + (", broke down" if (folder / BROKEN).exists() else "")
    return {**accuracy, "end": end}


def table(results: Mapping[tuple[str, bool], Mapping[str, Any]]) -> str:
    """Return the Markdown table of accuracies by rule and attack."""
    lines = [
        f"| rule | attacker | last round | {' | '.join(COLUMNS)} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for (rule, attacks), accuracy in results.items():
        cells = [
            "-" if accuracy[column] is None else f"{accuracy[column]:.1f}"
            for column in COLUMNS
        ]
        said = f"1 of {CLIENTS}" if attacks else "none"
        lines.append(f"| {rule} | {said} | {accuracy['end']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(
    runs: Path, settings: Mapping[str, Scalar]
) -> tuple[dict[tuple[str, bool], dict[str, Any]], dict[str, dict[str, Scalar]]]:
    """Run every rule with and without an attacker; return accuracies and settings.

    Parameters
    ----------
    runs : Path
        Folder of the runs.
    settings : mapping
        Configuration that differs from the defaults.

    Returns
    -------
    tuple of dict and dict
        Last accuracy by rule and attack, and each rule's settings.
    """
    everybody: dict[str, Scalar] = {
        "partition.clients": CLIENTS,
        "federation.clients-per-round": CLIENTS,
    }
    base = {**settings, **everybody}
    calm = run(runs / "length-ratio-calm", base, attacks=False)
    # Each rule runs alone: only the first one drops replies by their length.
    alone: dict[str, Scalar] = {"aggregation.max-length-ratio": 0.0}
    chosen: dict[str, dict[str, Scalar]] = {
        "length ratio": {"aggregation.max-length-ratio": LENGTH_RATIO},
        "mean": alone,
        **{rule: {**own, **alone} for rule, own in rules(calm).items()},
    }
    results = {}
    for rule, own in chosen.items():
        for attacks in (False, True):
            end = "attacked" if attacks else "calm"
            folder = runs / f"{rule.replace(' ', '-')}-{end}"
            run(folder, {**base, **own}, attacks)
            results[rule, attacks] = last_accuracy(folder)
    return results, chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with the settings of the command line."""
    parser = argparse.ArgumentParser(description="Attack the federation.")
    parser.add_argument("run_config", type=Path, help="TOML file of the experiment")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--set", nargs="*", default=[], help="key=value pairs")
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = {
        **flatten(tomllib.loads(options.run_config.read_text("utf-8"))),
        **parse_overrides(options.set),
        "seed": options.seed,
    }
    stem = options.run_config.stem
    runs = options.runs.resolve() / f"attack-{stem}-{options.seed}"
    results, chosen = compare(runs, settings)
    bounds = ", ".join(f"`{k}` = {v:.3g}" for k, v in chosen["norm bound"].items() if v)
    write_results(
        f"attack-{stem}",
        f"One of {CLIENTS} clients attacks: {stem}",
        f"The attacker sends its update and class gradients times {FACTOR:g}. Accuracy "
        "in percent of the delivered classifier after the last round; a run breaks "
        "down when every client's loss is infinite. "
        f"Length ratio: `aggregation.max-length-ratio` = {LENGTH_RATIO:g}, the "
        f"default; the other rules run without it. Norm bound: {bounds}; trimmed "
        f"mean: `aggregation.trim` = {1 / CLIENTS:g}.\n\n"
        f"{table(results)}",
        torch.device("cpu"),
        options.results,
    )


if __name__ == "__main__":
    main()
