"""What is written on a registered version: tags for machines, a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entprune.report.wording import (
    describe_budget,
    describe_certificate,
    describe_outcome,
    describe_perturbed,
    format_fraction,
    result_of,
)

_FIGURES = ("accuracy", "accuracy_drop", "parameters", "parameters_removed", "macs", "macs_removed")


def version_tags(content: Mapping[str, Any]) -> dict[str, Any]:
    """Lineage, figures and verdicts that go with a version: all that a promotion has to know.

    Args:
        content: of report.json.
    """
    figures = content["fine_tuned"] or content["one_shot"]
    dense = content["dense"]
    lineage = {name: value for name, value in content["lineage"].items() if name != "registered_version"}
    return {
        **lineage,
        **{name: figures[name] for name in _FIGURES},
        **{f"latency_ms_{batch}": value for batch, value in figures["latency_ms"].items()},
        **{f"dense_{name}": dense[name] for name in ("accuracy", "parameters", "macs")},
        **{f"budget_{name}": value for name, value in _budget(content).items()},
        "model_spec": content["model"]["spec"],
        "test_samples": content["data"]["test_samples"],
        "measured_on": measured_on(content["environment"]),
        "certificate_passed": content["certificate"]["passed"],
        "budget_met": content["budget_met"],
    }


def measured_on(environment: Mapping[str, Any]) -> str:
    """The machine that latencies belong to; those of different machines say nothing about each other."""
    counts = [_count(environment.get("cpus"), "CPU"), _count(environment.get("threads"), "thread")]
    parts = [environment.get("platform"), environment.get("gpu"), *counts]
    return ", ".join(str(part) for part in parts if part)


def _count(number: object, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def version_page(content: Mapping[str, Any], name: str) -> str:
    """The model card of a version as markdown.

    Args:
        content: of report.json.
        name: in the registry.
    """
    figures = result_of(content)
    removed = f"{format_fraction(figures['parameters_removed'])} of the parameters removed"
    sections = {
        f"## {content['model']['spec']}, pruned: {removed}": _summary(content),
        "### Before and after": _figures_table(content),
        "### Certificate": [describe_certificate(content["certificate"])],
        "### Origin": _origin_lines(content),
        "### Use": _use_lines(content, name),
        "### Limits": _limit_lines(content),
    }
    return "\n\n".join("\n".join([heading, "", *lines]) for heading, lines in sections.items())


def _summary(content: Mapping[str, Any]) -> list[str]:
    model, shape = content["model"], " × ".join(str(size) for size in content["model"]["input_shape"])
    how = "then fine-tuned." if content["fine_tuned"] else "without a single training step."
    return [  # one line for a paragraph: MLflow breaks lines where the text does
        (
            f"A smaller `{model['spec']}` for images of {shape} and {model['num_classes']} classes. Whole channels are "
            f"taken out, and the remaining weights computed anew from training images, {how}"
        ),
        "",
        f"Asked: {describe_budget(_budget(content))}. {describe_outcome(content)}",
    ]


def data_name(spec: str) -> str:
    """A data specification without the folders of the machine that it was used on."""
    kind, colon, location = spec.partition(":")
    return f"{kind}:{Path(location).name}" if colon and kind in {"npz", "imagefolder"} else spec


def _budget(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content["budget"].items() if value is not None}


def _figures_table(content: Mapping[str, Any]) -> list[str]:
    dense, figures = content["dense"], content["fine_tuned"] or content["one_shot"]
    rows = [
        ("test accuracy", f"{dense['accuracy']:.2f} %", f"{figures['accuracy']:.2f} %", "accuracy_drop"),
        ("parameters", f"{dense['parameters']:,}", f"{figures['parameters']:,}", "parameters_removed"),
        ("multiply-accumulates", f"{dense['macs']:,}", f"{figures['macs']:,}", "macs_removed"),
    ]
    lines = ["|  | unpruned | this version | change |", "| --- | ---: | ---: | ---: |"]
    for title, before, after, change in rows:
        value = figures[change]
        text = f"-{value:.2f} points" if change == "accuracy_drop" else f"-{value:.1%}"
        lines.append(f"| {title} | {before} | {after} | {text.replace('--', '+')} |")
    for batch, milliseconds in figures["latency_ms"].items():
        before = dense["latency_ms"].get(batch)
        cells = (f"{before:.2f} ms" if before else "", f"{milliseconds:.2f} ms")
        change = f"{milliseconds / before - 1:+.0%}" if before else ""
        lines.append(f"| time, {batch} image{'s' if batch != '1' else ''} | {cells[0]} | {cells[1]} | {change} |")
    return lines


def _origin_lines(content: Mapping[str, Any]) -> list[str]:
    lineage, data = content["lineage"], content["data"]
    is_apart = data.get("validation_split") == "validation"
    entries = {
        "unpruned version": lineage.get("dense_version"),
        "checkpoint of the unpruned network, SHA-256": lineage.get("checkpoint_sha256"),
        "data": f"{data_name(data['spec'])}, SHA-256 {data['sha256']}",
        "images": (
            f"{data['calibration_samples']:,} training images for the weights, {data['validation_samples']:,} "
            f"{'of the validation split' if is_apart else 'further ones'} to choose by{describe_perturbed(content)}, "
            f"{data['test_samples']:,} test images for the figures above"
        ),
        "code": lineage.get("code_version"),
        "MLflow run": lineage.get("mlflow_run_id"),
        "Prefect flow run": lineage.get("prefect_flow_run_id"),
        "machine": measured_on(content["environment"]),
    }
    return [f"- {title}: {text}" for title, text in entries.items() if text]


def _use_lines(content: Mapping[str, Any], name: str) -> list[str]:
    model, data = content["model"], content["data"]
    channels, height, width = model["input_shape"]
    return [
        "Needs mlflow and torch, neither entprune nor the network's code; nothing in it is pickle.",
        "",
        "```python",
        "# @champion once it is promoted; until then @challenger, or the version's number",
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")',
        f"# images: float32 array of shape (n, {channels}, {height}, {width}), any n",
        "logits = model.predict(images)",
        "```",
        "",
        (
            f"Images: pixel values scaled to 0..1, then minus mean {_short(data['mean'])}, divided by std "
            f"{_short(data['std'])}."
        ),
        "",
        (
            "`extra_files/preprocessing.json` says so for machines, with the class names; `extra_files/model.onnx` is "
            "the same network for ONNX Runtime, if it is there."
        ),
    ]


def _limit_lines(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "- Accuracy was measured on the test images, by which nothing was chosen; on other images it is unknown.",
        "- Milliseconds hold for the machine above alone.",
    ]
    return lines + [f"- {warning}" for warning in content.get("warnings", ())]


def _short(values: Any) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
