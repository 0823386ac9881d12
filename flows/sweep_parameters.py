"""What a sweep is asked for: a common base, a grid or random draws over it, and the rule by which one is chosen."""

from __future__ import annotations

import itertools
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from entprune.config import PruneConfig
from entprune.errors import ConfigError
from entprune.path import PathSetting
from flows.parameters import PruneParameters, RegistryName, describe_validation, parse_parameters

_DEFAULTS = PruneConfig()
BUDGET_FIELDS = ("max_accuracy_drop", "parameters_removed", "macs_removed", "latency_removed")
PATH_FIELDS = tuple(PathSetting.__dataclass_fields__)
_RUN_FIELDS = (
    "checkpoint", "calibration_samples", "validation_samples", "seed", "keep", "low_rank", "round_to",
    "minimum_channels", "minimum_fraction",
)  # fmt: skip
_CONFIG_FIELDS = (
    "loss_exponent", "objective", "relative_ridge", "reestimate_batchnorm", "rectified_steps", "output_temperature",
    "correct_residuals", "drop_estimate", "perturbed_share", "scoring_precision", "confidence", "min_rows",
    "rows_per_feature", "resolution", "max_rounds", "candidates_per_round",
)  # fmt: skip
_LEFT_OPEN: dict[str, Any] = {"drop_estimate": "posterior", "scoring_precision": "float32", "perturbed_share": 0.0}
SWEEPABLE = (*PATH_FIELDS, *_CONFIG_FIELDS, *BUDGET_FIELDS, *_RUN_FIELDS, "network")
_MAX_SETTINGS = 1000


class Range(BaseModel):
    """Where random values of one field come from: an interval, or a list of choices."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    low: float | None = None
    """Lower end of the interval."""
    high: float | None = None
    """Upper end; of a field that takes whole numbers, both ends may be drawn."""
    log: bool = False
    """Whether the logarithm is uniform."""
    choices: tuple[Any, ...] = ()
    """The values, instead of an interval."""

    @model_validator(mode="before")
    @classmethod
    def _accept_list(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("expected low and high, or a list of choices")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"expected low below high, got {self.low:g} and {self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"expected low above 0 on a logarithmic scale, got {self.low:g}")
        return self

    def examples(self, name: str) -> tuple[Any, ...]:
        """Values that stand for all: what is wrong with any is wrong with one of them."""
        return self.choices or (_fitting(name, self.low), _fitting(name, self.high))

    def draw(self, name: str, generator: np.random.Generator) -> Any:
        """One value of a field."""
        if self.choices:
            return self.choices[int(generator.integers(len(self.choices)))]
        low, high = float(self.low or 0.0), float(self.high or 0.0)
        share = float(generator.random())
        if _is_whole(name):
            return min(int(high), int(low) + int(share * (int(high) - int(low) + 1)))
        return float(low * (high / low) ** share) if self.log else low + share * (high - low)


class RandomSearch(BaseModel):
    """Random draws; each field's do not depend on which others are drawn, nor the first ones on how many follow."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    samples: int = Field(ge=1, le=_MAX_SETTINGS)
    """How many draws."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    ranges: dict[str, Range] = Field(min_length=1)
    """Field to where its values come from."""

    def draws(self) -> list[dict[str, Any]]:
        """One mapping of field to value per sample."""
        columns = {}
        for name, where in self.ranges.items():
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            columns[name] = [where.draw(name, generator) for _ in range(self.samples)]
        return [{name: column[number] for name, column in columns.items()} for number in range(self.samples)]


class Choice(BaseModel):
    """Which setting's network is handed out; judged on validation images alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_accuracy_drop: float | None = Field(default=None, ge=0.0, lt=100.0)
    """Points that the upper confidence bound of the drop may reach; by default the base's budget."""
    smallest: Literal["parameters", "macs", "latency"] = "parameters"
    """What is made small among those within it. Without any accuracy budget, the setting that loses least counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSetting:
    """One setting: the values that it differs by, and all that a run with them is asked for."""

    number: int
    values: Mapping[str, Any]
    parameters: PruneParameters

    def label(self) -> str:
        """The values in one line."""
        return ", ".join(f"{name} {_short(value)}" for name, value in self.values.items()) or "base"


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which no model needs

    class SweepParameters(BaseModel):
        """What the `sweep` flow is asked to do: plain values, as a YAML file or a deployment holds them."""

        model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

        base: dict[str, Any]
        """What all settings have in common: fields of a pruning run (PruneParameters), of PruneConfig and PathSetting.
        Its budgets count where none is swept."""
        grid: dict[str, list[Any]] = Field(default_factory=dict)
        """Field to the list of its values; every combination is a setting."""
        random: RandomSearch | None = None
        """Random draws; with a grid too, each of its points is combined with each draw."""
        choose: Choice = Choice()
        """Rule by which one setting's network is chosen."""
        early_stop: bool = True
        """Whether settings that are clearly worse than another are given up."""
        output: Path
        """Folder of the results; an earlier sweep's are replaced."""
        register: RegistryName | None = None
        """Name in the model registry under which the chosen network becomes a version; by default none."""

        @model_validator(mode="after")
        def _check(self) -> Self:
            if misplaced := sorted({"output", "register"} & set(self.base)):
                raise ConfigError(f"base.{misplaced[0]}: give it beside the base, not in it.")
            ranges = self.random.ranges if self.random else {}
            if "rounds" in {*self.base, *self.grid, *ranges}:
                raise ConfigError("rounds: a sweep prunes once a setting; leave it out, or run `entprune prune`.")
            for name in self.grid:
                if name in ranges:
                    raise ConfigError(f"grid.{name}: drawn at random as well; give the field in one place.")
            for place, name, value in self._all_values():
                if name == "network":
                    _check_network(value, f"{place}: ")
            self._check_base()
            for place, name, value in self._all_values():
                self._check_value(place, name, value)
            self.settings()
            return self

        def settings(self) -> tuple[SweepSetting, ...]:
            """Every setting once, in the order of the grid and the draws.

            Raises:
                ConfigError: there are too many, or two values do not go together.
            """
            draws = self.random.draws() if self.random else [{}]
            count = len(draws) * int(np.prod([len(values) for values in self.grid.values()], dtype=np.float64))
            if count > _MAX_SETTINGS:
                raise ConfigError(f"grid: expected at most {_MAX_SETTINGS} settings, got {count}; give fewer values.")
            unique: dict[str, SweepSetting] = {}
            for combination in itertools.product(*self.grid.values()):
                for draw in draws:
                    values = dict(zip(self.grid, combination, strict=True)) | draw
                    parameters = self._parameters(values)
                    setting = SweepSetting(number=len(unique), values=values, parameters=parameters)
                    unique.setdefault(parameters.model_dump_json(), setting)
            return tuple(unique.values())

        def max_accuracy_drop(self) -> float | None:
            """Points that the chosen network may lose, None where no budget says so."""
            if self.choose.max_accuracy_drop is not None:
                return self.choose.max_accuracy_drop
            allowed = [setting.parameters.max_accuracy_drop for setting in self.settings()]
            given = [value for value in allowed if value is not None]
            return max(given, default=None)

        def swept(self) -> tuple[str, ...]:
            """Fields in which the settings differ."""
            return (*self.grid, *(self.random.ranges if self.random else {}))

        def _all_values(self) -> Iterator[tuple[str, str, Any]]:
            for name, values in self.grid.items():
                if not values:
                    raise ConfigError(f"grid.{name}: expected a list of at least one value, got an empty one.")
                yield from ((f"grid.{name}[{number}]", name, value) for number, value in enumerate(values))
            for name, where in (self.random.ranges if self.random else {}).items():
                yield from ((f"random.ranges.{name}", name, value) for value in where.examples(name))

        def _check_base(self) -> None:
            try:
                self._parameters(self._needed({}))
            except ConfigError as cause:
                raise ConfigError(f"base: {cause}") from cause

        def _check_value(self, place: str, name: str, value: Any) -> None:
            if name not in SWEEPABLE:
                raise ConfigError(f"{place}: no field to sweep over; expected one of {', '.join(SWEEPABLE)}.")
            try:
                self._parameters(self._needed({name: value}))
            except ConfigError as cause:
                raise ConfigError(f"{place}: {cause}") from cause

        def _needed(self, values: dict[str, Any]) -> dict[str, Any]:
            """The values, with some of the fields that only the other axes bring."""
            first: dict[str, Any] = {name: listed[0] for name, listed in self.grid.items() if listed}
            if self.random:
                first |= {name: where.examples(name)[0] for name, where in self.random.ranges.items()}
            required = {name for name in ("network", "checkpoint") if name in first and name not in values}
            filled: dict[str, Any] = {
                name: first[name] for name in required if not (name == "checkpoint" and "network" in values)
            }
            if not any(name in BUDGET_FIELDS for name in (*self.base, *values)):
                budget = next((name for name in BUDGET_FIELDS if name in first), None)
                filled |= {} if budget is None else {budget: 0.5}  # fits all of them
            return filled | values

        def _parameters(self, values: Mapping[str, Any]) -> PruneParameters:
            """What a run at these values is asked for."""
            given = [name for name in values if name in BUDGET_FIELDS]
            base = {name: value for name, value in self.base.items() if not (given and name in BUDGET_FIELDS)}
            return _route({**base, **values, "output": self.output / "chosen", "register": self.register})


def read_sweep(path: Path, changes: Mapping[str, Any] | None = None) -> SweepParameters:
    """Read a sweep's description.

    Args:
        path: of a YAML file.
        changes: values that take the place of the file's.

    Raises:
        ConfigError: it cannot be read, or a value is missing, unknown or out of range; the sentence names its field.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 -- a safe loader
    except (OSError, UnicodeDecodeError) as cause:
        reason = getattr(cause, "strerror", None) or "no UTF-8 text"
        raise ConfigError(f"'{path}': expected a YAML file, but it cannot be read ({reason}).") from cause
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(cause, "problem", None) or "syntax error"
        raise ConfigError(f"'{path}'{place}: expected YAML, got {problem}; correct the file.") from cause
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}': expected fields such as base and grid, got {type(content).__name__}.")
    return parse_sweep(content | dict(changes or {}))


def parse_sweep(values: Mapping[str, Any]) -> SweepParameters:
    """Build the parameters from plain values; errors as for :func:`read_sweep`."""
    try:
        return SweepParameters.model_validate(dict(values))
    except ValidationError as cause:
        raise ConfigError(describe_validation(cause)) from cause


class _Loader(yaml.SafeLoader):
    """Reads numbers such as 1e-3, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _route(values: Mapping[str, Any]) -> PruneParameters:
    """Put each value where a run looks for it: its own fields, the library's settings, or those of every continuation.

    Raises:
        ConfigError: a value is missing, unknown, of another type or out of range.
    """
    own = {name: value for name, value in values.items() if name not in (*PATH_FIELDS, *_CONFIG_FIELDS, "network")}
    if "network" in values:
        _check_network(values["network"])
        own |= values["network"]
    overrides = dict(own.pop("overrides", None) or {})
    for name in _CONFIG_FIELDS:
        if name in values:
            overrides[name] = _checked(values[name], _LEFT_OPEN.get(name, getattr(_DEFAULTS, name)))
    path = {name: _checked(values[name], getattr(PathSetting(), name)) for name in PATH_FIELDS if name in values}
    if path:
        listed = PruneConfig.from_dict(
            {"settings": overrides.get("settings", _DEFAULTS.to_dict()["settings"])}
        ).settings
        changed = dict.fromkeys(
            entry if entry.method == "elimination" and "method" not in path else replace(entry, **path)
            for entry in listed
        )
        overrides["settings"] = [entry.to_dict() for entry in changed]
    return parse_parameters({**own, "overrides": overrides})


def _check_network(value: Any, place: str = "") -> None:
    if not isinstance(value, Mapping) or set(value) != {"model", "checkpoint"}:
        raise ConfigError(f"{place}expected a model and a checkpoint, got {value!r}; give both.")


def _checked(value: Any, like: Any) -> Any:
    """A value of the same kind as another."""
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str,), "a word"),
    }
    kind, words = kinds[type(like)]
    if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(like, bool)):
        raise ConfigError(f"expected {words}, got {value!r}; correct the value.")
    converted: Any = value
    return float(converted) if isinstance(like, float) else converted


def _is_whole(name: str) -> bool:
    field = PruneParameters.model_fields.get(name)
    if field is not None:
        return int in (field.annotation, *get_args(field.annotation))  # the default may be None
    default = getattr(PathSetting(), name, getattr(_DEFAULTS, name, None))
    return isinstance(default, int) and not isinstance(default, bool)


def _fitting(name: str, value: float | None) -> Any:
    return int(value or 0) if _is_whole(name) else value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(_short(part) for part in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(_short(part) for part in value)
    return Path(value).name if isinstance(value, (str, Path)) and "/" in str(value) else str(value)
