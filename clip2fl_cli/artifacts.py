"""Read and check ``artifacts.safetensors``, the tensors of a run for its report."""

from collections.abc import Mapping
from pathlib import Path

import torch

from clip2fl_cli.run_schema import MAX_COUNT
from clip2fl_common.shown import short, shown
from server_app.foreign_files import ForeignFileError
from server_app.run_folder import CLIENTS, CONFUSION, FEATURES
from server_app.tensor_files import Declared, TensorFile

PROTOTYPES = "text_features"
REAL = (torch.float32, torch.float16, torch.bfloat16)
# The size of two confusion matrices of 8,000 classes. Drawing larger ones takes more
# memory than most machines have.
MAX_BYTES = 2**31


def read_artifacts(file: Path, classes: int) -> dict[str, torch.Tensor]:
    """Read the tensors that a report shows.

    Parameters
    ----------
    file : Path
        A run's ``artifacts.safetensors``.
    classes : int
        Number of classes C of the run.

    Returns
    -------
    dict of str to Tensor
        ``clients_by_class`` [K, C] and, for each head, ``confusion.HEAD`` [C, C], of
        int64; ``features`` [C, m, d] and ``text_features`` [C, d]. Each of them may be
        absent; other tensors of a method are not read.

    Raises
    ------
    ForeignFileError
        Names the tensor that is not as described, with its type and shape.
    """
    found = TensorFile.read(file)
    tensors = {name: t for name, t in found.tensors.items() if _is_shown(name)}
    for name, declared in tensors.items():
        _check_declared(file, name, declared, classes)
    features, prototypes = tensors.get(FEATURES), tensors.get(PROTOTYPES)
    if features and prototypes and features.shape[2] != prototypes.shape[1]:
        raise ForeignFileError(
            f"{shown(file)}: {FEATURES} are {features}, but {PROTOTYPES} are "
            f"{prototypes}: their widths must agree"
        )
    if file.stat().st_size > MAX_BYTES:
        raise ForeignFileError(
            f"{shown(file)} has more than {MAX_BYTES:,} bytes, which cannot be drawn"
        )
    loaded = found.load(tensors)
    _check_counts(file, loaded)
    return loaded


def _is_shown(name: str) -> bool:
    return name in (CLIENTS, FEATURES, PROTOTYPES) or name.startswith(CONFUSION)


def _check_declared(file: Path, name: str, declared: Declared, classes: int) -> None:
    # None stands for any size of at least 1.
    wanted: tuple[int | None, ...] = {
        CLIENTS: (None, classes),
        FEATURES: (classes, None, None),
        PROTOTYPES: (classes, None),
    }.get(name, (classes, classes))
    counts = name == CLIENTS or name.startswith(CONFUSION)
    kind = declared.dtype in ((torch.int64,) if counts else REAL)
    fits = len(declared.shape) == len(wanted) and all(
        has >= 1 and want in (None, has)
        for has, want in zip(declared.shape, wanted, strict=True)
    )
    if not (kind and fits):
        sides = ", ".join("any" if want is None else str(want) for want in wanted)
        raise ForeignFileError(
            f"{shown(file)}: the tensor {short(name)} is {declared}, but it must be "
            f"{'int64' if counts else 'float'} [{sides}]"
        )


def _check_counts(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int64 and (
            bool((tensor < 0).any()) or float(tensor.double().sum()) > MAX_COUNT
        ):
            raise ForeignFileError(
                f"{shown(file)}: the tensor {short(name)} holds counts that are "
                "negative or add up to more than there can be"
            )
