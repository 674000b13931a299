"""Learning rates and weight decays as functions of the step: numbers, sequences, callables.

And the way in and out of numbers: every kind is computed in float64, and given back as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manifold_sde.errors import TimeScaleError

Array = NDArray[np.float64]

Numbers = float | Sequence[float] | NDArray[Any] | torch.Tensor
"""A number, or real numbers of any shape."""

SMALLEST, LARGEST = 1e-37, 1e37
"""Range of positive learning rates, norms and traces: no product of their powers overflows."""
LARGEST_FLOAT = float(np.finfo(np.float64).max)
LARGEST_STEP = 2**53
"""From here on whole numbers are not told apart in float64."""

_PROBE_TOLERANCE = 1e-12


def as_float64(name: str, value: Any) -> Array:
    """A number, sequence, array or tensor of real numbers as a float64 array.

    Args:
        name: What the value is, for the error.
        value: Number, (nested) sequence, array or tensor, of any shape and device.

    Returns:
        Array of the same shape; it may share memory with ``value``.

    Raises:
        TimeScaleError: ``value`` is not made of real numbers.

    >>> as_float64("time", [1, 2])
    array([1., 2.])
    """
    if type(value) is float or type(value) is int:
        with suppress(OverflowError):
            return np.asarray(float(value))
    cause: Exception | None = None
    try:
        if isinstance(value, torch.Tensor):
            array = _tensor_as_array(value)
        elif isinstance(value, Fraction):
            array = np.asarray(float(value))
        else:
            array = np.asarray(value)
        if array.dtype.kind in "iuf" or array.size == 0:
            with np.errstate(over="ignore"):
                return array.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        cause = error
    raise TimeScaleError(
        f"{name} is not a real number or an array of real numbers.",
        received=f"{type(value).__name__} {_shortened(value)}",
        expected="int or float, or a sequence, NumPy array or torch tensor of them",
        remedy="convert it first, for instance with float(...) or list(...)",
    ) from cause


def _tensor_as_array(value: torch.Tensor) -> NDArray[Any]:
    value = value.detach().cpu()
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError("not a tensor of real numbers")
    return value.to(torch.float64).numpy()


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_range(
    name: str, value: Any, way: str, *, least: float = 0.0, most: float = LARGEST_FLOAT
) -> Array:
    """A number or numbers as a float64 array, refused where one is out of range.

    Args:
        name: What the value is, for the error.
        value: Number, sequence, array or tensor, of any shape and device.
        way: The way out, for the error.
        least: Smallest value allowed.
        most: Largest value allowed.

    Returns:
        Array of the shape of ``value``.

    Raises:
        TimeScaleError: A value is not a real number, not finite, or out of range.

    >>> check_range("T", [1.0, -1.0], "use abs(T)")
    Traceback (most recent call last):
    manifold_sde.errors.TimeScaleError: T is out of range.
      received: T = -1.0, number 1 of 2
      expected: a finite number, at least 0
      way out:  use abs(T)
    """
    values = as_float64(name, value)
    usable = (values >= least) & (values <= most)
    if not usable.all():
        bound = "a finite number" if most == LARGEST_FLOAT else f"a number up to {most:g}"
        raise _out_of_range(name, values, usable, f"{bound}, at least {least:g}", way)
    return values


def check_number(
    name: str, value: Any, way: str, *, least: float = 0.0, most: float = LARGEST_FLOAT
) -> float:
    """One number, with the arguments and errors of ``check_range``.

    >>> check_number("C", np.array([2.0]), "pass one number")
    2.0
    """
    values = check_range(name, value, way, least=least, most=most)
    if values.size != 1:
        raise TimeScaleError(
            f"{name} is not one number.",
            received=f"shape {values.shape}",
            expected="a number",
            remedy=way,
        )
    return float(values.reshape(()))


def check_norm(initial_norm: Numbers) -> Array:
    """The norm of a starting point, refused where it is not a positive number.

    >>> float(check_norm(2))
    2.0
    """
    way = "initial_norm is the norm of the weights before the first step"
    return check_range("initial_norm", initial_norm, way, least=SMALLEST, most=LARGEST)


def check_trace(noise_trace: Numbers) -> Array:
    """The trace of a noise covariance, refused where it is negative.

    >>> float(check_trace(0))
    0.0
    """
    way = "noise_trace is the trace of the noise covariance at a point of norm 1"
    return check_range("noise_trace", noise_trace, way, most=LARGEST)


def check_whole(name: str, value: Any) -> Array:
    """Whole step counts 0, 1, 2, ... as a float64 array, refused where one is not.

    >>> check_whole("k", [0, 1e6])
    array([      0., 1000000.])
    """
    values = check_range(name, value, "steps count from 0")
    usable = (values == np.floor(values)) & (values < LARGEST_STEP)
    if not usable.all():
        way = "round to a whole step; beyond 2^53 whole steps are not told apart in float64"
        raise _out_of_range(name, values, usable, "a whole number of steps below 2^53", way)
    return values


def _out_of_range(
    name: str, values: Array, usable: NDArray[Any], expected: str, way: str
) -> TimeScaleError:
    first = int(np.argmin(usable.reshape(-1)))
    which = "" if values.ndim == 0 else f", number {first} of {values.size}"
    return TimeScaleError(
        f"{name} is out of range.",
        received=f"{name} = {float(values.reshape(-1)[first])!r}{which}",
        expected=expected,
        remedy=way,
    )


def check_finite(result: Array, what: str, way: str) -> None:
    """Refuse a result that overflowed.

    >>> check_finite(np.array(1.0), "The time", "use a smaller one")
    """
    if not np.isfinite(result).all():
        raise TimeScaleError(
            f"{what} is too large for a float.",
            received="a result beyond the range of its dtype",
            expected="a finite result",
            remedy=way,
        )


def broadcast(*arrays: Array) -> list[Array]:
    """Arrays broadcast against each other.

    >>> [a.shape for a in broadcast(np.zeros((2, 1)), np.zeros(3))]
    [(2, 3), (2, 3)]
    """
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
    """A float64 result in the form of its inputs.

    Args:
        result: Array of any shape.
        inputs: What it was computed from. If one of them is a tensor so is the result, with
            the dtype of the first that is floating-point, or float64.

    Returns:
        Tensor, ``numpy.float64`` or array, of the shape of ``result``.

    Raises:
        TimeScaleError: The dtype of the tensor cannot hold the result.

    >>> like(np.array([0.5]), torch.ones(1))
    tensor([0.5000])
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if not tensors:
        return np.asarray(result)[()]
    model = next((x for x in tensors if x.is_floating_point()), None)
    dtype = torch.float64 if model is None else model.dtype
    tensor = torch.from_numpy(np.array(result)).to(dtype)
    if (tensor.isfinite().numpy() != np.isfinite(result)).any():
        check_finite(np.array(np.inf), "The result", f"pass float64 in place of {dtype}")
    return tensor.to(tensors[0].device)


class Schedule:
    """A learning rate or a weight decay as a function of the step k = 0, 1, 2, ...

    Args:
        name: ``"lr"`` or ``"weight_decay"``; errors use it.
        source: Number (the same at every step), 1-D sequence, array or tensor (one value
            a step), or callable of the step. A callable must depend on k alone. It is
            called with an int64 array of steps where it takes one and agrees there with
            its own values at single steps, otherwise with one ``int`` at a time.
        smallest: Smallest number that is allowed; a schedule may also be zero at some steps.

    Attributes:
        constant: The number, or ``None`` for a schedule.
        length: Number of steps of a sequence, or ``None`` where there is no end.

    Raises:
        TimeScaleError: ``source`` is none of these, or a value is negative, not finite
            or out of range. A callable's values are checked as they are needed.

    >>> Schedule("lr", [0.1, 0.1, 0.01])
    <3 values from 0.1 to 0.01>
    >>> Schedule("lr", lambda k: 0.1 / (1 + k)).read(0, 3)[0]
    array([0.1       , 0.05      , 0.03333333])
    """

    def __init__(self, name: str, source: Any, *, smallest: float = 0.0) -> None:
        self.name = name
        self.smallest = smallest
        self.constant: float | None = None
        self.length: int | None = None
        self._function: Callable[[Any], Any] | None = None
        self._factor = 1.0
        self._values = np.empty(0)
        # The latest stretch of a callable's values, so that asking for more extends it.
        self._known: tuple[int, Array, TimeScaleError | None] = (0, np.empty(0), None)
        self._takes_arrays = True
        if callable(source):
            self._function = source
            return
        values = as_float64(name, source)
        if values.ndim > 1 or values.size == 0:
            raise TimeScaleError(
                f"{name} is neither a number nor a list of one number a step.",
                received=f"shape {values.shape}",
                expected="a number, a sequence of shape (steps,) or a callable of the step",
                remedy="pass one value a step, for instance values.reshape(-1)",
            )
        if values.ndim == 0:
            self.constant = float(values)
            _, fault = self._checked(values.reshape(1), 0)
            if self.constant == 0 < smallest:
                fault = TimeScaleError(
                    f"{name} is zero: no step would move the weights.",
                    received=f"{name} = {self.constant!r}",
                    expected="a positive number",
                    remedy="a schedule may be zero at some steps: pass a sequence or a callable",
                )
        else:
            self._values = values.copy()
            self.length = values.size
            _, fault = self._checked(self._values, 0)
        if fault is not None:
            raise fault

    @classmethod
    def of(cls, name: str, source: ScheduleLike, *, smallest: float = 0.0) -> Schedule:
        """The schedule itself if ``source`` is one, otherwise one made of it."""
        if isinstance(source, Schedule):
            return source
        return cls(name, source, smallest=smallest)

    def read(self, start: int, stop: int) -> tuple[Array, TimeScaleError | None]:
        """Values at the steps start, ..., stop - 1, up to the first that cannot be used.

        Args:
            start: First step.
            stop: One past the last step; for a sequence at most its length.

        Returns:
            The usable values, shape (at most stop - start,), and the error that describes
            the step after them, or ``None`` where all could be used. The caller raises it
            if that step is needed.

        >>> values, fault = Schedule("lr", lambda k: 0.2 - 0.1 * k).read(0, 5)
        >>> len(values), fault.problem
        (3, 'lr at step 3 is out of range.')
        """
        if self.constant is not None:
            return np.full(stop - start, self.constant), None
        if self._function is None:
            return self._values[start:stop], None
        known_start, values, fault = self._known
        if known_start != start:
            values, fault = np.empty(0), None
        end = start + values.size
        if end < stop and fault is None:
            more, fault = self._call(self._function, end, stop)
            more, out_of_range = self._checked(more * self._factor, end)
            values = np.concatenate([values, more])
            fault = out_of_range if out_of_range is not None else fault
            self._known = (start, values, fault)
        return values[: stop - start], fault if values.size < stop - start else None

    def scaled(self, factor: float) -> Schedule:
        """The schedule with every value multiplied by a positive number.

        >>> Schedule("lr", [0.1, 0.2]).scaled(10.0)
        <2 values from 1.0 to 2.0>
        """
        if self.constant is not None:
            return Schedule(self.name, self.constant * factor, smallest=self.smallest)
        if self._function is None:
            return Schedule(self.name, self._values * factor, smallest=self.smallest)
        scaled = Schedule(self.name, self._function, smallest=self.smallest)
        scaled._factor = self._factor * factor
        return scaled

    @property
    def is_lazy(self) -> bool:
        """Whether the values come from a callable."""
        return self._function is not None

    def _checked(self, values: Array, start: int) -> tuple[Array, TimeScaleError | None]:
        usable = (values == 0) | ((values >= self.smallest) & (values >= 0) & (values <= LARGEST))
        if usable.all():
            return values, None
        first = int(np.argmin(usable))
        where = "" if self.constant is not None else f" at step {start + first}"
        fault = TimeScaleError(
            f"{self.name}{where} is out of range.",
            received=f"{self.name} = {float(values[first])!r}",
            expected=f"a finite number from {self.smallest:g} to {LARGEST:g}",
            remedy="check its sign and its units, and the steps for which it is meant",
        )
        return values[:first], fault

    def _call(
        self, function: Callable[[Any], Any], start: int, stop: int
    ) -> tuple[Array, TimeScaleError | None]:
        if self._takes_arrays and stop - start > 1:
            values = self._call_with_array(function, start, stop)
            if values is not None:
                return values, None
            self._takes_arrays = False
        values = np.empty(stop - start)
        for k in range(start, stop):
            try:
                values[k - start] = self._call_with_step(function, k)
            except TimeScaleError as fault:
                return values[: k - start], fault
        return values, None

    def _call_with_array(
        self, function: Callable[[Any], Any], start: int, stop: int
    ) -> Array | None:
        """Values by one call, or ``None`` where the callable does not work elementwise."""
        try:
            with np.errstate(all="ignore"):
                values = as_float64(self.name, function(np.arange(start, stop)))
        except Exception:  # whatever a user's callable raises on an array, it gets ints instead
            return None
        if values.shape != (stop - start,):
            return None
        probes = [0, (stop - start) // 2, stop - start - 1]
        try:
            alone = [self._call_with_step(function, start + i) for i in probes]
        except TimeScaleError:
            return None
        agree = np.allclose(values[probes], alone, rtol=_PROBE_TOLERANCE, atol=0, equal_nan=True)
        return values if agree else None

    def _call_with_step(self, function: Callable[[Any], Any], step: int) -> float:
        try:
            value = function(step)
        except Exception as error:
            raise TimeScaleError(
                f"The callable {self.name} failed at step {step}.",
                received=f"{type(error).__name__}: {error}",
                expected="a number for every step k = 0, 1, 2, ...",
                remedy="call it with that step by hand to see the whole traceback",
            ) from error
        number = as_float64(f"{self.name} at step {step}", value)
        if number.size != 1:
            raise TimeScaleError(
                f"The callable {self.name} did not give one number at step {step}.",
                received=f"shape {number.shape}",
                expected="a number for a step, or an array of n numbers for an array of n steps",
                remedy="return a number; a list of values is passed as it is, not as a callable",
            )
        return float(number.reshape(()))

    def __repr__(self) -> str:
        if self.constant is not None:
            return repr(self.constant)
        if self._function is not None:
            name = getattr(self._function, "__name__", type(self._function).__name__)
            factor = "" if self._factor == 1 else f"{self._factor:g} * "
            return f"<{factor}callable {name}>"
        first, last = float(self._values[0]), float(self._values[-1])
        return f"<{self.length} values from {first!r} to {last!r}>"


ScheduleLike = Numbers | Callable[[Any], Any] | Schedule
"""A number, one value a step, or a callable of the step."""
