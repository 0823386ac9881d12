"""Importance scores of torch-pruning, as its users call them, on this project's channel groups.

torch-pruning scores a list of (layer, how it is cut, positions). The list is made from our groups, not from its own
graph, because that couples the padded shortcuts of CIFAR ResNets at the wrong offset.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from entprune.groups import ChannelGroup, ChannelGroups, LayerSlice
from entprune.layers import find_part
from entprune.stages import ImageSet

_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Item:
    """One coupled layer in torch-pruning's terms."""

    dep: Any
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


def coupled_layers(model: nn.Module, group: ChannelGroup) -> list[_Item]:
    """Everything that goes with a group's channels, producers first."""
    items = [_item(model, piece, reads=False) for piece in (*group.producers, *group.followers)]
    items += [_item(model, piece, reads=True) for piece in group.consumers]
    return [item for item in items if item is not None]


def _item(model: nn.Module, piece: LayerSlice, *, reads: bool) -> _Item | None:
    layer = find_part(model, piece.layer)
    if isinstance(layer, nn.Conv2d):
        cut = tp.prune_conv_in_channels if reads else tp.prune_conv_out_channels
    elif isinstance(layer, nn.Linear):
        cut = tp.prune_linear_in_channels if reads else tp.prune_linear_out_channels
    elif isinstance(layer, nn.BatchNorm2d):
        cut = tp.prune_batchnorm_out_channels
    else:
        return None  # a shortcut without parameters
    positions = piece.index.ravel()
    channels = np.repeat(np.arange(len(piece.index)), piece.index.shape[1])
    order = positions.argsort()
    dependency = SimpleNamespace(layer=layer, pruning_fn=cut, target=SimpleNamespace(module=layer), handler=cut)
    return _Item(dependency, positions[order].tolist(), channels[order].tolist())


def rank_by(importance: Any, model: nn.Module, groups: ChannelGroups) -> dict[str, np.ndarray]:
    """(c,) channels of every group, most important first; ties keep their order.

    Args:
        importance: one of torch-pruning's.
        model: the dense network, with gradients where the importance reads them.
        groups: its channel groups.
    """
    orders = {}
    for group in groups.groups:
        scores = importance(coupled_layers(model, group)).detach().double().numpy()
        orders[group.name] = np.argsort(-scores, kind="stable")
    return orders


def l1_order(model: nn.Module, groups: ChannelGroups) -> Mapping[str, np.ndarray]:
    """By the L1 norm of all weights that go with a channel."""
    return rank_by(tp.importance.GroupMagnitudeImportance(p=1), model, groups)


def fpgm_order(model: nn.Module, groups: ChannelGroups) -> Mapping[str, np.ndarray]:
    """By the distance from the geometric median (He et al. 2019)."""
    return rank_by(tp.importance.FPGMImportance(), model, groups)


def taylor_order(model: nn.Module, groups: ChannelGroups, images: ImageSet) -> Mapping[str, np.ndarray]:
    """By |weight * gradient| of the cross-entropy on labelled calibration images (Molchanov et al. 2019)."""
    network = copy.deepcopy(model).eval()
    labels = torch.from_numpy(np.asarray(images.split.labels)[images.indices])
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        loss = F.cross_entropy(network(images.split.batch(images.indices[part])), labels[part], reduction="sum")
        torch.autograd.backward(loss / len(images))
    return rank_by(tp.importance.GroupTaylorImportance(), network, groups)
