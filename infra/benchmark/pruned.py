"""Pruned networks that are kept between runs: pruning and tuning need not happen on one machine.

    python -m infra.benchmark.pruned --network resnet56_cifar --seed 0 --pruned DIR --data-root data ...

prunes to the sizes of the part `tuned` and fills the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import entprune
from entprune.config import Budget, PruneConfig
from entprune.errors import ConfigError, EntpruneError
from entprune.storage import atomic_write_text
from infra.benchmark.budgets import prune_to
from infra.benchmark.contest import budget_label
from infra.benchmark.networks import Bench, Folders, find_network, load_bench


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrunedNetwork:
    """A network at a size.

    Attributes:
        model: before any gradient step.
        dense, one_shot: figures of the report.
        seconds: how long it took.
        ranks: of its layers of low rank.
    """

    model: nn.Module
    dense: Mapping[str, Any]
    one_shot: Mapping[str, Any]
    seconds: float
    ranks: Mapping[str, int] = field(default_factory=dict)


def pruned_network(bench: Bench, budget: Budget, folder: Path | None) -> PrunedNetwork:
    """The pruned network, from the folder if it is there, otherwise put there.

    Raises:
        ConfigError: what is there was made from another checkpoint or other images.
    """
    kind = "-low_rank" if bench.config.low_rank else ""
    name = f"{bench.entry.name}-{budget_label(budget)}{kind}-seed{bench.config.seed}"
    place = None if folder is None else folder / name
    if place is not None and place.exists():
        return _read(place, bench)
    start = time.perf_counter()
    result = prune_to(bench, budget)
    seconds = round(time.perf_counter() - start, 1)
    figures = {"dense": result.report["dense"], "one_shot": result.report["one_shot"], "ranks": dict(result.plan.ranks)}
    if place is not None:
        content = figures | {"facts": bench.facts, "prune_seconds": seconds}
        atomic_write_text(_figures_path(place), json.dumps(content))
        entprune.save(result, place)
    return PrunedNetwork(model=result.model, seconds=seconds, **figures)


def _read(place: Path, bench: Bench) -> PrunedNetwork:
    content = json.loads(_figures_path(place).read_text(encoding="utf-8"))
    if content["facts"] != bench.facts or "ranks" not in content:
        raise ConfigError(
            f"pruned network '{place.name}': expected one made from the checkpoint and images given, got another or "
            "one of an earlier version; delete the folder."
        )
    figures = {name: content[name] for name in ("dense", "one_shot", "ranks")}
    return PrunedNetwork(model=entprune.load(place), seconds=content["prune_seconds"], **figures)


def _figures_path(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def main() -> int:
    """Prune one network to the sizes at which it is tuned; returns the exit code."""
    from infra.benchmark.tuned import RECIPES  # noqa: PLC0415 -- which reads this module

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="", help="only this one: parameters_removed-0.92")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    options = parser.parse_args()
    try:
        folders = Folders(data=options.data_root, checkpoints=options.checkpoints)
        config = PruneConfig(seed=options.seed, threads=options.threads)
        bench = load_bench(find_network(options.network), folders, config)
        for recipe in RECIPES[options.network]:
            if options.budget not in {"", budget_label(recipe.budget)}:
                continue
            bench.config = replace(config, low_rank=recipe.low_rank)
            pruned = pruned_network(bench, recipe.first_budget(), options.pruned)
            print(f"{options.network} {budget_label(recipe.budget)} seed {options.seed}: {pruned.seconds:.0f} s")
    except EntpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
