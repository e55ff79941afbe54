"""Measure what a message costs a node besides training: imports, data, teacher.

In a deployment every message is a process of its own. This starts one for each of
some train messages, as a node would, on a folder of drawn images::

    python -m benchmarks.message_cost --images 300 --messages 3

The first message fills the caches. Flower's own share (polling, transfer, start of the
process) is not in it; `tests/deployment` has whole rounds.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLASSES = (
    "circle, triangle, square, pentagon, star, cross, ring, crescent, heart, arrow"
)


def prepare(folder: Path, images: int, teacher: str) -> None:
    """Write a site's folder, the run configuration and a train message."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from PIL import Image
    from torch import nn

    from clip2fl_common import messages
    from clip2fl_common.config import RunConfig, Scalar, defaults
    from clip2fl_common.data import demo
    from clip2fl_common.models import build_model
    from clip2fl_common.provenance import code_fingerprint
    from clip2fl_common.teacher import load_teacher
    from tests.flower_private import act_as_flower_process

    for label, name in enumerate(demo.CLASS_NAMES):
        (folder / "site" / name).mkdir(parents=True)
        for i, image in enumerate(demo.draw_images("train", label, images // 10)):
            picture = Image.fromarray(image.transpose(1, 2, 0)).resize((640, 480))
            picture.save(folder / "site" / name / f"{i}.jpg")
    flat: dict[str, Scalar] = {
        **defaults(),
        "dataset.name": "sites",
        "dataset.class-names": CLASSES,
        "teacher.model": teacher,
        "client.epochs": 1,
    }
    config = RunConfig.from_run_config(flat)
    act_as_flower_process()
    content = RecordDict(
        {
            messages.ARRAYS: messages.model_to_arrays(
                build_model(config.model.name, 10)
            ),
            messages.CLASSIFIER: messages.model_to_arrays(nn.Linear(512, 10)),
            messages.CONFIG: ConfigRecord(
                {
                    messages.ROUND: 1,
                    messages.PARTITION: 1,
                    messages.CODE_FINGERPRINT: code_fingerprint(),
                    messages.DISTILLATION_WEIGHT: 1.0,
                    messages.DISTILLATION_TEMPERATURE: 3.0,
                    messages.TEACHER_FINGERPRINT: load_teacher(teacher).fingerprint,
                }
            ),
        }
    )
    message = Message(content, 1, "train")
    (folder / "message").write_bytes(pickle.dumps((message, config.to_flat())))


def answer(folder: Path) -> None:
    """Answer the message in this process; print the seconds of each phase."""
    started = time.perf_counter()
    from flwr.app import Context, RecordDict

    from tests.flower_private import act_as_flower_process

    flower = time.perf_counter()
    from client_app.app import app

    imported = time.perf_counter()
    act_as_flower_process()
    message, config = pickle.loads((folder / "message").read_bytes())
    node: dict[str, bool | float | int | str] = {"data-path": str(folder / "site")}
    reply = app(message, Context(1, 1, node, RecordDict(), config))
    metrics = reply.content.metric_records["metrics"]
    seconds = {
        "import flwr": flower - started,
        "import client_app": imported - flower,
        "data and teacher": metrics["seconds-data"],
        "class gradients": metrics["seconds-gradients"],
        "training": metrics["seconds-training"],
    }
    print(json.dumps(seconds))


def _children_cpu() -> float:
    """Return the seconds of CPU of this program's ended children."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    """Print a table with one line a message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300, metavar="N")
    parser.add_argument("--messages", type=int, default=3, metavar="N")
    parser.add_argument("--teacher", default="demo", metavar="NAME")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(options.answer)
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        prepare(folder, options.images, options.teacher)
        command = [sys.executable, "-m", "benchmarks.message_cost", "--answer"]
        environment = dict(os.environ, CLIP2FL_CACHE_DIR=str(folder / "cache"))
        for number in range(1, options.messages + 1):
            started, used = time.perf_counter(), _children_cpu()
            done = subprocess.run(
                [*command, directory],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            whole = time.perf_counter() - started
            phases = json.loads(done.stdout.splitlines()[-1])
            rest = whole - sum(phases.values())
            listed = ", ".join(f"{n} {s:.2f}" for n, s in phases.items())
            used = _children_cpu() - used
            print(
                f"message {number}: {whole:.2f} s, {used:.2f} s of CPU "
                f"({listed}, rest {rest:.2f})"
            )


if __name__ == "__main__":
    main()
