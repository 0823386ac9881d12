"""Make the README's result table from the committed reports: `python infra/results/render.py` prints it, `--write` puts it in.

Each file beside this script is the report.json of one real run; its `command` entry says how to repeat it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEADER = (
    "| network, data | dense accuracy | one-shot accuracy | drop | parameters removed | MACs removed "
    "| latency at batch 64 | certificate | seconds |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table, or write it between the README's markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    arguments = parser.parse_args()
    table = "\n".join([HEADER, *(row(json.loads(path.read_text())) for path in sorted(HERE.glob("*.json")))])
    if not arguments.write:
        print(table)
        return
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def row(report: dict[str, Any]) -> str:
    """One line of the table."""
    dense, small = report["dense"], report["one_shot"]
    certificate = report["certificate"]
    cells = [
        f"{report['model']['spec']}, {report['data']['name']}",
        f"{dense['accuracy']:.2f} %",
        f"**{small['accuracy']:.2f} %**",
        f"{small['accuracy_drop']:.2f}",
        f"**{100 * small['parameters_removed']:.1f} %** ({dense['parameters']:,} → {small['parameters']:,})",
        f"{100 * small['macs_removed']:.1f} %",
        f"{dense['latency_ms']['64']:.1f} → {small['latency_ms']['64']:.1f} ms",
        f"{'passed' if certificate['passed'] else 'FAILED'} ({certificate['max_abs_difference']:.0e})",
        f"{report['timings_seconds']['total']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
