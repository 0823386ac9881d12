"""Bundles and folders: exact round trips, damage noticed, nothing half-written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entprune.calibration import LayerStatistics
from entprune.errors import ArtifactError, OutputError
from entprune.moments import Moments
from entprune.path import PathSetting, SettingPath, SparsityPath
from entprune.storage import (
    atomic_write_text,
    load_path,
    load_setting_path,
    load_statistics,
    read_bundle,
    save_path,
    save_setting_path,
    save_statistics,
    staging_directory,
    write_bundle,
)

ARRAYS = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.int64, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def make_setting_path(num_channels: int = 5, entropy_weight: float = 0.1, seed: int = 0) -> SettingPath:
    generator = np.random.default_rng(seed)
    return SettingPath(
        setting=PathSetting(entropy_weight=entropy_weight),
        order=generator.permutation(num_channels),
        errors=np.sort(generator.random(num_channels + 1))[::-1].copy(),
        snapshots=generator.dirichlet(np.ones(num_channels), size=3).astype(np.float32),
        status="complete",
    )


def make_path() -> SparsityPath:
    settings = (make_setting_path(seed=1), make_setting_path(entropy_weight=1 / 3, seed=2))
    errors = np.stack([entry.errors for entry in settings])
    return SparsityPath(
        group="layer1.0.conv1", num_consumers=2, settings=settings, errors=errors.min(0), choice=errors.argmin(0)
    )


def assert_same_setting_path(actual: SettingPath, expected: SettingPath) -> None:
    assert actual.setting == expected.setting
    assert actual.status == expected.status
    for name in ("order", "errors", "snapshots"):
        assert_same_bits(getattr(actual, name), getattr(expected, name))


def content_of(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_half(directory: Path, failure: BaseException) -> None:
    with staging_directory(directory) as staging:
        (staging / "half.txt").write_text("half")
        raise failure


# --- bundles --------------------------------------------------------------------------------------------------------


@given(
    arrays=st.dictionaries(st.text(min_size=1, max_size=5), ARRAYS, max_size=3),
    content=st.dictionaries(st.text(), JSON),
)
def test_bundle_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], content: dict[str, Any]
) -> None:
    arrays.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("bundle") / "x.safetensors"
    write_bundle(path, arrays, content)
    read_arrays, read_content = read_bundle(path)
    assert read_content == content
    assert read_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_same_bits(read_arrays[name], array)


def test_memory_layout_does_not_matter(tmp_path: Path) -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    variants = {"strided": array[:, ::2], "fortran": np.asfortranarray(array), "big": array.astype(">f8")}
    write_bundle(tmp_path / "x", variants, {})
    read, _ = read_bundle(tmp_path / "x")
    for name, variant in variants.items():
        np.testing.assert_array_equal(read[name], variant)
        assert read[name].flags.writeable


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bundle(path, {"a": np.arange(3.0)}, {"kind": "test"})
    original = path.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="expected"):
            read_bundle(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bundle(path, {"a": np.arange(3.0)}, {"kind": "test"})
    original = path.read_bytes()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        with pytest.raises(ArtifactError, match="damaged or cut off"):
            read_bundle(path)


def test_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing\.here.*found none"):
        read_bundle(tmp_path / "nothing.here")


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "x")
    with pytest.raises(ArtifactError, match="a file of another origin"):
        read_bundle(tmp_path / "x")


def test_failed_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_bundle(path, {"a": np.ones(2)}, {"number": 1})

    def fill_the_disk(_: Any, target: Path, **__: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fill_the_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        write_bundle(path, {"a": np.zeros(2)}, {"number": 2})
    assert names_in(tmp_path) == ["x"]
    assert read_bundle(path)[1] == {"number": 1}


def test_content_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_bundle(tmp_path / "x", {}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_bundle(tmp_path / "file" / "x", {}, {})


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_bundle_can_be_read_by_whom_the_user_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_bundle(tmp_path / "x", {"a": np.zeros(2)}, {})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "note.txt"
    atomic_write_text(path, "long old text\n")
    atomic_write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert names_in(path.parent) == ["note.txt"]


# --- folders --------------------------------------------------------------------------------------------------------


def test_staged_folder_replaces_the_older_one(tmp_path: Path) -> None:
    for number in (1, 2):
        with staging_directory(tmp_path / "deep" / "final") as staging:
            assert staging.parent == tmp_path / "deep"
            (staging / f"{number}.txt").write_text(str(number))
    assert content_of(tmp_path) == {"deep/final/2.txt": "2"}
    assert names_in(tmp_path / "deep") == ["final"]


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("is_older", [False, True])
def test_interrupted_folder_leaves_nothing(tmp_path: Path, failure: BaseException, is_older: bool) -> None:
    if is_older:
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "old.txt").write_text("old")
    before = content_of(tmp_path)
    with pytest.raises(type(failure), match="stop"):
        write_half(tmp_path / "final", failure)
    assert content_of(tmp_path) == before
    assert names_in(tmp_path) == (["final"] if is_older else [])


def test_failed_replacement_brings_the_older_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old.txt").write_text("old")
    original = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(13, "Permission denied")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Permission denied"), staging_directory(tmp_path / "final"):
        pass
    assert content_of(tmp_path) == {"final/old.txt": "old"}
    assert names_in(tmp_path) == ["final"]


def test_folder_without_the_marker_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match=r"an older one with model\.json"),
        staging_directory(tmp_path, marker="model.json"),
    ):
        pytest.fail("the block must not run")
    assert content_of(tmp_path) == {"thesis.tex": "years of work"}


def test_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("mine")
    with pytest.raises(OutputError, match="got a file"), staging_directory(tmp_path / "final"):
        pytest.fail("the block must not run")


# --- dataclasses ----------------------------------------------------------------------------------------------------


def test_setting_path_round_trip(tmp_path: Path) -> None:
    original = make_setting_path()
    save_setting_path(original, tmp_path / "x")
    assert_same_setting_path(load_setting_path(tmp_path / "x"), original)


def test_path_round_trip(tmp_path: Path) -> None:
    original = make_path()
    save_path(original, tmp_path / "x")
    loaded = load_path(tmp_path / "x")
    assert (loaded.group, loaded.num_consumers) == (original.group, original.num_consumers)
    assert_same_bits(loaded.errors, original.errors)
    assert_same_bits(loaded.choice, original.choice)
    for actual, expected in zip(loaded.settings, original.settings, strict=True):
        assert_same_setting_path(actual, expected)
    assert all(loaded.kept(width) == original.kept(width) for width in range(6))


@given(scatter=hnp.arrays(np.float64, (3, 3)), count=st.integers(0, 2**62))
def test_statistics_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, scatter: np.ndarray, count: int
) -> None:
    outputs = np.arange(4, dtype=np.float32).reshape(2, 2)
    moments = Moments(count=count, mean=scatter[0], scatter=scatter)
    original = {
        "z.last": LayerStatistics(moments=moments, outputs=outputs),
        "a.first": LayerStatistics(moments=None, outputs=outputs + 1),
    }
    path = tmp_path_factory.mktemp("statistics") / "x"
    save_statistics(original, path)
    loaded = load_statistics(path)
    assert list(loaded) == list(original)
    assert loaded["a.first"].moments is None
    assert_same_bits(loaded["a.first"].outputs, outputs + 1)
    restored = loaded["z.last"].moments
    assert restored is not None
    assert restored.count == count
    assert_same_bits(restored.mean, scatter[0])
    assert_same_bits(restored.scatter, scatter)


def test_bundle_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_setting_path(make_setting_path(), tmp_path / "x")
    with pytest.raises(ArtifactError, match="expected a stored sparsity path, got 'setting path'"):
        load_path(tmp_path / "x")


def test_bundle_with_unknown_settings_is_refused(tmp_path: Path) -> None:
    save_setting_path(make_setting_path(), tmp_path / "x")
    arrays, content = read_bundle(tmp_path / "x")
    content["setting"]["speed"] = 3.0
    write_bundle(tmp_path / "x", arrays, content)
    with pytest.raises(ArtifactError, match=r"got other fields.*speed"):
        load_setting_path(tmp_path / "x")
