"""Settings of a pruning run and the budget in the user's own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

from entprune.allocation import Objective
from entprune.assembly import RefitConfig
from entprune.errors import ConfigError
from entprune.evaluation import PRECISIONS, Precision, has_native_bfloat16
from entprune.path import PathSetting
from entprune.selection import DROP_ESTIMATES, DropEstimate

_CALIBRATION_SAMPLES, _CALIBRATION_MACS = 1536, 300e6  # of the largest network that gets no more than these
_VALIDATION_SAMPLES, _VALIDATION_MACS = 4000, 800e6
_MOST = 4.0  # times as many
_PERTURBED_SHARE = 0.25  # between too easy and too hard, see infra/benchmark/estimates.py
_MUCH_SCORING = 1e12  # multiply-accumulates of one network on all validation images; less is fast enough in float32

BudgetKind = Literal["max_accuracy_drop", "parameters_removed", "macs_removed", "latency_removed"]
_KINDS: tuple[BudgetKind, ...] = ("max_accuracy_drop", "parameters_removed", "macs_removed", "latency_removed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What the user allows or asks: one of these or several together.

    With an accuracy budget the smallest network is searched that loses at most so much and removes at least what the
    others ask. Without one, the network is found that removes what they ask at the least predicted loss.

    Attributes:
        max_accuracy_drop: accuracy points that may be lost, in [0, 100).
        parameters_removed: least fraction of the parameters to remove, in [0, 1).
        macs_removed: least fraction of the multiply-accumulates to remove, in [0, 1).
        latency_removed: least fraction of the CPU latency to remove, in [0, 1); measured on this machine.
        latency_batch: images in one forward pass where latency is measured.
    """

    max_accuracy_drop: float | None = None
    parameters_removed: float | None = None
    macs_removed: float | None = None
    latency_removed: float | None = None
    latency_batch: int = 64

    def __post_init__(self) -> None:
        given = self._given()
        if not given:
            raise ConfigError(
                "expected a budget, got none; give --max-accuracy-drop, --parameters-removed, --macs-removed, "
                "--latency-removed, or several of them."
            )
        for name, value in given.items():
            upper = 100.0 if name == "max_accuracy_drop" else 1.0
            if not 0.0 <= value < upper:
                option = "--" + name.replace("_", "-")
                unit = "accuracy points" if name == "max_accuracy_drop" else "a fraction"
                raise ConfigError(f"{option} is {unit} in [0, {upper:g}), got {value:g}; choose a value in that range.")
        if self.latency_batch < 1:
            raise ConfigError(f"--latency-batch must be at least 1, got {self.latency_batch}.")

    def _given(self) -> dict[BudgetKind, float]:
        values = {name: getattr(self, name) for name in _KINDS}
        return {name: float(value) for name, value in values.items() if value is not None}

    @property
    def kind(self) -> BudgetKind:
        """Name of the budget that decides what is searched: accuracy if it was given, else the first of the others."""
        return next(iter(self._given()))

    @property
    def value(self) -> float:
        """Its value, in points or as a fraction."""
        return float(getattr(self, self.kind))

    def size_limits(self) -> dict[Objective, float]:
        """Largest fraction of the parameters and of the MACs that may be kept, where that was given."""
        removed: dict[Objective, float | None] = {"parameters": self.parameters_removed, "macs": self.macs_removed}
        return {name: 1.0 - value for name, value in removed.items() if value is not None}

    def to_dict(self) -> dict[str, float]:
        """The given entries."""
        given: dict[str, float] = {str(name): value for name, value in self._given().items()}
        return given if self.latency_removed is None else {**given, "latency_batch": self.latency_batch}


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """Settings of a pruning run; the defaults are meant to be left alone.

    Attributes:
        calibration_samples: training images whose moments are taken; None for as many as :meth:`sized_for` finds fit.
        validation_samples: images on which candidates are compared, at most so many: of the data's own validation
            split, or else further training images, none of them a calibration image; None likewise.
        calibration_shards: independent parts of the data pass; fixed, so that the plan does not depend on the worker
            count.
        batch_size: images per forward pass.
        min_rows, rows_per_feature: sampled rows per layer (see SamplingPlan).
        settings: hyperparameter settings of the sparsity paths; the envelope keeps the best at every width.
        loss_exponent: a group's predicted loss is its refit error to this power; below 1 it spares groups whose error
            rises from almost nothing.
        objective: what is made small under an accuracy budget.
        minimum_channels: least width of a group.
        minimum_fraction: the same as a fraction of its dense width.
        round_to: widths of layers are multiples of this, dense ones excepted.
        keep: shell patterns of layers that must not change.
        low_rank: layers whose outputs are correlated become two thin ones (:mod:`entprune.low_rank`).
        relative_ridge, reestimate_batchnorm, rectified_steps, output_temperature: see RefitConfig.
        correct_residuals: let the last layer of a residual branch make up for the error of the stream it is added to.
        drop_estimate: how the drop on new images is estimated: "labels", "posterior" or "blend" (entprune.selection);
            None for "labels" on a validation split that the network has not seen, else "posterior".
        perturbed_share: of the validation images that are changed a little (entprune.datasets.perturbed), because
            training images are easier than new ones; None for a quarter of training images that the drop is
            estimated on by "posterior", else none.
        scoring_precision: in which products the dense network and candidates answer the validation images; None for
            bfloat16 where that is much work and the device does it natively, else float32. Weights are estimated, and
            the certificate and the test images computed, in float32 in any case.
        confidence: one-sided probability with which the accuracy budget shall hold on unseen data of the
            validation's kind.
        candidates_per_round, max_rounds, resolution: search; it stops when neighbouring sizes differ by less than
            the factor, and what is removed by less than a quarter.
        certificate_tolerance: allowed relative difference.
        threads: torch threads per worker; fixed, so that the plan does not depend on the machine's load.
        seed: of every random choice.
        device: torch device of the heavy work, "cpu" or "cuda".
    """

    calibration_samples: int | None = None
    validation_samples: int | None = None
    calibration_shards: int = 4
    batch_size: int = 64
    min_rows: int = 10_000
    rows_per_feature: float = 2.0
    settings: tuple[PathSetting, ...] = field(
        default_factory=lambda: (PathSetting(entropy_weight=1.0), PathSetting(method="elimination"))
    )
    loss_exponent: float = 1.0
    objective: Literal["parameters", "macs"] = "parameters"
    minimum_channels: int = 1
    minimum_fraction: float = 0.0
    round_to: int = 1
    keep: tuple[str, ...] = ()
    low_rank: bool = False
    relative_ridge: float = 1e-3
    reestimate_batchnorm: bool = True
    rectified_steps: int = 2
    output_temperature: float = 2.0
    correct_residuals: bool = True
    drop_estimate: DropEstimate | None = None
    perturbed_share: float | None = None
    scoring_precision: Precision | None = None
    confidence: float = 0.95
    candidates_per_round: int = 2
    max_rounds: int = 6
    resolution: float = 1.05
    certificate_tolerance: float = 1e-4
    threads: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive = (
            "calibration_samples", "validation_samples", "calibration_shards", "batch_size", "min_rows",
            "minimum_channels", "round_to", "candidates_per_round", "max_rounds", "threads",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if not 0.0 < self.loss_exponent <= 4.0:
            raise ConfigError(f"loss_exponent must lie in (0, 4], got {self.loss_exponent}.")
        if not 0.0 <= self.minimum_fraction <= 1.0:
            raise ConfigError(f"minimum_fraction must lie in [0, 1], got {self.minimum_fraction}.")
        if not self.settings:
            raise ConfigError("settings must hold at least one path setting, got none.")
        _check_choice("drop_estimate", self.drop_estimate, (None, *DROP_ESTIMATES))
        _check_choice("scoring_precision", self.scoring_precision, (None, *PRECISIONS))
        if self.perturbed_share is not None and not 0.0 <= self.perturbed_share <= 1.0:
            raise ConfigError(f"perturbed_share must lie in [0, 1], got {self.perturbed_share}.")
        if not 0.5 <= self.confidence < 1.0:
            raise ConfigError(f"confidence must lie in [0.5, 1), got {self.confidence}.")
        self.refit()
        if self.resolution <= 1.0:
            raise ConfigError(f"resolution must exceed 1, got {self.resolution}.")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}.")

    def sized_for(self, macs: int, *, has_unseen: bool = False) -> PruneConfig:
        """The same with what was left open: numbers of images, precision, and how the drop is estimated.

        The first two follow from the cost of the dense network.

        Small networks get more images, for they cost little and their fully connected layers see one row an image.
        Candidates are smaller still, and are looked at until their verdict is clear: more images to validate on make
        the bound of the drop tighter, and so the result smaller.

        Args:
            macs: multiply-accumulates of one image.
            has_unseen: whether the validation images are new to the network.
        """

        def more(usual: float) -> float:
            return min(max(usual / max(macs, 1), 1.0), _MOST)

        estimate: DropEstimate = self.drop_estimate or ("labels" if has_unseen else "posterior")
        usual_share = 0.0 if has_unseen or estimate != "posterior" else _PERTURBED_SHARE
        validation = self.validation_samples or round(_VALIDATION_SAMPLES * more(_VALIDATION_MACS))
        return replace(
            self,
            calibration_samples=self.calibration_samples or round(_CALIBRATION_SAMPLES * more(_CALIBRATION_MACS)),
            validation_samples=validation,
            drop_estimate=estimate,
            perturbed_share=usual_share if self.perturbed_share is None else self.perturbed_share,
            scoring_precision=self.scoring_precision or self._fast_precision(validation * macs),
        )

    def _fast_precision(self, macs: float) -> Precision:
        """For so many multiply-accumulates; the device is this machine's, where others only do the work."""
        is_native = has_native_bfloat16(self.device)
        return "bfloat16" if is_native and macs >= _MUCH_SCORING else "float32"

    def refit(self) -> RefitConfig:
        """How assembly re-estimates weights."""
        return RefitConfig(
            relative_ridge=self.relative_ridge,
            reestimate_batchnorm=self.reestimate_batchnorm,
            rectified_steps=self.rectified_steps,
            output_temperature=self.output_temperature,
        )

    @property
    def precision(self) -> Precision:
        """In which validation images are answered; float32 where it was left open and not decided."""
        return self.scoring_precision or "float32"

    @property
    def quantile(self) -> float:
        """Standard normal quantile of the confidence."""
        return NormalDist().inv_cdf(self.confidence)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PruneConfig:
        """Inverse of :meth:`to_dict`; unknown names raise ConfigError."""
        known = set(cls.__dataclass_fields__)
        if unknown := set(content) - known:
            raise ConfigError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}.")
        values = dict(content)
        if "settings" in values:
            values["settings"] = tuple(PathSetting(**entry) for entry in values["settings"])
        if "keep" in values:
            values["keep"] = tuple(values["keep"])
        return replace(cls(), **values)


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
