"""The images of the examples: Fashion-MNIST if it is installed, and the 8×8 digits that come with scikit-learn.

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) is read from the folder of Debian's package dataset-fashion-mnist, or from
another folder with its four gzipped files.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Images(NamedTuple):
    """Grey images from 0 to 1, (N, height, width), and their classes, (N,)."""

    name: str
    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    class_names: tuple[str, ...]


def load_digits() -> Images:
    """1500 training and 297 test images of 8 × 8 pixels."""
    digits = datasets.load_digits()
    x, classes = torch.from_numpy(digits.images / 16).float(), torch.from_numpy(digits.target)
    return Images("digits", x[:1500], classes[:1500], x[1500:], classes[1500:], tuple("0123456789"))


def load_fashion_mnist(folder: Path = DEBIAN_FOLDER) -> Images:
    """60 000 training and 10 000 test images of 28 × 28 pixels.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    parts = [f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"no Fashion-MNIST in {folder}: missing {', '.join(missing)}")
    train, train_classes, test, test_classes = (_read_idx(folder / name) for name in parts)
    for x, classes in ((train, train_classes), (test, test_classes)):
        if x[0].shape != train[0].shape or classes.shape != x.shape[:1] or classes.max() >= len(CLASSES):
            raise ValueError(f"no Fashion-MNIST in {folder}: images and labels do not fit")
    return Images("Fashion-MNIST", train / 255, train_classes, test / 255, test_classes, CLASSES)


def _read_idx(file: Path) -> Tensor:
    """Bytes in idx format: 0, 0, 8 (for uint8), the number of dimensions; their sizes as big-endian int32; values."""
    try:
        content = gzip.decompress(file.read_bytes())
        sizes = np.frombuffer(content, dtype=">i4", offset=4, count=content[3])
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(sizes))
        return torch.from_numpy(values.reshape(sizes).copy())
    except (OSError, EOFError, zlib.error, ValueError, IndexError):
        raise ValueError(f"cannot read {file}: corrupt, or no gzipped idx file") from None
