"""Every torchvision classification CNN through groups, surgery, certificate, counts, training and a fresh process.

Half of every prunable group's channels are removed by a fixed rule, on random weights. `python -m tests.conformance`
runs all of them and writes a table; the test suite runs a few.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprune.allocation import build_cost_model
from entprune.artifact import ModelCard, save_model
from entprune.assembly import slice_network
from entprune.certificate import certify, confirm_groups
from entprune.evaluation import count_macs, count_parameters
from entprune.groups import ChannelGroups, find_groups
from entprune.layers import find_part, part_width
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan, select_layers

NO_CNN = ("vit_*", "swin*", "maxvit_t")
_LARGER = {"inception_v3": 299}  # its auxiliary head takes no smaller images
_SIZE = 64
_CLASSES = 10

RELOAD = """
import sys, torch, entprune
torch.set_num_threads(int(sys.argv[3]))
model = entprune.load(sys.argv[1])
content = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    print(float((model(content["images"]) - content["outputs"]).abs().max()))
"""


def network_names() -> list[str]:
    """Torchvision's classification networks without the transformers."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in NO_CNN)]


def half_plan(groups: ChannelGroups) -> PruningPlan:
    """Keep every second channel of each group."""
    return PruningPlan(
        groups=tuple(
            GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=tuple(range(0, g.num_channels, 2)))
            for g in groups.groups
        )
    )


def check_network(name: str, folder: Path) -> dict[str, Any]:
    """All checks of one network.

    Raises:
        AssertionError: a check failed; the message says which.
    """
    start = time.perf_counter()
    size = _LARGER.get(name, _SIZE)
    shape = (3, size, size)
    model = _build(name, shape)
    before = _fingerprint(model)
    groups = confirm_groups(model, find_groups(model, torch.zeros(2, *shape)), shape)
    analysed = time.perf_counter()
    assert groups.groups, "nothing can be pruned"
    plan = half_plan(groups)
    smaller = slice_network(model, groups, plan)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    certificate = certify(model, smaller, groups, plan, images)
    assert certificate.passed, f"certificate {certificate.max_abs_difference:.1e}"
    _check_widths(model, smaller, groups, plan)
    sizes = _check_counts(model, smaller, groups, plan, shape)
    assert type(smaller) is type(model), "another class"
    _check_training(smaller, images)
    assert _fingerprint(model) == before, "the user's network was changed"
    difference = _check_reload(smaller.eval(), name, shape, plan, images, folder)
    return {
        "network": name,
        "input": size,
        "groups": len(groups.groups),
        "left_alone": len(groups.unprunable),
        "refused_by_trial": sum("trial" in entry.reason for entry in groups.unprunable),
        **sizes,
        "certificate": certificate.max_abs_difference,
        "reload_difference": difference,
        "analyse_seconds": round(analysed - start, 2),
        "seconds": round(time.perf_counter() - start, 2),
        "passed": True,
    }


def _build(name: str, shape: tuple[int, int, int]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about changes of initialisation in a later release
        return build_model(f"torchvision:{name}", num_classes=_CLASSES, input_shape=shape).eval()


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
    return digest.hexdigest()


def _check_widths(model: nn.Module, smaller: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> None:
    for name, selection in select_layers(model, groups, plan).items():
        if selection.outputs is not None:
            width = part_width(find_part(smaller, name), selection.axis)
            assert width == len(selection.outputs), f"{name} has {width} outputs, asked were {len(selection.outputs)}"


def _check_counts(
    model: nn.Module, smaller: nn.Module, groups: ChannelGroups, plan: PruningPlan, shape: tuple[int, int, int]
) -> dict[str, Any]:
    cost = build_cost_model(model, groups, shape)
    parameters, macs = count_parameters(smaller), count_macs(smaller, shape)
    predicted = cost.parameters(plan.widths()), cost.macs(plan.widths())
    assert predicted == (parameters, macs), f"predicted {predicted} parameters and MACs, counted {(parameters, macs)}"
    dense = count_parameters(model), count_macs(model, shape)
    return {
        "parameters": dense[0],
        "macs": dense[1],
        "parameters_removed": round(1 - parameters / dense[0], 4),
        "macs_removed": round(1 - macs / dense[1], 4),
    }


def _check_training(smaller: nn.Module, images: Tensor) -> None:
    smaller.train()
    answers = [value for value in tree_leaves(smaller(images)) if isinstance(value, Tensor)]
    assert answers[0].shape == (len(images), _CLASSES), f"outputs of shape {tuple(answers[0].shape)}"
    sum(value.square().mean() for value in answers).backward()  # type: ignore[union-attr]
    without = [name for name, parameter in smaller.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient reaches {without[:3]}"
    smaller.zero_grad(set_to_none=True)


def _check_reload(
    smaller: nn.Module, name: str, shape: tuple[int, int, int], plan: PruningPlan, images: Tensor, folder: Path
) -> float:
    card = ModelCard(
        model_spec=f"torchvision:{name}", num_classes=_CLASSES, input_shape=shape, mean=(), std=(), class_names=()
    )
    save_model(smaller, plan, card, folder / "model")
    with torch.inference_mode():
        torch.save({"images": images, "outputs": smaller(images)}, folder / "answers.pt")
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, str(folder / "model"), str(folder / "answers.pt")]
    command.append(str(torch.get_num_threads()))  # sums in the same order
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr.strip().splitlines()[-1]
    difference = float(completed.stdout)
    assert difference == 0.0, f"reloaded network differs by {difference:.1e}"
    return difference


# --- the whole, as a command ------------------------------------------------------------------------------------------


def run_all(names: Iterable[str], output: Path) -> bool:
    """Check networks one after the other, print a line for each, and write the table after each."""
    rows: list[dict[str, Any]] = []
    names = list(names)
    for number, name in enumerate(names, start=1):
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = check_network(name, Path(folder))
            except Exception as error:  # noqa: BLE001 -- the table shows every failure
                traceback.print_exc()
                row = {"network": name, "passed": False, "failure": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
        print(f"{number}/{len(names)} {json.dumps(row)}", flush=True)  # noqa: T201 -- progress
        _write(rows, output)
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} networks passed; table in {output}")  # noqa: T201 -- result
    return passed == len(rows)


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    content = {
        "command": "python -m tests.conformance",
        "rule": "every second channel of each group is removed; random weights, seed 0; 10 classes",
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "torchvision": torchvision.__version__.split("+")[0],
            "python": platform.python_version(),
        },
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "passed": sum(row["passed"] for row in rows),
        "networks": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_suffix(".tmp")
    staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    staging.replace(output)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Check every torchvision classification CNN.")
    parser.add_argument("--only", default="*", help="shell pattern of network names")
    parser.add_argument("--output", type=Path, default=Path("runs/conformance.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    names = [name for name in network_names() if fnmatchcase(name, arguments.only)]
    if not names:
        sys.exit(f"no torchvision classification CNN matches '{arguments.only}'.")
    sys.exit(0 if run_all(names, arguments.output) else 1)


if __name__ == "__main__":
    main()
