"""Keep and show the figures of real runs.

    python infra/results/render.py --add RUN_FOLDER --name NAME --label LABEL --command "entprune ..."
    python infra/results/render.py            # prints the table
    python infra/results/render.py --write    # puts it into README.md

Each JSON file beside this script is the report of one run with the command that made it; no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "network, data",
    "dense accuracy",
    "one-shot accuracy",
    "drop",
    "fine-tuned accuracy",
    "drop",
    "parameters removed",
    "MACs removed",
    "latency, batch 64",
    "certificate",
)


def main() -> None:
    """Add a run, print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--add", type=Path, metavar="RUN_FOLDER", help="copy report.json and the plot of widths from here"
    )
    parser.add_argument("--name", help="file name of the added run")
    parser.add_argument("--label", help="first cell of its row")
    parser.add_argument("--command", help="what was run")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    arguments = parser.parse_args()
    if arguments.add:
        add(arguments.add, arguments.name, arguments.label, arguments.command)
    elif arguments.write:
        text = README.read_text()
        README.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table()}\n{END}{text.split(END)[1]}")
    else:
        print(table())


def add(folder: Path, name: str, label: str, command: str) -> None:
    """Copy one run's report and its plot of widths; kept channels and their probabilities stay with the run."""
    report = json.loads((folder / "report.json").read_text())
    report.pop("plan", None)
    for group in report["groups"]:
        group.pop("channel_probability", None)
    kind, separator, path = report["data"]["spec"].partition(":")
    report["data"]["spec"] = f"{kind}{separator}{Path(path).name}"  # where it lay on one machine tells nobody anything
    entry = {"label": label, "command": command, "report": report}
    (HERE / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n")
    shutil.copyfile(folder / "plots" / "widths.svg", HERE / f"{name}_widths.svg")


def table() -> str:
    """All committed runs, one row each."""
    entries = [json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row(entry) for entry in entries)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def drop_cell(figures: dict[str, Any]) -> str:
    """Points lost on the test images, and between what on new ones where the run says so."""
    ends = figures.get("accuracy_drop_interval")
    return f"{figures['accuracy_drop']:.2f}" + (f" ({ends['low']:.2f} to {ends['high']:.2f})" if ends else "")


def row(entry: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one run."""
    report = entry["report"]
    dense, small, certificate = report["dense"], report["one_shot"], report["certificate"]
    tuned = report["fine_tuned"]
    result = tuned or small  # smaller than the one-shot network where there were several rounds
    is_other_size = result["parameters"] != small["parameters"]
    return (
        entry["label"],
        f"{dense['accuracy']:.2f} %",
        f"{small['accuracy']:.2f} %" + (f" (at {100 * small['parameters_removed']:.1f} %)" if is_other_size else ""),
        drop_cell(small),
        "-" if tuned is None else f"{tuned['accuracy']:.2f} %",
        "-" if tuned is None else drop_cell(tuned),
        f"**{100 * result['parameters_removed']:.1f} %** ({dense['parameters']:,} → {result['parameters']:,})",
        f"{100 * result['macs_removed']:.1f} %",
        f"{dense['latency_ms']['64']:.0f} → {result['latency_ms']['64']:.0f} ms",
        f"{'passed' if certificate['passed'] else 'FAILED'}, {certificate['max_abs_difference']:.0e}",
    )


if __name__ == "__main__":
    main()
