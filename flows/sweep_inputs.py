"""Checks of a sweep before an engine starts; networks and data that settings share are loaded once."""

from __future__ import annotations

from flows.preflight import LoadedInputs, check_output_folder, check_store, handed_over, load_inputs
from flows.sweep_parameters import SweepParameters

SWEEP_NAME = "sweep.json"  # marks a folder as the result of an earlier sweep, which may be replaced
_SHARED_FIELDS = ("model", "checkpoint", "keep")


def preflight_sweep(parameters: SweepParameters) -> list[LoadedInputs]:
    """Check everything that can be checked without an engine; nothing is written.

    Returns:
        One entry per setting; those of the same network are the same object.

    Raises:
        ConfigError, OutputError, ModelError, DataError, CheckpointError: an input is unusable.
    """
    earlier: list[LoadedInputs] | None = handed_over(parameters)
    if earlier is not None:
        return earlier
    check_output_folder(parameters.output, marker=SWEEP_NAME)
    check_store(parameters.settings()[0].parameters.cache_dir)
    loaded: dict[str, LoadedInputs] = {}
    inputs = []
    for setting in parameters.settings():
        asked, config = setting.parameters, setting.parameters.config()
        name = repr([*(getattr(asked, field) for field in _SHARED_FIELDS), config.correct_residuals])
        if name not in loaded:
            loaded[name] = load_inputs(asked, data=next((entry.data for entry in loaded.values()), None))
        inputs.append(loaded[name])
    return inputs
