"""What a part of the benchmark is: which cells it has, and who measures one.

A cell is known before anything is loaded, so what exists is skipped at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entprune.config import PruneConfig
from infra.benchmark.networks import Bench, Folders, find_network, load_bench
from infra.benchmark.records import Record, Subject

Key = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked of one part and network.

    Attributes:
        network: name of the network.
        seed: of splits, sampled positions and random choices.
        threads: torch threads.
        folders: where data and checkpoints lie.
        methods: selectors of the parts `selection` and `recovery`.
        budget: label of the only budget wanted, empty for all.
        device: where the heavy work runs, such as "cpu" or "cuda".
        pruned: where the part `tuned` keeps pruned networks, None for nowhere.
    """

    network: str
    seed: int
    threads: int
    folders: Folders
    methods: tuple[str, ...] = ()
    budget: str = ""
    device: str = "cpu"
    pruned: Path | None = None

    def config(self, calibration_samples: int | None = None) -> PruneConfig:
        """Settings of this project: the defaults but for seed, threads, device and, if asked, calibration images."""
        return PruneConfig(
            seed=self.seed, threads=self.threads, calibration_samples=calibration_samples, device=self.device
        )

    def bench(self, calibration_samples: int | None = None) -> Bench:
        """The network with its images; as many calibration images as the defaults find unless a number is given."""
        return load_bench(find_network(self.network), self.folders, self.config(calibration_samples))


class Meter(Protocol):
    """Measures cells of one network and seed."""

    def facts(self, record: Record) -> Mapping[str, Any]:
        """What all cells of the file have in common."""

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:
        """Figures of one cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of the benchmark.

    Attributes:
        name: also the folder of its results.
        networks: to which it applies.
        threads: torch threads unless told otherwise.
        cells: subjects and keys of all cells, in the order in which they are measured.
        meter: loads what measuring needs.
        headline: names of the figures that the progress line repeats.
    """

    name: str
    networks: tuple[str, ...]
    threads: int
    cells: Callable[[Request], Sequence[tuple[Subject, Key]]]
    meter: Callable[[Request], Meter]
    headline: tuple[str, ...] = ()
