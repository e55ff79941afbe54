"""Run configurations that a hostile server sends to a site."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Files that a server would like to read at a site, and what is none.
PATHS = (
    "/proc/self/environ",
    "/proc/self/mem",
    "/etc/passwd",
    "/etc/shadow",
    "/dev/zero",
    "/dev/random",
    "/dev/stdin",
    "/",
    "/home/somebody/.ssh/id_ecdsa",
    "/nonexistent",
    "~/.ssh/id_ecdsa",
    "relative/path",
    "/tmp/\x00nul",
    "/tmp/new\nline",
    "/" + "x" * 5000,
    "{secret}",
    "{fifo}",
    "{folder}",
    "{images}",
    "hf-hub:somebody/images@main",
)
OTHER_DATASETS = (
    "demo",
    "cifar10",
    "cifar100",
    "imagenet-lt",
    "image-folder",
    "list",
    "hugging-face",
)
TEACHERS = (
    *(f"local-dir:{path}" for path in PATHS),
    "hf-hub:somebody/model",
    "hf-hub:../../etc/passwd",
    "hf-hub:/etc/passwd",
    "hf-hub:" + "x" * 5000,
    "ViT-B-32",
    "RN50",
    "no-such-model",
    "",
    "\x1b[31mred",
    "../../../etc/passwd",
    "local-dir:",
    "demo\n",
    "file:///etc/passwd",
    "http://127.0.0.1:1/model",
)
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 2**31, 2**63, 10**30, -(10**30), True),
    *(0.0, -0.0, -1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("7", "", "nan"),
)
NUMERIC_KEYS = (
    "seed",
    "dataset.validation-share",
    "dataset.image-size",
    "dataset.imbalance-factor",
    "partition.alpha",
    "client.learning-rate",
    "client.batch-size",
    "client.crop-padding",
    "client.logit-adjustment",
    "client.learning-rate-other",
    "client.momentum",
    "client.weight-decay",
    "client.label-weight",
    "distillation.weight",
    "distillation.temperature",
    "distillation.views",
    "class-gradients.draws",
    "class-gradients.samples-per-class",
    "upload.min-cosine",
    "privacy.gradient-clip-norm",
    "privacy.gradient-noise-multiplier",
    "privacy.moment-clip-norm",
    "privacy.moment-noise-multiplier",
    "privacy.min-class-samples",
    "model.feature-dim",
    "synthesis.features-per-class",
    "evaluation.batch-size",
    "teacher.batch-size",
)
TEXTS: dict[str, tuple[Any, ...]] = {
    "device": ("cuda:99", "cuda:-1", "tpu", "cpu; rm -rf /", "", "meta", "\x1b[31m"),
    "method": ("../../x", "", "FedAvg", "os.system", "x" * 10_000, "fed\navg"),
    "dataset.test-split": ("..", "../x", "", "a/b", "x" * 300),
    "dataset.image-column": ("x" * 5000, "a\nb"),
    "partition.kind": ("", "iid", "natural"),
    "dataset.class-names": (
        "circle",
        "circle,circle",
        "circle,,square",
        "circle, square, \x1b[31mred",
        "../../etc, /etc/passwd",
        "a_b, a b",
        ",".join(f"c{i}" for i in range(100_000)),
        "circle, " + "x" * 100_000,
        "circle, \ud800",
    ),
    "teacher.prompt": ("", "no name", "{class}" * 10_000, "{class.__class__}", "{0}"),
    "run.name": ("..", "../up", "/abs", "a/b", ".hidden", "x" * 300, "a\x00b", "-r"),
    "run.dir": ("relative", "/nonexistent\x00", "/proc/1", "x" * 5000),
    "run.resume": ("relative", "/nonexistent", "/etc", "/dev/null"),
    "run.trackers": ("os", "tensorboard;rm", "x" * 5000),
    "aggregation.rule": ("", "max", "mean "),
    "model.name": ("resnet9000", "../x", ""),
    "unknown.key": (1, "x"),
}


def hostile_configurations(
    sites: Mapping[str, Any], places: Mapping[str, Path]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a hostile server may send: a name and flat keys to values.

    Parameters
    ----------
    sites : mapping of str to scalar
        A small run of sites that is all right.
    places : mapping of str to Path
        ``secret`` (a file), ``fifo``, ``folder`` and ``images`` outside the site's
        folder, which stand for their names in braces.
    """

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(f"{{{name}}}", str(place))
        return text

    for dataset in OTHER_DATASETS:
        for number, path in enumerate(PATHS):
            keys = {
                "dataset.name": dataset,
                "dataset.root": placed(path),
                "dataset.train-list": placed(path),
                "dataset.test-list": placed(path),
            }
            yield f"{dataset} with path {number}", {**sites, **keys}
    for number, teacher in enumerate(TEACHERS):
        for pretrained in ("", "openai", placed("{secret}"), "/dev/zero"):
            keys = {
                "method": "clip2fl",
                "teacher.model": placed(teacher),
                "teacher.pretrained": pretrained,
            }
            yield f"teacher {number} {pretrained}", {**sites, **keys}
    for key in NUMERIC_KEYS:
        for value in NUMBERS:
            yield f"{key} = {value!r}", {**sites, key: value}
    for key, values in TEXTS.items():
        for number, value in enumerate(values):
            yield f"{key}, text {number}", {**sites, key: value}
