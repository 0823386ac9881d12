"""The network's operations as a graph that can be walked node by node.

Every module without children stays whole, so its code runs with the sizes that it has at that time.
"""

from __future__ import annotations

import linecache
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import fx, nn

from entprune.errors import ModelError

_TORCH_FOLDER = str(Path(torch.__file__).parent)


class _WholeLeaves(fx.Tracer):
    """Does not look into modules without children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Symbolically trace the network.

    Raises:
        ModelError: its forward pass depends on data in a way that cannot be traced; the message names the line.
    """
    try:
        return fx.GraphModule(model, _WholeLeaves().trace(model))
    except Exception as error:
        text = str(error).strip()
        reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
        raise ModelError(
            f"expected a network that torch.fx can trace, got {type(model).__name__}: {reason}{_line(error)}. Replace "
            "Python control flow on tensors by tensor operations, or move it into a module of its own without children."
        ) from error


def _line(error: Exception) -> str:
    """The last line of code outside torch that was running."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_TORCH_FOLDER) and frame.filename != __file__:
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f" (line {frame.lineno} of {Path(frame.filename).name}: `{code}`)"
    return ""


def called_modules(graph: fx.Graph) -> dict[str, int]:
    """Names of the called modules in execution order with the number of calls of each."""
    return dict(Counter(str(node.target) for node in graph.nodes if node.op == "call_module"))
