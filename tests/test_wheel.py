"""The package as it is handed out: built, installed beside nothing of this checkout, used in an empty folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("build", "hatchling", "pip")),
        reason="build, hatchling and pip are needed to make and install a wheel",
    ),
]


def run(*command: str | Path, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a virtual environment with the wheel; its dependencies are those of this one, which saves 5 GB."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    places = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(places) + "\n", encoding="utf-8")
    return folder / "bin"


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        assert "Requires-Dist: torch>=2.14" in archive.read(metadata).decode()
    tops = {name.split("/", 1)[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"entprune", "tasks", "flows"}
    sources = [path for top in ("entprune", "tasks", "flows") for path in (ROOT / top).rglob("*") if path.is_file()]
    kept = {path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts}
    assert kept <= set(names)


def test_installed_command_prunes_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    hidden = ("PYTHON", "MLFLOW_TRACKING", "PREFECT_API_URL", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    where = run("python", "-c", "import entprune; print(entprune.__file__)", folder=tmp_path, environment=environment)
    assert Path(where.strip()).is_relative_to(programs.parent)
    assert "Shrink pretrained convolutional networks" in run(
        "entprune", "--help", folder=tmp_path, environment=environment
    )
    given = ["--model", "digits_cnn", "--data", "digits"]
    run("entprune", "train", *given, "--epochs", "1", "--output", "dense.safetensors",
        folder=tmp_path, environment=environment)  # fmt: skip
    run("entprune", "prune", *given, "--checkpoint", "dense.safetensors", "--parameters-removed", "0.5",
        "--register", "small", "--output", "runs/small", folder=tmp_path, environment=environment)  # fmt: skip
    report = json.loads((tmp_path / "runs/small/report.json").read_text(encoding="utf-8"))
    assert report["certificate"]["passed"] is True
    assert report["lineage"]["registered_version"] == 1
    assert (tmp_path / "runs/small/report.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {
        "dense.safetensors", "runs", "mlflow.db", "mlartifacts", ".entprune",
    }  # fmt: skip
