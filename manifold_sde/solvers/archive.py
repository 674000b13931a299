"""Files that hold arrays and a header: written whole or not at all, checked when read.

A file is a NumPy archive without pickles and without compression: what it says of itself is
compared with its size before anything is read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import platform
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from manifold_sde.arguments import check_path
from manifold_sde.errors import CheckpointError, ManifoldSDEError
from manifold_sde.writing import held, replacing, sweep, unwritable

_HEADER = "header"
#: What reading a damaged file raises; changed flags of a zip file are taken for features.
_DAMAGED = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile),
    *(zlib.error, SyntaxError, tokenize.TokenError, MemoryError, OverflowError),
)
#: Kinds of numbers and texts that an array may hold.
_KINDS = "biufcUS"
#: Ending of the files of a folder.
SUFFIX = ".npz"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from manifold_sde import __version__

    return {
        "manifold_sde": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write_archive(
    path: str | Path, kind: str, header: dict[str, Any], arrays: dict[str, NDArray[Any]]
) -> None:
    """Write arrays and a header in one step.

    Args:
        path: Where to; its folder is made.
        kind: What the file holds; checked when it is read.
        header: Anything that JSON can hold.
        arrays: The arrays.

    Raises:
        WriteError: If it cannot be written.
    """
    text = json.dumps({"kind": kind, "arrays": sorted(arrays), **header}, allow_nan=True)
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **{_HEADER: np.array(text)}, **arrays)


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """A folder for archives, made, kept for this run alone, and without unfinished files.

    Raises:
        CheckpointError: If another run keeps it.
        WriteError: If nothing can be written there, and nothing is there to be read.
    """
    with held(folder / ".lock", folder, readable=any(folder.glob(f"*{SUFFIX}"))):
        sweep(folder, f"*{SUFFIX}")
        yield


@contextlib.contextmanager
def held_file(path: Path) -> Iterator[None]:
    """A file for a checkpoint, kept for this run alone.

    Raises:
        CheckpointError: If another run keeps it.
        WriteError: If it cannot be written, and is not there to be read.
    """
    if path.is_dir():
        raise unwritable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    with held(path.with_name(f".{path.name}.lock"), path, readable=path.is_file()):
        sweep(path.parent, glob.escape(path.name))
        yield


def read_archive(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what :func:`write_archive` wrote.

    Args:
        path: The file.
        kind: What it is expected to hold.

    Returns:
        The header and the arrays.

    Raises:
        CheckpointError: If there is no such file, it is corrupted, or it holds something else.
    """
    path = check_path("path", path)
    if not path.is_file():
        raise CheckpointError(
            "there is no such file",
            received=f"{path}, a folder" if path.is_dir() else str(path),
            expected=f"a file that holds a {kind}",
            remedy="check the path",
        )
    try:
        arrays = _arrays(path)
        header = json.loads(str(arrays.pop(_HEADER)))
        found = header.pop("kind")
        if header.pop("arrays") != sorted(arrays):
            raise ValueError("some of its arrays are missing")
    except _DAMAGED as error:
        raise CheckpointError(
            "the file is corrupted or was not written by this toolkit",
            received=f"{path}: {type(error).__name__}: {str(error)[:80]}",
            expected=f"a file that holds a {kind}",
            remedy="delete it to start anew, or take an intact copy",
        ) from error
    if found != kind:
        raise CheckpointError(
            "the file holds something else",
            received=f"{path}: a {found}",
            expected=f"a {kind}",
            remedy="check the path",
        )
    return header, arrays


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file, by name, each of the size that it declares."""
    arrays: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it says that it is larger than it is")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED or name in arrays:
                raise ValueError(f"{name} is compressed, or there twice")
            with archive.open(member) as file:
                declared = _declared_size(file) + file.tell()
            if declared != member.file_size:
                raise ValueError(f"{name} has {member.file_size} bytes, and says {declared}")
            with archive.open(member) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _declared_size(file: IO[bytes]) -> int:
    """Bytes of numbers that the header of an array says will follow it."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, _, dtype = read(file)
    if dtype.kind not in _KINDS:
        raise ValueError(f"an array of {dtype}")
    return math.prod(shape) * dtype.itemsize


@contextlib.contextmanager
def complete(path: object, what: str, remedy: str) -> Iterator[None]:
    """Where what an archive holds is taken apart.

    Args:
        path: The file, for the error.
        what: What it is expected to hold.
        remedy: The way out where it does not.

    Raises:
        CheckpointError: If something is missing in it, or of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, ManifoldSDEError):
            raise
        how = "without " * isinstance(error, KeyError) + str(error)
        raise CheckpointError(
            "the file is incomplete or of another version",
            received=f"{path}: {how}",
            expected=what,
            remedy=remedy,
        ) from error
