"""The house: what an import pulls in, and that the layer contracts hold and bite."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("entprune", "tasks", "flows")


def run_lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    return subprocess.run(
        [str(command), "--no-cache", "--no-logo"], cwd=directory, capture_output=True, text=True, check=False
    )


def loaded_by_library_import(packages: tuple[str, ...]) -> str:
    return loaded_by("import entprune", packages)


def loaded_by(statements: str, packages: tuple[str, ...]) -> str:
    program = f"{statements}; import sys; print(sorted(set({packages!r}) & set(sys.modules)))"
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_library_import_loads_no_engine() -> None:
    assert loaded_by_library_import(("prefect", "ray", "mlflow")) == "[]"


def test_library_import_loads_no_lazy_dependency() -> None:
    assert loaded_by_library_import(("matplotlib", "sklearn", "onnx", "onnxscript", "onnxruntime")) == "[]"


def test_analysis_loads_no_compiler_and_no_learning_library() -> None:
    statements = (
        "from entprune.config import PruneConfig; from entprune.datasets import load_data; "
        "from entprune.models import build_model; from entprune.stages import analyse; data = load_data('digits'); "
        "model = build_model('digits_cnn', num_classes=10, input_shape=data.input_shape); "
        "analyse(model, data.input_shape, PruneConfig())"
    )
    assert loaded_by(statements, ("torch._dynamo", "sympy", "sklearn", "scipy")) == "[]"


def test_contracts_hold() -> None:
    completed = run_lint_imports(ROOT)
    assert completed.returncode == 0, completed.stdout + completed.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken_contract"),
    [
        ("entprune/errors.py", "import ray", "the library knows no engine"),
        ("entprune/errors.py", "import tasks", "flows stand on tasks"),
        ("entprune/errors.py", "import entprune.models", "inside the library imports point down"),
        ("entprune/unlisted.py", "", "inside the library imports point down"),
        ("tasks/solve.py", "import mlflow", "only tasks.tracking imports mlflow"),
        ("flows/prune_model.py", "import ray.util", "only tasks.actors and tasks.cluster import ray"),
    ],
)
def test_contracts_bite(copied_tree: Path, module: str, line: str, broken_contract: str) -> None:
    with (copied_tree / module).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    completed = run_lint_imports(copied_tree)
    assert completed.returncode == 1, completed.stdout + completed.stderr
    broken_lines = [text for text in completed.stdout.splitlines() if " BROKEN" in text]
    assert any(text.startswith(broken_contract) for text in broken_lines), completed.stdout
