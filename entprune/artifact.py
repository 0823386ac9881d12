"""The portable form of a pruned network: plain weights and plain JSON, no pickled classes.

A pruned network is the named network with narrower layers. The folder holds the widths of every layer and the weights;
loading builds the network from its specification, narrows each layer, and loads the weights strictly.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from entprune.checkpoints import load_plain_state, save_state, sha256_file
from entprune.errors import ArtifactError, CheckpointError, ConfigError, EntpruneError
from entprune.layers import is_dense, layer_sizes, output_width, resize
from entprune.low_rank import new_pair
from entprune.models import MODEL_NAMES, build_model
from entprune.plan import PruningPlan
from entprune.storage import atomic_write_text, staging_directory

FORMAT_VERSION = 1

_WEIGHTS_NAME = "model.safetensors"
_DESCRIPTION_NAME = "model.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a user must know to feed a network and to read its answer.

    Attributes:
        model_spec: how the unpruned network is built, None for one that was passed in process.
        num_classes: length of the logit vector.
        input_shape: channels, height and width of one image.
        mean: per channel, subtracted from pixel values in [0, 1]; empty if unknown.
        std: per channel, by which the difference is divided; empty if unknown.
        class_names: in the order of the logits; empty if unknown.
    """

    model_spec: str | None
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if min(self.num_classes, *self.input_shape) < 1:
            raise ConfigError(
                "expected num_classes >= 1 and a positive (channels, height, width), "
                f"got num_classes={self.num_classes} and input_shape={self.input_shape}."
            )
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError(
                f"expected as many means as positive deviations, got mean={self.mean} and std={self.std}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelCard:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a value is out of range. KeyError, TypeError, ValueError: an entry is missing or malformed.
        """
        channels, height, width = (int(size) for size in content["input_shape"])
        return cls(
            model_spec=content["model_spec"],
            num_classes=int(content["num_classes"]),
            input_shape=(channels, height, width),
            mean=tuple(float(value) for value in content["mean"]),
            std=tuple(float(value) for value in content["std"]),
            class_names=tuple(str(name) for name in content["class_names"]),
        )


def save_model(
    model: nn.Module,
    plan: PruningPlan | None,
    card: ModelCard,
    directory: Path,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network as a folder with ``model.safetensors`` and ``model.json``; it appears complete or not at all.

    Args:
        model: pruned or dense network; it is not changed.
        plan: which channels were kept, None for a network that was not pruned.
        card: how it is built and fed.
        directory: an older artifact there is replaced; a folder with anything else is refused.
        extra: further plain values to keep beside the network, such as its lineage.

    Raises:
        ArtifactError: the network holds NaN or infinite values, or more than tensors.
        OutputError: the folder cannot be written.
    """
    _check_saveable(model)
    with staging_directory(Path(directory), marker=_DESCRIPTION_NAME) as staging:
        save_state(model, staging / _WEIGHTS_NAME)
        description: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "card": card.to_dict(),
            "layers": layer_sizes(model),
            **({"ranks": dict(plan.ranks)} if plan is not None and plan.ranks else {}),
            "plan": None if plan is None else plan.to_dict(),
            "weights": {"file": _WEIGHTS_NAME, "sha256": sha256_file(staging / _WEIGHTS_NAME)},
            "extra": dict(extra or {}),
        }
        description["sha256"] = _description_digest(description)
        atomic_write_text(staging / _DESCRIPTION_NAME, json.dumps(description, indent=2, allow_nan=False) + "\n")
        # safetensors makes files that only their owner can read; whoever reads one of the two may read the other.
        (staging / _WEIGHTS_NAME).chmod((staging / _DESCRIPTION_NAME).stat().st_mode)


def load_model(directory: Path, *, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved network without running any code that the folder names.

    Args:
        directory: written by :func:`save_model`, or the output folder of a run, which holds such a folder as `model`.
        model: an unpruned instance of the network, needed for other networks than built-in ones and torchvision's;
            it is not changed.

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        ArtifactError: the folder is missing, damaged or of another version, or `model` is another network or is needed.
    """
    directory = _artifact_folder(directory)
    description = _read_description(directory)
    card = _card(directory, description)
    network = (_build(directory, card) if model is None else copy.deepcopy(model).cpu()).float()
    _split(directory, network, description.get("ranks", {}))
    _narrow(directory, network, description["layers"])
    state = _read_weights(directory, description["weights"].get("sha256"))
    try:
        load_plain_state(network, state)
    except RuntimeError as cause:
        raise _misfit(directory, " ".join(str(cause).split())[:300]) from cause
    return network.eval()


def read_card(directory: Path) -> ModelCard:
    """Return how a saved network is built and fed, without loading it; `directory` as for :func:`load_model`.

    Raises:
        ArtifactError: the folder is missing, damaged or of another version.
    """
    directory = _artifact_folder(directory)
    return _card(directory, _read_description(directory))


def _artifact_folder(directory: Path) -> Path:
    """Where the network lies: a folder that is no artifact itself may be the output of a run, which holds one."""
    directory = Path(directory)
    inner = directory / "model"
    return inner if inner.is_dir() and not (directory / _DESCRIPTION_NAME).exists() else directory


def _check_saveable(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(
                f"expected a network of tensors only, got {type(value).__name__} in '{name}'; remove its extra state."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtifactError(
                f"expected finite weights, got NaN or infinity in '{name}'; train or prune the network again."
            )


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / _DESCRIPTION_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ArtifactError(
            f"artifact '{directory}': expected a folder with {_DESCRIPTION_NAME}, found none; check the path."
        ) from cause
    except ValueError as cause:  # neither UTF-8 nor JSON
        raise ArtifactError(f"artifact '{directory}': {_DESCRIPTION_NAME} is damaged; save the model again.") from cause
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"artifact '{directory}': expected format_version {FORMAT_VERSION}, got {version!r}; "
            "load it with the version of entprune that wrote it."
        )
    if description.get("sha256") != _description_digest(description):
        raise ArtifactError(
            f"artifact '{directory}': {_DESCRIPTION_NAME} does not match its checksum; save the model again."
        )
    if not all(isinstance(description.get(key), dict) for key in ("card", "layers", "weights")):
        raise ArtifactError(f"artifact '{directory}': {_DESCRIPTION_NAME} is incomplete; save the model again.")
    return dict(description)


def _description_digest(description: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the digest itself, independent of spaces and line ends."""
    covered = {key: value for key, value in description.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _card(directory: Path, description: Mapping[str, Any]) -> ModelCard:
    try:
        return ModelCard.from_dict(description["card"])
    except (KeyError, TypeError, ValueError, ConfigError) as cause:
        raise ArtifactError(
            f"artifact '{directory}': its card is incomplete ({cause}); save the model again."
        ) from cause


def _build(directory: Path, card: ModelCard) -> nn.Module:
    """Build the dense network, from names that this package knows only."""
    spec = card.model_spec
    if spec is None or (spec not in MODEL_NAMES and not spec.startswith("torchvision:")):
        origin = (
            "a network without a specification"
            if spec is None
            else f"'{spec}', whose code is not run from a saved file"
        )
        raise ArtifactError(
            f"artifact '{directory}': it was made from {origin}; "
            "build an unpruned instance yourself and pass it as model=."
        )
    try:
        return build_model(spec, num_classes=card.num_classes, input_shape=card.input_shape)
    except EntpruneError as cause:
        raise ArtifactError(f"artifact '{directory}': its network cannot be built: {cause}") from cause


def _split(directory: Path, network: nn.Module, ranks: Any) -> None:
    """Make two layers of each that was given a rank; sizes are checked afterwards."""
    if not isinstance(ranks, dict):
        raise _misfit(directory, f"ranks of layers are recorded as {ranks!r}")
    layers = dict(network.named_modules())
    for name, rank in ranks.items():
        layer = layers.get(name)
        if layer is None or not is_dense(layer):
            raise _misfit(directory, f"'{name}', which is recorded as one of rank {rank}, is no dense layer")
        if not isinstance(rank, int) or not 1 <= rank <= output_width(layer):
            raise _misfit(directory, f"layer '{name}' has rank {rank!r}, expected 1 to {output_width(layer)}")
        new_pair(network, name, rank)


def _narrow(directory: Path, network: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give every layer its recorded sizes; parameters are left empty."""
    present = layer_sizes(network)
    if set(present) != set(layers):
        stranger = min(set(present) ^ set(layers))
        raise _misfit(directory, f"layer '{stranger}' is in only one of the two")
    for name, recorded in layers.items():
        if recorded == present[name]:
            continue
        problem = _compare(recorded, present[name])
        if problem is not None:
            raise _misfit(directory, f"layer '{name}' {problem}")
        resize(network, name, recorded)


def _compare(recorded: Any, present: Mapping[str, Any]) -> str | None:
    """Why a layer cannot be cut to the recorded sizes, None if it can."""
    if not isinstance(recorded, dict) or recorded.keys() != present.keys() or recorded["type"] != present["type"]:
        return f"is recorded as {recorded}, got {dict(present)}"
    for field, size in recorded.items():
        if field in {"type", "source"}:
            continue
        sizes, limits = (value if isinstance(value, list) else [value] for value in (size, present[field]))
        if len(sizes) != len(limits):
            return f"has {field} {size}, expected one like {present[field]}"
        for value, limit in zip(sizes, limits, strict=True):
            if not isinstance(value, int) or not min(1, limit) <= value <= limit:
                return f"has {field} {size}, expected 1 to {present[field]}"
    return _compare_source(recorded)


def _compare_source(recorded: Mapping[str, Any]) -> str | None:
    """What is wrong with the channels that a shortcut takes."""
    source = recorded.get("source")
    if source is None:
        return None
    is_list = isinstance(source, list) and len(source) == recorded["out_channels"]
    if not is_list or not all(isinstance(c, int) and -1 <= c < recorded["in_channels"] for c in source):
        return f"takes the channels {source}, expected {recorded['out_channels']} of {recorded['in_channels']}"
    return None


def _read_weights(directory: Path, expected_digest: str | None) -> dict[str, Tensor]:
    path = directory / _WEIGHTS_NAME
    if not path.is_file():
        raise ArtifactError(f"artifact '{directory}': expected {_WEIGHTS_NAME}, found none; save the model again.")
    try:
        if sha256_file(path) != expected_digest:
            raise ArtifactError(
                f"artifact '{directory}': {_WEIGHTS_NAME} does not match its checksum; save the model again."
            )
        return safetensors.torch.load_file(path, device="cpu")
    except (CheckpointError, SafetensorError, OSError, ValueError) as cause:
        raise ArtifactError(f"artifact '{directory}': {_WEIGHTS_NAME} cannot be read; save the model again.") from cause


def _misfit(directory: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"artifact '{directory}': expected the network that it was made from, but {reason}; "
        "pass an unpruned instance of that network."
    )
