"""One pass of the dense network over calibration images: moments of what each consumer reads, and what it answers.

Axes: n images, t sampled rows, d features, m outputs.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx, nn

from entprune.errors import DataError
from entprune.evaluation import ImageSplit, chunks
from entprune.moments import (
    InputMoments,
    MomentAccumulator,
    RowAccumulator,
    RowMoments,
    count_positions,
    draw_positions,
    feature_count,
    make_accumulator,
    merge,
    read_outputs,
    read_rows,
)
from entprune.residuals import ResidualGraph, inverse_gain


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """How many rows each layer contributes.

    Attributes:
        num_images: calibration images in all shards together.
        batch_size: images per forward pass; shards start at multiples of it, so that results do not depend on sharding.
        chunk: least images per forward pass where a batch is too many for the memory. Rows are drawn and summed by
            whole batches all the same, so the result is that of whole batches (:func:`entprune.evaluation.chunks`).
        min_rows: least rows wanted per layer over all images.
        rows_per_feature: rows wanted per input feature.
        seed: of the random positions.
    """

    num_images: int
    batch_size: int = 64
    min_rows: int = 10_000
    rows_per_feature: float = 2.0
    seed: int = 0
    chunk: int | None = None

    def per_image(self, layer: nn.Module) -> int:
        """Random output positions per image for one layer."""
        wanted = max(self.min_rows, self.rows_per_feature * feature_count(layer))
        return max(1, math.ceil(wanted / self.num_images))

    def num_rows(self, layer: nn.Module, num_positions: int) -> int:
        """Rows of one layer in all shards together, for that many output positions per image."""
        return self.num_images * min(self.per_image(layer), num_positions)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerStatistics:
    """What the calibration data say about one layer.

    Attributes:
        moments: of its sampled input rows, or these rows where they are fewer than the features; None where only the
            answers are needed.
        outputs: (t, m) float32 dense answers at the same rows, in image order; where a residual addition follows, plus
            what is added there, in the layer's own units.
    """

    moments: InputMoments | None
    outputs: np.ndarray


Statistics = Mapping[str, LayerStatistics]


def collect_statistics(
    model: nn.Module,
    split: ImageSplit,
    indices: np.ndarray,
    *,
    consumers: Sequence[str],
    others: Sequence[str] = (),
    sampling: SamplingPlan,
    first_image: int = 0,
    device: str = "cpu",
    residuals: ResidualGraph | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Run one shard of the calibration images through the dense network.

    Args:
        model: dense network in eval mode, on `device`.
        split: labelled images; the labels are not used.
        indices: (n,) numbers of this shard's images in the split.
        consumers: layers whose moments are wanted.
        others: layers of which only the answers are wanted.
        sampling: rows per layer.
        first_image: number of the shard's first image, a multiple of the batch size.
        residuals: layers followed by a residual addition, and where in the network's operations.
        progress: called with (images done, images in the shard).

    Raises:
        DataError: the shard does not start at a batch boundary, or the network answers NaN.
    """
    if first_image % sampling.batch_size:
        raise DataError(f"expected a shard that starts at a multiple of {sampling.batch_size}, got {first_image}.")
    collector = _Collector(model, consumers, others, sampling, device)
    run = model if residuals is None or not residuals.layers else _SummandRun(model, residuals, collector).run
    with torch.inference_mode(), collector:
        for start in range(0, len(indices), sampling.batch_size):
            batch = indices[start : start + sampling.batch_size]
            collector.begin((first_image + start) // sampling.batch_size, len(batch))
            for part in chunks(batch, sampling.batch_size, sampling.chunk):
                collector.expect(len(part))
                _check_outputs(run(split.batch(part).to(device)))
            collector.finish()
            if progress is not None:
                progress(min(start + sampling.batch_size, len(indices)), len(indices))
        return collector.result()


def _check_outputs(output: Tensor) -> None:
    if not bool(torch.isfinite(output).all()):
        raise DataError(
            "expected finite network outputs on the calibration images, got NaN or infinity; check data and weights."
        )


def merge_statistics(shards: Sequence[Statistics]) -> dict[str, LayerStatistics]:
    """Union of shards, summed in the order given: the same order gives the same bits."""
    merged: dict[str, LayerStatistics] = {}
    for layer in shards[0]:
        moments = shards[0][layer].moments
        for shard in shards[1:]:
            other = shard[layer].moments
            moments = merge(moments, other) if moments is not None and other is not None else None
        outputs = np.concatenate([shard[layer].outputs for shard in shards])
        merged[layer] = LayerStatistics(moments=moments, outputs=outputs)
    return merged


def num_bytes(statistics: Statistics) -> int:
    """Memory that some layers' statistics take."""
    total = 0
    for entry in statistics.values():
        moments = entry.moments
        total += entry.outputs.nbytes
        if moments is not None:
            total += moments.rows.nbytes if isinstance(moments, RowMoments) else moments.scatter.nbytes
    return total


class ShardSum:
    """Sums shards as they come in, in any order, to the same bits as :func:`merge_statistics` in theirs.

    Moments are large: a shard is held only until all before it have come.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Statistics] = {}
        self._count = 0
        self._total: dict[str, LayerStatistics] = {}

    def add(self, number: int, shard: Statistics) -> None:
        """Add the shard of that number, counted from 0."""
        self._waiting[number] = shard
        while self._count in self._waiting:
            following = self._waiting.pop(self._count)
            self._total = merge_statistics([self._total, following] if self._count else [following])
            self._count += 1

    def total(self) -> dict[str, LayerStatistics]:
        """The union of all shards so far."""
        return self._total


class _SummandRun(fx.Interpreter):
    """Runs the network operation by operation, and hands the collector what will be added to a layer's output."""

    def __init__(self, model: nn.Module, residuals: ResidualGraph, collector: _Collector) -> None:
        super().__init__(fx.GraphModule(model, copy.deepcopy(residuals.graph)))
        nodes = {node.name: node for node in self.module.graph.nodes}  # type: ignore[union-attr]
        self._others = {entry.layer: nodes[entry.other] for entry in residuals.layers}
        self._gains = {
            entry.layer: _along_channels(model.get_submodule(entry.layer), inverse_gain(model, entry))
            for entry in residuals.layers
        }
        self._collector = collector

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        layer = str(n.target)
        if n.op == "call_module" and layer in self._others:
            self._collector.summand = self.env[self._others[layer]] * self._gains[layer]
        return super().run_node(n)


def _along_channels(layer: nn.Module, values: Tensor) -> Tensor:
    """(m,) values in the shape that multiplies the layer's outputs, on its device."""
    values = values.to(layer.get_parameter("weight").device)
    return values.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Collector:
    """Hooks that sample rows of every wanted layer while the network runs, and take them in batch by batch.

    A batch may come in parts. Rows are drawn for the whole batch and added up once it is complete, so that parts do not
    show in the result.
    """

    def __init__(
        self, model: nn.Module, consumers: Sequence[str], others: Sequence[str], sampling: SamplingPlan, device: str
    ) -> None:
        self._sampling = sampling
        self._layers = {name: model.get_submodule(name) for name in (*consumers, *others)}
        self._consumers, self._device = frozenset(consumers), device
        self._accumulators: dict[str, MomentAccumulator | RowAccumulator] = {}  # made when the positions are known
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._batch = self._num_images = 0  # number of the batch, and its images
        self._first = self._part = 0  # image of the batch with which the present part begins, and images in it
        self._calls: Counter[str] = Counter()  # of each layer for the present part
        self._rows: dict[tuple[str, int], list[Tensor]] = {}  # per layer and call, of the parts so far
        self._answers: dict[tuple[str, int], list[Tensor]] = {}
        self.summand: Tensor | None = None  # of the layer that runs next, in its own units, (n, m, h, w) or (n, ..., m)

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        per_image = self._sampling.per_image(self._layers[name])

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            num_positions = count_positions(layer, inputs[0])
            share = len(output) / self._part  # 1, unless the network folds other axes into the first
            positions = draw_positions(
                round(share * self._num_images), num_positions,
                per_image=per_image, seed=self._sampling.seed, name=name, batch=self._batch,
            )  # fmt: skip
            if positions is not None:
                first = round(share * self._first)
                positions = positions[first : first + len(output)]
            answers = read_outputs(layer, output, positions)
            if self.summand is not None:
                answers, self.summand = answers + read_outputs(layer, self.summand, positions), None
            call = (name, self._calls[name])
            self._calls[name] += 1
            self._answers.setdefault(call, []).append(answers.cpu().clone())
            if name in self._consumers:
                self._accumulator(name, num_positions)
                self._rows.setdefault(call, []).append(read_rows(layer, inputs[0], positions))
                if self._first + self._part == self._num_images:  # now: a batch's rows are held no longer than needed
                    self._accumulators[name].update(_joined(self._rows.pop(call)))

        return hook

    def begin(self, batch: int, num_images: int) -> None:
        """A batch of that number and size follows."""
        self._batch, self._num_images, self._first, self._part = batch, num_images, 0, 0

    def expect(self, num_images: int) -> None:
        """A part of it of that size follows."""
        self._first, self._part = self._first + self._part, num_images
        self._calls.clear()

    def finish(self) -> None:
        """All of it has run."""
        for call in sorted(self._answers, key=lambda call: call[1]):
            self._outputs[call[0]].append(_joined(self._answers.pop(call)))

    def _accumulator(self, name: str, num_positions: int) -> MomentAccumulator | RowAccumulator:
        """Its form depends on the layer, the images' size and the sampling plan alone: every shard has the same."""
        if name not in self._accumulators:
            layer = self._layers[name]
            num_rows = self._sampling.num_rows(layer, num_positions)
            self._accumulators[name] = make_accumulator(feature_count(layer), num_rows, device=self._device)
        return self._accumulators[name]

    def result(self) -> dict[str, LayerStatistics]:
        return {
            name: LayerStatistics(
                moments=self._accumulators[name].result() if name in self._accumulators else None,
                outputs=torch.cat(self._outputs[name]).float().numpy(),
            )
            for name in self._layers
        }
