"""Files that hold arrays and a header: written whole or not at all, checked when read.

A file is a NumPy archive without pickles. It is written beside its place and moved there in one
step, so that a run killed at any moment leaves the last complete file behind.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manifold_sde.errors import CheckpointError

_HEADER = "header"
#: What reading a damaged file raises; changed flags of a zip file are taken for features.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
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
        kind: What the file holds; asked for again when it is read.
        header: Anything that JSON can hold.
        arrays: The arrays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": kind, "arrays": sorted(arrays), **header}, allow_nan=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: np.array(text)}, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def prepare_folder(folder: Path) -> None:
    """Make a folder for archives, without what runs that were killed while they wrote have left.

    Raises:
        CheckpointError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f".*{SUFFIX}.*"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(error) from error


def unwritable(error: OSError) -> CheckpointError:
    """What is said of a checkpoint that cannot be written."""
    return CheckpointError(
        "the checkpoint cannot be written",
        received=f"{type(error).__name__}: {error}",
        expected="a folder that this process and all workers can write to",
        remedy="a folder with room, on a file system that all machines share",
    )


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
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            "there is no such file",
            received=f"{path}, a folder" if path.is_dir() else str(path),
            expected=f"a file that holds a {kind}",
            remedy="check the path",
        )
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
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
