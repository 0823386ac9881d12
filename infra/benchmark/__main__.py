"""Run parts of the benchmark; figures that exist are not measured again.

python -m infra.benchmark --part selection --network lenet --seed 0 --data-root data --checkpoints checkpoints
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entprune.errors import ConfigError, EntpruneError
from infra.benchmark import (
    ablation,
    actors,
    budgets,
    engine,
    epoch,
    latency,
    recovery,
    scaling,
    selection,
    sweep_cost,
    tuned,
)
from infra.benchmark.networks import NETWORKS, Folders
from infra.benchmark.parts import Meter, Part, Request
from infra.benchmark.records import RESULTS, Record, Subject, describe_run
from infra.benchmark.selectors import METHODS

PARTS: dict[str, Part] = {
    module.PART.name: module.PART
    for module in (selection, budgets, tuned, recovery, epoch, scaling, latency, sweep_cost, ablation, actors, engine)
}


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
    parser.add_argument("--network", default="all", help=f"one of {', '.join(NETWORKS)}, synthetic, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="", help="only this one, as in the file names: parameters_removed-0.92")
    parser.add_argument(
        "--methods", default="", help=f"of the parts selection and recovery: some of {','.join(METHODS)}"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads; by default what the part prescribes")
    parser.add_argument(
        "--force", action="store_true", help="measure again what exists; files on other inputs begin anew"
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parse(arguments)
    try:
        for part, network in choose(options.part, options.network):
            run_part(part, network, options)
    except EntpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the cells printed above are stored, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def choose(part_name: str, network: str) -> list[tuple[Part, str]]:
    """Pairs of part and network that are asked for.

    Raises:
        ConfigError: there are none.
    """
    wanted = [part for part in PARTS.values() if part_name in {"all", part.name}]
    if not wanted:
        raise ConfigError(f"part: expected one of {', '.join(PARTS)} or all, got {part_name!r}.")
    pairs = [(part, name) for part in wanted for name in part.networks if network in {"all", name}]
    if not pairs:
        known = ", ".join(dict.fromkeys(name for part in wanted for name in part.networks))
        raise ConfigError(f"network: expected one of {known} or all, got {network!r}.")
    return pairs


def run_part(part: Part, network: str, options: argparse.Namespace) -> None:
    """Measure the missing cells of one part and network, each stored as soon as it is known."""
    request = Request(
        network=network,
        seed=options.seed,
        threads=options.threads or part.threads,
        folders=Folders(data=options.data_root, checkpoints=options.checkpoints),
        methods=tuple(options.methods.split(",")) if options.methods else (),
        budget=options.budget,
    )
    records: dict[Subject, Record] = {}
    todo = []
    for subject, key in part.cells(request):
        if subject not in records:
            records[subject] = Record(subject.path(options.results), subject)
        if options.force or not records[subject].has(key):
            todo.append((subject, key))
    progress = Progress(f"{part.name} {network} seed {options.seed}", len(todo))
    command = f"make benchmark PART={part.name} NETWORK={network} SEED={options.seed}"
    command += f" THREADS={options.threads}" if options.threads else ""
    run = describe_run(command, request.threads)
    meter: Meter | None = None
    for subject, key in todo:
        meter = meter or part.meter(request)
        records[subject].require_facts(meter.facts(records[subject]), renew=options.force)
        values = meter.measure(subject, key)
        records[subject].put(key, values, run)
        progress.step(" ".join([subject.budget, *map(str, key.values()), *_headline(part, values)]))


def _headline(part: Part, values: Mapping[str, Any]) -> list[str]:
    return [f"| {name}: {_short(values[name])}" for name in part.headline if name in values]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(entry)}" for name, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
