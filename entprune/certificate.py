"""Proof that the smaller network is the full-size one with the removed channels silenced.

The masked network has the *dense* topology: every layer keeps its full width, the smaller network's weights are
written back to their places, and each consumer's input is multiplied by zero where a channel was removed. Wrong
couplings (the right number of channels, but not the same ones) run without complaint; only this comparison finds
them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprune.assembly import slice_network
from entprune.groups import ChannelGroup, ChannelGroups, Unprunable
from entprune.layers import LayerSelection, input_width, is_dense, output_width
from entprune.models.resnet import PaddedShortcut
from entprune.plan import GroupPlan, PruningPlan, select_layers

_TRIAL_TOLERANCE = 1e-9  # of the same computation in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Outcome of the comparison.

    Attributes:
        max_abs_difference: largest difference of any output of the network or of one of its convolutions and linear
            layers, relative to the largest absolute value there in the masked network; a layer whose contribution to
            the network's output is tiny is compared all the same.
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
    batch = torch.cat([images, noise]).double()
    masked = masked_network(dense, smaller, groups, plan).double()
    small = copy.deepcopy(smaller).eval().double().cpu()
    with torch.inference_mode():
        expected = _answers(masked, batch, select_layers(dense, groups, plan))
        actual = _answers(small, batch, {})
    difference = max(_relative_difference(expected[name], value) for name, value in actual.items())
    return Certificate(
        max_abs_difference=difference,
        tolerance=tolerance,
        num_images=len(batch),
        passed=bool(np.isfinite(difference) and difference <= tolerance),
    )


def answer_difference(expected: nn.Module, actual: nn.Module, images: Tensor) -> float:
    """Largest difference of two networks' outputs in float64, relative to the largest value of the first's.

    Args:
        expected, actual: networks for the same images; neither is changed.
        images: (n, C, H, W).
    """
    with torch.inference_mode():
        networks = [copy.deepcopy(model).eval().double().cpu() for model in (expected, actual)]
        answers = [_answers(network, images.double(), {}) for network in networks]
    outputs = [{name: value for name, value in found.items() if name.startswith("output ")} for found in answers]
    return max(_relative_difference(value, outputs[1][name]) for name, value in outputs[0].items())


def _answers(model: nn.Module, batch: Tensor, selection: Mapping[str, LayerSelection]) -> dict[str, Tensor]:
    """Outputs of the network and of each dense layer, kept channels alone; of the last call if there are several."""
    found: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        kept = selection.get(name, LayerSelection()).outputs

        def hook(layer: nn.Module, _: object, output: Tensor) -> None:
            axis = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
            index = torch.arange(output.shape[axis]) if kept is None else torch.from_numpy(kept)
            found[name] = output.index_select(axis, index)  # a copy: what follows may work in place

        return hook

    dense = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(record(name)) for name, layer in dense]
    try:
        answer = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    leaves = [value for value in tree_leaves(answer) if isinstance(value, Tensor)]
    return {**found, **{f"output {number}": value for number, value in enumerate(leaves)}}


def _relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where it is not a number."""
    if expected.shape != actual.shape:
        return float("inf")
    difference = (expected - actual).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float("inf") if bool(difference.isnan()) else float(difference)


def confirm_groups(model: nn.Module, groups: ChannelGroups, input_shape: tuple[int, int, int]) -> ChannelGroups:
    """Refuse the groups that cannot be certified, before any work is spent on them.

    A trial cuts a random half of the channels out of all groups, and only if that fails out of halves of them, down to
    the one that is to blame. It finds what the analysis of the coupling did not understand: code that counts on its
    channels, say.

    Args:
        model: network in eval mode; it is not changed.
        groups: its groups as the analysis found them.
        input_shape: (C, H, W).
    """
    images = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    confirmed: list[ChannelGroup] = []
    refused: list[Unprunable] = []
    waiting = [groups.groups]
    while waiting:
        part = waiting.pop()
        if not part or _survives_trial(model, (*confirmed, *part), images):
            confirmed.extend(part)
        elif len(part) > 1:
            waiting.extend((part[len(part) // 2 :], part[: len(part) // 2]))  # the first half is tried next
        else:
            reason = "a trial showed that cutting its channels out is not the same as silencing them"
            refused.extend(Unprunable(layer=piece.layer, reason=reason) for piece in part[0].producers)
    if not refused:
        return groups
    return replace(groups, groups=tuple(confirmed), unprunable=(*groups.unprunable, *refused))


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
        smaller = slice_network(model, only, plan)
        return certify(model, smaller, only, plan, images, tolerance=_TRIAL_TOLERANCE).passed
    except (RuntimeError, IndexError, ValueError):  # shapes that do not fit together
        return False


def masked_network(dense: nn.Module, smaller: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> nn.Module:
    """Full-size copy with the smaller network's weights and removed channels zeroed at every consumer's input.

    A normalisation over channels (LayerNorm, GroupNorm) takes its sums over the kept ones.
    """
    masked = copy.deepcopy(dense).eval().cpu()
    selection = select_layers(dense, groups, plan)
    for name, small_layer in smaller.named_modules():
        layer = masked.get_submodule(name)
        entry = selection.get(name, LayerSelection())
        _write_back(name, layer, small_layer, selection)
        if is_dense(layer) and entry.inputs is not None:
            layer.register_forward_pre_hook(_silence(layer, entry.inputs))
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) and entry.outputs is not None:
            layer.register_forward_hook(_normalise_kept(small_layer, entry.outputs))
    return masked


def _write_back(name: str, layer: nn.Module, small_layer: nn.Module, selection: Mapping[str, LayerSelection]) -> None:
    """Scatter the smaller layer's own parameters and buffers into the full-size layer."""
    if isinstance(layer, PaddedShortcut):
        return
    small = dict(small_layer.named_parameters(recurse=False)) | dict(small_layer.named_buffers(recurse=False))
    full = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    whole = selection.get(name, LayerSelection())
    with torch.no_grad():
        for own, value in small.items():
            entry = selection.get(f"{name}.{own}" if name else own, whole)
            full[own][_kept(own, full[own], entry)] = value.detach().cpu()


def _kept(own: str, full: Tensor, entry: LayerSelection) -> tuple[Tensor, ...]:
    """Index of the kept entries of a tensor."""
    if full.ndim == 0:
        return ()
    positions = [torch.arange(size) for size in full.shape]
    if entry.outputs is not None:
        positions[entry.axis] = torch.from_numpy(entry.outputs)
    if entry.inputs is not None and own == "weight" and full.ndim > 1:
        positions[1] = torch.from_numpy(entry.inputs)
    return torch.meshgrid(*positions, indexing="ij")


def _silence(layer: nn.Module, kept: np.ndarray) -> Any:
    mask = torch.zeros(input_width(layer), dtype=torch.float64)
    mask[torch.from_numpy(kept)] = 1.0

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = inputs[0]
        shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        return (value * mask.to(value).reshape(shape), *inputs[1:])

    return hook


def _normalise_kept(small_layer: nn.Module, kept: np.ndarray) -> Any:
    """Replace a normalisation's output: the narrow layer's at the kept channels, zero elsewhere."""
    small, index = copy.deepcopy(small_layer).eval().double().cpu(), torch.from_numpy(kept)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        axis = _norm_axis(layer, output)
        result = torch.zeros_like(output)
        return result.index_copy(axis, index, small(inputs[0].index_select(axis, index)))

    return hook


def _norm_axis(layer: nn.Module, output: Tensor) -> int:
    """Axis of a normalisation's channels: the last one for LayerNorm itself, images first for what derives from it."""
    is_derived = type(layer) is not nn.LayerNorm and output.shape[1] == output_width(layer)
    return 1 if isinstance(layer, nn.GroupNorm) or is_derived else output.ndim - 1
