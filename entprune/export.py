"""A network as one file that runs without this package and without the network's code.

``.pt2`` is torch's own archive, which ``torch.export.load`` reads; ``.onnx`` is read by ONNX Runtime and most inference
engines. The number of images stays free. What was written is read back and compared before it gets its name.

Axes: n images, c channels, h and w pixels.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from entprune.errors import ArtifactError, ConfigError
from entprune.storage import staged_file

INPUT_NAME = "images"  # of the only input in an ONNX file
METADATA_NAME = "entprune.json"  # key in an ONNX file, extra file in an archive of torch

_TOLERANCE = 1e-4  # engines fuse layers and sum in another order
_PROBED_BATCHES = (1, 2, 5)  # the last is the example of the export, which would take a batch of 1 for a constant
_ONNX_PACKAGES = ("onnx", "onnxscript")

Answer = Callable[[Tensor], list[Tensor]]  # images (n, c, h, w) to the network's outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedFile:
    """A network that was written to one file, read back and compared.

    Attributes:
        path: of the file.
        num_bytes: its size.
        relative_difference: largest difference of an output from the network's, as a fraction of the largest output.
        batch_sizes: numbers of random images for which it was measured.
        verified_by: what read the file.
    """

    path: Path
    num_bytes: int
    relative_difference: float
    batch_sizes: tuple[int, ...]
    verified_by: str


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, int, int],
    metadata: Mapping[str, Any] | None = None,
) -> ExportedFile:
    """Write a pruned or dense network as one file: evaluation mode, float32, any number of images.

    Args:
        model: maps images (n, c, h, w) to a tensor, or to a container of tensors; it is not changed.
        path: ends in ``.pt2`` or ``.onnx``; missing folders are made, an older file is replaced.
        input_shape: channels, height and width of one image.
        metadata: further plain values to keep in the file under :data:`METADATA_NAME`, such as mean and std.

    Returns:
        Where it is and how exactly it repeats the network.

    Raises:
        ConfigError: the suffix or the shape is unusable, or a package is missing.
        ArtifactError: the network cannot be exported, or the file gives other outputs; there is no file then.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    check_export_path(path)
    probes = _draw_probes(input_shape)
    network = copy.deepcopy(model).cpu().float().eval().requires_grad_(requires_grad=False)
    with torch.no_grad(), _quiet():
        expected = [_answer(network, images, path) for images in probes]
        content = _encode(network, probes[-1], path, json.dumps(dict(metadata or {})))
        with staged_file(path) as staged:
            staged.write_bytes(content)
            difference, reader = _compare(staged, path, probes, expected)
    return ExportedFile(
        path=path,
        num_bytes=len(content),
        relative_difference=difference,
        batch_sizes=_PROBED_BATCHES,
        verified_by=reader,
    )


def check_export_path(path: Path) -> None:
    """Require a suffix that can be written, and the packages for it, without importing them.

    Raises:
        ConfigError: the suffix is another one, or a package is missing.
    """
    if path.suffix not in {".pt2", ".onnx"}:
        raise ConfigError(f"export '{path}': expected a name ending in .pt2 or .onnx, got '{path.suffix}'.")
    missing = [name for name in _ONNX_PACKAGES if path.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"export '{path}': expected the packages {' and '.join(_ONNX_PACKAGES)}, "
            f"found no {' and no '.join(missing)}; "
            'run `pip install "entprune[onnx]"`, or write a .pt2 file.'
        )


# --- the network and what it answers ----------------------------------------------------------------------------------


def _draw_probes(input_shape: tuple[int, ...]) -> list[Tensor]:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ConfigError(f"expected input_shape to be a positive (channels, height, width), got {input_shape}.")
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *input_shape, generator=generator) for size in _PROBED_BATCHES]


def _answer(network: nn.Module, images: Tensor, path: Path) -> list[Tensor]:
    try:
        outputs = _tensors(network(images))
    except Exception as cause:
        raise ConfigError(
            f"export '{path}': the network refuses images of shape {tuple(images.shape)} ({_reason(cause)}); "
            "give the input_shape that it was made for."
        ) from cause
    if not outputs or not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ArtifactError(
            f"export '{path}': expected finite tensors from the network for random images, got "
            f"{'NaN or infinity' if outputs else 'no tensor'}; train or prune it again."
        )
    return outputs


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


# --- encoding ---------------------------------------------------------------------------------------------------------


def _encode(network: nn.Module, example: Tensor, path: Path, metadata: str) -> bytes:
    """The content of the file, from a network and images of the form that it takes."""
    program = _capture(network, example, path)
    encode = _encode_pt2 if path.suffix == ".pt2" else _encode_onnx
    try:
        return encode(program, metadata)
    except Exception as cause:  # a converter has many ways to say that it does not know an operation
        other = "write a .pt2 file" if path.suffix == ".onnx" else "save the network with save_model"
        raise ArtifactError(f"export '{path}': the network cannot be written ({_reason(cause)}); {other}.") from cause


def _capture(network: nn.Module, example: Tensor, path: Path) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    except Exception as cause:  # torch.export has many ways to say that it cannot follow a network
        raise ArtifactError(
            f"export '{path}': the network cannot be exported ({_reason(cause)}); "
            "let its forward pass depend neither on values nor on the number of images."
        ) from cause
    program.example_inputs = None  # torch would store them in the file
    return program


def _encode_pt2(program: ExportedProgram, metadata: str) -> bytes:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of the network's code, and where they lie on this machine
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA_NAME: metadata})
    return stream.getvalue()


def _encode_onnx(program: ExportedProgram, metadata: str) -> bytes:
    converted = torch.onnx.export(
        program, input_names=[INPUT_NAME], dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False
    )
    assert converted is not None  # noqa: S101 -- the older exporter alone returns None
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of the network's code, and where they lie on this machine
    converted.model.metadata_props[METADATA_NAME] = metadata
    return bytes(converted.model_proto.SerializeToString())  # weights inside: one file


# --- reading back -----------------------------------------------------------------------------------------------------


def _compare(staged: Path, path: Path, probes: list[Tensor], expected: list[list[Tensor]]) -> tuple[float, str]:
    """Largest relative difference between the file and the network, and what read the file."""
    try:
        answer, reader = _read_pt2(staged) if path.suffix == ".pt2" else _read_onnx(staged)
        found = [answer(images) for images in probes]
    except Exception as cause:  # whatever a reader says about a file that it cannot use
        raise ArtifactError(
            f"export '{path}': the file cannot be run ({_reason(cause)}); write one with the other suffix."
        ) from cause
    differences = [_relative_difference(*pair) for pair in zip(expected, found, strict=True)]
    difference = float(torch.tensor(differences, dtype=torch.float64).max())  # NaN stays NaN
    if not difference <= _TOLERANCE:
        raise ArtifactError(
            f"export '{path}': expected outputs within {_TOLERANCE:g} of the network's, got a relative difference of "
            f"{difference:.1e} with {reader}; write one with the other suffix."
        )
    return difference, reader


def _relative_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    if [output.shape for output in expected] != [output.shape for output in found]:
        return float("inf")
    reference = torch.cat([output.double().flatten() for output in expected])
    difference = torch.cat([output.double().flatten() for output in found]) - reference
    scale = float(reference.abs().max())
    return float(difference.abs().max()) / (scale if scale > 0 else 1.0)


def _read_pt2(path: Path) -> tuple[Answer, str]:
    with path.open("rb") as stream:
        network = torch.export.load(stream).module()
    return lambda images: _tensors(network(images)), "torch.export"


def _read_onnx(path: Path) -> tuple[Answer, str]:
    session, reader = _open_session(path)
    return lambda images: [
        torch.from_numpy(np.asarray(output)) for output in session.run(None, {INPUT_NAME: images.numpy()})
    ], reader


def _open_session(path: Path) -> tuple[Any, str]:
    """ONNX Runtime, or the slow reference implementation that comes with onnx."""
    try:
        import onnxruntime  # noqa: PLC0415 -- optional
    except ImportError:
        import onnx.reference  # noqa: PLC0415 -- optional

        return onnx.reference.ReferenceEvaluator(onnx.load(path)), "onnx.reference"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), "onnxruntime"


# --- manners ----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters log, warn of and print from the user; what matters is raised."""
    disabled_before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_before)


def _reason(error: BaseException) -> str:
    """First sentence of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    sentence = re.split(r"[.!](?:\s|$)", line, maxsplit=1)[0]
    return sentence if len(sentence) <= 200 else f"{sentence[:197]}..."
