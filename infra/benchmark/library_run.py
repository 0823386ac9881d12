"""`entprune prune` without any engine, on data that have no validation split: the same options, the same files.

python -m infra.benchmark.library_run prune --model lenet --checkpoint lenet.pt --data mnist ... --output out
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import entprune
from entprune.datasets import ArraySplit, ImageSplit, split_training
from entprune.errors import ConfigError
from entprune.report import write_report
from entprune.runner import InProcessRunner
from flows import cli
from flows.parameters import parse_parameters
from flows.preflight import load_inputs


def run(options: dict[str, Any], **_: Any) -> int:
    """Load, prune in process, save and report."""
    parameters = parse_parameters(options)
    inputs = load_inputs(parameters)
    data, config = inputs.data, parameters.config().sized_for(inputs.network.dense_macs())
    calibration, validation = split_training(
        data,
        calibration=config.calibration_samples or 0,
        validation=config.validation_samples or 0,
        seed=config.seed,
    )
    result = entprune.prune(
        inputs.model,
        cut_out(data.train, calibration),
        budget=parameters.budget(),
        evaluate=cut_out(data.train, validation),
        test=data.test,
        config=config,
        runner=InProcessRunner(threads=config.threads),
        model_spec=parameters.model,
        class_names=data.class_names,
    )
    entprune.save(result, parameters.output / "model")
    write_report(result.report, result.paths, parameters.output)
    return 0


def cut_out(split: ImageSplit, indices: np.ndarray) -> ArraySplit:
    """The chosen images of a split in memory."""
    if not isinstance(split, ArraySplit):
        raise ConfigError("expected a data set that is kept in memory, got image files.")
    return dataclasses.replace(split, images=split.images[indices], labels=split.labels[indices])


if __name__ == "__main__":
    cli._prune = run  # noqa: SLF001 -- the options are read by the command itself
    cli.main()
