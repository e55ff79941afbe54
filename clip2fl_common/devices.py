"""Choose the compute device."""

import torch

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
