"""Several trainings at once on one GPU, each on a stream of its own: a small network alone leaves most of it idle.

    python -m infra.benchmark.at_once --device cuda --pruned DIR dense:resnet18_cifar_long:0 tuned:resnet56_cifar:0

A job is PART:NETWORK:SEED, with :BUDGET for one recipe alone. Networks that are pruned first are pruned on the CPU in a
process of their own, and wait for their checkpoint where another job trains it.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from entprune.errors import ConfigError, EntpruneError
from entprune.evaluation import resolve_device
from infra.benchmark import dense, tuned
from infra.benchmark.networks import Folders
from infra.benchmark.parts import Part, Request
from infra.benchmark.records import RESULTS
from infra.benchmark.running import run_part

_PARTS: dict[str, Part] = {module.PART.name: module.PART for module in (dense, tuned)}


class Jobs:
    """Runs jobs, each in a thread.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._requests = [self._request(text) for text in options.jobs]
        self._trained = {
            request.network: threading.Event() for part, request in self._requests if part.name == dense.PART.name
        }
        self._start = time.perf_counter()

    def run(self) -> bool:
        """Run all of them; whether all succeeded."""
        with ThreadPoolExecutor(len(self._requests)) as pool:
            return all(pool.map(self._run_one, self._requests))

    def _request(self, text: str) -> tuple[Part, Request]:
        part, network, seed, budget = (*text.split(":"), "", "", "")[:4]
        if part not in _PARTS or network not in _PARTS[part].networks or not seed.isdigit():
            known = "; ".join(f"{name} of {', '.join(entry.networks)}" for name, entry in _PARTS.items())
            raise ConfigError(f"job: expected PART:NETWORK:SEED with {known}; got {text!r}.")
        options = self._options
        return _PARTS[part], Request(
            network=network, seed=int(seed), threads=options.threads, budget=budget, device=options.device,
            folders=Folders(data=options.data_root, checkpoints=options.checkpoints), pruned=options.pruned,
        )  # fmt: skip

    def _run_one(self, job: tuple[Part, Request]) -> bool:
        part, request = job
        name = f"{part.name} {request.network} seed {request.seed}"
        try:
            if part.name == tuned.PART.name:
                self._prune(request)
            self._say(f"{name}: begins")
            with self._stream():
                run_part(part, request, self._options.results)
        except (EntpruneError, subprocess.CalledProcessError, RuntimeError) as error:
            self._say(f"{name}: failed: {error}")
            return False
        finally:
            if part.name == dense.PART.name:
                self._trained[request.network].set()
        self._say(f"{name}: done")
        return True

    def _prune(self, request: Request) -> None:
        """Fill the folder of pruned networks."""
        if request.network in self._trained:
            self._trained[request.network].wait()
        if request.pruned is None:
            return
        options: dict[str, Any] = {
            "network": request.network, "seed": request.seed, "threads": request.threads, "pruned": request.pruned,
            "data-root": request.folders.data, "checkpoints": request.folders.checkpoints, "budget": request.budget,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "infra.benchmark.pruned", *words], check=True)  # noqa: S603 -- fixed words

    def _stream(self) -> Any:
        device = resolve_device(self._options.device)
        if device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:.0f} s] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="PART:NETWORK:SEED[:BUDGET]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pruned", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.allow_tf32 = False  # accuracies are measured in float32; training is in bfloat16
    try:
        return 0 if Jobs(parser.parse_args(arguments)).run() else 1
    except EntpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
