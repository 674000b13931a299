"""Real numbers of any kind, shape and device as float64 arrays, and back."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.errors import TimeScaleError

Array = NDArray[np.floating[Any]]

Numbers = float | Sequence[float] | NDArray[Any] | Tensor
"""A number, or real numbers of any shape."""

SMALLEST, LARGEST = 1e-37, 1e37
"""Range of positive learning rates, norms and traces: no product of their powers overflows."""
LARGEST_FLOAT = float(np.finfo(np.float64).max)
LARGEST_STEP = 2**53
"""From here on whole numbers are not told apart in float64."""


def as_float64(name: str, value: Any) -> Array:
    """Convert real numbers of any kind, shape and device to a float64 array of their shape.

    >>> as_float64("time", [1, 2])
    array([1., 2.])
    """
    cause: Exception | None = None
    try:
        array: Any = value
        if isinstance(value, Tensor):
            if value.dtype == torch.bool or value.is_complex():
                raise TypeError("not a tensor of real numbers")
            array = value.detach().cpu().to(torch.float64).numpy()
        elif isinstance(value, int | float | Fraction) and not isinstance(value, bool):
            array = float(value)
        array = np.asarray(array)
        if array.dtype.kind in "iuf" or array.size == 0:
            with np.errstate(over="ignore"):
                return array.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        cause = error
    text = " ".join(repr(value).split())
    raise TimeScaleError(
        f"{name} is not a real number or an array of real numbers.",
        received=f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}",
        expected="int or float, or a sequence, NumPy array or torch tensor of them",
        remedy="convert it first, for instance with float(...) or list(...)",
    ) from cause


def check_range(
    name: str, value: Any, hint: str, *, least: float = 0.0, most: float = LARGEST_FLOAT
) -> Array:
    """Convert numbers to float64, and refuse those outside of [least, most].

    >>> check_range("T", [1.0, -1.0], "use abs(T)")
    Traceback (most recent call last):
    manifold_sde.errors.TimeScaleError: T is out of range.
      received: T = -1.0, number 1 of 2
      expected: a finite number, at least 0
      hint:     use abs(T)
    """
    values = as_float64(name, value)
    bound = "a finite number" if most == LARGEST_FLOAT else f"a number up to {most:g}"
    bound += f", at least {least:g}" if least > -LARGEST_FLOAT else ""
    usable = (values >= least) & (values <= most)
    return _require(name, values, usable, bound, hint)


def check_number(
    name: str, value: Any, hint: str, *, least: float = 0.0, most: float = LARGEST_FLOAT
) -> float:
    """Convert one number to a float; as ``check_range``.

    >>> check_number("C", np.array([2.0]), "pass one number")
    2.0
    """
    values = check_range(name, value, hint, least=least, most=most)
    if values.size != 1:
        raise TimeScaleError(
            f"{name} is not one number.",
            received=f"shape {values.shape}",
            expected="a number",
            remedy=hint,
        )
    return float(values.reshape(()))


def check_whole(name: str, value: Any) -> Array:
    """Convert step counts 0, 1, 2, ... below 2^53 to float64.

    >>> check_whole("k", [0, 1e6])
    array([      0., 1000000.])
    """
    values = check_range(name, value, "steps count from 0")
    usable = (values == np.floor(values)) & (values < LARGEST_STEP)
    hint = "round to a whole step; beyond 2^53 whole steps are not told apart in float64"
    return _require(name, values, usable, "a whole number of steps below 2^53", hint)


def _require(name: str, values: Array, usable: Any, expected: str, hint: str) -> Array:
    if usable.all():
        return values
    first = int(np.argmin(usable.reshape(-1)))
    which = "" if values.ndim == 0 else f", number {first} of {values.size}"
    raise TimeScaleError(
        f"{name} is out of range.",
        received=f"{name} = {float(values.reshape(-1)[first])!r}{which}",
        expected=expected,
        remedy=hint,
    )


def finite(result: Array, what: str, hint: str) -> Array:
    """Round to float64, and refuse what is too large for it."""
    with np.errstate(over="ignore", under="ignore"):
        result = np.asarray(result, np.float64)
    if not np.isfinite(result).all():
        raise TimeScaleError(
            f"{what} is too large for a float.",
            received="a result beyond the range of its dtype",
            expected="a finite result",
            remedy=hint,
        )
    return result


def broadcast(*arrays: Array) -> list[Array]:
    """Broadcast arrays against each other."""
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError as error:
        raise TimeScaleError(
            "The arguments do not broadcast against each other.",
            received=f"shapes {', '.join(str(a.shape) for a in arrays)}",
            expected="shapes that agree or are 1, counted from the last axis",
            remedy="add an axis of length 1 where they are to vary independently",
        ) from error


def like(result: Array, *inputs: Any) -> Any:
    """Return a result in the form of its inputs.

    If one of them is a tensor so is the result, on the device of the first, with the dtype of the
    first that is floating-point, or float64; otherwise ``numpy.float64`` or a float64 array.

    >>> like(np.array([0.5]), torch.ones(1))
    tensor([0.5000])
    """
    with np.errstate(under="ignore"):
        result = np.array(result, np.float64)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not tensors:
        return result[()]
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float64)
    tensor = torch.from_numpy(result).to(dtype)
    if (tensor.isfinite().numpy() != np.isfinite(result)).any():
        finite(np.array(np.inf), "The result", f"pass float64 in place of {dtype}")
    return tensor.to(tensors[0].device)
