"""What the command line prints: result tables from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from entprune.export import ExportedFile

_MISSING = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRow:
    """One channel group and what depends on it.

    Attributes:
        name: of the group.
        channels: its width.
        producers, consumers: layers that write and read it.
        parameters, macs: fraction of the network's that scale with its width; those of neighbouring groups overlap.
    """

    name: str
    channels: int
    producers: Sequence[str]
    consumers: Sequence[str]
    parameters: float
    macs: float


def result_table(report: Mapping[str, Any]) -> Table:
    """Dense, one-shot and fine-tuned network side by side, from the content of report.json."""
    columns = [("dense", report["dense"]), ("one-shot", report["one_shot"]), ("fine-tuned", report.get("fine_tuned"))]
    columns = [(title, figures) for title, figures in columns if figures is not None]
    table = Table(title="Result", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for title, _ in columns:
        table.add_column(title, justify="right")
    rows = {
        "test accuracy": lambda figures: _percent(figures.get("accuracy")),
        "accuracy drop": lambda figures: _points(figures.get("accuracy_drop")),
        "on new images, 95 %": lambda figures: _interval(figures.get("accuracy_drop_interval")),
        "parameters": lambda figures: _size(figures["parameters"], figures.get("parameters_removed")),
        "MACs": lambda figures: _size(figures["macs"], figures.get("macs_removed")),
        "latency, batch 1": lambda figures: _milliseconds((figures["latency_ms"] or {}).get("1")),
        "latency, batch 64": lambda figures: _milliseconds((figures["latency_ms"] or {}).get("64")),
    }
    for title, cell in rows.items():
        table.add_row(title, *(cell(figures) for _, figures in columns))
    if thin := report.get("low_rank"):
        table.add_row("layers of low rank", _MISSING, *[str(len(thin))] * (len(columns) - 1))
    table.add_row("certificate", _MISSING, *[certificate_text(report["certificate"])] * (len(columns) > 1))
    return table


def comparison_table(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """One line for each run, from a name and the content of its report.json."""
    table = Table(title="Runs", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("run", overflow="fold")
    for title in ("accuracy", "drop", "params", "MACs", "batch 64", "certificate"):
        table.add_column(title, justify="right", no_wrap=title != "certificate")
    for number, (name, report) in enumerate(runs, 1):
        figures, certificate = report.get("fine_tuned") or report["one_shot"], report.get("certificate")
        table.add_row(
            str(number),
            escape(name),
            _percent(figures.get("accuracy")),
            _points(figures.get("accuracy_drop")),
            f"−{100 * figures['parameters_removed']:.1f}%",
            f"−{100 * figures['macs_removed']:.1f}%",
            _milliseconds((figures.get("latency_ms") or {}).get("64")),
            _MISSING if not certificate else "[green]passed[/green]" if certificate["passed"] else "[red]failed[/red]",
        )
    return table


def sweep_table(content: Mapping[str, Any]) -> Table:
    """Settings of a sweep, from the content of sweep.json; the chosen one stands out."""
    from entprune.report.sweep_page import fronts_of  # noqa: PLC0415 -- imports torch

    table = Table(
        title="Settings",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("#", justify="right")
    table.add_column("setting", overflow="fold", min_width=18)
    for title in ("params", "MACs", "ms", "drop", "bound"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("front")
    table.add_column("rounds", no_wrap=True)
    for setting in content["settings"]:
        result, number = setting["result"], setting["number"]
        table.add_row(
            str(number),
            escape(setting["label"].replace(", ", "\n")),
            f"−{100 * result['parameters_removed']:.1f}%",
            f"−{100 * result['macs_removed']:.1f}%",
            f"{result['latency_ms']['64']:.2f}",
            _points(result["validation_drop"]),
            _points(result["drop_upper_bound"]),
            " ".join(axis[0].upper() for axis in fronts_of(content, number)) or _MISSING,
            str(setting["rounds"]) if setting["status"] == "finished" else "stopped",
            style="bold" if number == content["chosen"]["number"] else None,
        )
    table.caption = (
        "Drop: points lost on validation images, and their upper confidence bound.\nms: a batch of 64. "
        "Front: no other network beats it in drop and\nP parameters, M MACs, L latency."
    )
    table.caption_justify = "left"
    return table


def certificate_text(certificate: Mapping[str, Any]) -> str:
    """Verdict and difference in a few characters."""
    verdict = "[green]passed[/green]" if certificate["passed"] else "[red]failed[/red]"
    return f"{verdict} ({certificate['max_abs_difference']:.1e})"


def evaluation_table(
    title: str, *, accuracy: float, parameters: int, macs: int, latency_ms: Mapping[str, float], num_images: int
) -> Table:
    """One network's figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False)
    table.add_row(f"accuracy on {num_images:,} test images", _percent(accuracy))
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("MACs", f"{macs:,}")
    for batch, value in latency_ms.items():
        table.add_row(f"latency, batch {batch}", _milliseconds(value))
    return table


def export_lines(
    exported: ExportedFile, input_shape: tuple[int, int, int], card: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What an exported file is, how exactly it repeats the network, and how it is used."""
    batches = ", ".join(str(size) for size in exported.batch_sizes)
    images = f"images (n, {', '.join(str(size) for size in input_shape)}), float32"
    if card.get("mean") and card.get("std"):
        mean, std = (", ".join(f"{value:g}" for value in card[name]) for name in ("mean", "std"))
        images += f", as (pixel in [0, 1] - mean) / std with mean {mean} and std {std}"
    is_torch = exported.path.suffix == ".pt2"
    load = 'torch.export.load("{}").module()' if is_torch else 'onnxruntime.InferenceSession("{}")'
    return [
        ("file", str(exported.path)),
        ("size", f"{exported.num_bytes:,} bytes"),
        ("verified", f"{exported.relative_difference:.1e} (relative, {exported.verified_by}, batches of {batches})"),
        ("input", images),
        ("load", load.format(exported.path)),
    ]


def group_table(rows: Sequence[GroupRow]) -> Table:
    """Channel groups in execution order, each with the layers that write and read it."""
    table = Table(title="Channel groups", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("group", overflow="fold")
    for title in ("channels", "parameters", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        others = [name for name in row.producers if name != row.name]
        lines = [row.name, *_listed("also written by", others), *_listed("read by", row.consumers)]
        table.add_row("\n".join(lines), str(row.channels), f"{row.parameters:.1%}", f"{row.macs:.1%}")
    table.caption = "Named after the first layer that writes it. Parameters, MACs: share\n"
    table.caption += "that scales with its width; neighbours overlap."
    table.caption_justify = "left"
    return table


def _listed(title: str, layers: Sequence[str]) -> list[str]:
    return [f"[dim]  {title} {escape(', '.join(layers))}[/dim]"] if layers else []


def unprunable_table(entries: Sequence[tuple[str, str]]) -> Table:
    """Layers whose outputs stay, each with its reason."""
    table = Table(title="Left alone", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    table.add_column("reason", overflow="fold")
    for layer, reason in entries:
        table.add_row(layer, reason)
    return table


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f} %"


def _points(value: float | None) -> str:
    return _MISSING if value is None else f"{value:+.2f}"


def _interval(ends: Mapping[str, float] | None) -> str:
    return _MISSING if ends is None else f"{_points(ends['low'])} to {_points(ends['high'])}"


def _size(value: int, removed: float | None) -> str:
    return f"{value:,}" if removed is None else f"{value:,} (−{100 * removed:.1f} %)"


def _milliseconds(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f} ms"
