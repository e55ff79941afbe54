"""Re-training of a balanced classifier on federated features (CReFF, Sec. 3.4).

A step is four small operations. A GPU waits for the host between them, so there many
steps are recorded as one CUDA graph (`clip2fl_common.graphs`).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from clip2fl_common.graphs import Capture, Kept, Replayed, capture_for
from clip2fl_common.parallel import single_threaded_kernels

# Below this many multiply-adds in one product a second thread does not pay off. A batch
# of 32 reaches it at C = 250 and d = 512.
THREADING_THRESHOLD = 4_000_000

# Microseconds, for `retraining_device`, with d = 512 and batches of 32. On a CPU core:
# measured at C = 10 and 100, 21 and 85 a step. In a graph on an H100: measured at C =
# 10, 100 and 1000, 16, 26 and 95 a step, where single launches took 88, 95 and 106.
# Recording takes 50,000 once in a process, which is assumed.
CPU_STEP_US, CPU_US_PER_MEGA_MULTIPLY_ADD = 14.0, 43.0
GPU_STEP_US, GPU_US_PER_MEGA_MULTIPLY_ADD = 15.0, 5.0
RECORDING_US = 50_000.0

# Batches in one recording. More save little, and take longer to record.
STEPS_AT_ONCE = 32
# Random orders are copied to a GPU for many epochs at a time, up to this many numbers.
ORDER_NUMBERS = 2**20
# Recordings in a process, each with features and a classifier.
KEPT = 2


def retraining_device(
    device: torch.device, steps: int, multiply_adds: int
) -> torch.device:
    """Return where re-training takes less time: on a GPU, or on the CPU beside it.

    A CPU is faster where the steps are few and small, since it records nothing. The
    published settings (300 epochs, m = 100, d = 512, batches of 32) take 0.2 s on a CPU
    core at C = 10, and 0.15 s on an H100 after the first round. From there on the GPU
    is ahead: 2.4 s in place of 8 s at C = 100.

    Parameters
    ----------
    device : torch.device
        Device of the features.
    steps : int
        Number of steps in all epochs.
    multiply_adds : int
        Batch size times d times C: multiplications of one product.

    Returns
    -------
    torch.device
        The given one, or the CPU.
    """
    millions = multiply_adds / 1e6
    on_cpu = CPU_STEP_US + CPU_US_PER_MEGA_MULTIPLY_ADD * millions
    on_gpu = GPU_STEP_US + GPU_US_PER_MEGA_MULTIPLY_ADD * millions
    if steps * on_cpu < steps * on_gpu + RECORDING_US:
        return torch.device("cpu")
    return device


@torch.no_grad()
def retrain_classifier(
    features: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    initial: nn.Linear | None = None,
    classes: torch.Tensor | None = None,
    num_classes: int | None = None,
    capture: Capture | None = None,
) -> nn.Linear:
    """Train a linear classifier on the federated features.

    Plain SGD on shuffled mini-batches of mean cross-entropy. As in the released code,
    the classifier starts afresh each round (the paper's text continues the old one).
    The gradient of a linear classifier is written out, so neither a data loader nor
    automatic differentiation is needed, and the features stay in memory.

    Parameters
    ----------
    features : Tensor, shape [C, m, d]
        Federated features; row c is labelled c, so classes are balanced.
    epochs : int
        Passes over all C * m features.
    batch_size : int
        Mini-batch size; the last batch of an epoch may be smaller.
    learning_rate : float
        Step size.
    generator : torch.Generator
        CPU generator of the initial weights and the shuffling. torch's global
        generator is not used.
    initial : torch.nn.Linear or None
        Classifier to start from, not changed; None starts from a new one.
    classes : Tensor of int64, shape [K], or None
        If there are features of some classes only, [K, m, d]: the class of each row.
    num_classes : int or None
        Number of classes C, if there are features of some classes only.
    capture : Capture or None
        How steps on the features' device are recorded; None: as CUDA graphs where a
        GPU is faster (`retraining_device`), and not at all elsewhere.

    Returns
    -------
    torch.nn.Linear
        With d inputs and C outputs, on the features' device.
    """
    rows, per_class, dim = features.shape
    num_classes = num_classes or rows
    classifier = new_classifier(dim, num_classes, generator)
    classifier.to(features.device, features.dtype)
    if initial is not None:
        classifier.load_state_dict(initial.state_dict())
    # The bias is the weight of an additional feature, which is always 1.
    samples = torch.cat(
        [features.flatten(0, 1), features.new_ones(rows * per_class, 1)], dim=1
    )
    weight = torch.cat([classifier.weight, classifier.bias[:, None]], dim=1)
    steps = epochs * -(-len(samples) // batch_size)
    multiply_adds = batch_size * dim * num_classes
    device = features.device
    if capture is None:
        device = retraining_device(device, steps, multiply_adds)
        capture = capture_for(device)
    samples, weight = samples.to(device), weight.to(device)
    if classes is not None:
        classes = classes.to(device)
    orders = _orders(len(samples), epochs, generator, device)
    if capture is None:
        minus_one = -samples.new_ones(1, batch_size)
        small = multiply_adds < THREADING_THRESHOLD
        with single_threaded_kernels() if small else nullcontext():
            for order in orders:
                labels = _labels(order, per_class, classes)[None]
                for chosen, targets in zip(
                    order.split(batch_size),
                    labels.split(batch_size, dim=1),
                    strict=True,
                ):
                    batch = samples.index_select(0, chosen)
                    _descend(weight, batch, targets, minus_one, learning_rate)
    else:
        shapes = (samples.shape, weight.shape, samples.dtype, device)
        recorded = _recorded.of(
            (shapes, batch_size, learning_rate, capture),
            lambda: _Recorded(samples, weight, batch_size, learning_rate, capture),
        )
        recorded.start(samples, weight)
        for order in orders:
            recorded.run_epoch(order, _labels(order, per_class, classes))
        weight = recorded.weight
    classifier.weight.copy_(weight[:, :dim])
    classifier.bias.copy_(weight[:, dim])
    return classifier


def _descend(
    weight: torch.Tensor,
    batch: torch.Tensor,
    targets: torch.Tensor,
    minus_one: torch.Tensor,
    learning_rate: float,
) -> None:
    """Take a step of the weight [C, d + 1] on a batch [n, d + 1] of targets [1, n]."""
    # Shape [C, n]: with few classes a softmax along the outer axis is several times
    # faster.
    residual = weight.mm(batch.T).softmax(0)
    residual.scatter_add_(0, targets, minus_one)
    weight.addmm_(residual, batch, alpha=-learning_rate / len(batch))


def _descend_batches(
    samples: torch.Tensor,
    weight: torch.Tensor,
    minus_one: torch.Tensor,
    learning_rate: float,
    chosen: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """Take the steps of several batches of samples; the last one may be smaller."""
    batch_size = minus_one.shape[1]
    for batch, targets in zip(
        samples.index_select(0, chosen).split(batch_size),
        labels[None].split(batch_size, dim=1),
        strict=True,
    ):
        _descend(weight, batch, targets, minus_one, learning_rate)


def _orders(
    number: int, epochs: int, generator: torch.Generator, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield a random order of the samples for each epoch, on a device."""
    at_once = 1 if device.type == "cpu" else max(1, ORDER_NUMBERS // number)
    for start in range(0, epochs, at_once):
        orders = [
            torch.randperm(number, generator=generator)
            for _ in range(min(at_once, epochs - start))
        ]
        yield from torch.stack(orders).to(device)


def _labels(
    order: torch.Tensor, per_class: int, classes: torch.Tensor | None
) -> torch.Tensor:
    """Return the classes of the samples of an order."""
    rows = order // per_class
    return rows if classes is None else classes[rows]


class _Recorded:
    """Steps of one size on features and a classifier at fixed addresses."""

    def __init__(
        self,
        samples: torch.Tensor,
        weight: torch.Tensor,
        batch_size: int,
        learning_rate: float,
        capture: Capture,
    ) -> None:
        self._samples, self.weight = samples.clone(), weight.clone()
        self._batch_size = batch_size
        # Without this object in it: the recording is freed as soon as nobody uses it.
        steps = partial(
            _descend_batches,
            self._samples,
            self.weight,
            -samples.new_ones(1, batch_size),
            learning_rate,
        )
        self._take = Replayed(steps, [self.weight], capture, "re-training")

    def start(self, samples: torch.Tensor, weight: torch.Tensor) -> None:
        """Copy samples [N, d + 1] and a first weight [C, d + 1] to where steps read."""
        self._samples.copy_(samples)
        self.weight.copy_(weight)

    def run_epoch(self, order: torch.Tensor, labels: torch.Tensor) -> None:
        """Take the steps of an epoch, given its order [N] and the labels of it [N]."""
        at_once = STEPS_AT_ONCE * self._batch_size
        for chosen, targets in zip(
            order.split(at_once), labels.split(at_once), strict=True
        ):
            self._take(chosen, targets)


_recorded: Kept[_Recorded] = Kept(KEPT)


def new_classifier(
    feature_dim: int, num_classes: int, generator: torch.Generator
) -> nn.Linear:
    """Return a linear classifier with torch's default initialisation.

    ``nn.Linear`` draws weight and bias from U(-1/sqrt(d), 1/sqrt(d)) too, but only
    from the global generator.

    Parameters
    ----------
    feature_dim : int
        Number of inputs d.
    num_classes : int
        Number of outputs C.
    generator : torch.Generator
        CPU generator of the initial values.

    Returns
    -------
    torch.nn.Linear
    """
    # The meta device keeps nn.Linear's own initialisation from drawing numbers.
    classifier = nn.Linear(feature_dim, num_classes, device="meta").to_empty(
        device="cpu"
    )
    bound = feature_dim**-0.5
    with torch.no_grad():
        classifier.weight.uniform_(-bound, bound, generator=generator)
        classifier.bias.uniform_(-bound, bound, generator=generator)
    return classifier
