"""Data: the digits, and folders that look like CIFAR-10's, whole and damaged."""

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifold_sde import errors
from manifold_sde.networks.data import Images, cifar10, digits

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def test_digits_are_divided_and_standardised() -> None:
    data = digits(1000)
    assert data.inputs.shape == (1000, 1, 8, 8)
    assert data.test_inputs.shape == (797, 1, 8, 8)
    assert data.inputs.dtype == torch.float64
    assert data.targets.dtype == torch.int64
    assert float(data.inputs.mean().abs()) < 1e-12
    assert abs(float(data.inputs.std()) - 1.0) < 1e-12
    every = torch.cat([data.inputs, data.test_inputs]).flatten(1)
    assert len(every.unique(dim=0)) == 1797
    assert torch.equal(data.one_hot().argmax(1), data.targets)
    assert data.one_hot(data.test_targets).shape == (797, 10)
    assert "1000 for training, 797 for testing" in repr(data)


def test_digits_are_scikit_learns() -> None:
    """Each image, scaled back, is one of the 1797, with its class."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    rows = {
        tuple(image.ravel()): int(t) for image, t in zip(loaded.images, loaded.target, strict=True)
    }
    data = digits(50, test=7, seed=3)
    assert len(data.test_targets) == 7
    zero = data.inputs.min()
    unit = (data.inputs.max() - zero) / 16
    for image, target in zip(data.inputs, data.targets, strict=True):
        pixels = ((image - zero) / unit).round().flatten().tolist()
        assert rows[tuple(pixels)] == int(target)


def test_digits_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    assert torch.equal(digits(30, seed=1).inputs, digits(30, seed=1).inputs)
    assert not torch.equal(digits(30, seed=1).inputs, digits(30, seed=2).inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("n_train", [1798, -1, 1, 2.5])
def test_as_many_digits_as_there_are(n_train: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="n_train"):
        digits(n_train)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(errors.MissingDependencyError, match=r"manifold_sde\[networks\]"):
        digits(10)


# CIFAR-10: twenty images a file, in the formats of the published ones.


def contents() -> dict[str, tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(0)
    return {
        name: (
            generator.integers(0, 256, (20, 3072), dtype=np.uint8),
            generator.permutation(np.arange(20) % 10).tolist(),
        )
        for name in NAMES
    }


def write(folder: Path, *, binary: bool) -> dict[str, str]:
    """Write the files; return their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name, (pixels, labels) in contents().items():
        if binary:
            name += ".bin"
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1)
            content = rows.tobytes()
        else:
            entries = {b"data": pixels, b"labels": labels, b"batch_label": b"a batch"}
            content = pickle.dumps(entries, protocol=2)
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    return checksums


@pytest.mark.parametrize("binary", [False, True])
def test_both_formats_give_the_images(tmp_path: Path, binary: bool) -> None:
    inner = tmp_path / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    checksums = write(inner, binary=binary)
    for folder in (tmp_path, inner, str(inner)):
        data = cifar10(folder, checksums=checksums)
        assert isinstance(data, Images)
        assert data.inputs.shape == (100, 3, 32, 32)
        assert data.test_inputs.shape == (20, 3, 32, 32)
        assert data.inputs.dtype == torch.float32
        pixels, labels = contents()["data_batch_2"]
        assert data.targets[20:40].tolist() == labels
        green = torch.as_tensor(pixels[0, 1024:2048].reshape(32, 32)).float() / 255
        torch.testing.assert_close(data.inputs[20, 1], (green - 0.4822) / 0.2435)
    few = cifar10(tmp_path, n_train=7, n_test=0, seed=4, checksums=checksums)
    assert (len(few.targets), len(few.test_targets)) == (7, 0)
    assert torch.equal(
        few.targets, cifar10(tmp_path, n_train=7, seed=4, checksums=checksums).targets
    )
    with pytest.raises(errors.ArgumentError, match="n_train"):
        cifar10(tmp_path, n_train=101, checksums=checksums)


def test_files_that_are_not_the_published_ones(tmp_path: Path) -> None:
    write(tmp_path, binary=False)
    with pytest.raises(
        errors.DataFileError, match="MD5 c99cafc152244af753f735de768cd75f"
    ) as caught:
        cifar10(tmp_path)
    assert caught.value.path.endswith("data_batch_1")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    checksums = write(tmp_path, binary=False)
    damaged = tmp_path / "data_batch_3"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1000] + bytes(1000))
    with pytest.raises(errors.DataFileError, match="data_batch_3 is not the published one"):
        cifar10(tmp_path, checksums=checksums)
    for broken in (
        content[:500],
        b"",
        b"not a pickle",
        pickle.dumps({b"data": 1}),
        pickle.dumps(3),
    ):
        damaged.write_bytes(broken)
        with pytest.raises(errors.DataFileError, match="data_batch_3 cannot be read"):
            cifar10(tmp_path, checksums={})
    entries = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}
    damaged.write_bytes(pickle.dumps(entries, protocol=2))
    with pytest.raises(errors.DataFileError, match="not from 0 to 9"):
        cifar10(tmp_path, checksums={})


class Call:
    """Unpickles to a call of a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path) -> None:
    write(tmp_path, binary=False)
    touched = tmp_path / "touched"
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Call(touched)}, protocol=2))
    with pytest.raises(errors.DataFileError, match="it asks for"):
        cifar10(tmp_path, checksums={})
    assert not touched.exists()


def test_damaged_binary_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, binary=True)
    assert len(cifar10(tmp_path).targets) == 100
    last = tmp_path / "test_batch.bin"
    content = last.read_bytes()
    last.write_bytes(content[:-1])
    with pytest.raises(errors.DataFileError, match="not a multiple of 3073 bytes"):
        cifar10(tmp_path)
    last.write_bytes(content[: 19 * 3073])
    with pytest.raises(errors.DataFileError, match="the same number of each"):
        cifar10(tmp_path)


def test_missing_folder_and_files_show_the_layout(tmp_path: Path) -> None:
    with pytest.raises(errors.DataFileError, match="no such folder"):
        cifar10(tmp_path / "nowhere")
    with pytest.raises(errors.DataFileError, match="none of the files") as caught:
        cifar10(tmp_path)
    assert "cifar-10-batches-py/" in str(caught.value)
    assert "data_batch_1.bin" in str(caught.value)
    write(tmp_path / "cifar-10-batches-py", binary=False)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(errors.DataFileError, match=r"no data_batch_4 in .*batches-py"):
        cifar10(tmp_path)
