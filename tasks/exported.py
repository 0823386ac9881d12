"""A network that was exported as a graph, made to look like any other."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn


class ExportedNetwork(nn.Module):
    """An exported graph behind the usual interface; exported graphs refuse `eval()` and are always in that mode."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.network = graph  # a module named `graph` could not be exported again
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, C, H, W) to what the exported network gave for them."""
        outputs: Tensor = self.network(images)
        return outputs

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 -- torch's signature
        """Change nothing."""
        return self
