"""Parameters of the pruning flow: plain values in, one sentence for what is wrong."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprune import Budget, PruneConfig
from entprune.errors import ConfigError
from flows.parameters import PruneParameters, parse_parameters

REQUIRED: dict[str, Any] = {"model": "lenet", "checkpoint": "lenet.pt", "data": "mnist", "output": "out"}
VALID = {**REQUIRED, "max_accuracy_drop": 0.5}


def test_defaults_are_those_of_the_library() -> None:
    parameters = parse_parameters(VALID)
    assert parameters.config() == PruneConfig()
    assert parameters.budget() == Budget(max_accuracy_drop=0.5)


def test_options_and_overrides_reach_the_settings() -> None:
    setting = {"entropy_weight": 0.1}
    overrides = {"resolution": 1.2, "objective": "macs", "settings": [setting]}
    config = parse_parameters({**VALID, "keep": ["conv1"], "seed": 3, "overrides": overrides}).config()
    assert (config.keep, config.seed, config.resolution, config.objective) == (("conv1",), 3, 1.2, "macs")
    assert [entry.entropy_weight for entry in config.settings] == [0.1]


@pytest.mark.parametrize(("given", "expected"), [("a/b", Path("a/b")), ("s3://bucket/a", "s3://bucket/a")])
def test_place_of_stored_results_is_a_folder_or_a_uri(given: str, expected: Path | str) -> None:
    base = {"model": "lenet", "checkpoint": "c.pt", "data": "mnist", "max_accuracy_drop": 1.0, "output": "out"}
    parameters = parse_parameters({**base, "cache_dir": given})
    assert parameters.cache_dir == expected
    assert PruneParameters.model_validate_json(parameters.model_dump_json()) == parameters


def test_parameters_survive_json() -> None:
    parameters = parse_parameters(
        {**VALID, "mean": (0.1, 0.2), "register": "digits", "round_to": 8, "overrides": {"max_rounds": 3}}
    )
    assert PruneParameters.model_validate_json(parameters.model_dump_json()) == parameters


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers": 0}, r"^workers: .* got 0"),
        ({"seed": "x"}, r"^seed: .* got 'x'"),
        ({"gpus_per_worker": float("nan")}, "^gpus_per_worker: .* got nan"),
        ({"calibration_samples": 0}, r"^calibration_samples: .* got 0"),
        ({"colour": "red"}, "^colour: extra inputs are not permitted"),
        ({"model": None}, r"^model: .* got None"),
        ({"workers": 0, "seed": -1}, r"\(and 1 more\)"),
        ({"register": "a:b"}, r"^register: expected a name of letters.* got 'a:b'"),
        ({"register": " a"}, "^register: expected a name of letters"),
        ({"overrides": {"seed": 1}}, "^overrides: seed must be given beside the overrides"),
        ({"overrides": {"colour": 1}}, r"unknown settings \['colour'\]"),
        ({"overrides": {"resolution": 0.5}}, "resolution must exceed 1, got 0.5"),
        ({"overrides": {"threads": "many"}}, "^overrides: .*see entprune.PruneConfig"),
        ({"overrides": {"settings": [{"colour": 1}]}}, "^overrides: .*colour"),
        ({"max_accuracy_drop": None}, "expected a budget, got none; give --max-accuracy-drop"),
        ({"latency_removed": 0.5, "latency_batch": 0}, "--latency-batch must be at least 1, got 0"),
        ({"rounds": 2}, "--rounds 2 needs tuning between the rounds, got --finetune-epochs 0"),
        ({"finetune_learning_rate": 0.0}, "expected learning_rate > 0, got 0.0"),
        ({"finetune_distillation_weight": 1.5}, r"expected distillation_weight in \[0, 1\], got 1.5"),
        ({"max_accuracy_drop": -1}, r"--max-accuracy-drop is accuracy points in \[0, 100\), got -1"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_parameters({**VALID, **changes})
    assert "\n" not in str(caught.value)


@given(
    st.dictionaries(st.sampled_from(sorted(PruneParameters.model_fields)), st.one_of(st.none(), st.text(), st.floats()))
)
def test_no_value_raises_anything_but_a_config_error(changes: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert parse_parameters({**VALID, **changes}).budget().value >= 0
