"""Data sets that are kept in memory: scikit-learn's digits, torchvision's small images, and the user's own arrays.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from entprune.datasets.checks import check_images, check_labels, check_normalisation, check_pairing
from entprune.datasets.order import balanced_order
from entprune.datasets.splits import ArraySplit, ImageData
from entprune.errors import DataError

DOWNLOADED = {
    "mnist": ("MNIST", (0.1307,), (0.3081,)),
    "fashion_mnist": ("FashionMNIST", (0.2860,), (0.3530,)),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_NPZ_VALIDATION = ("x_val", "y_val")
_DIGITS_FILE = Path("datasets", "data", "digits.csv.gz")  # within scikit-learn
_DIGITS_MEAN, _DIGITS_STD = (0.3053,), (0.3761,)  # of all digits after scaling 0..16 to 0..1


def load_digits(mean: Sequence[float] | None, std: Sequence[float] | None) -> ImageData:
    """Load the 1797 8x8 digits that come with scikit-learn, a fixed stratified quarter of them for testing."""
    pixels, labels = _read_digits()
    images = (pixels / 16).astype(np.float32)
    order = balanced_order(labels, np.random.default_rng(0))
    num_test = len(order) // 4
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return _make_array_data(
        "digits",
        {"train": (images[train], labels[train]), "test": (images[test], labels[test])},
        mean=_DIGITS_MEAN if mean is None else mean,
        std=_DIGITS_STD if std is None else std,
        class_names=[str(digit) for digit in range(10)],
    )


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 8, 8) from 0 to 16 and labels (n,), from scikit-learn's file: importing the package takes seconds."""
    package = find_spec("sklearn")
    if package is None:
        raise DataError("data 'digits': expected scikit-learn to be installed; run pip install scikit-learn.")
    for folder in package.submodule_search_locations or ():
        file = Path(folder) / _DIGITS_FILE
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits as load

    digits = load()
    return digits.images, digits.target


def load_downloaded(
    name: str, root: Path, mean: Sequence[float] | None, std: Sequence[float] | None, download: bool
) -> ImageData:
    """Load one of torchvision's data sets of small images."""
    import torchvision.datasets  # takes more than a second

    class_name, usual_mean, usual_std = DOWNLOADED[name]
    factory = getattr(torchvision.datasets, class_name)
    train, test = (_open_downloaded(name, factory, root, is_train, download) for is_train in (True, False))
    parts = {"train": train, "test": test}
    return _make_array_data(
        name,
        {part: (np.asarray(split.data), np.asarray(split.targets)) for part, split in parts.items()},
        mean=usual_mean if mean is None else mean,
        std=usual_std if std is None else std,
        class_names=train.classes,
    )


def _open_downloaded(name: str, factory: Callable[..., Any], root: Path, is_train: bool, download: bool) -> Any:
    try:
        return factory(root=root, train=is_train, download=False)
    except (RuntimeError, OSError, ValueError) as cause:
        if not download:
            raise DataError(
                f"data '{name}': expected torchvision's files under '{root}', found none or damaged ones; "
                "name their folder as the data root, or allow the download."
            ) from cause
    try:
        return factory(root=root, train=is_train, download=True)
    except Exception as cause:  # a network can fail in more ways than torchvision names
        raise DataError(
            f"data '{name}': not under '{root}', and the download failed ({type(cause).__name__}); put torchvision's "
            "files there, name their folder as the data root, or use npz:FILE."
        ) from cause


def load_npz(spec: str, location: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> ImageData:
    """Load the user's own arrays from one archive, a file or what a URI names."""
    arrays = _read_npz(spec, _fetch(spec, location) if "://" in location else _existing(spec, Path(location)))
    parts = {"train": "train", "test": "test", "validation": "val"}
    splits = {part: (arrays[f"x_{end}"], arrays[f"y_{end}"]) for part, end in parts.items() if f"x_{end}" in arrays}
    num_classes = int(arrays["num_classes"]) if "num_classes" in arrays else None
    class_names = [str(name) for name in arrays["class_names"].ravel()] if "class_names" in arrays else None
    return _make_array_data(spec, splits, mean=mean, std=std, class_names=class_names, num_classes=num_classes)


def _existing(spec: str, path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"data '{spec}': expected a file '{path}', found none; check the path.")
    return path


def _fetch(spec: str, uri: str) -> io.BytesIO:
    """The bytes of a remote file."""
    import fsspec  # late: only URIs need it

    try:
        with fsspec.open(uri, "rb") as stream:
            return io.BytesIO(stream.read())
    except FileNotFoundError as cause:
        raise DataError(f"data '{spec}': expected a file at that address, found none; check the URI.") from cause
    except Exception as cause:  # each back end raises errors of its own
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise DataError(
            f"data '{spec}': expected a URI that fsspec can read, got {type(cause).__name__} ({reason}); check the "
            "address, your rights there, and that the package for its protocol is installed."
        ) from cause


def _read_npz(spec: str, source: Path | io.BytesIO) -> dict[str, npt.NDArray[Any]]:
    try:
        archive = np.load(source, allow_pickle=False)
    except Exception as cause:  # a damaged file can make the reader raise almost anything
        raise DataError(
            f"data '{spec}': expected a file written by numpy.savez, but it cannot be read as one."
        ) from cause
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"data '{spec}': expected an .npz archive, got a single array; save it with numpy.savez.")
    with archive:
        wanted = (*_NPZ_ARRAYS, *_NPZ_VALIDATION) if set(_NPZ_VALIDATION) & set(archive.files) else _NPZ_ARRAYS
        missing = [name for name in wanted if name not in archive.files]
        if missing:
            found = ", ".join(archive.files) or "none"
            raise DataError(
                f"data '{spec}': missing arrays {', '.join(missing)}; found {found}; save them by these names."
            )
        try:
            return {name: archive[name] for name in archive.files if name in (*wanted, "num_classes", "class_names")}
        except Exception as cause:  # object arrays, a broken archive member, a wrong checksum
            raise DataError(
                f"data '{spec}': an array cannot be read ({str(cause).splitlines()[0]}); save plain numeric arrays."
            ) from cause


def _make_array_data(
    name: str,
    arrays: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> ImageData:
    """Check images and labels of the splits "train", "test" and perhaps "validation", and put them together."""
    images = {part: check_images(name, part, x) for part, (x, _) in arrays.items()}
    labels = {part: check_labels(name, part, y) for part, (_, y) in arrays.items()}
    x_train, y_train = images["train"], labels["train"]
    for part, found in images.items():
        if found.shape[1:] != x_train.shape[1:]:
            raise DataError(
                f"data '{name}': expected train and {part} images of one shape (c, h, w), "
                f"got {x_train.shape[1:]} and {found.shape[1:]}."
            )
    if num_classes is None:
        num_classes = len(class_names) if class_names is not None else int(y_train.max(initial=-1)) + 1
    if class_names is not None and len(class_names) != num_classes:
        raise DataError(f"data '{name}': expected {num_classes} class names, got {len(class_names)}.")
    for part in arrays:
        check_pairing(name, part, len(images[part]), labels[part], num_classes)
    if mean is None or std is None:
        own_mean, own_std = _measure_channels(x_train)
        mean, std = (own_mean if mean is None else mean), (own_std if std is None else std)
    mean, std = check_normalisation(name, mean, std, x_train.shape[1])
    splits = {part: ArraySplit(images=images[part], labels=labels[part], mean=mean, std=std) for part in arrays}
    return ImageData(
        name=name,
        train=splits["train"],
        test=splits["test"],
        num_classes=num_classes,
        input_shape=(x_train.shape[1], x_train.shape[2], x_train.shape[3]),
        mean=mean,
        std=std,
        class_names=tuple(map(str, range(num_classes) if class_names is None else class_names)),
        sha256=_hash_arrays(array for part in arrays for array in (images[part], labels[part])),
        validation=splits.get("validation"),
    )


def _measure_channels(images: npt.NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (n, c, h, w), bytes read as 0..1.

    A constant channel gets a standard deviation of 1.
    """
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    channels = [images[:, channel] for channel in range(images.shape[1])]  # one at a time: float64 copies are large
    means = tuple(float(channel.mean(dtype=np.float64)) / scale for channel in channels)
    stds = tuple(float(channel.std(dtype=np.float64)) / scale or 1.0 for channel in channels)
    return means, stds


def _hash_arrays(arrays: Iterable[npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
