"""The pruning plan: which channels of each group stay, and what that means for every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from entprune.errors import ConfigError
from entprune.groups import ChannelGroup, ChannelGroups, LayerSlice
from entprune.layers import LayerSelection, find_part, input_width, part_width

_PLAN_VERSION, _WITH_RANKS = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """Kept channels of one group, sorted."""

    name: str
    num_channels: int
    kept_channels: tuple[int, ...]

    def __post_init__(self) -> None:
        kept = self.kept_channels
        if not kept:
            raise ConfigError(f"group {self.name!r}: expected at least one kept channel, got none; rebuild the plan.")
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.num_channels:
            raise ConfigError(
                f"group {self.name!r}: kept_channels must be sorted, unique and lie in [0, {self.num_channels}), got "
                f"{kept[0]}..{kept[-1]}; rebuild the plan."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningPlan:
    """What stays of a network.

    Attributes:
        groups: kept channels of every group, in execution order.
        ranks: layers whose weights are of low rank, with that rank, in execution order; they become two layers each
            (:mod:`entprune.low_rank`).
    """

    groups: tuple[GroupPlan, ...]
    ranks: tuple[tuple[str, int], ...] = ()

    def widths(self) -> dict[str, int]:
        """Kept channels per group."""
        return {group.name: len(group.kept_channels) for group in self.groups}

    def kept(self, name: str) -> np.ndarray:
        """(k,) sorted channel numbers of one group."""
        for group in self.groups:
            if group.name == name:
                return np.array(group.kept_channels, dtype=np.int64)
        raise ConfigError(f"the plan has no group {name!r}; it was made for another network.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ranks = {"ranks": dict(self.ranks)} if self.ranks else {}
        return {
            "plan_version": _WITH_RANKS if ranks else _PLAN_VERSION,
            "groups": [
                {"name": g.name, "num_channels": g.num_channels, "kept_channels": list(g.kept_channels)}
                for g in self.groups
            ],
            **ranks,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown version or a malformed entry.
        """
        if content.get("plan_version") not in {_PLAN_VERSION, _WITH_RANKS}:
            raise ConfigError(
                f"expected plan_version {_PLAN_VERSION} or {_WITH_RANKS}, got {content.get('plan_version')!r}; "
                "rebuild the plan."
            )
        return cls(
            groups=tuple(
                GroupPlan(
                    name=str(entry["name"]),
                    num_channels=int(entry["num_channels"]),
                    kept_channels=tuple(int(channel) for channel in entry["kept_channels"]),
                )
                for entry in content["groups"]
            ),
            ranks=tuple((str(name), int(rank)) for name, rank in content.get("ranks", {}).items()),
        )

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form: two runs agree exactly if their digests do."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class _Removed:
    inputs: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)
    axis: int = 0


def full_plan(groups: ChannelGroups) -> PruningPlan:
    """The plan that keeps everything."""
    return PruningPlan(
        groups=tuple(
            GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=tuple(range(g.num_channels)))
            for g in groups.groups
        )
    )


def compose_plans(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan that does at once what two plans do one after the other.

    Args:
        first: of the dense network.
        second: of the network that the first one leaves, whose layers of low rank are one again
            (:func:`entprune.low_rank.merge_layers`), so that only the second's ranks remain; groups that it does not
            name stay as they are.

    Raises:
        ConfigError: the second plan belongs to another network.
    """
    later = {group.name: group for group in second.groups}
    if unknown := set(later) - {group.name for group in first.groups}:
        raise ConfigError(f"the second plan has groups {sorted(unknown)} that the first lacks; rebuild the plan.")
    groups = []
    for group in first.groups:
        kept = group.kept_channels
        then = later.get(group.name)
        if then is not None and then.num_channels != len(kept):
            raise ConfigError(
                f"group {group.name!r}: expected a second plan for {len(kept)} channels, got one for "
                f"{then.num_channels}; rebuild the plan."
            )
        chosen = kept if then is None else tuple(kept[channel] for channel in then.kept_channels)
        groups.append(GroupPlan(name=group.name, num_channels=group.num_channels, kept_channels=chosen))
    return PruningPlan(groups=tuple(groups), ranks=second.ranks)


def select_layers(model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> dict[str, LayerSelection]:
    """Translate kept channels into kept positions of every layer that a group touches.

    A layer may read several groups (at offsets, after a concatenation): what no group removes stays.
    """
    removed: dict[str, _Removed] = {}
    for group in groups.groups:
        gone = np.setdiff1d(np.arange(group.num_channels), plan.kept(group.name))
        for piece in (*group.consumers, *group.readers):
            removed.setdefault(piece.layer, _Removed()).inputs.append(piece.index[gone].ravel())
        for piece in (*group.producers, *group.followers):
            entry = removed.setdefault(piece.layer, _Removed(axis=piece.axis))
            entry.outputs.append(piece.index[gone].ravel())
    return {layer: _selection(find_part(model, layer), entry) for layer, entry in removed.items()}


def _selection(part: nn.Module | Tensor, entry: _Removed) -> LayerSelection:
    selection = LayerSelection(axis=entry.axis)
    if entry.inputs and isinstance(part, nn.Module):
        selection.inputs = _remaining(input_width(part), entry.inputs)
    if entry.outputs:
        selection.outputs = _remaining(part_width(part, entry.axis), entry.outputs)
    return selection


def _remaining(width: int, removed: list[np.ndarray]) -> np.ndarray:
    return np.setdiff1d(np.arange(width), np.concatenate(removed))


def consumer_features(layer: nn.Module, piece: LayerSlice) -> np.ndarray:
    """(c, b) features of each channel in the unfolded input of a consumer: kh * kw per channel of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return piece.index
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    return np.asarray((piece.index[:, :, None] * taps + np.arange(taps)).reshape(len(piece.index), -1))


def group_consumers(group: ChannelGroup) -> tuple[str, ...]:
    """Names of the layers that read the group."""
    return tuple(piece.layer for piece in group.consumers)
