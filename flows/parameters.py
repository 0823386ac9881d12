"""Everything one pruning run is asked for, checked where it enters: command line, deployment or schedule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from entprune import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.finetune import FinetuneConfig

_DEFAULTS = PruneConfig()
_FINETUNING = FinetuneConfig()
_REGISTRY_NAME = re.compile(r"\w([\w .+()-]*[\w+()-])?")  # also a part of paths, addresses and filter expressions
_OWN_FIELDS = (
    "calibration_samples", "validation_samples", "device", "seed", "keep", "low_rank", "round_to", "minimum_channels",
    "minimum_fraction",
)  # fmt: skip


def check_registry_name(name: str) -> str:
    """Return a name of the model registry as it came.

    Raises:
        ValueError: it could not be told from a part of a path, an address or a filter expression.
    """
    if _REGISTRY_NAME.fullmatch(name) is None:
        raise ValueError("expected a name of letters, digits, spaces and _.+()- that starts with a letter or digit")
    return name


def require_registry_name(field: str, name: str) -> None:
    """The same for a name of the command line.

    Raises:
        ConfigError: it is none.
    """
    try:
        check_registry_name(name)
    except ValueError as cause:
        raise ConfigError(f"{field}: {cause}, got '{name}'; correct the value.") from cause


RegistryName = Annotated[str, AfterValidator(check_registry_name)]

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which no model needs

    class PruneRequest(BaseModel):
        """What a pruning run is asked for, apart from the network: plain values, so that a deployment can hold them."""

        model_config = ConfigDict(
            frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
        )  # the texts below the fields are what Prefect's page shows beside them

        data: str
        """Data: digits, mnist, cifar10 and the like, npz:FILE, imagefolder:DIR or package.module:factory."""
        data_root: Path | None = None
        """Folder of data sets that are downloaded."""
        mean: tuple[float, ...] | None = None
        """Mean of each channel that the network was trained with; that of the data set by default."""
        std: tuple[float, ...] | None = None
        """Standard deviation of each channel, likewise."""
        max_accuracy_drop: float | None = None
        """Budget: accuracy points that may be lost. At least one budget must be given."""
        parameters_removed: float | None = None
        """Budget: fraction of the parameters to remove."""
        macs_removed: float | None = None
        """Budget: fraction of the multiply-accumulates to remove."""
        latency_removed: float | None = None
        """Budget: fraction of the CPU latency to remove, measured where the run is."""
        latency_batch: int = 64
        """Images in one forward pass where latency is measured."""
        finetune_epochs: int = Field(default=0, ge=0)
        """Epochs of distillation after pruning; 0 for none."""
        rounds: int = Field(default=1, ge=1)
        """How often to prune and to tune in turns; more than 1 needs finetune_epochs."""
        finetune_learning_rate: float = _FINETUNING.learning_rate
        """Peak of the learning rate of the distillation."""
        finetune_optimiser: str = _FINETUNING.optimiser
        """Optimiser of the distillation."""
        finetune_batch_size: int = _FINETUNING.batch_size
        """Images in one step of the distillation."""
        finetune_distillation_weight: float = _FINETUNING.distillation_weight
        """Share of the dense network's answers in the loss; the rest is the labels'. 0 for labels alone."""
        calibration_samples: int | None = Field(default=_DEFAULTS.calibration_samples, ge=1)
        """Training images for the statistics; more by default for small networks."""
        validation_samples: int | None = Field(default=_DEFAULTS.validation_samples, ge=1)
        """Images that candidates are compared on: of the data's validation split, or else further training images."""
        workers: int | None = Field(default=None, ge=1)
        """Ray actors at work side by side; by default as many as the cluster's CPUs allow."""
        gpus_per_worker: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
        """GPUs that each worker reserves; 0.5 where two share one."""
        memory_per_worker: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
        """GiB of memory that each worker reserves; by default an estimate, 0 for none."""
        ray_address: str | None = None
        """Ray cluster to join; by default RAY_ADDRESS, or else a cluster of the machine's own."""
        device: str = _DEFAULTS.device
        """Where the heavy work runs: cpu or cuda."""
        register: RegistryName | None = None
        """Name in the model registry under which the result becomes a version; by default none."""
        seed: int = Field(default=_DEFAULTS.seed, ge=0)
        """Seed of every random choice."""
        keep: tuple[str, ...] = ()
        """Shell patterns of layers that must not change."""
        low_rank: bool = _DEFAULTS.low_rank
        """Whether layers whose outputs are correlated become two thin ones."""
        round_to: int = Field(default=_DEFAULTS.round_to, ge=1)
        """Widths of layers are multiples of this; 8 suits most hardware."""
        minimum_channels: int = Field(default=_DEFAULTS.minimum_channels, ge=1)
        """Channels that every group keeps at least."""
        minimum_fraction: float = Field(default=_DEFAULTS.minimum_fraction, ge=0.0, le=1.0)
        """Fraction of its channels that every group keeps at least."""
        output: Path
        """Folder of the report and the smaller network; an earlier result there is replaced."""
        cache_dir: str | Path | None = None
        """Folder or URI of the stages' results, from which an interrupted run goes on; by default .entprune."""
        experiment: str = Field(default="entprune", min_length=1)
        """Experiment of MLflow that the run is filed under."""
        overrides: dict[str, Any] = Field(default_factory=dict)
        """Further fields of entprune.PruneConfig."""

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
                distillation_weight=self.finetune_distillation_weight,
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

    class PruneParameters(PruneRequest):
        """What the `prune-model` flow is asked to do: a network, and what to do with it."""

        model: str
        """Network: a built-in name such as lenet, torchvision:NAME, or package.module:factory."""
        checkpoint: Path
        """File with its trained parameters: .pt, .pth or .safetensors."""
        dense_version: str | None = None
        """Registered version that the checkpoint came from, for the record."""
        register: RegistryName | None = None  # again: pydantic would inherit ABCMeta.register as its default
        """Name in the model registry under which the result becomes a version; by default none."""


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
