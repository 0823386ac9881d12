"""What the benchmark's tests measure: a network of a few channels on noise, and what a record says of its run."""

from __future__ import annotations

import torch

from entprune.config import PruneConfig
from entprune.datasets import ImageData
from infra.benchmark.networks import Bench, TrainedNetwork
from infra.benchmark.parts import Request
from tests.micro_networks import IMAGE_SHAPE, Chain, random_split, warm_up

ENTRY = TrainedNetwork(
    name="chain", checkpoint="chain.pt", data="noise", parameters_removed=(0.3, 0.5), macs_removed=(0.4,)
)


class TinyRequest(Request):
    """A request whose network needs no file."""

    def bench(self, calibration_samples: int | None = None) -> Bench:
        torch.manual_seed(0)
        train, test = random_split(1800), random_split(200, seed=1)
        data = ImageData(
            name="noise", train=train, test=test, num_classes=3, input_shape=IMAGE_SHAPE, mean=train.mean,
            std=train.std, class_names=("a", "b", "c"), sha256="d",
        )  # fmt: skip
        config = PruneConfig(
            seed=self.seed,
            calibration_samples=min(calibration_samples or 192, 192),
            validation_samples=200,
            min_rows=500,
        )
        return Bench(ENTRY, warm_up(Chain()), data, config, "c")


RUN_WITH_VERSIONS = {
    "command": "make benchmark PART=x", "code_commit": "0123456789abcdef", "environment": {"threads": 1, "torch": "2"},
}  # fmt: skip
