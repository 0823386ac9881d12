"""How much memory a worker needs for the stages of a pruning run, from the sizes of what it holds.

Per stage, above the libraries and two copies of the network (the shared one and the one that runs):

    calibrate   one batch's live activations, and of each consumer's d features the running sums and the result:
                about (6 + 8) d^2 bytes, or 4 t d for t rows fewer than d; dense answers 4 t m
    solve       about 110 d^2 bytes for each consumer of a group, as measured on a ResNet-50; the problem itself lies in
                the object store
    assemble    the live activations of all calibration images, or a gigabyte of them and one batch's beside the files
                that hold the rest; beside those that are alive when a layer is refit twice its rows (at most a
                gigabyte) and its normal equations, about 60 d^2
    tune        five copies of the network and one batch's activations of all layers, twice

Live activations are counted operation by operation on one image: a value counts until its last use.

Axes: t sampled rows, d features, m outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from entprune.assembly import HELD_BYTES, HELD_NUMBERS
from entprune.calibration import SamplingPlan
from entprune.config import PruneConfig
from entprune.moments import count_positions, feature_count
from entprune.stages import Network, sampling_plan

# Private memory of a worker that has done its first job: Python, torch, Ray, and what these load and keep at first use.
LIBRARY_BYTES = 420 * 2**20
_FLOAT = 4
# Per entry of the Gram matrices, as measured on a ResNet-50: copies in both precisions, and what the allocator keeps.
_SOLVE_BYTES, _REFIT_BYTES = 110, 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """What one image takes on its way through the dense network.

    Attributes:
        image: bytes of the image itself.
        live: most bytes alive at any moment, the image included.
        total: bytes of all operations' results together.
        positions: output positions per convolution or linear layer.
        alive: bytes alive when that layer runs.
    """

    image: int
    live: int
    total: int
    positions: dict[str, int]
    alive: dict[str, int]


def measure_activations(network: Network) -> Activations:
    """Run one image of zeros through the dense network and count what is alive."""
    run = _CountingRun(network)
    image = torch.zeros(1, *network.input_shape)
    with torch.inference_mode():
        run.run(image)
    return Activations(image=_size(image), live=run.live, total=run.total, positions=run.positions, alive=run.alive)


class _CountingRun(fx.Interpreter):
    """Runs the operations one by one; the interpreter lets go of a value after its last use."""

    def __init__(self, network: Network) -> None:
        super().__init__(fx.GraphModule(network.model, network.graph))
        self.live = self.total = 0
        self.positions: dict[str, int] = {}
        self.alive: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation; what it reads and what it returns are alive together."""
        result = super().run_node(n)
        if n.op == "get_attr":
            return result
        values = [value for node, value in self.env.items() if node.op != "get_attr"]
        alive = _size([*values, result])
        self.total += _size(result)
        self.live = max(self.live, alive)
        if n.op == "call_module" and isinstance(layer := self.submodules[str(n.target)], (nn.Conv2d, nn.Linear)):
            self.positions[str(n.target)] = count_positions(layer, self.env[n.args[0]])  # type: ignore[index]
            self.alive[str(n.target)] = alive
        return result


def worker_bytes(
    network: Network, activations: Activations, config: PruneConfig, *, tuning_batch: int | None = None
) -> int:
    """Memory that one worker needs for the most demanding stage.

    Args:
        network: analysed.
        activations: of the network.
        config: settings, with as many images as there are.
        tuning_batch: images per step of fine-tuning, None without.
    """
    images = config.calibration_samples or 1
    sampling = sampling_plan(config, images)
    own: int = sum(_size(value) for value in network.model.state_dict().values())
    on_host = 0 if config.device.startswith("cuda") else 1  # activations lie on the device
    stages = [
        on_host * config.batch_size * activations.live + _moment_bytes(network, activations, sampling, config),
        max(map(_solve_bytes, _features_by_group(network))),
        _walk_bytes(activations.live, on_host * images, config.batch_size),
        _refit_bytes(network, activations, sampling, on_host * images),
    ]
    if tuning_batch is not None:
        stages.append(3 * own + on_host * 2 * tuning_batch * activations.total)
    return LIBRARY_BYTES + 2 * own + max(stages)


def _moment_bytes(network: Network, activations: Activations, sampling: SamplingPlan, config: PruneConfig) -> int:
    consumers, total = set(network.consumers()), 0
    for name in {*consumers, *network.refit_layers}:
        layer = network.model.get_submodule(name)
        rows, features = sampling.num_rows(layer, activations.positions.get(name, 1)), feature_count(layer)
        share = -(-rows // config.calibration_shards)
        total += 2 * _FLOAT * share * layer.get_parameter("weight").shape[0]
        if name in consumers:
            total += 2 * _FLOAT * share * features if rows < features else 14 * features**2
    return total


def _features_by_group(network: Network) -> Iterable[list[int]]:
    for group in network.groups.groups:
        yield [feature_count(network.model.get_submodule(piece.layer)) for piece in group.consumers]


def _solve_bytes(features: list[int]) -> int:
    return _SOLVE_BYTES * sum(width**2 for width in features)


def _walk_bytes(per_image: int, images: int, batch_size: int) -> int:
    """Activations of all images, or what is held of them and of one batch that is read from files and written."""
    return min(images * per_image, HELD_BYTES + batch_size * per_image)


def _refit_bytes(network: Network, activations: Activations, sampling: SamplingPlan, images: int) -> int:
    needs = [0]
    for name in network.refit_layers:
        layer = network.model.get_submodule(name)
        rows, features = sampling.num_rows(layer, activations.positions.get(name, 1)), feature_count(layer)
        held = rows * features if rows * features <= HELD_NUMBERS else 0
        beside = _walk_bytes(activations.alive.get(name, 0), images, sampling.batch_size)
        needs.append(beside + 2 * _FLOAT * held + _REFIT_BYTES * min(rows, features) ** 2)
    return max(needs)


def _size(value: Any) -> int:
    """Bytes of tensors; those that share their memory count once."""
    return sum(
        {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in _tensors(value)}.values()
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
