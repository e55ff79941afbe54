"""Choice of the compute device."""

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device of a configuration's ``device`` key.

    Parameters
    ----------
    name : str
        ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If the name is no device, or not one of this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device = {name!r}, but this machine has {torch.cuda.device_count()} CUDA "
            "devices; use device='auto' or 'cpu'"
        )
    return device
