"""Predict how much GPU memory the clients of a simulation take together."""

import os
import shutil
import subprocess
from pathlib import Path

from clip2fl_common.config import RunConfig, listed_names
from clip2fl_common.config.types import TEACHER_METHODS

MIB = 2**20
# CUDA's context with its libraries in a process: 660 MiB on an H100. Assumed: a teacher
# of CLIP ViT-B/32's size with the activations of a batch.
PROCESS_BYTES = 700 * MIB
TEACHER_BYTES = 1024 * MIB
# What is not known before the start: images of one client, and classes of a data set
# that says nothing of them.
IMAGES = 5000
CLASSES = {"demo": 10, "cifar10": 10, "cifar100": 100, "imagenet-lt": 1000}
OTHER_CLASSES = 100
# A training step takes this many times what its backward pass needs: the derivatives of
# the activations, the workspaces of convolutions and the allocator's gaps.
ACTIVATION_FACTOR = 2.0
# Copies of the model: the global one, the one at fixed addresses, its gradients.
MODELS = 3
STATES = {"sgd": 0, "momentum": 1, "muon": 1, "adam": 2}
# At most so many target gradients are treated at once, with three arrays of their size.
TARGET_BYTES, TARGET_ARRAYS = 2**30, 4


def client_bytes(config: RunConfig) -> int:
    """Return the predicted GPU memory of a process that trains clients, in bytes.

    The activations are counted in a pass of the model on the CPU. The rest is
    arithmetic and the assumptions above.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    """
    from clip2fl_common.devices import SMALL_BYTES

    parameters, saved, largest = _model_bytes(config)
    client = config.client
    models = parameters * (MODELS + STATES[client.optimizer])
    training = int(saved * client.batch_size * ACTIVATION_FACTOR)
    inference = 3 * largest * config.evaluation.batch_size
    images = min(SMALL_BYTES, IMAGES * 3 * config.dataset.image_size**2)
    return PROCESS_BYTES + models + training + inference + images + _teacher(config)


def server_bytes(config: RunConfig) -> int:
    """Return the predicted GPU memory of the server's process, in bytes."""
    parameters, _, largest = _model_bytes(config)
    classes, dim = _classes(config), config.model.feature_dim
    targets = TARGET_ARRAYS * min(TARGET_BYTES, 4 * classes**2 * dim)
    inference = 3 * largest * config.evaluation.batch_size
    return PROCESS_BYTES + 2 * parameters + targets + inference + _teacher(config)


def memory_warning(
    config: RunConfig, gpus_per_client: float, together: int, free: int | None
) -> str:
    """Return what to change if the clients do not fit a GPU beside the server.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    gpus_per_client : float
        Share of a GPU that each client occupies.
    together : int
        Clients that train at the same time if GPUs do not limit them.
    free : int or None
        Free bytes of the fullest GPU; None if it is not known.

    Returns
    -------
    str
        One line; empty if they fit, or if no GPU is used.
    """
    if not gpus_per_client or free is None or config.device == "cpu":
        return ""
    at_once = min(together, max(1, int(1 / gpus_per_client + 1e-9)))
    each, server = client_bytes(config), server_bytes(config)
    if at_once * each + server <= free:
        return ""
    fitting = max(0, free - server) // each
    advice = (
        f"--gpus-per-client {_share(fitting):g} makes it {fitting} at a time"
        if fitting
        else "lower client.batch-size or evaluation.batch-size, or use device = 'cpu'"
    )
    return (
        f"GPU memory may not suffice: {at_once} clients at once with about "
        f"{each / MIB:.0f} MiB each and the server with {server / MIB:.0f} MiB, but "
        f"{free / MIB:.0f} MiB are free; {advice}"
    )


def _share(clients: int) -> float:
    """Return the share with which so many clients fit a GPU, and not one more."""
    return 1000 // clients / 1000


def free_gpu_bytes() -> int | None:
    """Return the free memory of the fullest visible GPU; None if it cannot be asked.

    It asks ``nvidia-smi``: torch would take half a gigabyte of the GPU to answer.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        )
        return min(int(line) for line in answer.stdout.split()) * MIB
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _model_bytes(config: RunConfig) -> tuple[int, int, int]:
    """Return bytes of parameters, of an image's saved and of its largest activation.

    Saved is what the forward pass keeps for the backward pass.
    """
    import torch

    from clip2fl_common.models import build_model

    state = torch.random.get_rng_state()
    try:
        model = build_model(
            config.model.name, _classes(config), config.model.feature_dim
        )
    finally:
        torch.random.set_rng_state(state)
    size = config.dataset.image_size
    images = torch.zeros(2, 3, size, size)  # BatchNorm needs two
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    # What is kept is not needed here, so it is given back as it is.
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        model.train()(images)
    saved = [tensor.nbytes for tensor in kept.values()]
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return parameters, sum(saved) // len(images), max(saved) // len(images)


def _classes(config: RunConfig) -> int:
    """Return the number of classes, as far as it is known before the start."""
    dataset = config.dataset
    if dataset.name in CLASSES:
        return CLASSES[dataset.name]
    if dataset.class_names:
        return len(listed_names(dataset.class_names))
    folder = Path(dataset.root).expanduser() / "train"
    if dataset.name == "image-folder" and folder.is_dir():
        return max(2, sum(place.is_dir() for place in folder.iterdir()))
    return OTHER_CLASSES


def _teacher(config: RunConfig) -> int:
    taught = config.method in TEACHER_METHODS and config.teacher.model != "demo"
    return TEACHER_BYTES if taught else 0
