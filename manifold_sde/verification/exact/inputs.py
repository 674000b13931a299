"""What users give to the exact laws: times, orders, numbers of nodes, angles and functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from manifold_sde.arguments import check_integer, integer, kind_of
from manifold_sde.errors import ArgumentError, ManifoldSDEError
from manifold_sde.number_arrays import LARGEST_STEP, as_float64, check_number
from manifold_sde.verification.exact.spectral import Array

#: Most nodes along a curve: the matrices of the laws are dense.
_MOST_NODES = 4095


def keep(law: object, **values: object) -> None:
    """Store converted values in a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(law, name, value)


def check_time(name: str, value: object) -> float:
    """Check a time or clock of a diffusion that starts at 0."""
    return check_number(name, value, f"the diffusion starts at {name} = 0")


def check_order(order: object) -> int:
    """Check the order of a Fourier moment, of any sign."""
    return check_integer("order", order, -LARGEST_STEP, LARGEST_STEP)


def check_nodes(name: str, nodes: object, least: int = 9) -> int:
    """Check an odd number of nodes."""
    count = integer(nodes)
    if count is None or not least <= count <= _MOST_NODES or count % 2 == 0:
        raise ArgumentError(
            "the number of nodes is out of range",
            received=f"{name}={nodes!r}",
            expected=f"an odd integer from {least} to {_MOST_NODES}",
            remedy=f"leave {name} out",
        )
    return count


def check_turn(angle: ArrayLike) -> Array:
    """Check the angles (...) of a distribution function on [-pi, pi]."""
    array: Any = as_float64("angle", angle)
    if not bool(np.all(np.abs(array) <= math.pi)):
        raise ArgumentError(
            "the distribution function starts at -pi and ends at pi",
            received=f"angles from {np.min(array):g} to {np.max(array):g}",
            expected="angles in [-pi, pi]",
            remedy="wrap(angle) takes whole turns off",
        )
    return array


def values_at(name: str, f: Callable[..., Any], shape: tuple[int, ...], *arrays: Any) -> Array:
    """Call a user's function of arrays, and broadcast its finite real values to a shape.

    Raises:
        ArgumentError: If it is not a function, raises an error, or returns something else.
    """
    received, cause = kind_of(f), None
    try:
        values = np.asarray(f(*arrays))
        received = f"values of shape {values.shape} and dtype {values.dtype}"
        if values.dtype.kind in "biuf" and np.isfinite(values).all():
            values = values.astype(np.float64, copy=False)
            return values if values.shape == shape else np.broadcast_to(values, shape)
        received += ", not all finite" if values.dtype.kind == "f" else ""
    except ManifoldSDEError:
        raise
    except Exception as error:
        received, cause = f"{received}; {type(error).__name__}: {error}", error
    raise ArgumentError(
        f"the {name} does not return finite numbers for each point",
        received=received,
        expected=f"an array of real numbers that broadcasts to {shape}",
        remedy="write it with NumPy functions of whole arrays, with the points as rows",
    ) from cause
