"""Perturbed validation images: which of them, how far, and the same whoever reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import entprune
from entprune.config import PruneConfig
from entprune.datasets import ArraySplit
from entprune.datasets.perturbed import PerturbedSplit, perturb, perturb_share
from entprune.errors import ConfigError
from entprune.predictions import dense_reference, with_perturbed
from entprune.selection import fit_temperature
from entprune.stages import ImageSet

ANGLE, SCALE, ACROSS, DOWN, CONTRAST, BRIGHTNESS = range(6)


def make_split(*, channels: int = 3, count: int = 40) -> ArraySplit:
    generator = np.random.default_rng(0)
    return ArraySplit(
        images=generator.integers(0, 256, (count, channels, 12, 10), dtype=np.uint8),
        labels=np.arange(count) % 4,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def draws(**values: float) -> Tensor:
    drawn = torch.zeros(1, 6)
    for name, value in values.items():
        drawn[0, globals()[name]] = value
    return drawn


def smooth_image() -> Tensor:
    """(1, 1, 40, 40): a bump off the centre."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    return torch.exp(-((x - 30.0) ** 2 + (y - 20.0) ** 2) / 18.0).view(1, 1, 40, 40)


def centre(image: Tensor) -> tuple[float, float]:
    """Centre of mass: across, down."""
    mass = image[0, 0] / image.sum()
    places = torch.arange(40.0)
    return float((mass.sum(0) * places).sum()), float((mass.sum(1) * places).sum())


def test_without_changes_the_image_stays() -> None:
    image = smooth_image()
    torch.testing.assert_close(perturb(image, draws()), image, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ACROSS": 1.0}, (29.0, 20.0)),  # by 2.5 % of the side: one pixel
        ({"DOWN": -1.0}, (30.0, 21.0)),
        ({"ANGLE": 1.0}, (19.5 + 10.48, 19.5 - 0.87)),  # (10.5, 0.5) from the middle, turned by 7.5 degrees
        ({"SCALE": 1.0}, (19.5 + 10.5 / 1.06, 19.5 + 0.5 / 1.06)),
    ],
)
def test_changes_move_what_is_seen_as_far_as_documented(
    change: dict[str, float], expected: tuple[float, float]
) -> None:
    assert centre(perturb(smooth_image(), draws(**change))) == pytest.approx(expected, abs=0.05)


def test_contrast_is_about_the_mean_and_brightness_is_added() -> None:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = perturb(image, draws(CONTRAST=1.0, BRIGHTNESS=-1.0))
    expected = image.mean() + 1.15 * (image - image.mean()) - 0.25
    torch.testing.assert_close(changed, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 10), (0.0, 0), (1.0, 40), (0.1, 4)])
def test_a_share_is_perturbed_evenly_spread_and_the_rest_is_as_it_was(share: float, expected: int) -> None:
    split, indices = make_split(), np.arange(39, -1, -1)
    perturbed = perturb_share(split, indices, share, seed=0)
    plain = split.batch(indices)
    seen = perturbed.batch(np.arange(40))
    differs = (seen != plain).flatten(1).any(1).numpy()
    assert differs.sum() == expected
    assert all(abs(differs[:end].sum() - share * end) < 1.0 for end in range(41))
    np.testing.assert_array_equal(perturbed.labels, split.labels[indices])
    assert torch.equal(split.batch(indices), plain)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_the_same_in_any_batch_and_follows_the_seed(channels: int) -> None:
    split, indices = make_split(channels=channels), np.arange(40)
    first = perturb_share(split, indices, 0.5, seed=3)
    whole = first.batch(indices)
    assert torch.equal(whole, torch.cat([first.batch(part) for part in np.array_split(indices, 7)]))
    assert torch.equal(whole, perturb_share(split, indices, 0.5, seed=3).batch(indices))
    assert not torch.equal(whole, perturb_share(split, indices, 0.5, seed=4).batch(indices))
    assert whole.stride() == split.batch(indices).stride()


def test_images_that_a_split_lends_stay_as_they_are() -> None:
    class Lender:
        images, labels = torch.rand(8, 3, 4, 4), np.zeros(8, np.int64)

        def __len__(self) -> int:
            return 8

        def batch(self, indices: np.ndarray) -> Tensor:
            return self.images[int(indices[0]) : int(indices[-1]) + 1]  # a view

    before = Lender.images.clone()
    seen = perturb_share(Lender(), np.arange(8), 1.0, seed=0).batch(np.arange(8))
    assert not torch.equal(seen, before)
    assert torch.equal(Lender.images, before)


def test_only_training_images_judged_by_posterior_are_perturbed_unless_asked_for() -> None:
    assert PruneConfig().sized_for(1).perturbed_share == 0.25
    assert PruneConfig().sized_for(1, has_unseen=True).perturbed_share == 0.0
    assert PruneConfig(drop_estimate="labels").sized_for(1).perturbed_share == 0.0
    assert PruneConfig(perturbed_share=0.5).sized_for(1, has_unseen=True).perturbed_share == 0.5
    assert PruneConfig(perturbed_share=0.0).sized_for(1).perturbed_share == 0.0
    images = ImageSet(split=make_split(), indices=np.arange(8))
    assert with_perturbed(images, PruneConfig(perturbed_share=0.0)) is images
    assert isinstance(with_perturbed(images, PruneConfig(perturbed_share=0.5)).split, PerturbedSplit)


def test_temperature_is_fitted_on_perturbed_images_where_there_are_any() -> None:
    images = ImageSet(split=make_split(), indices=np.arange(40)[::-1])
    config = PruneConfig(perturbed_share=0.25)
    compared = with_perturbed(images, config)
    logits = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    chosen = compared.split.is_perturbed  # type: ignore[attr-defined]
    logits[~chosen, compared.split.labels[~chosen]] += 2.0  # known by heart

    found = dense_reference(logits, compared, config).probabilities
    expected = logits / fit_temperature(logits[chosen], compared.split.labels[chosen])
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected).softmax(1))
    plain = dense_reference(logits, images, config).probabilities
    assert np.median(plain[chosen].max(1)) > np.median(found[chosen].max(1)) + 0.2


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"perturbed_share must lie in \[0, 1\]"):
        PruneConfig(perturbed_share=share)


def test_pruning_compares_candidates_on_perturbed_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(*arguments: Any) -> None:
        seen.append(arguments[3])
        raise _Enough

    monkeypatch.setattr("entprune.pruning.candidate_job", record)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten(), torch.nn.Linear(192, 4)
    )
    split = make_split()
    with pytest.raises(_Enough):
        entprune.prune(
            network, split, budget=entprune.Budget(max_accuracy_drop=1.0), evaluate=split, config=PruneConfig()
        )
    assert isinstance(seen[0].split, PerturbedSplit)
    assert seen[0].split.is_perturbed.sum() == 10


class _Enough(Exception):  # noqa: N818 -- no error
    """Ends a run that has shown what was asked."""
