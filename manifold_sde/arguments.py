"""What users give as numbers and flags, of any kind that Python and NumPy have."""

from __future__ import annotations

import math
import numbers
import operator
import os
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from manifold_sde.errors import ArgumentError


def integer(value: object) -> int | None:
    """An integer of any kind (Python's, NumPy's) as an int; ``None`` for all else, bools too."""
    if isinstance(value, (bool, np.bool_, Tensor)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def real(value: object) -> float:
    """A real number (Python's, NumPy's, a tensor's) as a float; NaN for all else, bools too.

    An integer beyond the range of floats is infinite.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if cast("int", value) > 0 else -math.inf


def check_path(name: str, value: object) -> Path:
    """Check the path of a file or folder.

    Raises:
        ArgumentError: If it is none, or has no name.
    """
    if isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str):
        path = Path(value)
        if path.name:
            return path
    raise ArgumentError(
        f"{name} is not the path of a file or folder",
        received=repr(value),
        expected="a string or a pathlib.Path with a name",
        remedy=f'{name}="results/run"',
    )


def check_flag(name: str, value: object) -> bool:
    """Check a choice of two.

    Raises:
        ArgumentError: If it is neither True nor False.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ArgumentError(
        f"{name} must be True or False",
        received=repr(value),
        expected="True or False",
        remedy=f"{name}=True, or {name}=False",
    )
