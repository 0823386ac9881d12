"""Numbers and verdicts in plain words, for people who did not watch the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

UNKNOWN = "—"

_FEW_CHANNELS = 0.05
_LARGE_ERROR = 0.5
_MOST_NAMES = 6
_SEEN_DATA_POINTS = 0.5
_SHORTEST_COUNT = 10_000  # smaller counts are written in full
_COUNT_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(number: float | None) -> str:
    """A count in four digits: 431080 -> ``431.1 k``."""
    if number is None:
        return UNKNOWN
    if number < _SHORTEST_COUNT:
        return f"{number:,.0f}"
    rounded = float(f"{number:.4g}")  # first, so that 999960 is 1 M and not 1000 k
    size, unit = next(entry for entry in _COUNT_UNITS if rounded >= entry[0])
    return f"{rounded / size:.4g} {unit}"


def format_fraction(fraction: float | None) -> str:
    """A fraction in percent: 0.9234 -> ``92.3 %``; it never rounds up to everything or down to nothing."""
    if fraction is None:
        return UNKNOWN
    percent = 100.0 * fraction
    for digits in (1, 2, 3):
        if round(percent, digits) not in {0.0, 100.0} or fraction in {0.0, 1.0}:
            return f"{percent:.{digits}f} %"
    return f"{percent:.3g} %"


def format_accuracy(percent: float | None) -> str:
    """An accuracy that is in percent already."""
    return UNKNOWN if percent is None else f"{percent:.2f} %"


def format_change(drop: float | None) -> str:
    """A drop in points as a signed change of the accuracy: 0.31 -> ``−0.31``."""
    if drop is None:
        return UNKNOWN
    change = round(-drop, 2) + 0.0  # without negative zero
    return f"{change:+.2f}".replace("-", "−")


def format_points(drop: float | None) -> str:
    """The same with its unit: 0.31 -> ``−0.31 points``."""
    return UNKNOWN if drop is None else f"{format_change(drop)} points"


def format_milliseconds(value: float | None) -> str:
    """A latency in three digits."""
    return UNKNOWN if value is None else f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def format_seconds(seconds: float | None) -> str:
    """A duration: 192.4 -> ``3 min 12 s``."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_number(value: float | None) -> str:
    """A plain number in three digits."""
    return UNKNOWN if value is None else f"{value:.3g}"


def format_interval(interval: Mapping[str, float] | None) -> str:
    """Where the change of accuracy lies on new images, as signed points: ``−1.09 to −0.21``."""
    return UNKNOWN if interval is None else f"{format_change(interval['high'])} to {format_change(interval['low'])}"


def result_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Figures of the network that was saved: fine-tuned if it was, else one-shot."""
    result: Mapping[str, Any] = report.get("fine_tuned") or report["one_shot"]
    return result


def model_name(report: Mapping[str, Any]) -> str:
    """What the network is called."""
    return str(report["model"].get("spec") or "Network passed in process")


def speed_up(dense: Mapping[str, Any], result: Mapping[str, Any], batch_size: str = "64") -> str:
    """How many times faster: ``2.9 ×``."""
    before, after = ((figures.get("latency_ms") or {}).get(batch_size) for figures in (dense, result))
    return f"{before / after:.2g} ×" if before and after else UNKNOWN


_BUDGETS = {
    "max_accuracy_drop": "accuracy",
    "parameters_removed": "parameters",
    "macs_removed": "multiply-accumulates",
    "latency_removed": "latency",
}


def describe_perturbed(report: Mapping[str, Any]) -> str:
    """Which share of the images to choose by is perturbed, to go behind their number; nothing where none is."""
    share = report.get("settings", {}).get("perturbed_share")
    return f" ({share:.0%} of them perturbed)" if share else ""


def describe_budget(budget: Mapping[str, float]) -> str:
    """What was asked, as the end of a sentence that starts with 'Asked:'."""
    removed = [
        f"{format_fraction(budget[kind])} of its {counted}"
        for kind, counted in _BUDGETS.items()
        if kind in budget and kind != "max_accuracy_drop"
    ]
    if "latency_removed" in budget:
        removed[-1] += f" at batch size {budget['latency_batch']:g}"
    if "max_accuracy_drop" not in budget:
        return f"a network without {' and '.join(removed)}"
    asked = f"the smallest network that loses at most {budget['max_accuracy_drop']:g} points of accuracy"
    return f"{asked} and is without at least {' and '.join(removed)}" if removed else asked


def describe_outcome(report: Mapping[str, Any]) -> str:
    """What came of the budget, in one sentence."""
    if not report.get("budget_met"):
        return "No network that was tried met this; the one nearest to it was kept."
    if "max_accuracy_drop" not in report["budget"]:
        return "The network meets this."
    images = report["validation"]["images"]
    confidence = (report.get("settings") or {}).get("confidence")
    sureness = f" with {100 * confidence:.0f} % confidence" if confidence else ""
    return f"Judged on {images:,} validation images, the chosen network meets this{sureness}."


def describe_certificate(certificate: Mapping[str, Any] | None) -> str:
    """What the equality check says, in one sentence."""
    if not certificate:
        return "Whether the right channels were removed was not checked."
    compared = (
        f"largest difference {certificate['max_abs_difference']:.1e} of the output's size, "
        f"allowed {certificate['tolerance']:g}, {certificate['num_images']} inputs compared"
    )
    if certificate["passed"]:
        return f"It computes the same as the full-size network with the removed channels silenced ({compared})."
    return (
        f"It does not compute what the full-size network does with the removed channels silenced ({compared}): "
        "do not use it."
    )


def collect_warnings(report: Mapping[str, Any]) -> list[str]:
    """What a user should know before relying on the network, the gravest first.

    Args:
        report: schema version 1; its own ``warnings`` are not read.
    """
    return [
        *_verdict_warnings(report),
        *_accuracy_warnings(report),
        *_group_warnings(report),
        *_latency_warnings(report),
    ]


def _verdict_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    certificate = report.get("certificate")
    if certificate and not certificate["passed"]:
        yield (
            f"The certificate failed: the smaller network differs from the masked full-size one by "
            f"{certificate['max_abs_difference']:.1e}, and {certificate['tolerance']:g} is allowed. "
            "Do not use this network; protect the layers at fault with --keep."
        )
    if not report.get("budget_met", True):
        missed = [_BUDGETS[kind] for kind in report.get("budgets_missed", ())]
        failed = (
            f" What failed is the budget of {' and '.join(missed)}." if missed and len(report["budget"]) > 1 else ""
        )
        yield (
            f"The budget was not met: asked was {describe_budget(report['budget'])}.{failed} "
            "Allow more, give more calibration images, or fine-tune."
        )
    groups = report["groups"]
    if not groups:
        yield "Nothing could be pruned: no group of channels can be removed; the list of unprunable layers says why."
    elif all(entry["kept"] == entry["channels"] for entry in groups):
        yield "Nothing was removed: every group kept all of its channels. Allow a larger loss to get a smaller network."


def _accuracy_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    dense_accuracy = report["dense"].get("accuracy")
    if dense_accuracy is None:
        yield "No test images were given: what the network is worth on images that nothing was chosen by is unknown."
    validation = report.get("validation") or {}
    validation_accuracy = validation.get("dense_accuracy")
    if None not in (dense_accuracy, validation_accuracy) and validation_accuracy > dense_accuracy + _SEEN_DATA_POINTS:
        yield (
            f"The unpruned network scores {validation_accuracy:.2f} % on the validation images and "
            f"{dense_accuracy:.2f} % on the test images: it has probably seen the validation images in "
            "training, so accuracies on them are optimistic; trust the test figures, or give data with a validation "
            "split that it has not seen."
        )
    allowed = report["budget"].get("max_accuracy_drop")
    if allowed is None:
        return
    drop = result_of(report).get("accuracy_drop")
    if drop is not None and drop > allowed:
        yield (
            f"On the test images the accuracy fell by {drop:.2f} points, more than the {allowed:g} that were allowed."
            + _explain_overshoot(result_of(report).get("accuracy_drop_interval"), allowed)
        )
    images = validation.get("images") or 0
    if images and 100.0 / images > allowed > 0:
        yield (
            f"With {images:,} validation images one image is worth {100.0 / images:.2g} points, more than the "
            f"budget of {allowed:g}; give more images."
        )


def _explain_overshoot(interval: Mapping[str, float] | None, allowed: float) -> str:
    if interval is None:
        return ""
    ends = f"between {interval['low']:.2f} and {interval['high']:.2f} points with 95 % confidence"
    if interval["low"] > allowed:
        return f" On new images the loss lies {ends}: the budget is exceeded there, too."
    return f" On new images the loss lies {ends}, so these test images are too few to say that it is exceeded there."


def _group_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    groups = report["groups"]
    thin = [
        f"{entry['name']} ({entry['kept']} of {entry['channels']})"
        for entry in groups
        if entry["kept"] < _FEW_CHANNELS * entry["channels"]
    ]
    if thin:
        yield (
            f"{_count_groups(thin)} reduced to less than {_FEW_CHANNELS:.0%} of the channels: {_list_some(thin)}. "
            "If accuracy suffers, raise the floor with --min-channels or --min-fraction."
        )
    poor = [
        f"{entry['name']} ({format_fraction(entry['reconstruction_error'])})"
        for entry in groups
        if (entry.get("reconstruction_error") or 0.0) > _LARGE_ERROR
    ]
    if poor:
        yield (
            f"{_count_groups(poor)} stripped of more than half of what the next layers need: {_list_some(poor)}. "
            "If accuracy suffers, look there first."
        )


def _count_groups(names: Sequence[str]) -> str:
    return "One group was" if len(names) == 1 else f"{len(names)} groups were"


def _list_some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _latency_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    before, after = report["dense"].get("latency_ms") or {}, result_of(report).get("latency_ms") or {}
    for batch_size in before.keys() & after.keys():
        if after[batch_size] >= before[batch_size] and (result_of(report).get("macs_removed") or 0.0) > 0.0:
            yield (
                f"At batch size {batch_size} the smaller network is not faster "
                f"({format_milliseconds(before[batch_size])} before, {format_milliseconds(after[batch_size])} after); "
                "widths that are multiples of 8 (--round-to 8) suit most hardware better."
            )
