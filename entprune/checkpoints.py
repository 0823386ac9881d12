"""Trained parameters in and out of files, without ever running code from one.

A checkpoint is a dictionary from key names to dense tensors. Files that end in ``.safetensors`` hold nothing else; any
other file is read by torch's restricted loader, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from entprune.errors import CheckpointError, OutputError

_WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")
_PARALLEL_PREFIX = "module."
_COUNTER_SUFFIX = ".num_batches_tracked"  # absent from old checkpoints; torch itself treats that as zero
_NUM_LISTED_KEYS = 4


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint from a file that need not be trusted.

    Args:
        path: a ``.safetensors`` file, or one written by ``torch.save``. The dictionary may lie under ``state_dict``,
            ``model`` or ``model_state_dict``, and its keys may all start with ``module.``, which is removed.

    Returns:
        The tensors on the CPU, contiguous, every floating dtype cast to float32.

    Raises:
        CheckpointError: the file is missing, holds code or anything but tensors, or has NaN or infinite values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{path}': expected a file, found none; check the path.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = _strip_parallel_prefix(_unwrap(content, path))
    return {key: _clean_tensor(key, tensor, path) for key, tensor in tensors.items()}


def load_checkpoint(model: nn.Module, path: Path) -> nn.Module:
    """Load a checkpoint into a network of the same layout, strictly.

    Returns:
        The same network, in evaluation mode.

    Raises:
        CheckpointError: as for :func:`load_state`, or a key is missing, unexpected or has another shape. The network is
            unchanged then.
    """
    state = load_state(path)
    problems = _compare_states(model.state_dict(), state)
    if problems:
        raise CheckpointError(
            f"checkpoint '{path}' does not fit {type(model).__name__}: {'; '.join(problems)}; "
            "check the model name, the number of classes and the image size."
        )
    try:
        load_plain_state(model, state)
    except (RuntimeError, ValueError) as cause:  # a network with loading rules of its own
        raise CheckpointError(f"checkpoint '{path}' does not fit {type(model).__name__}: {cause}") from cause
    return model.eval()


def load_plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load values by name, strictly; names and values alone carry no layer versions, so they count as the network's.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    versioned, present = OrderedDict(state), model.state_dict()
    if state.keys() == present.keys():  # old files lack counters, which torch forgives where no version is given
        versioned._metadata = getattr(present, "_metadata", None)  # type: ignore[attr-defined]  # noqa: SLF001 -- its place
    model.load_state_dict(versioned, strict=True)


def save_state(model: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers; the file appears complete or not at all.

    Args:
        model: the network; it is not changed.
        path: ends in ``.safetensors`` or ``.pt``. Missing folders are made.

    Raises:
        CheckpointError: the suffix is another one. OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".pt"}:
        raise CheckpointError(
            f"checkpoint '{path}': expected a name ending in .safetensors or .pt, got '{path.suffix}'."
        )
    # A copy of each tensor: safetensors accepts neither views nor shared storage.
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in model.state_dict().items()}
    temporary_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, temporary_path)
        else:
            torch.save(state, temporary_path)
        temporary_path.replace(path)
    # Both libraries wrap a failed write in an error of their own.
    except (OSError, RuntimeError, safetensors.SafetensorError) as cause:
        with contextlib.suppress(OSError):
            temporary_path.unlink(missing_ok=True)
        raise OutputError(f"cannot write checkpoint '{path}': {_first_line(cause)}; choose another folder.") from cause


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as cause:
        raise CheckpointError(f"checkpoint '{path}': cannot be read ({cause.strerror}); check the path.") from cause


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as cause:
        raise CheckpointError(
            f"checkpoint '{path}': expected a safetensors file ({_first_line(cause)}); download or save it again."
        ) from cause


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as cause:  # a damaged or hostile file can make the reader raise almost anything
        if type(cause).__name__ == "UnpicklingError":  # named without importing the unsafe module that defines it
            raise CheckpointError(
                f"checkpoint '{path}': expected tensors only, but it holds other objects or code, which was not run; "
                "save the network's state_dict() and use that."
            ) from cause
        raise CheckpointError(
            f"checkpoint '{path}': expected a file written by torch.save or safetensors, but it cannot be read as one; "
            "download or save it again."
        ) from cause


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the dictionary of tensors, at most one level down."""
    if isinstance(content, Mapping):
        for wrapper in _WRAPPER_KEYS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint '{path}': expected a dictionary of tensors, got {type(content).__name__}; "
            "save the network's state_dict()."
        )
    strangers = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers or not content:
        found = f"entries that are none: {_list_some(strangers)}" if strangers else "no entries"
        raise CheckpointError(
            f"checkpoint '{path}': expected a dictionary from names to tensors, found {found}; save the state_dict()."
        )
    return dict(content)


def _strip_parallel_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith(_PARALLEL_PREFIX) for key in tensors):
        return {key.removeprefix(_PARALLEL_PREFIX): tensor for key, tensor in tensors.items()}
    return tensors


def _clean_tensor(key: str, tensor: Tensor, path: Path) -> Tensor:
    is_dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not is_dense or tensor.is_complex() or tensor.device.type != "cpu":
        raise CheckpointError(
            f"checkpoint '{path}': expected '{key}' to be a dense real tensor, got {tensor.dtype}, {tensor.layout} "
            f"on {tensor.device.type}; save it as float32."
        )
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"checkpoint '{path}': '{key}' has NaN or infinite values; train the network again.")
    return tensor.contiguous()


def _compare_states(expected: Mapping[str, Any], found: Mapping[str, Tensor]) -> list[str]:
    """Describe how the checkpoint differs from what the network has; empty if it does not."""
    tensors = {key: value for key, value in expected.items() if isinstance(value, Tensor)}
    missing = [key for key in tensors if key not in found and not key.endswith(_COUNTER_SUFFIX)]
    unexpected = [key for key in found if key not in expected]
    misfits = [
        f"'{key}' (expected {_describe(tensors[key])}, found {_describe(found[key])})"
        for key in tensors
        if key in found and not _is_compatible(tensors[key], found[key])
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("wrong", misfits)]
    return [f"{len(keys)} {kind}: {_list_some(keys)}" for kind, keys in problems if keys]


def _is_compatible(expected: Tensor, found: Tensor) -> bool:
    return expected.shape == found.shape and expected.is_floating_point() == found.is_floating_point()


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _list_some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NUM_LISTED_KEYS
    return ", ".join(listed[:_NUM_LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
