"""The state of a training run between two epochs, from which it goes on bit by bit as if nothing had happened.

Tensors are kept as arrays and everything else as plain values, so that a state can be stored without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entprune.errors import ArtifactError

_MODEL, _OPTIMISER, _GENERATOR = "model.", "optimiser.", "generator."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingState:
    """What a training run needs in order to go on.

    Attributes:
        arrays: weights and buffers, the optimiser's tensors and the states of torch's generators, by prefixed name.
        content: plain values: epochs and steps done, records of these epochs, state of the order's generator.
    """

    arrays: Mapping[str, np.ndarray]
    content: Mapping[str, Any]

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return int(self.content["epoch"])

    def network_arrays(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Weights as the network's state dict names them."""
        return {name: self.arrays[_MODEL + name] for name in model.state_dict()}


def capture_arrays(
    model: nn.Module, optimiser: torch.optim.Optimizer, generators: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """Copies of all tensors of a training run.

    Args:
        model: the network in training.
        optimiser: of its parameters.
        generators: states of torch's generators, name to (bytes,) uint8.
    """
    slots = {
        f"{number}.{name}": value
        for number, slot in optimiser.state_dict()["state"].items()
        for name, value in slot.items()
        if isinstance(value, Tensor)
    }
    named = {_MODEL: _tensors(model), _OPTIMISER: slots, _GENERATOR: generators}
    return {
        prefix + name: value.detach().cpu().contiguous().numpy().copy()
        for prefix, tensors in named.items()
        for name, value in tensors.items()
    }


def restore_arrays(
    arrays: Mapping[str, np.ndarray], model: nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Put captured tensors back where they were, each in the memory format of its parameter.

    Returns:
        States of the generators.

    Raises:
        ArtifactError: the state belongs to another network or optimiser.
    """
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    present = _tensors(model)
    stored = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
    if {name: value.shape for name, value in present.items()} != {name: value.shape for name, value in stored.items()}:
        raise ArtifactError(
            "training state: expected the tensors of this network, got another's; train from the start."
        )
    with torch.no_grad():
        for name, value in present.items():
            value.copy_(stored[name])
    _restore_optimiser(tensors, optimiser)
    return {name.removeprefix(_GENERATOR): value for name, value in tensors.items() if name.startswith(_GENERATOR)}


def _restore_optimiser(tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_OPTIMISER):
            number, slot = name.removeprefix(_OPTIMISER).split(".", 1)
            if int(number) >= len(parameters):
                raise ArtifactError("training state: expected as many parameters as there are; train from the start.")
            like = parameters[int(number)]
            slots.setdefault(int(number), {})[slot] = _in_format_of(like, value)
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})


def _in_format_of(like: Tensor, value: Tensor) -> Tensor:
    """The value with the strides of its parameter, so that later steps read both in the same order."""
    return torch.empty_like(like, device="cpu").copy_(value).detach() if value.shape == like.shape else value


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that the state dict leaves out."""
    state: dict[str, Tensor] = model.state_dict()
    return dict(model.named_buffers(remove_duplicate=False)) | state
