"""Times of a Brownian tree: the cell that they lie in, and where in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError

#: Deepest level of dyadic intervals.
DEEPEST = 40
_TICKS = 1 << DEEPEST


def ticks_of(time: float | Tensor, start: float, cell: float) -> int:
    """Time since a start in 2^-40 cells, without the bits that are rounding alone.

    Raises:
        ArgumentError: If W is not defined there.
    """
    try:
        x = (float(time) - start) / cell
        whole = math.floor(x)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise bad_time(time, start) from None
    if not -1 <= whole < _TICKS:
        raise bad_time(time, start)
    coarse = max(whole, 0).bit_length()
    ticks = (whole << DEEPEST) + (round((x - whole) * (_TICKS >> coarse)) << coarse)
    if ticks < 0:
        raise bad_time(time, start)
    return ticks


def cell_ticks_of(time: Tensor, start: float, cell: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same of each path: cell, 2^-40 cells since its beginning, and whether W is defined."""
    x = (time - start) / cell
    whole = torch.floor(x)
    good = (whole >= -1) & (whole < _TICKS)
    whole = torch.where(good, whole, 0.0)
    number = whole.to(torch.int64)
    bits = torch.frexp(whole.clamp(min=0)).exponent.to(torch.int64)
    part = torch.where(good, x - whole, 0.0) * (_TICKS >> bits).to(torch.float64)
    ticks = torch.round(part).to(torch.int64) << bits
    number, ticks = number + (ticks >> DEEPEST), ticks & (_TICKS - 1)
    return number.clamp(min=0), ticks, good & (number >= 0)


def check_time(name: str, value: object) -> float:
    """A finite number, or an error that names it."""
    number = real(value)
    if not math.isfinite(number):
        raise ArgumentError(
            f"{name} is not a time",
            received=repr(value),
            expected="a finite number",
            remedy=f"{name}=1.0",
        )
    return number


def bad_time(time: object, start: float) -> ArgumentError:
    """The error of a time at which W is not defined."""
    return ArgumentError(
        "W is not defined at this time",
        received=repr(time),
        expected=f"a time from start={start} on, less than 2**40 cells later",
        remedy="BrownianPath(..., start=...) no later than the first time that is asked for",
    )


def wrong_order(ta: float, tb: float, remedy: str) -> ArgumentError:
    """The error of an increment backwards."""
    return ArgumentError(
        "the times are in the wrong order",
        received=f"ta={ta!r}, tb={tb!r}",
        expected="ta <= tb",
        remedy=remedy,
    )


def require_times(ta: Tensor, tb: Tensor, start: float, good: Tensor, order: Tensor) -> None:
    """Check the two times of each path.

    Args:
        ta: First times (n,).
        tb: Second times (n,).
        start: Time at which W is 0.
        good: Whether W is defined at both (n,).
        order: Whether the second is not before the first (n,).

    Raises:
        ArgumentError: If they are not so for some path, with its times.
    """
    bad = ~(good & order)
    if not bool(bad.any()):
        return
    path = int(bad.nonzero()[0])
    a, b = float(ta[path]), float(tb[path])
    if not bool(good[path]):
        raise bad_time(b if a >= start else a, start)
    raise wrong_order(a, b, "-W.between(tb, ta) is the increment backwards")
