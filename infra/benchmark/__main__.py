"""Run parts of the benchmark; figures that exist are not measured again.

python -m infra.benchmark --part selection --network lenet --seed 0 --data-root data --checkpoints checkpoints
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from entprune.errors import ConfigError, EntpruneError
from infra.benchmark import (
    ablation,
    actors,
    budgets,
    dense,
    engine,
    epoch,
    estimates,
    latency,
    recovery,
    scaling,
    selection,
    sweep_cost,
    tuned,
)
from infra.benchmark.networks import LONG_TRAINED, NETWORKS, Folders
from infra.benchmark.parts import Part, Request
from infra.benchmark.records import RESULTS
from infra.benchmark.running import run_part
from infra.benchmark.selectors import METHODS

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        selection.PART,
        budgets.PART,
        budgets.LOW_RANK_PART,
        estimates.PART,
        dense.PART,
        tuned.PART,
        recovery.PART,
        epoch.PART,
        scaling.PART,
        latency.PART,
        sweep_cost.PART,
        ablation.PART,
        actors.PART,
        engine.PART,
    )
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="python -m infra.benchmark", description=__doc__)
    parser.add_argument("--part", default="all", help=f"one of {', '.join(PARTS)}, or all")
    parser.add_argument(
        "--network", default="all", help=f"one of {', '.join((*NETWORKS, *LONG_TRAINED))}, synthetic, or all"
    )
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
    parser.add_argument("--device", default="cpu", help="where the heavy work runs: cpu or cuda")
    parser.add_argument("--pruned", type=Path, help="where the part tuned finds pruned networks, or leaves them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parse(arguments)
    try:
        for part, network in choose(options.part, options.network):
            run_part(part, request_of(options, part, network), options.results, is_forced=options.force)
    except EntpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the cells printed above are stored, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def request_of(options: argparse.Namespace, part: Part, network: str) -> Request:
    """What the options ask of one part and network."""
    return Request(
        network=network,
        seed=options.seed,
        threads=options.threads or part.threads,
        folders=Folders(data=options.data_root, checkpoints=options.checkpoints),
        methods=tuple(options.methods.split(",")) if options.methods else (),
        budget=options.budget,
        device=options.device,
        pruned=options.pruned,
    )


def choose(part_name: str, network: str) -> list[tuple[Part, str]]:
    """Pairs of part and network that are asked for.

    Raises:
        ConfigError: there are none.
    """
    wanted = [part for part in PARTS.values() if part_name in {"all", part.name}]
    if not wanted:
        raise ConfigError(f"part: expected one of {', '.join(PARTS)} or all, got {part_name!r}.")
    left_out = set(LONG_TRAINED) if network == "all" else set()  # those are measured by name alone
    pairs = [
        (part, name) for part in wanted for name in part.networks if network in {"all", name} and name not in left_out
    ]
    if not pairs:
        known = ", ".join(dict.fromkeys(name for part in wanted for name in part.networks))
        raise ConfigError(f"network: expected one of {known} or all, got {network!r}.")
    return pairs


if __name__ == "__main__":
    sys.exit(main())
