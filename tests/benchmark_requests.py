"""What the benchmark's tests measure: a network of a few channels on noise; where it is stored, what its page says."""

from __future__ import annotations

from pathlib import Path

import torch

from entprune.config import Budget, PruneConfig
from entprune.datasets import ImageData
from entprune.finetune import FinetuneConfig
from infra.benchmark import tuned
from infra.benchmark.networks import Bench, Folders, TrainedNetwork
from infra.benchmark.parts import Request
from infra.benchmark.records import Record, Subject
from infra.benchmark.render import ABLATION_MARKERS, BEGIN, END, write_page
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


def tiny_request() -> TinyRequest:
    """With one thread and no folders."""
    return TinyRequest(network="lenet", seed=0, threads=1, folders=Folders(data=Path(), checkpoints=Path()))


TINY_RECIPE = tuned.Recipe(
    budget=Budget(parameters_removed=0.5), tuning=FinetuneConfig(epochs=1, learning_rate=0.1, distillation_weight=0.5)
)
RUN_WITH_VERSIONS = {
    "command": "make benchmark PART=x", "code_commit": "0123456789abcdef", "environment": {"threads": 1, "torch": "2"},
}  # fmt: skip


def measure_to(folder: Path, part: str, network: str, cells: list[tuple[dict, dict]]) -> None:
    """Store cells of one part."""
    subject = Subject(part=part, network=network, seed=0)
    record = Record(subject.path(folder), subject)
    for key, values in cells:
        record.put(key, values, RUN_WITH_VERSIONS)


def page_of(folder: Path, output: Path) -> str:
    """The page that results make, between what was there before."""
    output.mkdir(exist_ok=True)
    sections = f"{BEGIN}\nwhat was there\n{END}\nbetween\n" + "\nold\n".join(ABLATION_MARKERS)
    (output / "README.md").write_text(f"before\n{sections}\nafter\n", encoding="utf-8")
    write_page(folder, output)
    return (output / "README.md").read_text(encoding="utf-8")
