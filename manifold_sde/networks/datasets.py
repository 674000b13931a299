"""Data sets of maps, read once into tensors: into memory, or into a file where they are larger."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from manifold_sde.arguments import describe_bytes, kind_of
from manifold_sde.errors import ArgumentError, DTypeError, ManifoldSDEError, ShapeError
from manifold_sde.progress import Progress
from manifold_sde.remedies import first_line

#: Samples that are read together, and those that are read twice, to see whether they are fixed.
_TOGETHER, _TWICE = 64, 8


def read(
    source: Dataset[Any] | DataLoader[Any], memory: int, progress: bool | str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs and targets of all samples, in order, each read once.

    Args:
        source: Data set of samples (input, ..., target), by number; or a loader of one, whose
            samples, ``collate_fn`` and workers are used, and neither its order nor its batches.
        memory: Bytes above which the tensors stand in a file in the folder for temporary ones,
            which is gone when they are.
        progress: Whether to show a progress bar, or its label.

    Returns:
        The inputs (N, ...) as a tuple, and the targets (N, ...).

    Raises:
        ArgumentError, DTypeError, ShapeError: If the samples are no tensors of one shape, or differ
            from reading to reading.
    """
    loader = source if isinstance(source, DataLoader) else None
    dataset: Any = source if loader is None else loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ArgumentError(
            "the samples of the data set have no numbers",
            received=kind_of(dataset),
            expected="a data set with __len__ and __getitem__, whose samples are drawn by number",
            remedy="torch.utils.data.TensorDataset of the tensors that it yields",
        )
    count = len(dataset)
    if count < 1:
        raise ArgumentError(
            "the data set is empty",
            received=kind_of(dataset),
            expected="at least one sample",
            remedy="the data set that the module is trained on",
        )
    batches = DataLoader(
        dataset,
        batch_size=_TOGETHER,
        num_workers=loader.num_workers if loader else 0,
        collate_fn=loader.collate_fn if loader else None,
        generator=torch.Generator(),  # iterating draws a seed
    )
    try:
        return _read(batches, count, memory, progress)
    except ManifoldSDEError:
        raise
    except Exception as error:
        raise ArgumentError(
            "the data set raised",
            received=f"{type(dataset).__name__}: {first_line(error)}",
            expected=f"samples of one shape, for the numbers 0 to {count - 1}",
            remedy="next(iter(DataLoader(dataset))) by itself first; a transform that crops or "
            "pads the samples to one shape",
        ) from error


def _read(
    batches: DataLoader[Any], count: int, memory: int, progress: bool | str
) -> tuple[tuple[Tensor, ...], Tensor]:
    few = range(min(count, _TWICE))
    first, again = (
        _tensors(batches.collate_fn([batches.dataset[i] for i in few])) for _ in range(2)
    )
    pairs = zip(first, again, strict=True)
    if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        raise ArgumentError(
            "the samples of the data set are others at every reading",
            received=f"two readings of the first {len(few)} samples of a "
            f"{type(batches.dataset).__name__}",
            expected="fixed samples: the loss is a fixed function of the weights",
            remedy="the data set without random transforms; for augmentation, several fixed copies",
        )
    size = count * sum(math.prod(t.shape[1:]) * t.element_size() for t in first)
    if size > memory:
        _require_space(size, memory)
    wholes = [_empty((count, *t.shape[1:]), t.dtype, size > memory) for t in first]
    label = f"data, {describe_bytes(size)}"
    with Progress(progress, label, total=count, unit="sample") as bar:
        start = 0
        for batch in batches:
            rows = _tensors(batch)
            for whole, some in zip(wholes, rows, strict=True):
                if some.shape[1:] != whole.shape[1:] or some.dtype != whole.dtype:
                    raise _differing(some, whole, start)
                whole[start : start + len(some)] = some
            start += len(rows[0])
            bar.update(len(rows[0]))
    return tuple(wholes[:-1]), wholes[-1]


def _tensors(batch: Any) -> Sequence[Tensor]:
    """The inputs and targets of a batch."""
    if (
        not isinstance(batch, (list, tuple))
        or len(batch) < 2
        or not all(isinstance(value, Tensor) and value.dim() for value in batch)
    ):
        raise DTypeError(
            "the samples of the data set are not inputs and a target",
            received=f"a batch that is a {type(batch).__name__}"
            + (f" of {', '.join(map(kind_of, batch))}" if isinstance(batch, (list, tuple)) else ""),
            expected="samples (input, target), or (input, ..., target) for several arguments",
            remedy="a data set around it whose __getitem__ returns such a tuple of tensors and "
            "numbers",
        )
    return [value.detach() for value in batch]


def _differing(some: Tensor, whole: Tensor, start: int) -> ShapeError:
    return ShapeError(
        "the samples of the data set differ in shape or dtype",
        received=f"{tuple(some.shape[1:])} of {some.dtype} from sample {start} on",
        expected=f"{tuple(whole.shape[1:])} of {whole.dtype}, as of sample 0",
        remedy="a transform that crops or pads them to one shape",
    )


def _require_space(size: int, memory: int) -> None:
    """Refuse data that a file in the folder for temporary ones cannot hold."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ArgumentError(
            "the data set fits neither into memory= nor into the folder for temporary files",
            received=f"{describe_bytes(size)} for memory={describe_bytes(memory)!r}, and "
            f"{describe_bytes(free)} free in {folder}",
            expected="room for the data",
            remedy="the environment variable TMPDIR, with another folder; fewer samples",
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, on_disk: bool) -> Tensor:
    """A tensor in memory, or mapped from a file that is gone when it is."""
    count = math.prod(shape)
    if not on_disk or count == 0:
        return torch.empty(shape, dtype=dtype)
    handle, path = tempfile.mkstemp(suffix=".data")
    os.close(handle)
    try:
        return torch.from_file(path, shared=True, size=count, dtype=dtype).reshape(shape)
    finally:
        with contextlib.suppress(OSError):  # where a mapped file cannot be removed
            os.unlink(path)
