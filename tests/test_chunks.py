"""Work in smaller parts, for want of memory: the same bits as in whole batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entprune import Budget, PruneConfig
from entprune.calibration import LayerStatistics
from entprune.candidates import score_candidate
from entprune.datasets import ArraySplit
from entprune.evaluation import chunks
from entprune.models import build_model
from entprune.moments import RowMoments
from entprune.plan import GroupPlan, PruningPlan
from entprune.predictions import PredictJob, logits_range
from entprune.pruning import candidate_job
from entprune.runner import InProcessRunner
from entprune.stages import CalibrationJob, ImageSet, Network, analyse, calibrate, calibrate_shard, sampling_plan
from tests.trap_networks import TRAPS

NETWORKS = {"digits_cnn": (1, 8, 8), "resnet20_cifar": (3, 32, 32)}
NUM_IMAGES = 150  # two whole batches of 64, and a rest


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> Network:
    shape = NETWORKS[request.param]
    return analyse(build_model(request.param, num_classes=10, input_shape=shape), shape, PruneConfig())


@pytest.fixture(scope="module")
def images(network: Network) -> ImageSet:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (NUM_IMAGES, *network.input_shape), dtype=np.uint8)
    channels = network.input_shape[0]
    labels = generator.integers(0, 10, NUM_IMAGES)
    split = ArraySplit(images=pixels, labels=labels, mean=(0.5,) * channels, std=(0.3,) * channels)
    return ImageSet(split=split, indices=np.arange(NUM_IMAGES))


def assert_same_bits(found: dict[str, LayerStatistics], expected: dict[str, LayerStatistics]) -> None:
    for layer, entry in expected.items():
        np.testing.assert_array_equal(found[layer].outputs, entry.outputs)
        if entry.moments is not None:
            form = "rows" if isinstance(entry.moments, RowMoments) else "scatter"
            np.testing.assert_array_equal(getattr(found[layer].moments, form), getattr(entry.moments, form))


@pytest.mark.parametrize("chunk", [32, 16])
def test_statistics_of_chunks_have_the_bits_of_whole_batches(network: Network, images: ImageSet, chunk: int) -> None:
    sampling = sampling_plan(PruneConfig(min_rows=600), NUM_IMAGES)
    job = CalibrationJob(network=network, images=images, sampling=sampling, device="cpu")
    whole, cut = (calibrate_shard(each, (0, NUM_IMAGES)) for each in (job, job.in_chunks(chunk)))
    assert_same_bits(cut, whole)


@pytest.mark.parametrize("chunk", [32, 16])
def test_logits_of_chunks_have_the_bits_of_whole_batches(network: Network, images: ImageSet, chunk: int) -> None:
    job = PredictJob(model=network.model, images=images, device="cpu")
    np.testing.assert_array_equal(logits_range(job.in_chunks(chunk), (0, 150)), logits_range(job, (0, 150)))


@pytest.mark.parametrize("chunk", [64, 16])
def test_bfloat16_answers_nearly_the_same_and_leaves_the_network_as_it_was(
    network: Network, images: ImageSet, chunk: int
) -> None:
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    exact = logits_range(PredictJob(model=network.model, images=images, device="cpu"), (0, 150))
    job = PredictJob(model=network.model, images=images, device="cpu", precision="bfloat16")
    rounded = logits_range(job.in_chunks(chunk), (0, 150))
    assert rounded.dtype == np.float32
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, atol=0.05 * np.abs(exact).max())
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.is_contiguous()


def test_candidate_in_chunks_is_the_same_network(network: Network, images: ImageSet) -> None:
    config, runner = PruneConfig(min_rows=600), InProcessRunner()
    statistics = calibrate(network, images, config, runner)
    job = candidate_job(network, images, statistics, images, Budget(parameters_removed=0.5), config, runner)
    plan = PruningPlan(
        groups=tuple(
            GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=tuple(range(max(1, g.num_channels // 2))))
            for g in network.groups.groups
        )
    )
    whole, cut = score_candidate(job, plan), score_candidate(job.in_chunks(16), plan)
    np.testing.assert_array_equal(cut.predicted, whole.predicted)
    assert cut.state.keys() == whole.state.keys()
    rounded = score_candidate(replace(job, precision="bfloat16"), plan)
    assert rounded.predicted.shape == whole.predicted.shape
    assert (rounded.predicted == whole.predicted).mean() > 0.8
    for name, value in whole.state.items():
        np.testing.assert_array_equal(cut.state[name], value)
        np.testing.assert_array_equal(rounded.state[name], value)


def test_layer_that_is_called_twice_is_summed_in_the_same_order() -> None:
    model = TRAPS["module called twice"].build().eval()
    network = analyse(model, (2, 6, 6), PruneConfig())
    pixels = np.random.default_rng(0).random((60, 2, 6, 6), dtype=np.float32)
    split = ArraySplit(images=pixels, labels=np.zeros(60, np.int64), mean=(0.0, 0.0), std=(1.0, 1.0))
    job = CalibrationJob(
        network=network, images=ImageSet(split=split, indices=np.arange(60)),
        sampling=sampling_plan(PruneConfig(batch_size=40, min_rows=100), 60), device="cpu",
    )  # fmt: skip
    assert_same_bits(calibrate_shard(job.in_chunks(16), (0, 60)), calibrate_shard(job, (0, 60)))


@given(count=st.integers(1, 300), batch=st.integers(1, 80), chunk=st.integers(1, 80))
def test_chunks_are_the_batches_cut_into_parts_that_are_not_too_small(count: int, batch: int, chunk: int) -> None:
    parts = list(chunks(np.arange(count), batch, chunk))
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(count))
    edges = {0, *np.cumsum([len(part) for part in parts])}
    assert {*range(0, count, batch), count} <= edges
    last = count % batch or batch
    assert all(min(chunk, last, batch) <= len(part) <= batch for part in parts)
