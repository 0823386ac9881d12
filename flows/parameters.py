"""Everything one pruning run is asked for, checked where it enters: command line, deployment or schedule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from entprune import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.finetune import FinetuneConfig

_DEFAULTS = PruneConfig()
_FINETUNING = FinetuneConfig()
_REGISTRY_NAME = re.compile(r"[^/:\s]([^/:]*[^/:\s])?")
_OWN_FIELDS = (
    "calibration_samples", "validation_samples", "device", "seed", "keep", "round_to", "minimum_channels",
    "minimum_fraction",
)  # fmt: skip

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which no model needs

    class PruneParameters(BaseModel):
        """What the `prune_model` flow is asked to do: plain values, so that a deployment can hold them as JSON.

        Attributes:
            model: model specification.
            checkpoint: file with its parameters.
            data: data specification; `data_root`, `mean` and `std` go with it.
            max_accuracy_drop, parameters_removed, macs_removed, latency_removed: the budget, at least one of them.
            latency_batch: images in one forward pass where latency is measured.
            finetune_epochs: epochs of distillation after pruning; `finetune_learning_rate`, `finetune_optimiser` and
                `finetune_batch_size` go with it.
            rounds: how often to prune and to tune in turns.
            workers: Ray actors; None for as many as the cluster's CPUs allow.
            gpus_per_worker: GPUs that each of them reserves, a fraction where several share one.
            memory_per_worker: GiB that each reserves; None for an estimate, 0 for none.
            ray_address: cluster to join; None for RAY_ADDRESS, or else a cluster of this machine's own.
            register: name under which the result is registered; None for not at all.
            keep: shell patterns of layers that must not change.
            round_to: widths of layers are multiples of this.
            minimum_channels, minimum_fraction: floor of every group's width.
            dense_version: registered version that the checkpoint came from, for the record.
            output: folder of the report and the smaller network.
            cache_dir: folder or URI of the stages' results; None for the flow's own choice.
            experiment: of MLflow.
            overrides: further fields of :class:`entprune.PruneConfig`.
        """

        model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

        model: str
        checkpoint: Path
        data: str
        data_root: Path | None = None
        mean: tuple[float, ...] | None = None
        std: tuple[float, ...] | None = None
        max_accuracy_drop: float | None = None
        parameters_removed: float | None = None
        macs_removed: float | None = None
        latency_removed: float | None = None
        latency_batch: int = 64
        finetune_epochs: int = Field(default=0, ge=0)
        rounds: int = Field(default=1, ge=1)
        finetune_learning_rate: float = _FINETUNING.learning_rate
        finetune_optimiser: str = _FINETUNING.optimiser
        finetune_batch_size: int = _FINETUNING.batch_size
        calibration_samples: int | None = Field(default=_DEFAULTS.calibration_samples, ge=1)
        validation_samples: int | None = Field(default=_DEFAULTS.validation_samples, ge=1)
        workers: int | None = Field(default=None, ge=1)
        gpus_per_worker: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
        memory_per_worker: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
        ray_address: str | None = None
        device: str = _DEFAULTS.device
        register: str | None = None
        seed: int = Field(default=_DEFAULTS.seed, ge=0)
        keep: tuple[str, ...] = ()
        round_to: int = Field(default=_DEFAULTS.round_to, ge=1)
        minimum_channels: int = Field(default=_DEFAULTS.minimum_channels, ge=1)
        minimum_fraction: float = Field(default=_DEFAULTS.minimum_fraction, ge=0.0, le=1.0)
        dense_version: str | None = None
        output: Path
        cache_dir: str | Path | None = None
        experiment: str = Field(default="entprune", min_length=1)
        overrides: dict[str, Any] = Field(default_factory=dict)

        @field_validator("register")
        @classmethod
        def _check_register(cls, name: str | None) -> str | None:
            if name is not None and _REGISTRY_NAME.fullmatch(name) is None:
                raise ValueError("expected a name without '/', ':' and outer spaces")
            return name

        @field_validator("cache_dir", mode="after")
        @classmethod
        def _keep_uri(cls, place: str | Path | None) -> str | Path | None:
            return place if place is None or "://" in str(place) else Path(place)  # as a path, a URI loses a slash

        @field_validator("overrides")
        @classmethod
        def _check_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
            if doubled := sorted(set(overrides) & set(_OWN_FIELDS)):
                raise ValueError(f"{', '.join(doubled)} must be given beside the overrides, not among them")
            return overrides

        @model_validator(mode="after")
        def _check_derived(self) -> Self:
            self.budget()
            self.config()
            self.finetuning()
            if self.rounds > 1 and not self.finetune_epochs:
                raise ConfigError(
                    f"--rounds {self.rounds} needs tuning between the rounds, got --finetune-epochs 0; give at least 1."
                )
            return self

        def budget(self) -> Budget:
            """The user's budget.

            Raises:
                ConfigError: none was given, or one is out of range.
            """
            return Budget(
                max_accuracy_drop=self.max_accuracy_drop,
                parameters_removed=self.parameters_removed,
                macs_removed=self.macs_removed,
                latency_removed=self.latency_removed,
                latency_batch=self.latency_batch,
            )

        def finetuning(self) -> FinetuneConfig | None:
            """Recipe of the fine-tuning, None without.

            Raises:
                ConfigError: a setting is out of range, whether or not it is used.
            """
            recipe = FinetuneConfig(
                epochs=max(self.finetune_epochs, 1),
                learning_rate=self.finetune_learning_rate,
                optimiser=self.finetune_optimiser,
                batch_size=self.finetune_batch_size,
                seed=self.seed,
                device=self.device,
            )
            return recipe if self.finetune_epochs else None

        def config(self) -> PruneConfig:
            """Settings of the library's stages.

            Raises:
                ConfigError: an override is unknown or out of range.
            """
            own = {name: getattr(self, name) for name in _OWN_FIELDS}
            try:
                return PruneConfig.from_dict({**self.overrides, **own})
            except (TypeError, AttributeError) as cause:  # a value of another type, or an unknown part of a setting
                raise ConfigError(f"overrides: {cause}; see entprune.PruneConfig for names and types.") from cause


def parse_parameters(values: Mapping[str, Any]) -> PruneParameters:
    """Build the parameters from plain values, such as those of the command line.

    Raises:
        ConfigError: a value is missing, unknown or out of range; the sentence names its field.
    """
    try:
        return PruneParameters.model_validate(dict(values))
    except ValidationError as cause:
        raise ConfigError(describe_validation(cause)) from cause


def describe_validation(error: ValidationError) -> str:
    """Return one sentence for the first thing that is wrong, with the number of further ones."""
    problems = error.errors(include_url=False)
    first = problems[0]
    name = _field_name(first["loc"])
    reason = str(first["msg"]).removeprefix("Value error, ")
    given = "" if first["type"] in {"missing", "extra_forbidden"} else f", got {_shorten(first.get('input'))}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{name}: {reason[:1].lower()}{reason[1:]}{given}{more}; correct the value."


def _field_name(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location) or "parameters"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
