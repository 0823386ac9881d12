"""Run parts of the benchmark; figures that exist are not measured again.

python -m infra.benchmark --part selection --network lenet --seed 0 --data-root data --checkpoints checkpoints
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from entprune.config import PruneConfig
from entprune.errors import ConfigError, EntpruneError
from infra.benchmark.networks import NETWORKS, Bench, Folders, find_network
from infra.benchmark.records import RESULTS, Record, Subject, describe_run
from infra.benchmark.selection import SelectionPart, budget_label, cells
from infra.benchmark.selectors import METHODS

PARTS = ("selection",)


class Progress:
    """One line for each finished cell, with an estimate of the rest."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._start = title, total, 0, time.perf_counter()

    def step(self, text: str) -> None:
        """Count one cell."""
        self._done += 1
        seconds = time.perf_counter() - self._start
        left = seconds / self._done * (self._total - self._done)
        print(f"{self._title} {self._done}/{self._total}, {_minutes(left)} left | {text}", flush=True)


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="python -m infra.benchmark", description=__doc__)
    parser.add_argument("--part", default="all", help=f"one of {', '.join(PARTS)}, or all")
    parser.add_argument("--network", default="all", help=f"one of {', '.join(NETWORKS)}, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="", help="only this one, as in the file names: parameters_removed-0.92")
    parser.add_argument("--methods", default=",".join(METHODS), help="of the part selection, separated by commas")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; by default what the part prescribes")
    parser.add_argument("--force", action="store_true", help="measure again what exists")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parse(arguments)
    try:
        parts = PARTS if options.part == "all" else (options.part,)
        networks = tuple(NETWORKS) if options.network == "all" else (find_network(options.network).name,)
        for part in parts:
            if part not in PARTS:
                raise ConfigError(f"part: expected one of {', '.join(PARTS)} or all, got {part!r}.")
            for network in networks:
                run_selection(options, network)
    except EntpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_selection(options: argparse.Namespace, network: str) -> None:
    """The part `selection` of one network."""
    entry, methods = find_network(network), tuple(options.methods.split(","))
    if unknown := set(methods) - set(METHODS):
        raise ConfigError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}.")
    budgets = [budget for budget in entry.budgets() if options.budget in {"", budget_label(budget)}]
    if not budgets:
        raise ConfigError(
            f"budget: expected one of {[budget_label(b) for b in entry.budgets()]}, got {options.budget}."
        )
    records = {}
    for budget in budgets:
        subject = Subject(part="selection", network=network, seed=options.seed, budget=budget_label(budget))
        records[budget] = Record(subject.path(options.results), subject)
    todo = {b: [key for key in cells(methods) if options.force or not records[b].has(key)] for b in budgets}
    progress = Progress(f"selection {network} seed {options.seed}", sum(len(keys) for keys in todo.values()))
    config = PruneConfig(seed=options.seed, threads=options.threads or 1)
    run = describe_run(f"make benchmark PART=selection NETWORK={network} SEED={options.seed}", config.threads)
    folders, part = Folders(data=options.data_root, checkpoints=options.checkpoints), None
    for budget, keys in todo.items():
        if not keys:
            continue
        part = part or SelectionPart(Bench(entry, folders, config))
        for line in part.measure(records[budget], budget, keys, run):
            progress.step(line)


if __name__ == "__main__":
    sys.exit(main())
