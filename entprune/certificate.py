"""Proof that the smaller network is the full-size one with the removed channels silenced.

The masked network has the *dense* topology: every layer keeps its full width, the smaller network's weights are
written back to their places, and each consumer's input is multiplied by zero where a channel was removed. Wrong
couplings (the right number of channels, but not the same ones) run without complaint; only this comparison finds
them.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entprune.assembly import slice_network
from entprune.groups import ChannelGroup, ChannelGroups, Unprunable, input_width
from entprune.plan import GroupPlan, LayerSelection, PruningPlan, select_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Outcome of the comparison.

    Attributes:
        max_abs_difference: largest difference of any output, relative to the largest absolute output of the masked
            network.
        tolerance: allowed.
        num_images: compared.
        passed: whether the difference is finite and within the tolerance.
    """

    max_abs_difference: float
    tolerance: float
    num_images: int
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def certify(
    dense: nn.Module,
    smaller: nn.Module,
    groups: ChannelGroups,
    plan: PruningPlan,
    images: Tensor,
    *,
    tolerance: float = 1e-4,
) -> Certificate:
    """Compare the smaller network with the masked full-size one.

    Args:
        dense: the network before pruning; it is not changed.
        smaller: the pruned network with its present weights.
        images: (n, C, H, W) real inputs; noise is added as a second half so that no channel is silent by chance.
        tolerance: largest allowed difference relative to the output's scale.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator) * images.std() + images.mean()
    batch = torch.cat([images, noise])
    masked = masked_network(dense, smaller, groups, plan)
    small = copy.deepcopy(smaller).eval().double().cpu()
    with torch.inference_mode():
        expected, actual = masked.double()(batch.double()), small(batch.double())
    scale = float(expected.abs().max().clamp_min(1e-12))
    difference = float((expected - actual).abs().max()) / scale
    return Certificate(
        max_abs_difference=difference,
        tolerance=tolerance,
        num_images=len(batch),
        passed=bool(np.isfinite(difference) and difference <= tolerance),
    )


def confirm_groups(model: nn.Module, groups: ChannelGroups, input_shape: tuple[int, int, int]) -> ChannelGroups:
    """Refuse the groups that cannot be certified, before any work is spent on them.

    A trial cuts a random half of the channels out of all groups, and only if that fails out of one more group at a
    time. It finds what the analysis of the coupling did not understand: channels that are mixed without a layer, or
    that reach the network's output.

    Args:
        model: network in eval mode; it is not changed.
        groups: its groups as the analysis found them.
        input_shape: (C, H, W).
    """
    images = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    if _survives_trial(model, groups.groups, images):
        return groups
    confirmed: list[ChannelGroup] = []
    refused: list[Unprunable] = []
    for group in groups.groups:
        if _survives_trial(model, (*confirmed, group), images):
            confirmed.append(group)
        else:
            reason = "a trial showed that cutting its channels out is not the same as silencing them"
            refused.extend(Unprunable(layer=piece.layer, reason=reason) for piece in group.producers)
    return ChannelGroups(groups=tuple(confirmed), unprunable=(*groups.unprunable, *refused))


def _survives_trial(model: nn.Module, tried: tuple[ChannelGroup, ...], images: Tensor) -> bool:
    generator = np.random.default_rng(0)
    halves = [
        (group, np.sort(generator.permutation(group.num_channels)[: (group.num_channels + 1) // 2])) for group in tried
    ]
    plan = PruningPlan(
        groups=tuple(
            GroupPlan(name=group.name, num_channels=group.num_channels, kept_channels=tuple(half.tolist()))
            for group, half in halves
        )
    )
    only = ChannelGroups(groups=tried, unprunable=())
    try:
        return certify(model, slice_network(model, only, plan), only, plan, images).passed
    except (RuntimeError, IndexError, ValueError):  # shapes that do not fit together
        return False


def masked_network(dense: nn.Module, smaller: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> nn.Module:
    """Full-size copy with the smaller network's weights and removed channels zeroed at every consumer's input."""
    masked = copy.deepcopy(dense).eval().cpu()
    selection = select_layers(dense, groups, plan)
    for name, small_layer in smaller.named_modules():
        layer = masked.get_submodule(name)
        entry = selection.get(name, LayerSelection())
        _write_back(layer, small_layer, entry)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and entry.inputs is not None:
            layer.register_forward_pre_hook(_silence(layer, entry.inputs))
    return masked


def _write_back(layer: nn.Module, small_layer: nn.Module, entry: LayerSelection) -> None:
    """Scatter the smaller layer's own parameters and buffers into the full-size layer."""
    small = dict(small_layer.named_parameters(recurse=False)) | dict(small_layer.named_buffers(recurse=False))
    full = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    with torch.no_grad():
        for name, value in small.items():
            target = full[name]
            if value.ndim == 0:
                target.copy_(value)
                continue
            rows = _positions(entry.outputs, target.shape[0])
            if name == "weight" and value.ndim > 1:
                columns = _positions(entry.inputs, target.shape[1])
                target[rows[:, None], columns] = value.detach().cpu()
            else:
                target[rows] = value.detach().cpu()


def _positions(selected: np.ndarray | None, width: int) -> Tensor:
    return torch.arange(width) if selected is None else torch.from_numpy(selected)


def _silence(layer: nn.Module, kept: np.ndarray) -> Any:
    mask = torch.zeros(input_width(layer), dtype=torch.float64)
    mask[torch.from_numpy(kept)] = 1.0

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = inputs[0]
        shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        return (value * mask.to(value).reshape(shape), *inputs[1:])

    return hook
