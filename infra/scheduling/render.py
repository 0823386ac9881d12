"""Play the measured units through on many workers; write README.md, makespan.svg and simulation.json here.

    python -m infra.scheduling.render

No figure is typed by hand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from entprune.storage import atomic_write_text
from infra.benchmark.tables import table
from infra.scheduling.simulation import Outcome, simulate
from infra.scheduling.workloads import SCENARIOS, Costs, Scenario

HERE = Path(__file__).resolve().parent
WORKERS = (8, 64, 256)
_CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_COLOURS = ("#57606a", "#1f5fa8", "#1a7f4f", "#b4500f")
_STYLE = {"svg.hashsalt": "entprune", "svg.fonttype": "none", "font.size": 9.0, "axes.grid": True,
          "grid.color": "#d8dee4", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
          "legend.fontsize": 8.0}  # fmt: skip
_PRUNED = "predict pruned"
Found = list[tuple[Scenario, list[Outcome]]]

_INTRODUCTION = """# Scheduling

Written by `render.py` from `resnet50.json`, the measured seconds of each unit, and from a simulator that hands units
out as the product's pool does (`simulation.py`): an idle worker takes the first unit in the order of `largest_first`,
stages follow each other behind a barrier, and the command's own work in between is serial. No cluster of this size was
at hand: **simulated, not measured.**

```console
$ python -m infra.scheduling.measure --output infra/scheduling/resnet50.json     # some minutes on one core
$ python -m infra.scheduling.render
```
"""


def main() -> None:
    """Simulate and write all three files."""
    costs = Costs(json.loads((HERE / "resnet50.json").read_text(encoding="utf-8")))
    found = play(costs, WORKERS)
    atomic_write_text(HERE / "simulation.json", json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    atomic_write_text(HERE / "makespan.svg", draw(play(costs, _CURVE)))
    atomic_write_text(HERE / "README.md", page(costs, found))


def play(costs: Costs, workers: Sequence[int]) -> Found:
    """Every scenario on every number of workers."""
    seconds = float(costs.content["engine"]["seconds_per_unit"])
    return [(scenario, [_play(costs, scenario, count, seconds) for count in workers]) for scenario in SCENARIOS]


def _play(costs: Costs, scenario: Scenario, workers: int, hand_out_seconds: float) -> Outcome:
    """One run; its bound lets everything be cut that can be, whether the product does so or not."""
    whole = simulate(costs.stages(scenario, 1), workers)
    outcome = simulate(costs.stages(scenario, workers), workers, hand_out_seconds=hand_out_seconds)
    return replace(outcome, bound=whole.bound, chain=whole.chain)


def as_json(found: Found) -> list[dict[str, Any]]:
    """Plain values."""
    return [
        {
            **asdict(scenario),
            "rounds": scenario.rounds,
            "outcomes": [
                {**asdict(outcome), "share_of_bound": outcome.share_of_bound, "losses": outcome.losses()}
                for outcome in outcomes
            ],
        }
        for scenario, outcomes in found
    ]


def page(costs: Costs, found: Found) -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, _measured(costs), *_simulated(found), _remains(costs, found), ""])


def _measured(costs: Costs) -> str:
    content = costs.content
    versions = content["run"]["environment"]
    told = ", ".join(f"{name} {value}" for name, value in versions.items() if isinstance(value, (str, int)))
    shard, problems = content["engine"]["shard_bytes"], sum(group["bytes"] for group in content["groups"])
    return (
        f"## Measured\n\n`{content['model']}`, random weights, random images of 224 x 224, one thread, CPU seconds "
        f"({told}). What depends on the number of images was measured on {costs.few} and {costs.many} of them and "
        f"**extrapolated linearly** to {costs.calibration} for calibration and {costs.validation} for validation (the "
        "defaults for a network of this size); solving does not depend on it.\n\n"
        f"{table(('unit', 'size', 'time'), _measured_rows(costs))}\n\n"
        f"The network between the machines is not simulated: each shard's statistics ({shard / 2**30:.1f} GiB) travel "
        f"to the command, all problems ({problems / 2**30:.1f} GiB) to the nodes that solve them.\n"
    )


def _measured_rows(costs: Costs) -> list[tuple[str, str, str]]:
    content, calibration, validation = costs.content, costs.calibration, costs.validation
    solved = [seconds for group in content["groups"] for seconds in group["seconds"].values()]
    spread = f"{_short(min(solved))} to {_short(max(solved))}, together {_short(sum(solved))}"
    shard = costs.stages(SCENARIOS[0], 1)[1].longest
    own = costs.step("analyse") + costs.step("certify") + sum(group["build_seconds"] for group in content["groups"])
    return [
        ("calibration, one of 4 shards", f"{calibration // 4} images", _short(shard)),
        ("solving, (group, setting) pairs", f"{len(solved)} units", spread),
        ("a candidate: assembly", f"{calibration} images", _short(costs.images("assemble", calibration))),
        ("its validation, if all images count", f"{validation} images", _short(costs.images(_PRUNED, validation))),
        ("dense network on images", "1000 images", _short(costs.images("predict dense", 1000))),
        ("the command: analysis, problems of all groups, certificate", "", _short(own)),
        ("the command: adding one shard to another", "", _short(costs.step("merge"))),
        ("Ray: one unit without work", "", f"{1000 * content['engine']['seconds_per_unit']:.1f} ms"),
    ]


def _simulated(found: Found) -> list[str]:
    head = ("run", "workers", "makespan", "bound", "bound / makespan", "workers busy", "largest losses")
    rows = []
    for scenario, outcomes in found:
        for outcome in outcomes:
            causes = [f"{name}: {_short(seconds)}" for name, seconds in list(outcome.losses().items())[:2]]
            rows.append(
                (scenario.title, str(outcome.workers), _short(outcome.makespan), _short(outcome.bound),
                 f"**{outcome.share_of_bound:.2f}**", f"{outcome.busy:.0%}", "; ".join(causes))
            )  # fmt: skip
    (_, run, wide, _) = (scenario for scenario, _ in found)
    return [
        "## Simulated\n",
        (
            "The bound is what no schedule beats: all units' seconds shared evenly, or the chain of what must follow "
            "each other (of each stage the longest piece that cannot be cut without another result, and the command's "
            "own work), whichever is longer. Of predictions that piece is a batch, of a candidate its assembly and a "
            "batch. Losses are seconds beyond evenly shared work. A run includes both networks' test on "
            f"{run.test_images:,} images; a search takes as many rounds as cutting its bracket evenly does, "
            f"{run.rounds} with {run.candidates} candidates each and {wide.rounds} with {wide.candidates}.\n"
        ),
        table(head, rows),
        "\n![Makespan against the number of workers](makespan.svg)\n",
    ]


def _remains(costs: Costs, found: Found) -> str:
    old, run, wide, sweep = (outcomes[WORKERS.index(64)] for _, outcomes in found)
    candidate, validation = costs.images("assemble", costs.calibration), costs.images(_PRUNED, costs.validation)
    cause, seconds = next(iter(run.losses().items()))
    return (
        "## What it led to, and what remains\n\n"
        "- Predictions were cut into 8 units however many images there were, and a candidate was one unit, "
        f"validation ({_short(validation)}) included. Now predictions are cut evenly for the workers there are, "
        "at most 256 images each, and where there are at least twice as many workers as candidates, all of them "
        "validate what few have assembled (`entprune/scoring.py`). Batches stay the same, and so do the bits. "
        f"One run on 64 workers comes from {_short(old.makespan)} to {_short(run.makespan)}, from "
        f"{old.share_of_bound:.2f} to {run.share_of_bound:.2f} of its bound; the sweep reaches "
        f"{sweep.share_of_bound:.2f}.\n"
        f"- One run keeps 64 workers {run.busy:.0%} busy. The bottleneck is the {cause}, {_short(seconds)}: an "
        f"assembly is one unit of {_short(candidate)}, a round has few of them, and the next round depends on "
        f"their scores. `candidates_per_round: 8` needs fewer rounds ({_short(wide.makespan)} on 64 workers); it "
        "is a setting and does not follow the number of workers, because the plan depends on it.\n"
        f"- A sweep keeps 64 workers {sweep.busy:.0%} busy: candidates of all settings form one pool, but a "
        "round's assemblies are fewer than the workers, and of one length. The barrier between rounds stays, "
        "because early stopping compares all settings after each of them, whichever worker was faster.\n"
        "- Calibration has 4 shards, because the order of the sums is part of the result. More of them shorten it, and "
        "bring as many more statistics to the command, which adds them one after the other.\n"
        "- The tests at the end could run beside the search, which leaves workers idle; they do not. Latency is "
        "measured by the command alone, on purpose.\n"
    )


def _short(seconds: float) -> str:
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def draw(found: Found) -> str:
    """Makespans as lines, bounds dotted."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 3.8), layout="constrained")
        axes = figure.subplots()
        for (scenario, outcomes), colour in zip(found, _COLOURS, strict=True):
            workers = [outcome.workers for outcome in outcomes]
            axes.plot(workers, [entry.makespan / 60 for entry in outcomes], color=colour, marker="o", markersize=3,
                      label=scenario.title)  # fmt: skip
            axes.plot(workers, [entry.bound / 60 for entry in outcomes], color=colour, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="minutes, dotted: bound")
        axes.set_xticks(_CURVE, map(str, _CURVE))
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


if __name__ == "__main__":
    main()
