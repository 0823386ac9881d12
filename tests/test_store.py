"""Stored results: found again on the same inputs alone, refused when damaged, never a reason to fail."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from entprune import PathSetting, PruneConfig
from entprune.candidates import CandidateScore
from entprune.datasets import ArraySplit, ImageData
from entprune.errors import ConfigError
from entprune.finetune import FinetuneConfig
from entprune.groups import find_groups
from entprune.models import build_model
from entprune.plan import full_plan
from entprune.selection import DenseReference, StopRule
from entprune.storage import read_bundle, write_bundle
from tasks import keys
from tasks.keys import StageKeys, content_key, hash_arrays, hash_images, hash_network
from tasks.stages import keep_score, recall_score
from tasks.store import Store, open_store
from tasks.workload import cut_out


def save_number(number: int, path: Path) -> None:
    write_bundle(path, {"number": np.array([number])}, {})


def load_number(path: Path) -> int:
    return int(read_bundle(path)[0]["number"][0])


class Counted:
    """A stage that counts its runs."""

    def __init__(self, store: Store) -> None:
        self.store, self.runs = store, 0

    def __call__(self) -> int:
        number = self.store.remember("logits", "key", self._compute, load=load_number, save=save_number)
        self.store.flush()
        return number

    def _compute(self) -> int:
        self.runs += 1
        return 7


# --- the store --------------------------------------------------------------------------------------------------------


def test_result_is_computed_once(tmp_path: Path) -> None:
    stage = Counted(Store(tmp_path))
    assert [stage(), stage(), Counted(Store(tmp_path))()] == [7, 7, 7]
    assert stage.runs == 1
    assert stage.store.reused["logits"] == 1


def test_missing_result_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path).fetch("logits", "key", load_number) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_result_is_deleted_and_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Counted(Store(tmp_path))
    stage()
    path = stage.store.path("logits", "key")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"cut": bytes(content[:-3]), "flipped": bytes(content), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert stage() == 7
    assert stage.runs == 2
    assert "damaged and will be computed again" in caplog.text
    assert load_number(path) == 7


def test_store_that_cannot_be_written_costs_nothing_but_the_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    stage = Counted(Store(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert [stage(), stage()] == [7, 7]
    assert caplog.text.count("results of this run are not stored") == 1


def test_everything_kept_is_written_when_the_store_closes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for number in range(5):
            store.keep("logits", str(number), partial(save_number, number))
    found = [Store(tmp_path).fetch("logits", str(number), load_number) for number in range(5)]
    assert found == list(range(5))


def test_no_more_than_two_results_wait_for_the_disk(tmp_path: Path) -> None:
    release, kept = Event(), []

    def save_slowly(path: Path) -> None:
        release.wait(30)
        save_number(1, path)

    def keep_three() -> None:
        for number in range(3):
            store.keep("logits", str(number), save_slowly)
            kept.append(number)

    with Store(tmp_path) as store:
        keeper = Thread(target=keep_three)
        keeper.start()
        keeper.join(0.3)
        assert kept == [0, 1]
        release.set()
        keeper.join(30)
        assert kept == [0, 1, 2]


def test_what_killed_processes_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    torn = [tmp_path / "paths" / f".{name}.safetensors.ab.partial" for name in ("old", "new")]
    torn[0].parent.mkdir()
    for path in torn:
        path.touch()
    os.utime(torn[0], (0, 0))
    with Store(tmp_path):
        assert [path.exists() for path in torn] == [False, True]


def test_room_is_a_tenth_of_the_free_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "not there yet" / "store")
    free = shutil.disk_usage(tmp_path).free
    assert store.has_room(free // 20)
    assert not store.has_room(free // 5)


def test_failure_to_save_is_logged_with_its_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(tmp_path) as store:
        store.keep("logits", "key", lambda path: 1 / 0)
    assert "a result of stage 'logits' cannot be stored" in caplog.text
    assert "ZeroDivisionError" in caplog.text


# --- keys -------------------------------------------------------------------------------------------------------------


def small_network(stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=stride), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def make_network(stride: int = 1) -> nn.Module:
    network = small_network(stride)
    network(torch.zeros(1, 1, 6, 6))
    return network


def test_equal_networks_have_equal_hashes() -> None:
    assert hash_network(make_network()) == hash_network(make_network())


def test_network_hash_sees_weights_settings_and_forward_pass() -> None:
    changed = make_network()
    with torch.no_grad():
        changed[0].weight[0, 0, 0, 0] += 1e-6
    swapped = make_network()
    swapped[1] = nn.Tanh()
    hashes = {hash_network(network) for network in (make_network(), changed, swapped)}
    assert len(hashes) == 3
    padded, plain = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3)
    plain.load_state_dict(padded.state_dict())
    assert hash_network(nn.Sequential(padded)) != hash_network(nn.Sequential(plain))


def test_array_hash_sees_names_dtypes_shapes_and_values() -> None:
    array = np.arange(6)
    variants = [
        {"a": array},
        {"b": array},
        {"a": array.astype(np.int32)},
        {"a": array.reshape(2, 3)},
        {"a": array[::-1]},
    ]
    assert len({hash_arrays(variant) for variant in variants}) == len(variants)
    assert hash_arrays({"a": array, "b": array}) == hash_arrays({"b": array, "a": array.copy()})


def test_key_depends_on_stage_inputs_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_key("paths", {"x": 1, "y": 2})
    assert before == content_key("paths", {"y": 2, "x": 1})
    assert before != content_key("paths", {"x": 1, "y": 3})
    assert before != content_key("moments", {"x": 1, "y": 2})
    monkeypatch.setitem(keys.STAGE_VERSIONS, "paths", keys.STAGE_VERSIONS["paths"] + 1)
    assert before != content_key("paths", {"x": 1, "y": 2})


def all_keys(stage_keys: StageKeys) -> dict[str, str]:
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8))
    groups = find_groups(model, torch.zeros(2, 1, 8, 8))
    return {
        "shard": stage_keys.shard(("a",), ("a",), (0, 8)),
        "answers": stage_keys.answers(("a",)),
        "moments": stage_keys.moments(("a",)),
        "path": stage_keys.path(groups.groups[0], PathSetting()),
        "candidate": stage_keys.candidate(full_plan(groups)),
        "logits": stage_keys.logits(model, stage_keys.validation),
        "range": stage_keys.logits_range(stage_keys.logits(model, stage_keys.validation), (0, 8)),
        "finetuned": stage_keys.finetuned(model, FinetuneConfig(), stage_keys.validation),
    }


BASE = StageKeys(network="n", calibration="c", validation="v", test="t", config=PruneConfig())
STATISTICS = {"shard", "answers", "moments", "path", "candidate"}


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        ({"network": "other"}, STATISTICS | {"finetuned"}),
        ({"calibration": "other"}, STATISTICS),
        ({"validation": "other"}, {"candidate", "logits", "range", "finetuned"}),
        ({"test": "other"}, set()),
        ({"config": PruneConfig(seed=1)}, STATISTICS),
        ({"config": PruneConfig(min_rows=9)}, STATISTICS),
        ({"config": PruneConfig(threads=2)}, STATISTICS | {"logits", "range"}),
        ({"config": PruneConfig(relative_ridge=0.1)}, {"candidate"}),
        ({"config": PruneConfig(correct_residuals=False)}, {"shard", "answers", "path", "candidate"}),
        ({"config": PruneConfig(keep=("conv1",))}, {"shard", "answers", "path", "candidate"}),
        ({"config": PruneConfig(max_rounds=9, confidence=0.9, minimum_channels=2)}, set()),
    ],
)
def test_each_result_depends_on_what_matters_for_it(change: dict, affected: set[str]) -> None:
    before, after = all_keys(BASE), all_keys(replace(BASE, **change))
    assert {name for name in before if before[name] != after[name]} == affected


def test_image_hash_sees_normalisation_order_and_split() -> None:
    split = ArraySplit(images=np.zeros((4, 1, 2, 2), np.uint8), labels=np.zeros(4, np.int64), mean=(0.0,), std=(1.0,))
    data = ImageData(
        name="d", train=split, test=split, num_classes=2, input_shape=(1, 2, 2), mean=(0.0,), std=(1.0,),
        class_names=("a", "b"), sha256="s",
    )  # fmt: skip
    indices = np.arange(3)
    hashes = [
        hash_images(data, "train", indices),
        hash_images(data, "test", indices),
        hash_images(data, "train", indices[::-1]),
        hash_images(replace(data, mean=(0.1,)), "train", indices),
        hash_images(replace(data, sha256="other"), "train", indices),
        hash_images(data, "train", indices, 0.25, 0),
        hash_images(data, "train", indices, 0.5, 0),
        hash_images(data, "train", indices, 0.25, 1),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_images(data, "train", indices.astype(np.int32)) == hashes[0]


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_cut_out_images_are_those_of_the_split() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (9, 1, 2, 2), dtype=np.uint8)
    split = ArraySplit(images=pixels, labels=np.arange(9), mean=(0.5,), std=(0.2,))
    indices = np.array([7, 1, 4])
    cut = cut_out(split, indices)
    assert len(cut) == 3
    assert torch.equal(cut.split.batch(cut.indices), split.batch(indices))
    np.testing.assert_array_equal(cut.split.labels[cut.indices], indices)


class FakeJob:
    """The part of a candidate job that recalling reads."""

    def __init__(self, probabilities: np.ndarray, stop: StopRule) -> None:
        labels = np.zeros(len(probabilities), np.int64)
        self.reference = DenseReference(labels=labels, probabilities=probabilities, estimate="posterior")
        self.stop = stop


def scored(job: FakeJob, predicted: np.ndarray) -> np.ndarray:
    """Oracle: the loop of the unit that scores a candidate, on predictions known in advance."""
    seen = 0
    while seen < len(predicted):
        seen = min(seen + job.stop.chunk, len(predicted))
        if job.stop.is_decided(job.reference.drops(predicted[:seen])):
            break
    return predicted[:seen]


@given(
    seed=st.integers(0, 2**16),
    size=st.integers(2, 60),
    chunk=st.integers(2, 20),
    first=st.floats(0.0, 50.0),
    second=st.floats(0.0, 50.0),
)
def test_score_of_an_earlier_budget_is_what_this_budget_would_give(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, chunk: int, first: float, second: float
) -> None:
    generator = np.random.default_rng(seed)
    dense = generator.dirichlet(np.ones(3), size).astype(np.float32)
    predicted = np.where(generator.random(size) < 0.8, dense.argmax(1), generator.integers(0, 3, size))
    store = Store(tmp_path_factory.mktemp("store"))
    earlier = scored(FakeJob(dense, StopRule(max_drop=first, quantile=0.84, chunk=chunk)), predicted)
    keep_score(store, "key", CandidateScore(state={"w": np.ones(2, np.float32)}, predicted=earlier))
    store.flush()
    job = FakeJob(dense, StopRule(max_drop=second, quantile=0.84, chunk=chunk))
    expected, recalled = scored(job, predicted), recall_score(job, store, "key")
    if recalled is None:
        assert len(earlier) < len(expected)
    else:
        np.testing.assert_array_equal(recalled.predicted, expected)
        np.testing.assert_array_equal(recalled.state["w"], np.ones(2, np.float32))


# --- a store elsewhere ------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[str]:
    """URI of an empty folder in fsspec's memory."""
    yield "memory://entprune-tests/store"
    files = fsspec.filesystem("memory")
    if files.exists("/entprune-tests"):
        files.rm("/entprune-tests", recursive=True)


def test_result_behind_a_uri_is_computed_once_and_left_nowhere_else(memory: str) -> None:
    with open_store(memory) as store:
        stage = Counted(store)
        assert [stage(), stage()] == [7, 7]
        assert stage.runs == 1
        passage = store.path("logits", "key")
        assert not passage.exists()
    assert not passage.parents[1].exists()
    with open_store(memory) as store:
        assert store.fetch("logits", "key", load_number) == 7
        assert store.reused == {"logits": 1}
        store.discard("logits", "key")
    assert fsspec.filesystem("memory").find("/entprune-tests") == []


def test_file_uri_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/store") as store:
        Counted(store)()
        assert load_number(tmp_path / "store" / "logits" / "key.safetensors") == 7


def test_upload_that_breaks_off_leaves_the_older_result(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    with open_store(memory) as store:
        store.keep("logits", "key", partial(save_number, 1))
    real_put = type(files).put_file

    def cut_off(self: Any, source: str, target: str, **options: Any) -> None:
        real_put(self, source, target, **options)
        raise TimeoutError("the line went dead")

    with monkeypatch.context() as patch, open_store(memory) as store:
        patch.setattr(type(files), "put_file", cut_off)
        store.keep("logits", "key", partial(save_number, 2))
        store.flush()
    with open_store(memory) as store:
        assert store.fetch("logits", "key", load_number) == 1
    assert [Path(name).name for name in files.find("/entprune-tests")] == ["key.safetensors"]


def test_damaged_result_behind_a_uri_is_deleted_and_computed_again(
    memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(memory) as store:
        Counted(store)()
    (name,) = fsspec.filesystem("memory").find("/entprune-tests")
    content = fsspec.filesystem("memory").cat(name)
    fsspec.filesystem("memory").pipe(name, content[:-1] + bytes([content[-1] ^ 1]))
    with open_store(memory) as store:
        stage = Counted(store)
        assert stage() == 7
        assert stage.runs == 1
    assert "damaged and will be computed again" in caplog.text
    with open_store(memory) as store:
        assert store.fetch("logits", "key", load_number) == 7


def test_place_that_does_not_answer_costs_nothing_but_the_results(
    memory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to the server\nand a traceback")

    with open_store(memory) as store:
        for name in ("isfile", "makedirs"):
            monkeypatch.setattr(type(fsspec.filesystem("memory")), name, refuse)
        assert Counted(store)() == 7
    assert "cannot be read: RuntimeError: no route to the server" in caplog.text
    assert "results of this run are not stored: cannot write 'memory://entprune-tests/store/logits" in caplog.text


@pytest.mark.parametrize("uri", ["nowhere://bucket/store", "gdrive://bucket/store"])
def test_uri_that_cannot_be_opened_is_one_sentence(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"'{uri}': expected a folder or a URI that fsspec can open"), open_store(uri):
        pass
