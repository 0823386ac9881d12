"""What a sweep is asked for: every setting once, and errors that name their field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprune.config import PruneConfig
from entprune.errors import ConfigError
from entprune.path import PathSetting
from flows.sweep_parameters import SWEEPABLE, RandomSearch, parse_sweep, read_sweep

BASE = {"model": "lenet", "checkpoint": "lenet.pt", "data": "mnist", "max_accuracy_drop": 0.5}
SIZELESS = {name: value for name, value in BASE.items() if name != "max_accuracy_drop"}
EXAMPLE = Path(__file__).resolve().parents[1] / "infra" / "sweeps" / "lenet.yaml"


def asked(**changes: Any) -> dict[str, Any]:
    return {"base": BASE, "grid": {"loss_exponent": [0.5, 1.0]}, "output": "out"} | changes


# --- settings ---------------------------------------------------------------------------------------------------------


def test_grid_is_every_combination_once_in_its_order() -> None:
    sweep = parse_sweep(asked(grid={"loss_exponent": [0.5, 1.0, 0.5], "seed": [0, 1]}))
    assert [setting.values for setting in sweep.settings()] == [
        {"loss_exponent": 0.5, "seed": 0},
        {"loss_exponent": 0.5, "seed": 1},
        {"loss_exponent": 1.0, "seed": 0},
        {"loss_exponent": 1.0, "seed": 1},
    ]
    assert [setting.number for setting in sweep.settings()] == [0, 1, 2, 3]
    assert [setting.parameters.config().loss_exponent for setting in sweep.settings()] == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "values"),
    [("drop_estimate", ["labels", "posterior"]), ("scoring_precision", ["bfloat16"]), ("perturbed_share", [0.0, 0.5])],
)
def test_what_is_left_open_by_default_can_be_swept_over(name: str, values: list[Any]) -> None:
    settings = parse_sweep(asked(grid={name: values})).settings()
    assert [getattr(setting.parameters.config(), name) for setting in settings] == values


def test_values_of_continuations_change_all_of_a_settings_continuations() -> None:
    threshold, entropy = (
        parse_sweep(asked(grid={name: [value]})).settings()[0].parameters.config().settings
        for name, value in (("drop_threshold", 0.2), ("entropy_weight", -1))
    )
    default = PruneConfig().settings
    assert [entry.entropy_weight for entry in threshold] == [entry.entropy_weight for entry in default]
    assert {entry.drop_threshold for entry in threshold if entry.method == "entropy"} == {0.2}
    elimination = tuple(entry for entry in default if entry.method == "elimination")  # reads none of these values
    assert entropy == (PathSetting(entropy_weight=-1.0), *elimination)
    listed = [PathSetting(entropy_weight=weight).to_dict() for weight in (1.0, 3.0)]
    base = BASE | {"overrides": {"settings": listed}}
    (only,) = parse_sweep(asked(base=base, grid={"entropy_weight": [-1]})).settings()
    assert only.parameters.config().settings == (PathSetting(entropy_weight=-1.0),)  # equal ones are solved once
    (only,) = parse_sweep(asked(grid={"method": ["elimination"]})).settings()
    assert {entry.method for entry in only.parameters.config().settings} == {"elimination"}


def test_swept_budget_takes_the_place_of_the_base_s() -> None:
    settings = parse_sweep(asked(grid={"macs_removed": [0.3, 0.6]})).settings()
    assert [setting.parameters.budget().to_dict() for setting in settings] == [{"macs_removed": r} for r in (0.3, 0.6)]
    both = parse_sweep(asked(grid={"max_accuracy_drop": [0.5], "latency_removed": [0.2]})).settings()
    assert both[0].parameters.budget().kind == "max_accuracy_drop"
    assert both[0].parameters.budget().latency_removed == 0.2


def test_networks_come_with_their_checkpoints() -> None:
    base = {name: value for name, value in BASE.items() if name not in {"model", "checkpoint"}}
    networks = [{"model": "lenet", "checkpoint": "a.pt"}, {"model": "vgg16_cifar", "checkpoint": "runs/b.pt"}]
    settings = parse_sweep(asked(base=base, grid={"network": networks})).settings()
    assert [(s.parameters.model, str(s.parameters.checkpoint)) for s in settings] == [
        ("lenet", "a.pt"), ("vgg16_cifar", "runs/b.pt"),
    ]  # fmt: skip
    assert settings[1].label() == "network vgg16_cifar b.pt"


@given(st.integers(0, 99), st.integers(2, 20))
def test_draws_lie_in_their_ranges_and_do_not_depend_on_each_other(seed: int, samples: int) -> None:
    ranges: dict[str, Any] = {
        "l2_start": {"low": 0.001, "high": 1.0, "log": True},
        "calibration_samples": {"low": 10, "high": 12},
        "objective": ["parameters", "macs"],
    }
    draws = RandomSearch(samples=samples, seed=seed, ranges=ranges).draws()
    for draw in draws:
        assert 0.001 <= draw["l2_start"] <= 1.0
        assert draw["calibration_samples"] in {10, 11, 12}
        assert draw["objective"] in {"parameters", "macs"}
    fewer = RandomSearch(samples=samples - 1, seed=seed, ranges={"l2_start": ranges["l2_start"]}).draws()
    assert [draw["l2_start"] for draw in fewer] == [draw["l2_start"] for draw in draws[:-1]]


def test_grid_points_are_combined_with_draws() -> None:
    random = {"samples": 3, "ranges": {"l2_start": {"low": 0.01, "high": 0.5}}}
    assert len(parse_sweep(asked(random=random)).settings()) == 6


def test_choice_follows_the_base_s_budget_unless_it_says_otherwise() -> None:
    assert parse_sweep(asked()).max_accuracy_drop() == 0.5
    assert parse_sweep(asked(choose={"max_accuracy_drop": 0.2})).max_accuracy_drop() == 0.2
    assert parse_sweep(asked(grid={"macs_removed": [0.3]})).max_accuracy_drop() is None


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": {"loss_exponent": [0.5, 9.0]}}, r"^grid\.loss_exponent\[1\]: loss_exponent must lie in \(0, 4\]"),
        ({"grid": {"drop_threshold": [1.5]}}, r"^grid\.drop_threshold\[0\]: path setting drop_threshold is out"),
        ({"grid": {"loss_exponet": [1.0]}}, r"^grid\.loss_exponet\[0\]: no field to sweep over; expected one of "),
        ({"grid": {"entropy_weight": ["much"]}}, r"^grid\.entropy_weight\[0\]: expected a number, got 'much'"),
        ({"grid": {"drop_estimate": ["guess"]}}, r"^grid\.drop_estimate\[0\]: drop_estimate must be one of"),
        ({"grid": {"perturbed_share": ["all"]}}, r"^grid\.perturbed_share\[0\]: expected a number, got 'all'"),
        ({"grid": {"iterations": [1.5]}}, r"^grid\.iterations\[0\]: expected a whole number, got 1\.5"),
        ({"grid": {"seed": [-1]}}, r"^grid\.seed\[0\]: seed: input should be greater than or equal to 0, got -1"),
        ({"base": SIZELESS, "grid": {"macs_removed": [2.0]}}, r"^grid\.macs_removed\[0\]: --macs-removed is a"),
        ({"grid": {"seed": []}}, r"^grid\.seed: expected a list of at least one value"),
        ({"grid": {"seed": 3}}, r"^grid\.seed: input should be a valid list, got 3"),
        ({"grid": {"seed": list(range(2000))}}, r"^grid: expected at most 1000 settings, got 2000"),
        ({"grid": {"network": ["lenet"]}}, r"^grid\.network\[0\]: expected a model and a checkpoint, got 'lenet'"),
        ({"base": {**BASE, "data": None}}, r"^base: data: input should be a valid string"),
        ({"base": {"model": "lenet", "data": "mnist"}}, r"^base: checkpoint: field required"),
        ({"base": {**BASE, "output": "x"}}, r"^base\.output: give it beside the base"),
        ({"choose": {"smallest": "files"}}, r"^choose\.smallest: input should be 'parameters', 'macs' or 'latency'"),
        ({"random": {"samples": 0, "ranges": {"seed": [1]}}}, r"^random\.samples: input should be greater than"),
        ({"random": {"samples": 2, "ranges": {"seed": {"low": 1}}}}, r"^random\.ranges\.seed: expected low and"),
        ({"random": {"samples": 2, "ranges": {"seed": {"low": 2, "high": 1}}}}, r"^random\.ranges\.seed: .*below"),
        ({"random": {"samples": 2, "ranges": {"max_drop": {"low": 0.1, "high": 5}}}}, r"^random\.ranges\.max_dr"),
        ({"random": {"samples": 2, "ranges": {"loss_exponent": [1.0]}}}, r"^grid\.loss_exponent: drawn at random"),
        ({"early": True}, r"^early: extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence_with_its_field(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_sweep(asked(**changes))


def test_every_sweepable_field_is_one_of_a_run() -> None:
    known = {*PathSetting.__dataclass_fields__, *PruneConfig.__dataclass_fields__, "checkpoint", "network"}
    assert set(SWEEPABLE) <= known | {"max_accuracy_drop", "parameters_removed", "macs_removed", "latency_removed"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base: [", r"sweep\.yaml', line 1: expected YAML"),
        ("- 1", r"expected fields such as base and grid, got list"),
        ("base: !!python/object/apply:os.getcwd []", r"could not determine a constructor"),
    ],
)
def test_unreadable_files_are_explained(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_sweep(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sweep(tmp_path / "nowhere.yaml")


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(EXAMPLE.read_text().replace("[0.0, 1.0, 3.0]", "[1e-1]"))
    assert {s.values["entropy_weight"] for s in read_sweep(path).settings()} == {0.1}


def test_example_is_valid_and_holds_no_absolute_path() -> None:
    sweep = read_sweep(EXAMPLE)
    assert len(sweep.settings()) == 12
    assert not any(Path(str(value)).is_absolute() for value in (*sweep.base.values(), sweep.output))
