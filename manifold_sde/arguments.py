"""What users give as numbers and flags, of any kind that Python, NumPy and torch have."""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    ZeroVectorError,
)

Points = Tensor | NDArray[Any] | Sequence[Any]
"""A point or points: a tensor, or an array or lists of numbers."""

#: Norm whose fourth power, and the inverse of it, are far from the ends of the range.
_LARGEST_NORM = {torch.float64: 1e75, torch.float32: 1e9}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{letter}i": 1 << (10 * power) for power, letter in enumerate("kmgt", start=1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def integer(value: object) -> int | None:
    """An integer of any kind (Python's, NumPy's) as an int; ``None`` for all else, bools too."""
    if isinstance(value, (bool, np.bool_, Tensor)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_integer(name: str, value: object, low: int, high: int, remedy: str = "") -> int:
    """Check an integer in [low, high].

    Raises:
        ArgumentError: If it is none.
    """
    number = integer(value)
    if number is None or not low <= number <= high:
        small = high < 1 << 32 or (number is not None and number > high)
        raise ArgumentError(
            f"{name} is not an integer in its range",
            received=repr(value),
            expected=f"an integer in [{low}, {high}]" if small else f"an integer of at least {low}",
            remedy=remedy or f"pass {name} as an int in that range",
        )
    return number


def check_count(
    name: str,
    value: object,
    of: str,
    remedy: str,
    *,
    least: int = 1,
    even: str = "",
    expected: str = "a positive integer",
) -> int:
    """Check a number of things.

    Args:
        name: Name of the argument.
        value: What was given.
        of: What is counted.
        remedy: What to give.
        least: The smallest number.
        even: Why the number has to be even; empty where it need not be.
        expected: What it should be.

    Raises:
        ArgumentError: If it is no such number.
    """
    number = integer(value)
    if number is None or number < least or (even and number % 2):
        raise ArgumentError(
            f"{name} is not a number of {of}",
            received=repr(value),
            expected=expected + even,
            remedy=remedy,
        )
    return number


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


def check_positive(name: str, value: object, remedy: str) -> float:
    """Check a positive finite number.

    Raises:
        ArgumentError: If it is none.
    """
    number = real(value)
    if not 0.0 < number < math.inf:
        raise ArgumentError(
            f"{name} must be positive and finite",
            received=repr(value),
            expected="a positive finite number",
            remedy=remedy,
        )
    return number


def check_between(value: object, low: float, high: float, what: str, remedy: str) -> float:
    """Check a number of the half-open interval [low, high).

    Raises:
        ArgumentError: If it is no number, or outside.
    """
    number = real(value)
    if low <= number < high:
        return number
    raise ArgumentError(
        f"{what} is out of range",
        received=repr(value),
        expected=f"a number in [{low:g}, {high:g})",
        remedy=remedy,
    )


def check_choice(name: str, value: object, choices: Sequence[object], remedy: str) -> Any:
    """Check that something is one of the choices, of the same kind.

    Raises:
        ArgumentError: If it is none.
    """
    for choice in choices:
        if value is choice or (isinstance(value, str) and value == choice):
            return choice
    *first, last = map(repr, choices)
    raise ArgumentError(
        f"{name} is not one of its choices",
        received=repr(value),
        expected=f"{', '.join(first)} or {last}",
        remedy=remedy,
    )


def kind_of(value: object) -> str:
    """What something is, for messages: the name of its class, or that it is a class itself."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


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


def is_known_false(condition: Tensor) -> bool:
    """Whether a condition of one value fails; false where there is no value to look at.

    That is so for meta and fake tensors and inside ``vmap``, where only shapes are known.
    """
    try:
        return not bool(condition)
    except RuntimeError:
        return False


def check_point(
    x: object,
    dim: int,
    *,
    name: str = "x",
    allow_zero: bool = False,
    allow_nan: bool = False,
    values: bool = False,
) -> Tensor:
    """Check that a point or a batch of points can be used, and return it as a tensor.

    Args:
        x: What the user gave: a tensor (..., dim) of single or double precision, or a NumPy array
            or lists of numbers, which count as double precision.
        dim: Ambient dimension D.
        name: Name used in messages.
        allow_zero: Whether the zero vector is a legal value.
        allow_nan: Whether NaN is, as in the state of a path that was lost.
        values: Whether values are needed: a meta tensor has a shape alone.

    Returns:
        The same tensor, or one of the numbers.

    Raises:
        DTypeError: If x is neither numbers nor a dense tensor of float64 or float32.
        ShapeError: If its last dimension is not ``dim``.
        NonFiniteError: If it holds NaN or infinity.
        ZeroVectorError: If one of its points is the origin.
    """
    if not isinstance(x, Tensor):
        x = _tensor_of(x, dim, name)
    if x.dtype not in (torch.float64, torch.float32):
        raise DTypeError(
            f"{name} is not a real floating tensor of single or double precision",
            received=f"dtype {x.dtype}",
            expected="float64 (float32 works to its own tolerances)",
            remedy=f"{name}.to(torch.float64)",
        )
    if x.layout is not torch.strided or (values and x.is_meta):
        raise DTypeError(
            f"{name} is not a dense tensor with values",
            received="a meta tensor" if x.is_meta else f"layout {x.layout}",
            expected=f"a dense tensor of shape (..., {dim})",
            remedy=f"values for {name}" if x.is_meta else f"{name}.to_dense()",
        )
    # Double precision is left alone.
    if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        raise DTypeError(
            f"products of {name} are rounded to half precision here",
            received="a tensor of float32 in a block of torch.autocast",
            expected="the precision of x from x to the result",
            remedy=f"leave the torch.autocast block, or {name}.to(torch.float64)",
        )
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ShapeError(
            f"{name} has the wrong shape",
            received=str(tuple(x.shape)),
            expected=f"(..., {dim}): the last dimension is the ambient dimension D",
            remedy="put the batch in front and the coordinates last",
        )
    if not allow_nan and is_known_false(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).any(dim=-1).sum())
        raise NonFiniteError(
            f"{name} holds NaN or infinity",
            received=f"{bad} of {x.shape[:-1].numel()} points not finite",
            expected="finite coordinates",
            remedy="find where they arose; a smaller learning rate if a run blew up",
        )
    if not allow_zero and is_known_false((x != 0).any(dim=-1).all()):
        zero = int((x == 0).all(dim=-1).sum())
        raise ZeroVectorError(
            f"{name} contains the zero vector",
            received=f"{zero} of {x.shape[:-1].numel()} points of norm 0",
            expected="points away from the origin, where a scale-invariant loss is defined",
            remedy="start from a nonzero point; directions are all that matters",
        )
    return x


def _tensor_of(x: object, dim: int, name: str) -> Tensor:
    """The tensor of an array or of lists of numbers, in double precision.

    Raises:
        DTypeError: If it is something else.
    """
    if isinstance(x, (np.ndarray, list, tuple)):
        try:
            array = np.asarray(x)
        except ValueError:  # rows of different lengths
            array = np.asarray(None)
        if array.dtype.kind in "iuf":
            # Torch takes no negative strides.
            return torch.tensor(np.ascontiguousarray(array, np.float64))
    raise DTypeError(
        f"{name} is not numbers",
        received=f"{type(x).__module__}.{type(x).__qualname__}",
        expected=f"a torch tensor, a NumPy array or lists of numbers, of shape (..., {dim})",
        remedy=f"torch.as_tensor({name}, dtype=torch.float64)",
    )


def check_projection(projection: object, dim: int) -> None:
    """Check that something is symmetric matrices (..., dim, dim).

    Raises:
        ShapeError, ArgumentError: If it is not.
    """
    if not isinstance(projection, Tensor) or projection.shape[-2:] != (dim, dim):
        raise ShapeError(
            "the projection has the wrong shape",
            received=str(tuple(getattr(projection, "shape", ()))),
            expected=f"(..., {dim}, {dim})",
            remedy="geometry.tangent_projection(y, torch.eye(D)) gives its columns",
        )
    if is_known_false((projection - projection.mT).norm() <= 1e-6 * projection.norm()):
        raise ArgumentError(
            "the projection is not symmetric",
            received="a matrix with NaN, or one that differs from its transpose",
            expected="P = P^T",
            remedy="0.5 * (A + A.mT); a projection on a tangent space is symmetric",
        )


def require_norms(x: Tensor, *, name: str = "x") -> None:
    """Check that powers of the norms of points are in the range of numbers.

    The coefficients of the equations go up to the fourth power, or down. A NaN passes.

    Args:
        x: Points (..., D).
        name: Name used in messages.

    Raises:
        ArgumentError: If a norm is too small or too large.
    """
    bound = _LARGEST_NORM.get(x.dtype, math.inf)
    size = x.abs().amax(dim=-1)
    if is_known_false(~((size < 1.0 / bound) | (size > bound)).any()):
        raise ArgumentError(
            f"{name} has a norm whose powers are out of the range of numbers",
            received=f"norms from {float(size.min()):.1g} to {float(size.max()):.1g}",
            expected=f"norms between {1.0 / bound:.0e} and {bound:.0e} in {x.dtype}",
            remedy=f"{name} / {name}.norm(dim=-1, keepdim=True), and lr over the square of that "
            "norm: the directions are the same",
        )


def bytes_of(memory: object) -> int:
    """A number of bytes, given as one or as a string.

    Raises:
        ArgumentError: If it is none.

    Example:
        >>> bytes_of("2 GiB"), bytes_of("500 MB"), bytes_of(1024)
        (2147483648, 500000000, 1024)
    """
    value = integer(memory)
    if isinstance(memory, str) and (found := _AMOUNT.fullmatch(memory)):
        value = int(float(found[1]) * _UNITS.get(found[2].lower(), 0))
    if value is None or value < 1:
        raise ArgumentError(
            "memory is not a number of bytes",
            received=repr(memory),
            expected="a positive integer, or a string with a unit",
            remedy='memory="2 GiB", or memory=2 * 2**30',
        )
    return value


def describe_bytes(count: float) -> str:
    """A number of bytes in words, rounded up so that it is enough: ``"1.5 GiB"``."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if count >= _UNITS[u[:2].lower()]), "B")
    size = _UNITS[unit[:-1].lower()]
    return f"{-(-count * 10 // size) / 10:.10g} {unit}"
