"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entprune.checkpoints import save_state
from entprune.models import build_model
from flows import cli


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.random((40, 8, 8), np.float32),
        "y_train": np.arange(40) % 10,
        "x_test": generator.random((20, 8, 8), np.float32),
        "y_test": np.arange(20) % 10,
    }
    np.savez(path, **{**arrays, **changes})
    return path


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit, match=r"^\d+$") as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def assert_one_sentence(error: str, *fragments: str) -> None:
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("entprune: error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def fail_if_called(parameters: Any) -> None:
    pytest.fail(f"bad input reached the flow: {parameters}")


def write_checkpoint(path: Path) -> Path:
    """Untrained weights of `digits_cnn`."""
    save_state(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)), path)
    return path


def put_in_the_way(folder: Path, name: str) -> list[Path]:
    """A file where a folder may be wanted, and a folder of this name; returns all that lies there then."""
    (folder / "file").touch()
    (folder / name).mkdir()
    return sorted(folder.rglob("*"))
