"""Recorded values and clock readings of runs as arrays, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from manifold_sde.errors import ArgumentError, NonFiniteError, ShapeError
from manifold_sde.number_arrays import as_float64
from manifold_sde.training.likelihood import Array

#: Fewest records that say anything of a relaxation time and four more numbers.
_FEWEST = 16


def _rows(name: str, given: Any) -> list[Array]:
    """Runs of their own lengths."""
    ragged = isinstance(given, list | tuple) and len(given) > 0 and np.ndim(given[0]) == 1
    array = None if ragged else as_float64(name, given)
    if array is not None and array.ndim not in (1, 2):
        raise ShapeError(
            f"{name} are not the records of runs",
            received=f"shape {array.shape}",
            expected="(K,) for one run, (R, K) for R runs, or a list of R runs",
            remedy="one number a record; project vectors on a few fixed ones",
        )
    rows = [as_float64(name, row) for row in given] if array is None else np.atleast_2d(array)
    return [np.asarray(row) for row in rows]


def checked(name: str, clock: Any, values: Any) -> tuple[Array, Array]:
    """Clock and values of runs as (R, K), padded with NaN."""
    records, readings = _rows(name, values), _rows("clock readings", clock)
    if len(readings) == 1:
        readings = readings * len(records)
    lengths = [len(row) for row in records]
    if [len(row) for row in readings] != lengths:
        raise ShapeError(
            f"there is not one clock reading a record of {name!r}",
            received=f"{[len(row) for row in readings]} readings, {lengths} records",
            expected="as many readings as records in each run",
            remedy="record both at the same steps",
        )
    for row, times in zip(records, readings, strict=True):
        if not (np.isfinite(row).all() and np.isfinite(times).all()):
            raise NonFiniteError(
                f"the records of {name!r} or their clock hold NaN or infinity",
                received=f"{int((~np.isfinite(row)).sum())} values and "
                f"{int((~np.isfinite(times)).sum())} readings not finite",
                expected="finite numbers",
                remedy="leave out what was recorded after the run blew up",
            )
        if len(times) < 2 or (np.diff(times) < 0).any() or not times[-1] > times[0]:
            raise ArgumentError(
                "the clock does not run",
                received=f"{len(times)} readings from {times.min(initial=np.inf):g} to "
                f"{times.max(initial=-np.inf):g}, {int((np.diff(times) < 0).sum())} of them "
                "smaller than the one before",
                expected="readings that grow along a run",
                remedy="step the clock with the optimizer, and restore it when a run is resumed",
            )
    if sum(lengths) < _FEWEST:
        raise ArgumentError(
            f"there are too few records of {name!r}",
            received=f"{sum(lengths)} records",
            expected=f"{_FEWEST} at least, and some hundred to tell anything",
            remedy="record every few steps; a relaxation time needs several records",
        )
    most = max(lengths)
    y = np.full((len(records), most), np.nan)
    u = np.zeros_like(y)
    for i, (row, times) in enumerate(zip(records, readings, strict=True)):
        y[i, : len(row)] = row
        u[i] = np.concatenate([times, np.full(most - len(times), times[-1])])
    middle, size = float(np.nanmean(y)), float(np.nanstd(y))
    if not size > 1e-12 * max(abs(middle), 1e-300):
        raise ArgumentError(
            f"{name!r} does not move",
            received=f"{middle!r} in all records",
            expected="a function that varies along the run",
            remedy="another function; at interpolation without noise the weights stand still",
        )
    return u, (y - middle) / size
