"""Data sets: what each specification gives, what is refused with which sentence, and how the train split is divided."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from entprune.datasets import ArraySplit, ImageData, choose_validation, load_data, split_training
from entprune.datasets.resident import place_images, resident_images
from entprune.errors import DataError

SHARED_MNIST = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "mnist"


def make_arrays(**changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "data.npz"
    np.savez(path, **make_arrays(**changes))
    return f"npz:{path}"


def make_data(labels: np.ndarray) -> ImageData:
    images = np.zeros((len(labels), 1, 2, 2), np.uint8)
    split = ArraySplit(images=images, labels=labels.astype(np.int64), mean=(0.0,), std=(1.0,))
    return ImageData(
        name="made", train=split, test=split, num_classes=int(labels.max()) + 1, input_shape=(1, 2, 2),
        mean=(0.0,), std=(1.0,), class_names=("a",), sha256="0" * 64,
    )  # fmt: skip


def test_digits_are_split_the_same_way_each_time() -> None:
    first, second = load_data("digits"), load_data("digits")
    assert (len(first.train), len(first.test)) == (1348, 449)
    assert (first.input_shape, first.num_classes) == ((1, 8, 8), 10)
    assert first.sha256 == second.sha256
    assert np.array_equal(first.test.labels, second.test.labels)
    shares = np.bincount(first.test.labels) / np.bincount(np.concatenate([first.train.labels, first.test.labels]))
    assert np.abs(shares - 0.25).max() < 0.03


def test_digits_are_normalised() -> None:
    data = load_data("digits")
    images = torch.cat([part.batch(np.arange(len(part))) for part in (data.train, data.test)])
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


def test_digits_are_those_that_scikit_learn_itself_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    read = load_data("digits")
    monkeypatch.setattr("entprune.datasets.arrays._DIGITS_FILE", Path("moved_elsewhere.csv.gz"))
    assert load_data("digits").sha256 == read.sha256


def test_digits_without_scikit_learn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match="expected scikit-learn to be installed"):
        load_data("digits")


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_npz_layouts_give_the_same_images(tmp_path: Path, layout: str) -> None:
    arrays = make_arrays()
    if layout == "nchw":
        arrays = {name: array.transpose(0, 3, 1, 2) if array.ndim == 4 else array for name, array in arrays.items()}
    data = load_data(written(tmp_path, **arrays), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    assert data.input_shape == (3, 5, 4)
    indices = np.array([7, 2])
    expected = make_arrays()["x_train"][indices].transpose(0, 3, 1, 2) / 255
    expected = (expected - 0.5) / np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1)
    images = data.train.batch(indices)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)


def test_npz_greyscale_without_channel_axis(tmp_path: Path) -> None:
    arrays = make_arrays()
    spec = written(tmp_path, x_train=arrays["x_train"][..., 0], x_test=arrays["x_test"][..., 0])
    assert load_data(spec).input_shape == (1, 5, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_is_normalised_by_its_own_train_split(tmp_path: Path, dtype: type) -> None:
    arrays = {name: make_arrays()[name].astype(dtype) for name in ("x_train", "x_test")}
    data = load_data(written(tmp_path, **arrays))
    images = data.train.batch(np.arange(12))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_constant_channel_is_not_divided_by_zero(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays["x_train"][..., 1] = 7
    assert load_data(written(tmp_path, **arrays)).train.batch(np.arange(12))[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_on_a_device_are_those_of_their_split(kind: type, channels: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, channels, 4, 5)).astype(kind)
    mean, std = (0.3, 0.4, 0.5)[:channels], (0.2, 0.3, 0.1)[:channels]
    split = ArraySplit(images=images, labels=np.arange(6), mean=mean, std=std)
    placed, chosen = resident_images(split, torch.device("cpu")), np.array([4, 0, 4])
    for _ in range(2):  # reading changes nothing
        batch, labels = placed.batch(chosen)
        assert torch.equal(batch, split.batch(chosen))
        assert labels.tolist() == [4, 0, 4]
    assert place_images(split, torch.device("cpu")) is None


def test_reading_a_batch_leaves_float_arrays_alone(tmp_path: Path) -> None:
    data = load_data(written(tmp_path, **{name: make_arrays()[name] / 255 for name in ("x_train", "x_test")}))
    first = data.train.batch(np.arange(5))
    assert torch.equal(first, data.train.batch(np.arange(5)))


def test_optional_npz_arrays(tmp_path: Path) -> None:
    data = load_data(written(tmp_path, num_classes=np.array(5)))
    assert (data.num_classes, data.class_names) == (5, ("0", "1", "2", "3", "4"))
    data = load_data(written(tmp_path, class_names=np.array(["ant", "bee", "cat"])))
    assert data.class_names == ("ant", "bee", "cat")


def test_hash_follows_pixels_and_labels(tmp_path: Path) -> None:
    original = make_arrays()
    hashes = {load_data(written(tmp_path)).sha256}
    assert load_data(written(tmp_path), mean=(0, 0, 0), std=(1, 1, 1)).sha256 in hashes
    for name in original:
        array = original[name].copy()
        array.flat[0] = (array.flat[0] + 1) % 3
        hashes.add(load_data(written(tmp_path, **{name: array})).sha256)
    assert len(hashes) == 5


def test_validation_split_of_an_archive(tmp_path: Path) -> None:
    without = load_data(written(tmp_path))
    assert without.validation is None
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 4, 3), dtype=np.uint8)
    data = load_data(written(tmp_path, x_val=pixels, y_val=np.array([2, 1, 0, 1])))
    assert data.validation is not None
    assert data.validation.labels.tolist() == [2, 1, 0, 1]
    expected = (pixels[3].transpose(2, 0, 1) / 255 - np.reshape(data.mean, (3, 1, 1))) / np.reshape(data.std, (3, 1, 1))
    assert np.allclose(data.validation.batch(np.array([3]))[0], expected, atol=1e-5)
    assert data.sha256 != without.sha256
    assert torch.equal(data.train.batch(np.arange(12)), without.train.batch(np.arange(12)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_test": None}, "missing arrays x_test, y_test; found x_train, y_train"),
        ({"x_train": np.zeros((0, 5, 4, 3), np.uint8), "y_train": np.zeros(0, int)}, "train split: .*got none"),
        ({"y_train": np.arange(11) % 3}, "train split: .*got 12 images and 11 labels"),
        ({"y_test": np.arange(6)}, r"test split: expected labels in \[0, 3\), got 0 to 5"),
        ({"y_train": np.arange(12) - 1}, "train split: expected labels in .*got -1 to 10"),
        ({"y_train": np.arange(12) * 1_000_000}, "expected labels below 100000, got 11000000"),
        ({"y_train": np.arange(12) / 2}, "train split: expected integer labels .*got float64"),
        (
            {"y_train": np.eye(12, 3, dtype=int)},
            r"expected integer labels of shape \(n,\), got int64 of shape \(12, 3\)",
        ),
        ({"x_train": np.full((12, 5, 4, 3), np.nan)}, "train split: expected finite pixel values"),
        ({"x_test": np.full((6, 5, 4, 3), np.inf)}, "test split: expected finite pixel values"),
        ({"x_train": np.zeros((12, 5, 4, 3), int)}, "train split: expected images of dtype uint8 or float, got int64"),
        ({"x_train": np.zeros((12, 60))}, r"train split: expected images .*got shape \(12, 60\)"),
        ({"x_test": np.zeros((6, 7, 4, 3))}, r"one shape .*got \(3, 5, 4\) and \(3, 7, 4\)"),
        ({"y_train": np.array([None] * 12)}, "an array cannot be read .*plain numeric arrays"),
        ({"class_names": np.array(["ant"]), "num_classes": np.array(3)}, "expected 3 class names, got 1"),
        ({"x_val": np.zeros((6, 5, 4, 3), np.uint8)}, "missing arrays y_val; found x_train"),
        ({"x_val": np.zeros((6, 7, 4, 3)), "y_val": np.arange(6) % 3}, r"train and validation images of one shape"),
        ({"x_val": np.zeros((6, 5, 4, 3)), "y_val": np.arange(6)}, r"validation split: expected labels in \[0, 3\)"),
    ],
)
def test_unusable_npz_is_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "expected 3 values of mean and of std, got 1 and 3"),
        ({"std": (0.5, 0.5)}, "expected 3 values of mean and of std, got 3 and 2"),
        ({"std": (0.5, 0.0, 0.5)}, "expected finite means and positive std"),
        ({"mean": (0.5, float("nan"), 0.5)}, "expected finite means and positive std"),
        ({"image_size": 32}, "expected image_size 5x4, got 32; leave it out"),
    ],
)
def test_unusable_options_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(written(tmp_path), **options)


def test_npz_behind_a_uri_gives_the_same_images(tmp_path: Path) -> None:
    local = written(tmp_path)
    fsspec.filesystem("memory").put_file(str(tmp_path / "data.npz"), "/entprune-data/data.npz")
    first, second = load_data(local), load_data("npz:memory://entprune-data/data.npz")
    assert first.sha256 == second.sha256
    assert load_data(f"npz:file://{tmp_path / 'data.npz'}").sha256 == first.sha256


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("npz:memory://entprune-data/absent.npz", "expected a file at that address, found none"),
        ("npz:nowhere://data.npz", r"expected a URI that fsspec can read, got ValueError \(Protocol not known"),
    ],
)
def test_uri_that_cannot_be_read_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_files_that_are_no_archive_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none; check the path"):
        load_data(f"npz:{tmp_path / 'absent.npz'}")
    (tmp_path / "letter.npz").write_text("hello")
    with pytest.raises(DataError, match=r"expected a file written by numpy\.savez"):
        load_data(f"npz:{tmp_path / 'letter.npz'}")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match="got a single array"):
        load_data(f"npz:{tmp_path / 'single.npy'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("minst", "unknown data 'minst': did you mean mnist"),
        ("cifar-10", "unknown data 'cifar-10': did you mean cifar10"),
        ("npz:", "unknown data 'npz:'"),
        ("?", "unknown data '[?]': expected one of digits, mnist, "),
    ],
)
def test_unknown_specification_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_absent_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    with pytest.raises(DataError, match=r"found none or damaged ones; .*or allow the download"):
        load_data("mnist", root=tmp_path, download=False)

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fail)
    with pytest.raises(DataError, match=r"the download failed \(RuntimeError\); .*or use npz:FILE"):
        load_data("mnist", root=tmp_path)


def test_mnist_in_torchvisions_layout(tmp_path: Path) -> None:
    if not (SHARED_MNIST / "MNIST" / "raw").is_dir():
        pytest.skip("the benchmark data in ../shared are not here")
    import gzip

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (SHARED_MNIST / "MNIST" / "raw").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    data = load_data("mnist", root=tmp_path, download=False)
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (60_000, 10_000, (1, 28, 28), 10)
    assert abs(float(data.train.batch(np.arange(5000)).mean())) < 0.02


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for label, class_name in enumerate(("ant", "bee")):
            (tmp_path / part / class_name).mkdir(parents=True)
            for position in range(count):
                image = Image.new("RGB", (40, 30), (255 * label, 0, 0))
                image.paste((0, 255, 0), (0, 0, 2, 30))  # a stripe that the centre crop cuts off
                image.save(tmp_path / part / class_name / f"{position}.png")
    return tmp_path


def test_image_folder(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}", image_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert (len(data.train), len(data.test), data.class_names) == (6, 4, ("ant", "bee"))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = data.train.batch(np.array([0, 5]))
    assert images.shape == (2, *data.input_shape) == (2, 3, 16, 16)
    assert images[:, 1].max() == 0, "the stripe lies outside the centre"
    assert (images[0, 0].max(), images[1, 0].min()) == (0, 1)


def test_image_folder_with_both_test_and_val(image_folder: Path) -> None:
    spec = f"imagefolder:{image_folder}"
    assert load_data(spec).validation is None, "val is what there is to test on"
    before = load_data(spec).sha256
    for class_name in ("ant", "bee"):
        (image_folder / "test" / class_name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (0, 0, 255)).save(image_folder / "test" / class_name / "0.png")
    data = load_data(spec, image_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 4, 2)
    assert data.test.batch(np.array([0]))[0, 2].min() == 1, "the blue image is in test"
    assert load_data(spec).sha256 != before
    (image_folder / "val" / "cow").mkdir()
    with pytest.raises(DataError, match="classes cow are in 'val' but not in 'train'"):
        load_data(spec)


def test_image_folder_defaults(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}")
    assert data.input_shape == (3, 224, 224)
    assert data.train.batch(np.array([1])).shape == (1, 3, 224, 224)
    assert data.mean == (0.485, 0.456, 0.406)


def test_image_folder_hash_follows_names_and_sizes(image_folder: Path) -> None:
    spec = f"imagefolder:{image_folder}"
    before = load_data(spec).sha256
    assert load_data(spec).sha256 == before
    assert load_data(spec, image_size=64).sha256 != before
    (image_folder / "train" / "ant" / "0.png").rename(image_folder / "train" / "ant" / "9.png")
    assert load_data(spec).sha256 != before


def test_unusable_image_folders_are_explained(image_folder: Path) -> None:
    spec = f"imagefolder:{image_folder}"
    with pytest.raises(DataError, match="expected folders 'train' and 'test'"):
        load_data(f"imagefolder:{image_folder / 'train'}")
    with pytest.raises(DataError, match="expected image_size >= 1, got 0"):
        load_data(spec, image_size=0)
    (image_folder / "train" / "ant" / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"cannot be decoded .*; remove or replace it"):
        load_data(spec).train.batch(np.array([0]))
    (image_folder / "val" / "cow").mkdir()
    with pytest.raises(DataError, match="classes cow are in 'val' but not in 'train'"):
        load_data(spec)


def test_data_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from entprune.datasets import load_data\n"
        f"def plain():\n    return load_data({written(tmp_path)!r})\n"
        f"def scaled(mean, std):\n    return load_data({written(tmp_path)!r}, mean=mean, std=std)\n"
        "def wrong():\n    return 3\n"
    )
    (tmp_path / "entprune_test_data.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load_data("entprune_test_data:plain").train) == 12
    assert load_data("entprune_test_data:scaled", mean=(1, 2, 3)).mean == (1, 2, 3)
    with pytest.raises(DataError, match="it accepts no mean; leave them out"):
        load_data("entprune_test_data:plain", mean=(1, 2, 3))
    with pytest.raises(DataError, match="expected it to return an ImageData, got int"):
        load_data("entprune_test_data:wrong")
    sys.modules.pop("entprune_test_data")


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60).map(np.array),
    calibration=st.integers(1, 80),
    validation=st.integers(0, 80),
    seed=st.integers(0, 5),
)
def test_division_is_disjoint_bounded_and_repeatable(
    labels: np.ndarray, calibration: int, validation: int, seed: int
) -> None:
    data = make_data(labels)
    for_calibration, for_validation = split_training(data, calibration=calibration, validation=validation, seed=seed)
    assert len(for_calibration) == min(calibration, len(labels) // 2)
    assert len(for_validation) == min(validation, len(labels) // 2)
    together = np.concatenate([for_calibration, for_validation])
    assert len(np.unique(together)) == len(together)
    assert np.isin(together, np.arange(len(labels))).all()
    again, _ = split_training(data, calibration=calibration, validation=validation + 1, seed=seed)
    assert np.array_equal(again, for_calibration), "calibration must not depend on the size of validation"


def test_division_keeps_classes_in_proportion() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    parts = split_training(make_data(labels), calibration=100, validation=200, seed=0)
    for part in (*parts, parts[0][:50]):
        shares = np.bincount(labels[part], minlength=3) / len(part)
        assert np.abs(shares - [0.6, 0.3, 0.1]).max() <= 0.05


def test_choice_from_a_validation_split_keeps_classes_in_proportion() -> None:
    data = make_data(np.arange(40) % 4)
    with pytest.raises(DataError, match="expected a validation split, got none"):
        choose_validation(data, number=10, seed=0)
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    data = dataclasses.replace(data, validation=make_data(labels).train)
    chosen = choose_validation(data, number=200, seed=0)
    assert len(np.unique(chosen)) == 200
    assert np.abs(np.bincount(labels[chosen], minlength=3) / 200 - [0.6, 0.3, 0.1]).max() <= 0.05
    assert not np.array_equal(chosen, choose_validation(data, number=200, seed=1))
    assert len(np.unique(choose_validation(data, number=5000, seed=0))) == 1000


def test_division_follows_the_seed() -> None:
    data = make_data(np.arange(200) % 4)
    first, second = (split_training(data, calibration=50, validation=50, seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("calibration", "validation"), [(0, 5), (5, -1)])
def test_division_refuses_unusable_sizes(calibration: int, validation: int) -> None:
    with pytest.raises(DataError, match="expected calibration >= 1, validation >= 0"):
        split_training(make_data(np.arange(20) % 2), calibration=calibration, validation=validation, seed=0)


@pytest.mark.parametrize("has_own_strides", [False, True])
def test_images_of_one_channel_are_laid_out_alike_in_every_process(has_own_strides: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 5), dtype=np.uint8)
    images = pixels[..., None].transpose(0, 3, 1, 2) if has_own_strides else pixels[:, None].copy()
    split = ArraySplit(images=images, labels=np.zeros(6, np.int64), mean=(0.5,), std=(0.5,))
    batch = split.batch(np.arange(4))
    assert batch.stride() == (25, 1, 5, 1)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(batch[:, 0].numpy(), pixels[:4] / 127.5 - 1, atol=1e-6)
