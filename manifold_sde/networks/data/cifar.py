"""CIFAR-10 from a folder that the user names, in either published format. Nothing is downloaded."""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

from manifold_sde.errors import DataFileError
from manifold_sde.networks.data.images import Images, chosen
from manifold_sde.networks.mlp import generator_of

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = ("test_batch",)
_PYTHON, _BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_PIXELS = 3 * 32 * 32
_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: Mean and deviation of the channels of the training images, in pixels of 0 to 1.
_MEAN, _DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

#: MD5 of the published files of the Python version. For the binary version none are published.
CHECKSUMS: Mapping[str, str] = MappingProxyType(
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    }
)
_LAYOUT = f"""one of
    {_PYTHON}/    {", ".join(_TRAIN)}, test_batch
    {_BINARY}/   {_TRAIN[0]}.bin, ..., {_TRAIN[-1]}.bin, test_batch.bin"""


def cifar10(
    folder: str | Path,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int | torch.Generator = 0,
    dtype: torch.dtype = torch.float32,
    checksums: Mapping[str, str] = CHECKSUMS,
) -> Images:
    """CIFAR-10 from a folder: 50,000 training and 10,000 test images of 3 x 32 x 32.

    Each channel is shifted and scaled by the mean and deviation of all training images. Files of
    the Python version have to have their published MD5, and are read by an unpickler that knows
    arrays and nothing else. For the binary version no MD5 of the files is published: their sizes
    and their numbers of each class are checked, which a changed pixel passes.

    Args:
        folder: Folder that holds ``cifar-10-batches-py`` or ``cifar-10-batches-bin``, or one of
            these two.
        n_train: Number of training images, drawn at random; by default all, in their order.
        n_test: The same for the test images.
        seed: Seed or generator of the draw.
        dtype: Floating-point type of the images.
        checksums: MD5 of the files by their names, where they are to be checked: also of the files
            of the binary version, if you have them.

    Raises:
        DataFileError: If files are missing or are not the published ones.
        ArgumentError: If there are not so many images.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images" (2009).
    """
    home, suffix = _home(folder)
    parts = []
    generator = generator_of(seed)
    for names, wanted, what in ((_TRAIN, n_train, "n_train"), (_TEST, n_test, "n_test")):
        batches = [_batch(home / f"{name}{suffix}", checksums) for name in names]
        pixels = np.concatenate([batch[0] for batch in batches])
        labels = np.concatenate([batch[1] for batch in batches])
        if suffix and not checksums.get(f"{names[0]}{suffix}"):
            _require_balance(labels, home)
        index, _ = chosen(len(labels), wanted, generator, what)
        images = torch.as_tensor(pixels[index.numpy()]).reshape(-1, 3, 32, 32).to(dtype) / 255.0
        mean, deviation = (torch.tensor(v, dtype=dtype)[:, None, None] for v in (_MEAN, _DEVIATION))
        parts += [(images - mean) / deviation, torch.as_tensor(labels)[index]]
    inputs, targets, test_inputs, test_targets = parts
    return Images(inputs, targets, test_inputs, test_targets, classes=_CLASSES)


def _home(folder: str | Path) -> tuple[Path, str]:
    """The folder of the batches, and the suffix of their names."""
    given = Path(folder)
    if not given.is_dir():
        raise DataFileError(
            "there is no such folder",
            path=str(given),
            received=str(given),
            expected=f"a folder with {_LAYOUT}",
            remedy="unpack the published archive, and name the folder that it is in",
        )
    missing: dict[Path, list[str]] = {}
    for home in (given, given / _PYTHON, given / _BINARY):
        for suffix in ("", ".bin"):
            names = [f"{name}{suffix}" for name in (*_TRAIN, *_TEST)]
            absent = [name for name in names if not (home / name).is_file()]
            if not absent:
                return home, suffix
            if len(absent) < len(names):
                missing[home] = absent
    received = "; ".join(f"no {', '.join(names)} in {home}" for home, names in missing.items())
    raise DataFileError(
        "the files of CIFAR-10 are not all there",
        path=str(given),
        received=received or f"none of the files, in {given}",
        expected=f"in {given}, {_LAYOUT}",
        remedy="unpack the published archive there; nothing is downloaded",
    )


def _batch(path: Path, checksums: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) and classes (n,) of one file."""
    content = path.read_bytes()
    wanted = checksums.get(path.name)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if wanted is not None and found != wanted:
        raise DataFileError(
            f"the file {path.name} is not the published one",
            path=str(path),
            received=f"{len(content)} bytes with MD5 {found}",
            expected=f"MD5 {wanted}",
            remedy="unpack the archive again: the file is damaged or was changed",
        )
    try:
        pixels, labels = (_binary if path.suffix else _pickled)(content)
    except (pickle.UnpicklingError, ValueError, KeyError, EOFError, TypeError, IndexError) as error:
        raise DataFileError(
            f"the file {path.name} cannot be read",
            path=str(path),
            received=f"{len(content)} bytes; {type(error).__name__}: {error}",
            expected="images of 3072 pixels, each with a class from 0 to 9",
            remedy="unpack the archive again: the file is damaged or was changed",
        ) from error
    return pixels, labels


def _binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (_PIXELS + 1):
        raise ValueError(f"not a multiple of {_PIXELS + 1} bytes")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, _PIXELS + 1)
    return _checked(rows[:, 1:], rows[:, 0])


def _pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return _checked(batch[b"data"], batch[b"labels"])


def _checked(pixels: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = np.asarray(pixels), np.asarray(labels).astype(np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise ValueError(f"{pixels.shape} pixels of {pixels.dtype} for {len(labels)} classes")
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise ValueError("classes that are not from 0 to 9")
    return pixels, labels


def _require_balance(labels: np.ndarray, home: Path) -> None:
    """Each class is as frequent as the others, in the training and in the test images."""
    counts = np.bincount(labels, minlength=len(_CLASSES))
    if len(set(counts.tolist())) > 1:
        raise DataFileError(
            "the files of CIFAR-10 are not the published ones",
            path=str(home),
            received=f"images of the classes 0 to 9: {', '.join(map(str, counts))}",
            expected="the same number of each",
            remedy="unpack the archive again: a file is damaged or was changed",
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, and refuses everything else that would call something."""

    _ALLOWED = MappingProxyType(
        {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """The few functions that make arrays.

        Raises:
            UnpicklingError: If the file asks for another.
        """
        try:
            return self._ALLOWED[module, name]
        except KeyError as error:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from error
