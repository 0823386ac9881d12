"""Write the tables of the conformance run and of the runs at ImageNet size into README.md beside this script.

    make conformance && cp runs/conformance.json infra/conformance/torchvision.json
    python infra/conformance/render.py

No figure is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# Conformance

Written by `render.py` from the JSON files beside it.

## Every torchvision classification CNN

`make conformance` takes each classification network of torchvision but the transformers, with random weights, and
removes every second channel of every group. It passes if

- the outputs have the right shape and a training step reaches every parameter that is left;
- every layer has the width that was asked, and parameters and MACs are those of an independent count
  (`torch.utils.flop_counter`);
- the certificate holds: the smaller network equals the full-size one with the removed channels silenced, at the output
  and at the output of each convolution and linear layer (largest difference relative to the largest value there);
- the saved artifact, loaded in a fresh process, answers with the same bits;
- the network that was given is unchanged.
"""


def main() -> None:
    """Write the page."""
    content = json.loads((HERE / "torchvision.json").read_text())
    rows, versions = content["networks"], ", ".join(" ".join(pair) for pair in content["versions"].items())
    lines = [
        INTRODUCTION,
        f"**{content['passed']} of {len(rows)} networks passed** ({versions}; {content['rule']}).\n",
        *table(
            ("network", "image", "groups", "layers left alone", "parameters removed", "MACs removed", "certificate",
             "analysis, s", "passed"),
            (network_row(row) for row in rows),
        ),
        *imagenet_section(),
    ]  # fmt: skip
    (HERE / "README.md").write_text("\n".join(lines) + "\n")


def network_row(row: dict[str, Any]) -> Sequence[str]:
    """Cells of one network."""
    if not row["passed"]:
        return (row["network"], *[""] * 7, f"no: {row['failure']}")
    return (
        row["network"], str(row["input"]), str(row["groups"]), str(row["left_alone"]),
        f"{row['parameters_removed']:.1%}", f"{row['macs_removed']:.1%}", f"{row['certificate']:.0e}",
        f"{row['analyse_seconds']:.1f}", "yes",
    )  # fmt: skip


def imagenet_section() -> list[str]:
    """The real prune, regression and all, at 224 x 224."""
    content = json.loads((HERE / "imagenet_size.json").read_text())
    head = ("network", "groups", "parameters removed", "MACs removed", "certificate", "calibrate, s", "solve, s",
            "assemble, s", "total, s", "peak memory, GiB")  # fmt: skip
    text = (
        f"\n## A real one-shot prune at ImageNet size\n\n`{content['command']}`: random weights, {content['images']} "
        f"random images of {content['size']} x {content['size']}, {content['threads']} threads, in process, half of "
        "the parameters to go. Moments, paths and the refit of every layer, no selector.\n"
    )
    return [
        text,
        *table(head, (imagenet_row(row) for row in content["networks"])),
    ]


def imagenet_row(row: dict[str, Any]) -> Sequence[str]:
    """Cells of one network."""
    stages = [f"{row['seconds_per_stage'][stage]:.0f}" for stage in ("calibrate", "solve", "search")]
    return (
        row["network"], str(row["groups"]), f"{row['parameters_removed']:.1%}", f"{row['macs_removed']:.1%}",
        f"{row['certificate']['max_abs_difference']:.0e}", *stages, f"{row['seconds']:.0f}",
        f"{row['peak_memory_gib']:.1f}",
    )  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
