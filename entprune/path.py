"""Sparsity path of one channel group: for every width the best kept set that any setting found, and its error.

Axes: c channels, s snapshots along the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from entprune.elimination import can_eliminate, eliminate
from entprune.errors import ConfigError
from entprune.regression import GroupProblem
from entprune.shared_steps import Continuation, SharedSteps

_MAX_LEVELS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class PathSetting:
    """Hyperparameters of one way to order the channels of a group.

    Attributes:
        method: "entropy" continues in the L2 weight and drops channels whose probability vanishes; "elimination" takes
            out the channels that the refit error misses least (:mod:`entprune.elimination`) and reads nothing of the
            rest, except where a consumer has fewer rows than features: there it continues, too.
        entropy_weight: signed, in units of the L2 term per nat: eps_w = entropy_weight * (L2 term) / log(alive
            channels). Positive minimises entropy (sharpens), negative maximises it (softens), zero leaves the
            group-l_(2/3) penalty alone.
        drop_threshold: a channel with w_c below this fraction of max(w) leaves the problem.
        l2_start: first eps_l2 * c^2, the ridge relative to unit input variance at uniform w.
        l2_growth: factor between levels.
        iterations: alternations per level.
        max_drop: largest fraction of the alive channels that may leave after one level.
    """

    method: Literal["entropy", "elimination"] = "entropy"
    entropy_weight: float = 1.0
    drop_threshold: float = 0.3
    l2_start: float = 0.1
    l2_growth: float = 2.0
    iterations: int = 2
    max_drop: float = 0.3

    def __post_init__(self) -> None:
        checks = {
            "method": self.method in ("entropy", "elimination"),
            "entropy_weight": -10 <= self.entropy_weight <= 10,
            "drop_threshold": 0 < self.drop_threshold < 1,
            "l2_start": 0 < self.l2_start <= 1,
            "l2_growth": 1 < self.l2_growth <= 100,
            "iterations": 1 <= self.iterations <= 100,
            "max_drop": 0 < self.max_drop <= 1,
        }
        for name, fits in checks.items():
            if not fits:
                raise ConfigError(f"path setting {name} is out of range, got {getattr(self, name)}; see PathSetting.")

    def label(self) -> str:
        """Short name for tables and run names."""
        if self.method == "elimination":
            return "backward elimination"
        return f"entropy {self.entropy_weight:+g}, drop {self.drop_threshold:g}, growth {self.l2_growth:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SettingPath:
    """Result of one continuation.

    Attributes:
        setting: its hyperparameters.
        order: (c,) channels, most important first; the first k are the kept set of width k.
        errors: (c + 1,) refit error at each width, summed over consumers (fraction of output variance unexplained; on
            held-out rows for a consumer with fewer rows than features).
        snapshots: (s, c) channel probabilities along the continuation, zero for dropped channels.
        status: "complete" if one channel was left at the end, else "level limit".
    """

    setting: PathSetting
    order: np.ndarray
    errors: np.ndarray
    snapshots: np.ndarray
    status: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SparsityPath:
    """Lower envelope over settings for one group.

    Attributes:
        group: its name.
        num_consumers: regressions summed in the errors.
        settings: one result per setting.
        errors: (c + 1,) smallest refit error per width.
        choice: (c + 1,) number of the setting that reached it.
    """

    group: str
    num_consumers: int
    settings: tuple[SettingPath, ...]
    errors: np.ndarray
    choice: np.ndarray

    @property
    def num_channels(self) -> int:
        """c, the dense width."""
        return len(self.errors) - 1

    def kept(self, width: int) -> tuple[int, ...]:
        """Sorted channel numbers of the best kept set of that width."""
        if not 0 <= width <= self.num_channels:
            raise ConfigError(
                f"group {self.group!r}: width must lie in [0, {self.num_channels}], got {width}; rebuild the plan."
            )
        chosen = self.settings[int(self.choice[width])]
        return tuple(sorted(int(channel) for channel in chosen.order[:width]))

    def probability(self, width: int) -> np.ndarray:
        """(c,) channel probabilities nearest to that width on the chosen setting's continuation."""
        chosen = self.settings[int(self.choice[width])]
        support = (chosen.snapshots > 0).sum(1)
        nearest = int(np.abs(support - width).argmin())
        return np.asarray(chosen.snapshots[nearest])


def solve_setting(
    problem: GroupProblem, setting: PathSetting, *, device: str = "cpu", shared: SharedSteps | None = None
) -> SettingPath:
    """Order the channels of a group at one setting.

    By entropy: continue from small to large L2 weight, dropping channels as their probabilities vanish.

    Args:
        problem: scaled regressions of the group.
        setting: hyperparameters.
        device: torch device of the matrices.
        shared: steps of the same problem's continuations at other settings; the result is the same without.
    """
    shared = shared or SharedSteps(problem, device=device)
    if setting.method == "elimination" and can_eliminate(problem):
        ranked, probabilities = eliminate(problem, device=device)
        return SettingPath(
            setting=setting,
            order=np.array(ranked, dtype=np.int64),
            errors=shared.errors(ranked),
            snapshots=probabilities,
            status="complete",
        )
    state = shared.begin()
    dropped: list[int] = []
    snapshots: list[np.ndarray] = []
    l2_weight = setting.l2_start / problem.num_channels**2
    for _ in range(_MAX_LEVELS):
        entropy_weight = _entropy_weight(state, setting, l2_weight)
        state.alternate(l2_weight=l2_weight, entropy_weight=entropy_weight, iterations=setting.iterations)
        snapshots.append(_snapshot(state, problem.num_channels))
        dropped.extend(_drop(state, setting))
        if len(state.alive) == 1:
            break
        l2_weight *= setting.l2_growth
    # Where the levels ended first, the last probabilities may be equal: rank the survivors by the whole continuation.
    standing = np.sum(snapshots, axis=0)
    survivors = sorted(state.alive.tolist(), key=lambda channel: -standing[channel])
    order = np.array(survivors + dropped[::-1], dtype=np.int64)
    return SettingPath(
        setting=setting,
        order=order,
        errors=shared.errors(order.tolist()),
        snapshots=np.stack(snapshots).astype(np.float32),
        status="complete" if len(survivors) == 1 else "level limit",
    )


def _entropy_weight(state: Continuation, setting: PathSetting, l2_weight: float) -> float:
    """eps_w of this level: the L2 term is of size eps_l2 a^2 at uniform w, entropy at most log a."""
    count = len(state.alive)
    if setting.entropy_weight == 0.0 or count < 2:
        return 0.0
    return setting.entropy_weight * l2_weight * count**2 / float(np.log(count))


def _snapshot(state: Continuation, num_channels: int) -> np.ndarray:
    row = np.zeros(num_channels)
    row[state.alive.numpy()] = state.probability.numpy()
    return row


def _drop(state: Continuation, setting: PathSetting) -> list[int]:
    """Remove vanished channels; return them, first removed first."""
    probability = state.probability
    ranked = probability.argsort(stable=True)
    small = int((probability < setting.drop_threshold * probability.max()).sum())
    limit = max(1, int(setting.max_drop * len(probability)))
    count = min(small, limit, len(probability) - 1)
    if count == 0:
        return []
    removed = state.alive[ranked[:count]].tolist()
    state.keep(ranked[count:].sort().values)
    return [int(channel) for channel in removed]


def lower_envelope(group: str, num_consumers: int, settings: Sequence[SettingPath]) -> SparsityPath:
    """Keep at every width the setting with the smallest refit error (the first one on ties)."""
    errors = np.stack([path.errors for path in settings])
    return SparsityPath(
        group=group,
        num_consumers=num_consumers,
        settings=tuple(settings),
        errors=errors.min(0),
        choice=errors.argmin(0),
    )
