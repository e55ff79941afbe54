"""Checks of keys of the run configuration that contradict each other."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clip2fl_common.config.messages import shown
from clip2fl_common.config.types import (
    GRADIENT_METHODS,
    METHODS,
    MOMENTUM_METHODS,
    SUMMED_METHODS,
    TEACHER_METHODS,
    listed_names,
    path_fits,
)
from clip2fl_common.data.image_files import cannot_be_seen, without_joiners
from clip2fl_common.partition import long_tail_counts
from clip2fl_common.secure.statements import LEAST_PARTIES

if TYPE_CHECKING:  # the schema calls these checks
    from clip2fl_common.config.schema import Dataset, RunConfig

# dataset.name of a federation whose nodes have images of their own.
SITES = "sites"
LISTED, HUGGING_FACE = "list", "hugging-face"
NAMED = (SITES, LISTED, HUGGING_FACE)
"""Data sets whose classes dataset.class-names can name."""
HUB = "hf-hub:"
_HUB_PART = r"[\w-][\w.-]*"
HUB_NAME = re.compile(rf"{HUB}({_HUB_PART}/{_HUB_PART})@([\w-][\w./-]*)", re.ASCII)
"""A data set on the Hugging Face hub, and its revision: a commit, a tag or a branch."""
# Classes of each data set, and training images of each class where they are known.
CLASSES = {"demo": 10, "cifar10": 10, "cifar100": 100, "imagenet-lt": 1000}
FEWEST_CLASSES = 2
CIFAR_IMAGES = {"cifar10": 5000, "cifar100": 500}
NEEDED_PATHS = {
    "cifar10": ["root"],
    "cifar100": ["root"],
    "image-folder": ["root"],
    LISTED: ["train_list", "test_list"],
    HUGGING_FACE: ["root"],
    "imagenet-lt": ["root", "train_list", "test_list"],
}
LARGEST_ARRAY_BYTES = 2**36
"""Bound on products of keys whose own bounds do not exclude each other. No machine for
such runs holds an array of 64 GiB, and computing needs several such arrays."""
MOST_CLASSES = 10_000
"""The number of classes of iNaturalist 2021."""
CLASS_NAME_CHARACTERS = 100
CLASS_NAME_BYTES = 255
"""Limit on the length of a folder's name on Linux."""
DEEP_MODELS, DEEP_STRIDE = ("resnet18", "resnet50"), 32
"""Models that make one pixel of 32 x 32 pixels."""


def known_classes(flat: Mapping[str, object]) -> int | None:
    """Return the number of classes, if a configuration's keys tell it.

    Parameters
    ----------
    flat : mapping
        Dotted keys to values, which need not be checked yet.

    Returns
    -------
    int or None
        None where only the images tell it, as in a folder of images.
    """
    name, names = flat.get("dataset.name"), flat.get("dataset.class-names")
    if name in NAMED and isinstance(names, str) and names:
        return len(listed_names(names))
    return CLASSES.get(name) if isinstance(name, str) else None


def contradictions(config: "RunConfig", classes: int) -> list[str]:
    """Return the contradictions between keys that are each in range.

    Parameters
    ----------
    config : RunConfig
        A configuration whose keys are each in range.
    classes : int
        Number of classes C, on which the size of some arrays depends.

    Returns
    -------
    list of str
        One line for each problem: keys, values and what to do.
    """
    problems = [
        *_federation_problems(config),
        *_method_problems(config),
        *_privacy_problems(config),
        *_secure_problems(config),
    ]
    if "{class}" not in config.teacher.prompt:
        problems.append(
            f"teacher.prompt = {shown(config.teacher.prompt)} has no {{class}} where "
            "the class name goes, so every class would get the same text"
        )
    if not config.simulated:
        problems += _site_problems(config)
    else:
        problems += _partition_problems(config)
    if config.delivery.signing_key and config.simulated and not config.delivery.run:
        problems.append(
            f"delivery.signing-key = {shown(config.delivery.signing_key)}, but with "
            f"dataset.name = {config.dataset.name!r} there are no sites to send the "
            "model to: clear it, or set dataset.name = 'sites'"
        )
    if config.client.crop_padding > config.dataset.image_size:
        problems.append(
            f"client.crop-padding = {config.client.crop_padding} is more than "
            f"dataset.image-size = {config.dataset.image_size}: a crop could show "
            "nothing of the image; lower the first"
        )
    deep, size = config.model.name in DEEP_MODELS, config.dataset.image_size
    if deep and size <= DEEP_STRIDE:
        problems.append(
            f"model.name = {config.model.name!r} and dataset.image-size = {size}: its "
            "last layers see one pixel of each image, and BatchNorm cannot train on a "
            f"batch of one image; raise the second above {DEEP_STRIDE}, for example to "
            "64, or set model.name = 'resnet8'"
        )
    return [*problems, *_memory_problems(config, classes), *_path_problems(config)]


def _federation_problems(config: "RunConfig") -> Iterator[str]:
    sampled, clients = config.federation.clients_per_round, config.partition.clients
    if sampled > clients and config.simulated:
        yield (
            f"federation.clients-per-round = {sampled} is more than partition.clients "
            f"= {clients}; lower the first or raise the second"
        )
    if config.federation.min_replies > sampled:
        yield (
            f"federation.min-replies = {config.federation.min_replies} is more than "
            f"federation.clients-per-round = {sampled}: no round could succeed; lower "
            "the first or raise the second"
        )


def _method_problems(config: "RunConfig") -> Iterator[str]:
    rule = config.aggregation.rule
    if config.method in MOMENTUM_METHODS and rule != "mean":
        yield (
            f"aggregation.rule = {rule!r}, but with method = {config.method!r} the "
            "server's momentum steps from the clients' mean; set aggregation.rule = "
            "'mean' or choose another method"
        )
    if config.client.label_weight == 0:
        if config.method not in TEACHER_METHODS:
            yield (
                f"client.label-weight = 0, but method = {config.method!r} has no "
                "teacher, so nothing would train the local models; raise the weight or "
                f"choose one of {', '.join(TEACHER_METHODS)}"
            )
        elif config.distillation.weight == 0:
            yield (
                "client.label-weight = 0 and distillation.weight = 0: nothing would "
                "train the local models; raise one of them"
            )


def _path_problems(config: "RunConfig") -> Iterator[str]:
    dataset = config.dataset
    for leaf in NEEDED_PATHS.get(dataset.name, []):
        key, value = f"dataset.{leaf.replace('_', '-')}", getattr(dataset, leaf)
        if value and dataset.name == HUGGING_FACE and value.startswith(HUB):
            yield from _not_on_hub(value)
        elif value:
            yield from _not_absolute(key, value)
        else:
            yield (
                f"{key} is empty, but dataset.name = {dataset.name!r} needs it: "
                "give an absolute path"
            )
    if dataset.name == LISTED and dataset.root:
        yield from _not_absolute("dataset.root", dataset.root)
    for key, path in (
        ("run.dir", config.run.dir),
        ("run.resume", config.run.resume),
        ("federation.site-registry", config.federation.site_registry),
        ("delivery.signing-key", config.delivery.signing_key),
        ("delivery.run", config.delivery.run),
    ):
        if path:
            yield from _not_absolute(key, path)
    prefix = "local-dir:"
    if config.teacher.model.startswith(prefix):
        folder = config.teacher.model.removeprefix(prefix)
        yield from _not_absolute("teacher.model", folder)
        if not path_fits(folder):
            yield f"teacher.model = {shown(folder)} is longer than a path can be"


def _not_on_hub(value: str) -> Iterator[str]:
    if not HUB_NAME.fullmatch(value):
        yield (
            f"dataset.root = {shown(value)}, but a data set on the hub is written "
            "hf-hub:OWNER/NAME@REVISION, with the commit (or tag or branch) that all "
            "nodes read, for example hf-hub:uoft-cs/cifar10@main"
        )


def _not_absolute(key: str, value: str) -> Iterator[str]:
    if re.match("~[^/]", value):
        # Not looked up: an answer would tell the server which users a site has.
        yield f"{key} = {shown(value)} names a user's home: write the whole path"
        return
    try:
        absolute = Path(value).expanduser().is_absolute()
    except RuntimeError:
        yield f"{key} = {shown(value)}, but this user has no home folder here"
    else:
        if not absolute:
            yield (
                f"{key} = {shown(value)} is relative; server and clients run in "
                "folders of their own, so give an absolute path"
            )


def _privacy_problems(config: "RunConfig") -> Iterator[str]:
    privacy, aggregation = config.privacy, config.aggregation
    if privacy.gradient_noise_multiplier > 0 and privacy.gradient_clip_norm == 0:
        yield (
            "privacy.gradient-noise-multiplier = "
            f"{privacy.gradient_noise_multiplier}, but privacy.gradient-clip-norm = 0 "
            "does not bound what one image can change; set it, for example to 1.0"
        )
    if privacy.moment_noise_multiplier > 0 and privacy.moment_clip_norm == 0:
        yield (
            f"privacy.moment-noise-multiplier = {privacy.moment_noise_multiplier}, but "
            "privacy.moment-clip-norm = 0 does not bound what one image can change; "
            "set it, for example to 10.0"
        )
    if privacy.moment_noise_multiplier > 0 and aggregation.rule != "mean":
        yield (
            "privacy.moment-noise-multiplier = "
            f"{privacy.moment_noise_multiplier} needs aggregation.rule = 'mean', but "
            f"it is {aggregation.rule!r}: only sums over clients average the noise out"
        )
    if privacy.update_noise_multiplier > 0 and (
        aggregation.rule != "mean" or aggregation.max_update_norm == 0
    ):
        yield (
            f"privacy.update-noise-multiplier = {privacy.update_noise_multiplier} "
            "needs aggregation.rule = 'mean' and aggregation.max-update-norm above 0, "
            "which bound what one client can change"
        )
    if privacy.model_noise_multiplier > 0 and aggregation.max_update_norm == 0:
        yield (
            f"privacy.model-noise-multiplier = {privacy.model_noise_multiplier}, but "
            "aggregation.max-update-norm = 0 does not bound what one image can change; "
            "set it, for example to 1.0"
        )
    if privacy.model_noise_multiplier > 0 and privacy.update_noise_multiplier > 0:
        yield (
            f"privacy.model-noise-multiplier = {privacy.model_noise_multiplier} and "
            f"privacy.update-noise-multiplier = {privacy.update_noise_multiplier}: "
            "with the clients' noise no norm bounds what one client changes at the "
            "server; set one of them to 0.0"
        )
    drawn = config.class_gradients.samples_per_class
    if privacy.min_class_samples > drawn:
        yield (
            f"privacy.min-class-samples = {privacy.min_class_samples} is more than "
            f"class-gradients.samples-per-class = {drawn}, the images of a class that "
            "enter one draw: no gradient would be of as many images as it promises; "
            "lower the first or raise the second"
        )


def _secure_problems(config: "RunConfig") -> Iterator[str]:
    """Name what needs values of single clients, which secure aggregation hides."""
    if not config.aggregation.secure:
        return
    federation, rule = config.federation, config.aggregation.rule
    if rule != "mean":
        yield (
            f"aggregation.secure = true and aggregation.rule = {rule!r}: the server "
            "sees the clients' sum only, so set aggregation.rule = 'mean'"
        )
    if config.method not in SUMMED_METHODS:
        reason = (
            "its server needs the values of each client"
            if config.method in METHODS
            else "TRAITS (clip2fl_common/config/types.py) does not say that sums over "
            "clients are enough for it"
        )
        yield (
            f"aggregation.secure = true and method = {config.method!r}: {reason}; "
            f"choose one of {', '.join(SUMMED_METHODS)}"
        )
    if config.method in GRADIENT_METHODS and config.upload.min_cosine < 1:
        yield (
            f"aggregation.secure = true and upload.min-cosine = "
            f"{config.upload.min_cosine}: factors of clients cannot be summed; set "
            "upload.min-cosine = 1.0"
        )
    if config.privacy.update_noise_multiplier > 0:
        yield (
            "aggregation.secure = true and privacy.update-noise-multiplier = "
            f"{config.privacy.update_noise_multiplier}: noise at the server protects "
            "nothing that the server sees; set it to 0.0"
        )
    if federation.clients_per_round < LEAST_PARTIES:
        yield (
            f"aggregation.secure = true and federation.clients-per-round = "
            f"{federation.clients_per_round}: in a sum of fewer than {LEAST_PARTIES} "
            "a client could take its own part away; raise the second"
        )
    if 0 < federation.min_replies < LEAST_PARTIES:
        yield (
            f"aggregation.secure = true and federation.min-replies = "
            f"{federation.min_replies}: a sum needs at least {LEAST_PARTIES} clients; "
            f"set federation.min-replies to 0 or to {LEAST_PARTIES} and more"
        )


def _name_problems(dataset: "Dataset") -> Iterator[str]:
    names = listed_names(dataset.class_names)
    # People could not tell apart names that look the same.
    seen = Counter(map(without_joiners, names))
    twice = [name for name, count in seen.items() if count > 1]
    if len(seen) < 2 or twice or "" in seen:
        found = f" ({shown(twice[0])} is there twice)" if twice else ""
        yield (
            f"dataset.class-names = {shown(dataset.class_names)}, but dataset.name = "
            f"{dataset.name!r} needs at least two different names, separated by "
            f"commas, and none empty{found}"
        )
    if len(names) > MOST_CLASSES:
        yield (
            f"dataset.class-names has {len(names):,} names, but at most "
            f"{MOST_CLASSES:,} classes are supported"
        )
    for name in names:
        if not _can_be_folder(name):
            yield (
                f"dataset.class-names has {shown(name)}, which can be no folder's "
                f"name: at most {CLASS_NAME_CHARACTERS} characters, none a slash or "
                "invisible, and no dot first"
            )
            break


def _site_problems(config: "RunConfig") -> Iterator[str]:
    dataset = config.dataset
    yield from _name_problems(dataset)
    if dataset.validation_share == 0:
        yield (
            "dataset.validation-share = 0.0, but with dataset.name = 'sites' the "
            "server has no test images: let the sites keep some, for example 0.2"
        )
    if config.evaluation.tuning_share > 0:
        yield (
            f"evaluation.tuning-share = {config.evaluation.tuning_share}, but with "
            "dataset.name = 'sites' the server has no test images to divide: set it "
            "to 0.0"
        )
    if config.checkpoint.best_metric == "top1":
        yield (
            "checkpoint.best-metric = 'top1', but with dataset.name = 'sites' no top-1 "
            "accuracy is known, so no round would be best: choose another metric, for "
            "example 'balanced'"
        )


def _can_be_folder(name: str) -> bool:
    return (
        len(name) <= CLASS_NAME_CHARACTERS
        and len(name.encode("utf-8")) <= CLASS_NAME_BYTES
        and "/" not in name
        and not name.startswith(".")
        and not any(map(cannot_be_seen, name))
    )


def _long_tail(dataset: "Dataset") -> list[int] | None:
    """Return the training images of each class, if the configuration tells them."""
    largest = {"demo": dataset.demo_train_per_class, **CIFAR_IMAGES}.get(dataset.name)
    if largest is None:
        return None
    return long_tail_counts(largest, CLASSES[dataset.name], dataset.imbalance_factor)


def _partition_problems(config: "RunConfig") -> Iterator[str]:
    dataset, clients = config.dataset, config.partition.clients
    kind = config.partition.kind
    if dataset.name in NAMED and dataset.class_names:
        yield from _name_problems(dataset)
    if kind == "natural" and dataset.name not in NAMED:
        yield (
            "partition.kind = 'natural' divides images by the clients that they come "
            f"from, which dataset.name = {dataset.name!r} does not tell: choose "
            f"another kind, or one of {LISTED}, {HUGGING_FACE}"
        )
    counts = _long_tail(dataset)
    if counts is None:
        return
    largest = f"the most frequent one has {counts[0]}"
    if dataset.name == "demo":
        largest += f" (dataset.demo-train-per-class = {counts[0]})"
    if counts[-1] == 0:
        yield (
            f"dataset.imbalance-factor = {dataset.imbalance_factor:g} leaves no image "
            f"of the rarest class, since {largest}; use a smaller imbalance factor or "
            "more images"
        )
    elif sum(counts) < clients:
        yield (
            f"partition.clients = {clients}, but all classes together have only "
            f"{sum(counts)} training images, since {largest} and "
            f"dataset.imbalance-factor = {dataset.imbalance_factor:g}; a client would "
            "have none: use fewer clients or a smaller imbalance factor"
        )
    elif kind == "shards" and sum(counts) < clients * config.partition.shards:
        yield (
            f"partition.clients = {clients} with partition.shards = "
            f"{config.partition.shards} need an image for each shard, but all classes "
            f"together have only {sum(counts)} training images: use fewer clients or "
            "shards, or a smaller imbalance factor"
        )


def _memory_problems(config: "RunConfig", classes: int) -> Iterator[str]:
    """Name products of keys for which no machine has enough memory."""
    dataset, synthesis = config.dataset, config.synthesis
    gradients, width = config.class_gradients, config.model.feature_dim
    image = 3 * dataset.image_size**2
    padded = 3 * (dataset.image_size + 2 * config.client.crop_padding) ** 2
    arrays = {
        f"synthesis.features-per-class = {synthesis.features_per_class}, "
        f"{classes} classes and model.feature-dim = {width}": (
            4 * classes * synthesis.features_per_class * width
        ),
        f"ccvr.virtual-features = {config.ccvr.virtual_features}, "
        f"{classes} classes and model.feature-dim = {width}": (
            4 * classes * config.ccvr.virtual_features * width
        ),
        f"class-gradients.draws = {gradients.draws}, "
        f"class-gradients.samples-per-class = {gradients.samples_per_class} and "
        f"model.feature-dim = {width}": (
            4 * gradients.draws * gradients.samples_per_class * width
        ),
    }
    if config.method in GRADIENT_METHODS and config.upload.min_cosine == 1:
        # The server's mean of the gradients of all classes, in float32.
        arrays[
            "upload.min-cosine = 1.0 (whole class gradients; 0.99 sends thin factors), "
            f"{classes} classes and model.feature-dim = {width}"
        ] = 4 * classes**2 * width
    with_size = f"and dataset.image-size = {dataset.image_size}"
    batches = {
        "client": (config.client.batch_size, padded),
        "teacher": (config.teacher.batch_size, image),
        "evaluation": (config.evaluation.batch_size, image),
    }
    for group, (batch, pixels) in batches.items():
        arrays[f"{group}.batch-size = {batch} {with_size}"] = 4 * batch * pixels
    if dataset.name == "demo":
        train, test = sum(_long_tail(dataset) or ()), dataset.demo_test_per_class
        arrays[
            f"dataset.demo-train-per-class = {dataset.demo_train_per_class} {with_size}"
        ] = train * image
        arrays[f"dataset.demo-test-per-class = {test} {with_size}"] = (
            classes * test * image
        )
    for keys, size in arrays.items():
        if size > LARGEST_ARRAY_BYTES:
            yield (
                f"{keys} make one array of {size:,} bytes, but at most "
                f"{LARGEST_ARRAY_BYTES:,} are allowed; lower one of them"
            )
