"""What a network is worth and what it costs: top-1 accuracy, parameters, multiply-accumulates, latency.

Nothing here changes the network: it is put into evaluation mode and back, or copied when it lies on another device.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from entprune.errors import ConfigError, DataError, ModelError

Indices = npt.NDArray[np.integer[Any]]
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
Progress = Callable[[int, int, str], None]  # steps done, steps in total, what is being done

_NUM_WARM_UP_PASSES = 3
_LONG_PASS_SECONDS = 2.0


class ImageSplit(Protocol):
    """Images with labels, readable in any order."""

    def __len__(self) -> int:
        """Return the number of images n."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Return the class of each image, (n,)."""

    def batch(self, indices: Indices) -> Tensor:
        """Return the images at ``indices``, normalised, float32 (len(indices), c, h, w) on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one network is worth and what it costs.

    Attributes:
        accuracy: top-1, percent.
        parameters: number of trainable and fixed parameters; buffers are not counted.
        macs: multiply-accumulates for one image.
        latency_ms: batch size, as text, to the median milliseconds of one forward pass.
        correct: (n,) bool, whether each image is classified correctly; None where none was looked at.
    """

    accuracy: float
    parameters: int
    macs: int
    latency_ms: dict[str, float]
    correct: npt.NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


def measure(
    model: nn.Module,
    split: ImageSplit,
    input_shape: tuple[int, int, int],
    *,
    indices: Indices | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    latency_batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 10,
) -> Measurement:
    """Measure accuracy, size and speed of a network; arguments as for the functions below."""
    correct = predict_correct(model, split, indices, batch_size, device)
    return measurement_of(model, correct, input_shape, latency_batch_sizes, repeats=repeats, device=device)


def measurement_of(
    model: nn.Module,
    correct: npt.NDArray[np.bool_] | None,
    input_shape: tuple[int, int, int],
    latency_batch_sizes: Sequence[int] = (1, 64),
    *,
    repeats: int = 10,
    device: str = "cpu",
) -> Measurement:
    """Measure size and speed of a network whose test outcomes are known already.

    Args:
        correct: (n,) whether it classifies each image correctly; None gives an accuracy of NaN.
        model, input_shape, latency_batch_sizes, repeats, device: as for :func:`measure_latency`.
    """
    return Measurement(
        accuracy=float("nan") if correct is None else 100.0 * float(correct.mean()),
        correct=correct,
        parameters=count_parameters(model),
        macs=count_macs(model, input_shape),
        latency_ms=measure_latency(model, input_shape, latency_batch_sizes, repeats=repeats, device=device),
    )


def accuracy(
    model: nn.Module,
    split: ImageSplit,
    *,
    indices: Indices | None = None,
    batch_size: int = 256,
    device: str = "cpu",
) -> float:
    """Return the top-1 accuracy in percent; arguments and errors as for :func:`predict_correct`."""
    return 100.0 * float(predict_correct(model, split, indices, batch_size, device).mean())


def predict_correct(
    model: nn.Module,
    split: ImageSplit,
    indices: Indices | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress | None = None,
) -> npt.NDArray[np.bool_]:
    """Tell for each image whether the largest logit is that of its class.

    Args:
        model: maps (n, c, h, w) to logits (n, number of classes).
        split: where the images come from.
        indices: which images, all by default.
        batch_size: images in one forward pass.
        device: where to run, such as ``"cpu"`` or ``"cuda"``.
        progress: called after each batch.

    Returns:
        (number of images,), in the order of ``indices``. An image whose logits are not finite counts as wrong.

    Raises:
        ConfigError: the batch size or the device is unusable. DataError: there is no image. ModelError: the network's
        output is not (n, number of classes).
    """
    labels = split.labels if indices is None else split.labels[np.asarray(indices)]
    return np.asarray(predict_classes(model, split, indices, batch_size, device, progress) == labels)


def chunks(indices: Indices, batch_size: int, chunk: int | None) -> Iterator[Indices]:
    """Cut each batch of images into equal parts of at least `chunk` images, or leave it whole.

    On a CPU, torch answers bit by bit alike for 16, 32 or 64 images at once, and otherwise for fewer than 16: its
    matrix products then add up in another order. No part is therefore smaller than asked unless its batch was.
    """
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        yield from np.array_split(batch, max(1, len(batch) // (chunk or batch_size)))


def predict_classes(
    model: nn.Module,
    split: ImageSplit,
    indices: Indices | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress | None = None,
) -> npt.NDArray[np.int64]:
    """Return the class with the largest logit for each image, (n,); -1 where a logit is not finite.

    Arguments and errors as for :func:`predict_correct`.
    """
    logits = predict_logits(model, split, indices, batch_size, device, progress)
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def predict_logits(
    model: nn.Module,
    split: ImageSplit,
    indices: Indices | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Return the logits of each image, (n, number of classes); arguments and errors as for :func:`predict_correct`."""
    selected = np.arange(len(split)) if indices is None else np.asarray(indices)
    if len(selected) == 0:
        raise DataError("evaluation: expected at least one image, got none; give more data or leave indices out.")
    if batch_size < 1:
        raise ConfigError(f"evaluation: expected batch_size >= 1, got {batch_size}.")
    parts: list[npt.NDArray[np.float32]] = []
    target = resolve_device(device)
    with _evaluated(model, target) as network:
        for start in range(0, len(selected), batch_size):
            chosen = selected[start : start + batch_size]
            logits = _check_logits(network(split.batch(chosen).to(target)), len(chosen))
            parts.append(logits.float().cpu().numpy())
            if progress is not None:
                progress(start + len(chosen), len(selected), "evaluating images")
    return np.concatenate(parts)


def has_native_bfloat16(device: str) -> bool:
    """Tell whether this machine has a device of that name's kind that multiplies bfloat16 without emulating it."""
    device_type = device.partition(":")[0]
    if device_type == "cuda":
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def placed(model: nn.Module, device: str, precision: Precision = "float32") -> Iterator[nn.Module]:
    """Lend a network on a device, so that its products are computed in a precision.

    In bfloat16 convolutions are in channels_last, which is faster. Parameters keep their values; the network itself is
    moved, and its memory layout changes.

    Raises:
        ConfigError: the device is unusable.
    """
    target = resolve_device(device)
    network = model if locate_model(model) == target else model.to(target)
    if precision == "float32":
        yield network
        return
    with torch.autocast(target.type, dtype=torch.bfloat16):
        yield network.to(memory_format=torch.channels_last)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for one image of shape (c, h, w)."""
    with _evaluated(model, torch.device("cpu")) as network, FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *input_shape))
    return int(counter.get_total_flops()) // 2  # one multiplication and one addition each


def measure_latency(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] = (1, 64),
    *,
    repeats: int = 10,
    device: str = "cpu",
) -> dict[str, float]:
    """Time forward passes after a warm-up.

    Args:
        model: the network.
        input_shape: (c, h, w) of one image.
        batch_sizes: how many images at once.
        repeats: number of timed passes for each batch size; at most three where one takes seconds.
        device: where to run.

    Returns:
        Batch size, as text, to the median milliseconds of one pass.

    Raises:
        ConfigError: ``repeats`` or a batch size is below 1, or the device is unusable.
    """
    if repeats < 1 or min(batch_sizes, default=1) < 1:
        raise ConfigError(f"latency: expected repeats and batch sizes >= 1, got {repeats} and {tuple(batch_sizes)}.")
    target = resolve_device(device)
    generator = torch.Generator().manual_seed(0)
    latency_ms = {}
    with _evaluated(model, target) as network:
        for batch_size in batch_sizes:
            images = torch.randn(batch_size, *input_shape, generator=generator).to(target)
            latency_ms[str(batch_size)] = 1000.0 * statistics.median(_time_passes(network, images, repeats))
    return latency_ms


def resolve_device(name: str) -> torch.device:
    """Return the device of that name, CUDA ones with their number.

    Raises:
        ConfigError: the name is unknown, or the machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise ConfigError(f"device '{name}': expected a name such as cpu or cuda.") from cause
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device '{name}': this machine has no such GPU; use cpu.")
        return torch.empty(0, device=device).device  # with its number, which plain "cuda" lacks
    return device


def locate_model(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a network that has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _evaluated(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Lend the network in evaluation mode on a device, without gradients; each module's mode is restored."""
    network = model if locate_model(model) == device else copy.deepcopy(model).to(device)
    training_modules = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        for module in training_modules:
            module.training = True


def _check_logits(output: Any, num_images: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != num_images:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"expected logits of shape ({num_images}, classes) from the network, got {found}.")
    return output


def _time_passes(network: nn.Module, images: Tensor, repeats: int) -> list[float]:
    """Seconds of each pass after a warm-up; passes of seconds warm up in one and are steady enough for three."""
    is_long = _time_pass(network, images) > _LONG_PASS_SECONDS
    for _ in range(0 if is_long else _NUM_WARM_UP_PASSES - 1):
        network(images)
    return [_time_pass(network, images) for _ in range(min(repeats, 3) if is_long else repeats)]


def _time_pass(network: nn.Module, images: Tensor) -> float:
    """Return the seconds of one forward pass, its work on a GPU included."""
    start = time.perf_counter()
    network(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
