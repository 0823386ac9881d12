"""The benchmark's pages: no figure is lost on the way to them, and what they compute from records is right."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entprune.errors import ConfigError

pytest.importorskip("torch_pruning", reason="the benchmark's peers are development dependencies")
pytest.importorskip("sklearn", reason="the benchmark's peers are development dependencies")

from infra.benchmark import dense, estimates, recovery, selection, tuned
from infra.benchmark.networks import Folders
from infra.benchmark.outcomes import pack_outcomes, paired_error, unpack_outcomes
from infra.benchmark.parts import Request
from infra.benchmark.published import Measured, nearest, published_section
from infra.benchmark.records import Record, Subject
from infra.benchmark.render import replace_between_markers, short_table
from infra.benchmark.selectors import METHODS
from infra.benchmark.tables import commits_line, compare, exponent, standing
from tests.benchmark_requests import RUN_WITH_VERSIONS, measure_to, page_of

# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_fitted_exponent_is_that_of_the_curve(power: float) -> None:
    assert exponent([(n, 3.0 * n**power) for n in (1000, 3000, 50_000)]) == pytest.approx(power)


def test_a_table_names_the_runs_that_its_cells_are_from() -> None:
    environment = RUN_WITH_VERSIONS["environment"]
    runs = [RUN_WITH_VERSIONS | {"code_commit": name, "environment": environment} for name in ("replaced", "old")]
    runs.append(runs[0] | {"code_commit": "new", "environment": {**environment, "cpu": "Some CPU AVX2", "threads": 2}})
    line = commits_line([{"runs": runs, "cells": [{"run": 2}, {"run": 1}, {"run": 2}]}])
    assert "Commit new, old; torch 2; on Some CPU AVX2; threads 1, 2;" in line
    assert "; on " not in commits_line([{"runs": runs, "cells": [{"run": 1}]}])


@pytest.mark.parametrize("count", [1, 200, 10_001])
def test_outcomes_come_back(count: int) -> None:
    wrong = np.random.default_rng(count).random(count) < 0.1
    text = pack_outcomes(wrong)
    assert np.array_equal(unpack_outcomes(text, count), wrong)


def cell_of(wrong: np.ndarray, *, with_outcomes: bool = True) -> dict:
    stored = {"wrong": pack_outcomes(wrong)} if with_outcomes else {}
    return {"accuracy": 100.0 * float(np.mean(~wrong)), **stored}


def test_the_noise_of_a_difference_is_that_of_the_images_that_differ() -> None:
    first, second = np.zeros(10_000, dtype=bool), np.zeros(10_000, dtype=bool)
    first[:700], second[100:800] = True, True  # 200 images are right in one alone
    cells = [cell_of(first)], [cell_of(second)]
    assert paired_error(*cells, 10_000) == pytest.approx(100 * (0.02 / 10_000) ** 0.5)
    assert paired_error(cells[0], cells[0], 10_000) == 0.0
    bounds = [[cell_of(wrong, with_outcomes=False)] for wrong in (first, second)]
    assert paired_error(*bounds, 10_000) == pytest.approx(100 * (0.14 / 10_000) ** 0.5)
    second[:800] = False
    second[700:1400] = True  # no error in common: the bound is met
    assert paired_error([cell_of(first)], [cell_of(second)], 10_000) == pytest.approx(paired_error(*bounds, 10_000))


def test_the_best_is_bold_and_what_is_level_is_marked() -> None:
    best, level, behind = (np.arange(1000) < count for count in (50, 51, 90))
    texts = compare([[cell_of(wrong)] for wrong in (behind, best, level)] + [[]], 1000)
    assert texts == ["91.00", "**95.00**", "94.90 ≈", "-"]


# --- pages ------------------------------------------------------------------------------------------------------------


def store_selection(folder: Path, seeds: tuple[int, ...]) -> dict[tuple[int, str, str, str], float]:
    """Different accuracies in every cell."""
    stored = {}
    for seed in seeds:
        subject = Subject(part="selection", network="lenet", seed=seed, budget="parameters_removed-0.92")
        record = Record(subject.path(folder), subject)
        dense = {"accuracy": 99.5, "parameters": 1000, "macs": 5000}
        record.require_facts({"dense": dense, "test_samples": 100, "calibration_samples": 10})
        for number, (method, (weights, widths)) in enumerate(itertools.product(METHODS, selection.VARIANTS)):
            accuracy = 50.0 + number + 0.11 * seed
            key = {"method": method, "weights": weights, "widths": widths}
            record.put(key, {"accuracy": accuracy, "parameters": 80, "macs": 900}, RUN_WITH_VERSIONS)
            stored[seed, method, weights, widths] = accuracy
    return stored


def test_every_stored_accuracy_is_on_the_page(tmp_path: Path) -> None:
    stored = store_selection(tmp_path / "results", (0,))
    text = page_of(tmp_path / "results", tmp_path / "out")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "what was there" not in text
    lines = [line for line in text.split("## Beside published")[0].splitlines() if line.startswith("| ")]
    rows = [line.replace("**", "").replace(" ≈", "") for line in lines]
    assert sum("**" in line for line in lines) == len(selection.VARIANTS)
    for accuracy in stored.values():
        assert sum(f" {accuracy:.2f} " in line for line in rows) == 1
    assert (tmp_path / "out" / "plots" / "selection-lenet-parameters.svg").read_text().count("<svg") == 1
    assert "92.00%" in text  # what was really removed: 80 of 1000 parameters are left


def test_seeds_are_averaged_and_pages_are_the_same_every_time(tmp_path: Path) -> None:
    store_selection(tmp_path / "results", (0, 1, 2))
    text = page_of(tmp_path / "results", tmp_path / "out")
    assert "50.11 ± 0.11" in text
    first = {path.name: path.read_bytes() for path in (tmp_path / "out" / "plots").iterdir()}
    assert page_of(tmp_path / "results", tmp_path / "out") == text
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "plots").iterdir()} == first
    assert "50.11 ± 0.11" in short_table(tmp_path / "results")


def selection_records(accuracies: dict[tuple[str, str, str], float]) -> list[dict[str, Any]]:
    """One budget's record, with accuracies by (method, weights, widths)."""
    cells = [
        {"key": {"method": method, "weights": weights, "widths": widths}, "values": {"accuracy": accuracy}}
        for (method, weights, widths), accuracy in accuracies.items()
    ]
    return [{"budget": "macs_removed-0.5", "facts": {"test_samples": 10_000}, "cells": cells}]


def test_standing_counts_cells_with_rivals_and_the_lead_over_the_best_of_them() -> None:
    ahead = {
        ("ours", "refit", "allocated"): 92.0, ("l1", "refit", "allocated"): 90.0, ("ours", "refit", "uniform"): 80.0,
        ("ours", "plain", "uniform"): 91.9, ("l1", "plain", "uniform"): 50.0, ("fpgm", "plain", "uniform"): 60.0,
    }  # fmt: skip
    behind = {
        ("ours", "refit", "allocated"): 90.0, ("taylor", "refit", "allocated"): 92.0,
        ("ours", "refit", "uniform"): 80.0, ("l1", "refit", "uniform"): 80.2, ("l1", "plain", "uniform"): 48.0,
    }  # fmt: skip
    (line,) = standing({"a": selection_records(ahead), "b": selection_records(behind)})
    assert "in 1 of 2 cells with refit, our widths and in 1 of 1 cells with refit, uniform widths: **2 of 3**" in line
    assert "32.0 points ahead at the least and 37.0 in the median of 2 cells" in line
    assert standing({"a": selection_records({("ours", "refit", "allocated"): 90.0})}) == []


def test_seeds_of_a_tuned_network_have_their_medians(tmp_path: Path) -> None:
    recipe = tuned.RECIPES["vgg16_cifar"][0].key()
    for seed, (one_shot, after) in enumerate([(89.0, 91.0), (88.0, 92.0), (90.0, 91.4)]):
        subject = Subject(part="tuned", network="vgg16_cifar", seed=seed)
        values = {
            "dense": {"accuracy": 91.5, "parameters": 24680, "macs": 20000}, "one_shot_accuracy": one_shot,
            "tuned_accuracy": after, "parameters": 1234, "macs": 5678, "epoch_seconds": 86.4, "threads": 2,
        }  # fmt: skip
        Record(subject.path(tmp_path / "results"), subject).put(recipe, values, RUN_WITH_VERSIONS)
    text = page_of(tmp_path / "results", tmp_path / "out")
    first = (
        "| vgg16_cifar, 95% of the parameters | 0 | 91.50 | 89.00 | 2.50 | 91.00 | 0.50 | 1,234 | 5,678 | 14 | 0.05 |"
    )
    assert f"{first} 0 | - | all | 86 | 2 threads |" in text
    assert "| vgg16_cifar, 95% of the parameters | **median** |  |  | **2.50** |  | **0.10** |" in text


def network_of_ours(place: str, parameters: float, macs: float, **facts: Any) -> Measured:
    named = {"network": "lenet", "seed": 0, "tuned": False, "left": round(1000 * (1 - parameters))}
    return Measured(place=place, dense=99.0, accuracy=98.0, parameters=parameters, macs=macs, **named | facts)


@pytest.mark.parametrize(
    ("published", "places"),
    [
        ({"parameters_removed": 0.80, "macs_removed": 0.99}, ["small", "small"]),  # MACs count where they stand alone
        ({"parameters_removed": 0.70}, ["large"]),
        ({"parameters_removed": 0.704}, ["large"]),  # to half a percent
        ({"parameters_removed": 0.706}, ["small", "small"]),
        ({"macs_removed": 0.40}, ["small", "small"]),
        ({"parameters_left": 300}, ["large"]),
        ({"parameters_left": 290}, ["small", "small"]),
        ({"parameters_left": 190}, []),
        ({"parameters_removed": 0.95}, []),
    ],
)
def test_beside_what_is_published_stands_the_next_smaller_network(published: dict, places: list[str]) -> None:
    ours = [
        network_of_ours("large", 0.70, 0.30),
        network_of_ours("small", 0.82, 0.45),
        network_of_ours("small", 0.80, 0.45, seed=1),
        network_of_ours("tuned", 0.99, 0.99, tuned=True),
        network_of_ours("another", 0.99, 0.99, network="vgg16_cifar"),
    ]
    found = nearest({"network": "lenet", "tuned": False, **published}, ours)
    assert [network.place for network in found] == places


def test_medians_over_the_seeds_stand_beside_what_is_published(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((91.0, 90.0, 91.5)):
        subject = Subject(part="tuned", network="vgg16_cifar", seed=seed, budget="parameters_removed-0.75")
        values = {
            "dense": {"accuracy": 92.0, "parameters": 1000, "macs": 100}, "one_shot_accuracy": accuracy - 1.0,
            "tuned_accuracy": accuracy, "parameters": 200 + seed, "macs": 40,
        }  # fmt: skip
        Record(subject.path(tmp_path), subject).put({"epochs": 3}, values, RUN_WITH_VERSIONS)
    published = tmp_path / "published.json"
    entry = {"network": "vgg16_cifar", "method": "X", "dense": 94.0, "accuracy": 93.25, "parameters_removed": 0.7}
    published.write_text(json.dumps([entry | {"tuned": tuned} for tuned in (False, True)]), encoding="utf-8")
    text = "\n".join(published_section(tmp_path, published))
    row = "| vgg16_cifar | X | 94.00 → 93.25 | 0.75 | 70.0% | - | 92.00 → {} | 79.9% | 60.0% | 0, 1, 2 |"
    before, after = text.split("fine-tuned**")
    assert row.format("90.00 | 2.00") in before
    assert row.format("91.00 | 1.00") in after


def test_a_network_that_was_trained_for_the_benchmark_is_named_by_its_hash(tmp_path: Path) -> None:
    ((subject, key),) = dense.cells(replace(recovery_request(), network="vgg16_cifar_long"))
    values = {"accuracy": 93.71, "epoch_seconds": 1.234, "checkpoint_sha256": "0123456789abcdef" * 4}
    run = RUN_WITH_VERSIONS | {"environment": {"threads": 2, "torch": "2", "gpu": "NVIDIA H100"}}
    Record(subject.path(tmp_path / "results"), subject).put(key, values, run)
    text = page_of(tmp_path / "results", tmp_path / "out")
    row = "| vgg16_cifar_long | 0 | 93.71 | 60 | 256 | 0.2 | 0.0005 | 1.2 | NVIDIA H100 |"
    assert f"{row} `0123456789abcdef…` |" in text


def test_estimates_stand_beside_what_test_images_say(tmp_path: Path) -> None:
    (subject, key), _ = estimates.cells(recovery_request())
    values = {
        name: {
            "dense_accuracy": 97.28, "disagreement": changed, "labels": labels, "labels_error": 0.15,
            "posterior": posterior, "posterior_error": 0.06,
        }
        for name, changed, labels, posterior in (
            ("plain", 1.57, 0.95, 0.4), ("perturbed", 3.05, 0.93, 0.68), ("compared", 1.9, 0.94, 0.47),
            ("test", 2.8, 0.56, 0.7),
        )
    }  # fmt: skip
    Record(subject.path(tmp_path / "results"), subject).put(key, values, RUN_WITH_VERSIONS)
    text = page_of(tmp_path / "results", tmp_path / "out")
    row = "| vgg16_cifar, 89% of the parameters | 0 | 97.28 | 0.40 ± 0.06 | 0.68 ± 0.06 | 0.47 ± 0.06 | 0.70 ± 0.06 |"
    assert f"{row} **0.56** ± 0.15 | 1.57, 3.05, 2.80 |" in text


def test_methods_tuned_alike_are_compared_before_and_after(tmp_path: Path) -> None:
    def values(one_shot: int, after: int) -> dict[str, object]:
        shots = {"one_shot": one_shot, "tuned": after}
        wrong = {f"{name}_wrong": pack_outcomes(np.arange(1000) >= right) for name, right in shots.items()}
        return wrong | {f"{name}_accuracy": right / 10 for name, right in shots.items()}

    (subject, key), *_ = recovery.cells(request := recovery_request("ours", "l1"))
    record = Record(subject.path(tmp_path / "results"), subject)
    dense = {"accuracy": 91.46, "parameters": 1000, "macs": 2000}
    record.require_facts({"dense": dense, "test_samples": 1000, "calibration_samples": 192})
    figures = iter([(900, 913), (880, 912), (100, 800), (120, 700)])
    for _, key in recovery.cells(request):
        record.put(key, values(*next(figures)), RUN_WITH_VERSIONS)
    text = page_of(tmp_path / "results", tmp_path / "out")
    assert "### vgg16_cifar, 91% of the parameters" in text
    assert "refit, our widths: one-shot | refit, our widths: fine-tuned | plain, uniform widths: one-shot |" in text
    assert "| entprune | **90.00** | **91.30** | 10.00 | **80.00** |" in text
    assert "| L1 norm | 88.00 | 91.20 ≈ | **12.00** | 70.00 |" in text
    assert "| FPGM |" not in text


def recovery_request(*methods: str) -> Request:
    folders = Folders(data=Path(), checkpoints=Path())
    return Request(network="vgg16_cifar", seed=0, threads=1, folders=folders, methods=methods)


def test_seeds_of_an_accuracy_budget_have_their_median(tmp_path: Path) -> None:
    for seed, removed in enumerate((0.91, 0.7, 0.83)):
        subject = Subject(part="budgets", network="lenet", seed=seed)
        small: dict[str, object] = {
            "accuracy": 99.0 - seed,
            "accuracy_drop": float(seed),
            "parameters_removed": removed,
            "macs_removed": 0.5,
            "parameters": round(1000 * (1 - removed)),
            "macs": 50,
        }
        if seed == 1:  # records of earlier versions have no interval
            small["accuracy_drop_interval"] = {"low": 0.7, "high": 1.31}
        chosen = {"chosen": True, "validation_drop": 0.1 * seed, "drop_upper_bound": 0.1 * seed + 0.15}
        values = {
            "dense": {"accuracy": 99.0, "parameters": 1000, "macs": 100}, "one_shot": small, "threads": 1,
            "budget_met": seed != 2, "timings_seconds": {"solve": 1.25}, "candidates": [{"chosen": False}, chosen],
        }  # fmt: skip
        Record(subject.path(tmp_path / "results"), subject).put({"max_accuracy_drop": 0.5}, values, RUN_WITH_VERSIONS)
    text = page_of(tmp_path / "results", tmp_path / "out")
    assert "| lenet | 0.5 | 1 | 99.00 → 98.00 | 1.00 (0.70 to 1.31) | 0.10 (0.25) | 70.0% | 50.0% | 2 |" in text
    assert "| 2.00 (budget not met) | 0.20 (0.35) | 83.0% |" in text
    assert "| lenet | 0.5 | **median** |  | **1.00** |  | **83.0%** | **50.0%** |" in text
    estimated = "All 3 runs by 0.5 points: a drop of 0.10 was estimated in the mean, and on the test images it is 1.00"
    assert f"{estimated} (0.00 to 2.00); 1 of 3 are within the budget there." in text


def test_curves_over_images_are_fitted_and_drawn(tmp_path: Path) -> None:
    cells: list[tuple[dict, dict]] = []
    for n in (1000, 10_000):
        key = {"quantity": "solve", "images": n}
        cells.append((key, {"solve_seconds": 2.0}))
        for stage in ("solve", "assemble"):
            key = {"quantity": "memory", "stage": stage, "images": n}
            cells.append((key, {"peak_mib": n / 2 if stage == "assemble" else 500.0}))
    measure_to(tmp_path / "results", "scaling", "synthetic", cells)
    text = page_of(tmp_path / "results", tmp_path / "out")
    assert (text.count("**0.000**"), text.count("**1.000**")) == (2, 1)
    assert (tmp_path / "out" / "plots" / "scaling.svg").exists()


def test_a_page_without_markers_is_refused_and_stays(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("text", encoding="utf-8")
    with pytest.raises(ConfigError, match="markers"):
        replace_between_markers(page, "table")
    assert page.read_text(encoding="utf-8") == "text"
