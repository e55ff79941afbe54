"""Choose the compute device, and how exactly an NVIDIA GPU multiplies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clip2fl_common.choices import TF32

# Images up to this many bytes are kept on a GPU; larger sets are copied by batch.
SMALL_BYTES = 2 * 2**30


class DeviceError(ValueError):
    """The configured device is unknown, or is not on this machine."""


def resolve_device(name: str) -> torch.device:
    """Return the device of a configuration's ``device`` key.

    Parameters
    ----------
    name : str
        ``auto`` (CUDA if available, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Returns
    -------
    torch.device

    Raises
    ------
    DeviceError
        If the name is not a device, or this machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device = {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device = {name!r}, but this machine has {torch.cuda.device_count()} CUDA "
            "devices; use device='auto' or 'cpu'"
        )
    return device


def wait_for(device: torch.device) -> None:
    """Wait until a device has computed what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device_if_small(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a client's images on the device, or unchanged if they are many.

    Parameters
    ----------
    images : Tensor of uint8, shape [N, 3, H, W]
        Images in memory, or memory-mapped.
    device : torch.device
        Device that trains on them.

    Returns
    -------
    Tensor of uint8, shape [N, 3, H, W]
    """
    return images.to(device) if images.nbytes <= SMALL_BYTES else images


@contextmanager
def tensor_cores(allowed: TF32) -> Iterator[None]:
    """Say which float32 products may round their factors to TF32, within the block.

    TF32 has the range of float32 and 10 bits of precision. NVIDIA GPUs since Ampere
    multiply it several times as fast; other devices ignore this. Sums stay in float32.

    Parameters
    ----------
    allowed : {"off", "convolutions", "all"}
        "convolutions" is torch's default; "all" adds matrix products.
    """
    convolutions, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, matrices.allow_tf32
    convolutions.allow_tf32 = allowed != "off"
    matrices.allow_tf32 = allowed == "all"
    try:
        yield
    finally:
        convolutions.allow_tf32, matrices.allow_tf32 = before


def tf32_state() -> tuple[bool, bool]:
    """Return whether convolutions and matrix products may round their factors."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
