"""Part `tuned`: networks of a fixed size before any gradient step and after a few epochs of fine-tuning.

Recipes were fixed per network before the seeds were measured, but for the seeds 0 of VGG-16 and ResNet-18; the number
of epochs of ResNet-56 is what fitted into the time that a GPU was at hand. All training images are trained on, as
by the command where a size was asked; the test images are measured at the end alone, before and after.
Where pruned networks are kept, the state of the tuning is, too, after each epoch: a killed run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from entprune.allocation import Objective
from entprune.config import Budget
from entprune.errors import ConfigError
from entprune.evaluation import count_macs, count_parameters
from entprune.finetune import FinetuneConfig, finetune
from entprune.low_rank import merge_layers
from entprune.resumption import TrainingState
from entprune.rounds import round_budget
from entprune.runner import torch_threads
from entprune.storage import load_training, save_training
from infra.benchmark.budgets import prune_to
from infra.benchmark.contest import budget_label
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.pruned import PrunedNetwork, pruned_network
from infra.benchmark.records import Record, Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How small a network is made, and how it is tuned.

    Attributes:
        budget: a size, so that nothing is searched.
        tuning: of each round; its seed is the request's.
        rounds: of pruning and tuning in turns.
        low_rank: whether layers whose outputs are correlated become two.
    """

    budget: Budget
    tuning: FinetuneConfig
    rounds: int = 1
    low_rank: bool = False

    def first_budget(self) -> Budget:
        """What the first round is asked."""
        return round_budget(self.budget, 1, self.rounds, {"parameters": 1.0, "macs": 1.0})

    def key(self) -> Key:
        """What tells its cell from others."""
        rounds = {"rounds": self.rounds} if self.rounds > 1 else {}
        low_rank = {"low_rank": True} if self.low_rank else {}
        return {"budget": budget_label(self.budget), **tuning_key(self.tuning), **rounds, **low_rank, "images": "all"}


def tuning_key(tuning: FinetuneConfig) -> Key:
    """What tells cells apart that were tuned differently."""
    clipped = {} if tuning.clip_norm is None else {"clip_norm": tuning.clip_norm}
    return {
        "epochs": tuning.epochs,
        "learning_rate": tuning.learning_rate,
        "distillation_weight": tuning.distillation_weight,
        **clipped,
    }


_LENET = FinetuneConfig(epochs=15, clip_norm=None)  # here and below: as measured before gradients were clipped
_LABELS_ALONE = {"learning_rate": 0.05, "distillation_weight": 0.0, "clip_norm": None}
_LONG = FinetuneConfig(epochs=45, batch_size=256, learning_rate=0.1, distillation_weight=0.5, clip_norm=None)
_AFTER_LONG_TRAINING = FinetuneConfig(epochs=40, learning_rate=0.1, clip_norm=None)
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "lenet": (
        Recipe(budget=Budget(parameters_removed=0.9745), tuning=_LENET, rounds=3),
        Recipe(budget=Budget(parameters_removed=0.9745), tuning=FinetuneConfig(epochs=15), low_rank=True),
        Recipe(budget=Budget(parameters_removed=0.9745), tuning=FinetuneConfig(epochs=15), low_rank=True, rounds=3),
    ),
    "vgg16_cifar": (Recipe(budget=Budget(parameters_removed=0.95), tuning=FinetuneConfig(epochs=14, **_LABELS_ALONE)),),
    "resnet18_cifar": (
        Recipe(budget=Budget(parameters_removed=0.92), tuning=FinetuneConfig(epochs=8, **_LABELS_ALONE)),
    ),
    "resnet56_cifar": (
        Recipe(budget=Budget(macs_removed=0.531), tuning=_LONG),
        Recipe(budget=Budget(macs_removed=0.611), tuning=_LONG),
    ),
    "vgg16_cifar_long": (Recipe(budget=Budget(parameters_removed=0.95), tuning=_AFTER_LONG_TRAINING),),
    "resnet18_cifar_long": (Recipe(budget=Budget(parameters_removed=0.92), tuning=_AFTER_LONG_TRAINING),),
}


_OBJECTIVES: tuple[Objective, ...] = ("parameters", "macs")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Turns:
    """What came of pruning and tuning.

    Attributes:
        tuned: the network after the last round.
        size: its parameters and MACs.
        prune_seconds, tuning_seconds: of all rounds.
        places: where the states of the trainings lie.
    """

    tuned: nn.Module
    size: Mapping[Objective, int]
    prune_seconds: float
    tuning_seconds: float = 0.0
    places: tuple[Path, ...] = ()


class TunedMeter:
    """Prunes one network to a size and tunes it.

    Args:
        request: what is asked.
        recipes: how; by default those of the network.
    """

    def __init__(self, request: Request, recipes: Sequence[Recipe] = ()) -> None:
        self._bench, self._folder = request.bench(), request.pruned
        self._recipes = tuple(recipes) or RECIPES[request.network]

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Accuracy of the unpruned network, of the pruned one, and of that after tuning."""
        bench = self._bench
        recipe = next(recipe for recipe in self._recipes if recipe.key() == key)
        bench.config = replace(bench.config, low_rank=recipe.low_rank)
        pruned = pruned_network(bench, recipe.first_budget(), self._folder)
        turns = self._take_turns(pruned, recipe)
        figures = {
            "dense": pruned.dense,
            "parameters_removed": 1.0 - turns.size["parameters"] / pruned.dense["parameters"],
            "macs_removed": 1.0 - turns.size["macs"] / pruned.dense["macs"],
            **turns.size,
            "one_shot_accuracy": pruned.one_shot["accuracy"],
            "tuned_accuracy": bench.accuracy(turns.tuned),
            "prune_seconds": round(turns.prune_seconds, 1),
            "epoch_seconds": round(turns.tuning_seconds / recipe.tuning.epochs / recipe.rounds, 3),
            "batch_size": recipe.tuning.batch_size,
            "threads": bench.config.threads,
        }
        for place in turns.places:
            place.unlink()
        return figures

    def _take_turns(self, pruned: PrunedNetwork, recipe: Recipe) -> Turns:
        """Tune the pruned network, and in further rounds prune and tune what came of it."""
        size = {name: int(pruned.one_shot[name]) for name in _OBJECTIVES}
        turns = self._tune(pruned.model, recipe, Turns(tuned=pruned.model, size=size, prune_seconds=pruned.seconds))
        ranks = pruned.ranks
        for number in range(2, recipe.rounds + 1):
            one = merge_layers(turns.tuned, ranks)
            sizes = count_parameters(one), count_macs(one, self._bench.data.input_shape)
            kept = {name: size / pruned.dense[name] for name, size in zip(_OBJECTIVES, sizes, strict=True)}
            start = time.perf_counter()
            again = prune_to(self._bench, round_budget(recipe.budget, number, recipe.rounds, kept), model=one)
            ranks, seconds = dict(again.plan.ranks), turns.prune_seconds + time.perf_counter() - start
            size = {name: int(again.report["one_shot"][name]) for name in _OBJECTIVES}
            turns = self._tune(again.model, recipe, replace(turns, size=size, prune_seconds=seconds))
        return turns

    def _tune(self, model: nn.Module, recipe: Recipe, turns: Turns) -> Turns:
        """The turns so far and this one, which goes on where a killed run was."""
        bench = self._bench
        tuning = replace(recipe.tuning, seed=bench.config.seed, device=bench.config.device)
        place = None if self._folder is None else self._folder / f"{bench.entry.name}-{_digest(model, tuning)}.tuning"
        state = load_training(place) if place is not None and place.exists() else None
        states = [] if state is None else [state]

        def keep(state: TrainingState) -> None:
            states[:] = [state]
            if place is not None:
                save_training(state, place)

        with torch_threads(bench.config.threads):
            tuned = finetune(
                model, bench.model, bench.data.train, tuning, progress=say_steps, state=state, on_epoch=keep
            )
        seconds = turns.tuning_seconds + sum(float(epoch["seconds"]) for epoch in states[0].content["history"])
        places = turns.places if place is None else (*turns.places, place)
        return replace(turns, tuned=tuned, tuning_seconds=seconds, places=places)


def _digest(model: nn.Module, tuning: FinetuneConfig) -> str:
    """What tells trainings apart: where they start from and by which recipe."""
    digest = hashlib.sha256(json.dumps(asdict(tuning), sort_keys=True).encode())
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def say_steps(done: int, total: int, text: str) -> None:
    """Print twenty lines of progress."""
    if done == total or done % max(1, total // 20) == 0:
        print(f"  {text}: step {done} of {total}", flush=True)


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each recipe.

    Raises:
        ConfigError: there is no such budget.
    """
    keys = [recipe.key() for recipe in RECIPES[request.network]]
    budgets = {key["budget"]: None for key in keys}  # in their order, each once
    if request.budget not in {"", *budgets}:
        raise ConfigError(f"budget: expected one of {', '.join(budgets)}, got {request.budget!r}.")
    return [
        (Subject(part="tuned", network=request.network, seed=request.seed, budget=key["budget"]), key)
        for key in keys
        if request.budget in {"", key["budget"]}
    ]


PART = Part(
    name="tuned", networks=tuple(RECIPES), threads=2, cells=cells, meter=TunedMeter,
    headline=("one_shot_accuracy", "tuned_accuracy", "epoch_seconds"),
)  # fmt: skip
