"""Learning rates and weight decays as functions of the step, and the exact sums along them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LRScheduler

from manifold_sde.errors import ArgumentError, TimeScaleError
from manifold_sde.number_arrays import LARGEST, Array, Numbers, as_float64
from manifold_sde.scheduler_values import SchedulerValues

Steps = NDArray[np.int64]

STREAM_LIMIT = 10**9
"""Most steps of a schedule that are summed before a question is refused."""
WIDE: Any = np.longdouble
"""In which sums are carried."""

_ROW = 128
_BLOCK = _ROW * _ROW
_Block = tuple[int, Array, TimeScaleError | None]


class Schedule:
    """A learning rate or a weight decay as a function of the step k = 0, 1, 2, ...

    Args:
        name: ``"lr"`` or ``"weight_decay"``; errors use it.
        source: Number (the same at every step), 1-D sequence, array or tensor (one value a step),
            scheduler of ``torch.optim`` for the learning rate (stepped once a step, from where it
            stands), or callable of the step that depends on k alone. A callable is called with an
            int64 array of steps where it agrees there with its own values at single steps,
            otherwise with one ``int`` at a time, and its values are checked as they are needed.
        smallest: Smallest number that is allowed; a schedule may also be zero at some steps.

    Attributes:
        constant: The number, or ``None`` for a schedule.
        length: Number of steps of a sequence, or ``None`` where there is no end.

    Raises:
        TimeScaleError: ``source`` is none of these, or a value is out of range.

    >>> Schedule("lr", [0.1, 0.1, 0.01])
    <3 values from 0.1 to 0.01>
    >>> Schedule("lr", lambda k: 0.1 / (1 + k)).read(0, 3)[0]
    array([0.1       , 0.05      , 0.03333333])
    """

    def __init__(self, name: str, source: Any, *, smallest: float = 0.0) -> None:
        if isinstance(source, LRScheduler):
            source = SchedulerValues(source, name)
        self.name, self.smallest = name, smallest
        self.constant: float | None = None
        self.length: int | None = None
        self._function: Callable[[Any], Any] | None = source if callable(source) else None
        self._factor, self._takes_arrays = 1.0, True
        # The latest stretch of a callable's values, so that asking for more extends it.
        self._known: tuple[int, Array, TimeScaleError | None] = (0, np.empty(0), None)
        if self._function is not None:
            return
        self._values = as_float64(name, source).copy()
        if self._values.ndim > 1 or self._values.size == 0:
            raise TimeScaleError(
                f"{name} is neither a number nor a list of one number a step.",
                received=f"shape {self._values.shape}",
                expected="a number, a sequence of shape (steps,) or a callable of the step",
                remedy="pass one value a step, for instance values.reshape(-1)",
            )
        if self._values.ndim == 0:
            self.constant = float(self._values)
        else:
            self.length = self._values.size
        _, fault = self._checked(self._values.reshape(-1), 0)
        if self.constant == 0 < smallest:
            fault = TimeScaleError(
                f"{name} is zero: no step would move the weights.",
                received=f"{name} = {self.constant!r}",
                expected="a positive number",
                remedy="a schedule may be zero at some steps: pass a sequence or a callable",
            )
        if fault is not None:
            raise fault

    @classmethod
    def of(cls, name: str, source: ScheduleLike, *, smallest: float = 0.0) -> Schedule:
        """Return ``source`` itself if it is a schedule, otherwise one made of it."""
        return source if isinstance(source, Schedule) else cls(name, source, smallest=smallest)

    def every(self, start: int, stop: int, *, of: str, remedy: str) -> Array:
        """Read the values at all the steps start, ..., stop - 1.

        Args:
            start: First step.
            stop: One past the last step.
            of: Whose steps these are, for the error.
            remedy: What to give instead, for the error.

        Raises:
            TimeScaleError: If one is unusable.
            ArgumentError: If there are fewer.
        """
        values, fault = self.read(start, stop)
        if fault is not None:
            raise fault
        if len(values) < stop - start:
            raise ArgumentError(
                f"{self.name} ends before {of}",
                received=f"{len(values)} values for {stop - start} steps",
                expected="a value for each step",
                remedy=remedy,
            )
        return values

    def read(self, start: int, stop: int) -> tuple[Array, TimeScaleError | None]:
        """Read the values at the steps start, ..., stop - 1, up to the first that is unusable.

        Args:
            start: First step.
            stop: One past the last step; for a sequence at most its length.

        Returns:
            The values, shape (at most stop - start,), and the error of the step after them, or
            ``None`` where all are usable. The caller raises it if that step is needed.

        >>> values, fault = Schedule("lr", lambda k: 0.2 - 0.1 * k).read(0, 5)
        >>> len(values), fault.problem
        (3, 'lr at step 3 is out of range.')
        """
        if self.constant is not None:
            return np.full(stop - start, self.constant), None
        if self._function is None:
            return self._values[start:stop], None
        first, values, fault = self._known
        if first != start:
            values, fault = np.empty(0), None
        end = start + values.size
        if end < stop and fault is None:
            more, failed = self._call(self._function, end, stop)
            more, wrong = self._checked(more * self._factor, end)
            values, fault = np.concatenate([values, more]), wrong or failed
            self._known = (start, values, fault)
        return values[: stop - start], fault if values.size < stop - start else None

    def scaled(self, factor: float) -> Schedule:
        """Multiply every value by a positive number.

        >>> Schedule("lr", [0.1, 0.2]).scaled(10.0)
        <2 values from 1.0 to 2.0>
        """
        source = self._values * factor if self._function is None else self._function
        scaled = Schedule(self.name, source, smallest=self.smallest)
        scaled._factor = self._factor * factor
        return scaled

    @property
    def is_lazy(self) -> bool:
        """Whether the values come from a callable."""
        return self._function is not None

    def _checked(self, values: Array, start: int) -> tuple[Array, TimeScaleError | None]:
        usable = (values == 0) | ((values >= max(self.smallest, 0.0)) & (values <= LARGEST))
        if usable.all():
            return values, None
        first = int(np.argmin(usable))
        where = "" if self.constant is not None else f" at step {start + first}"
        return values[:first], TimeScaleError(
            f"{self.name}{where} is out of range.",
            received=f"{self.name} = {float(values[first])!r}",
            expected=f"a finite number from {self.smallest:g} to {LARGEST:g}",
            remedy="check its sign and its units, and the steps for which it is meant",
        )

    def _call(
        self, function: Callable[[Any], Any], start: int, stop: int
    ) -> tuple[Array, TimeScaleError | None]:
        if self._takes_arrays and stop - start > 1:
            probes = [0, (stop - start) // 2, stop - start - 1]
            try:
                with np.errstate(all="ignore"):
                    values = as_float64(self.name, function(np.arange(start, stop)))
                if values.shape == (stop - start,):
                    alone = [self._single(function, start + i) for i in probes]
                    if np.allclose(values[probes], alone, rtol=1e-12, atol=0, equal_nan=True):
                        return values, None
            except Exception:  # whatever a callable raises on an array, it gets ints instead
                pass
            self._takes_arrays = False
        values = np.empty(stop - start)
        for k in range(start, stop):
            try:
                values[k - start] = self._single(function, k)
            except TimeScaleError as fault:
                return values[: k - start], fault
        return values, None

    def _single(self, function: Callable[[Any], Any], step: int) -> float:
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
            return f"<{'' if self._factor == 1 else f'{self._factor:g} * '}callable {name}>"
        first, last = float(self._values[0]), float(self._values[-1])
        return f"<{self.length} values from {first!r} to {last!r}>"


ScheduleLike = Numbers | Callable[[Any], Any] | LRScheduler | Schedule
"""A number, one value a step, a scheduler of torch, or a callable of the step."""


@np.errstate(all="ignore")
def growth(log_a: Array, gained: Array) -> Array:
    """e^{2T} - 1 = 2 t0, infinite where it overflows."""
    grown: Array = gained * np.exp(-4 * log_a.astype(WIDE))
    return grown


@np.errstate(all="ignore")
def intrinsic_time(log_a: Array, gained: Array) -> Array:
    """T = ln(1 + 2 t0) / 2 in float64."""
    grown = growth(log_a, gained)
    double = np.where(np.isfinite(grown), np.log1p(grown), np.log(gained) - 4 * log_a)
    return np.asarray(double / 2, np.float64)


class StepSums:
    """Log a and gained along a schedule, summed in blocks of which the starts and one are kept.

    See :mod:`manifold_sde.time_scale` for the two. A block is its number of usable steps, the
    table (3, steps + 1) of log a, gained and lr before each step, and the error of the step after
    the last, if that cannot be used.
    """

    def __init__(self, lr: Schedule, weight_decay: Schedule) -> None:
        self._lr, self._weight_decay = lr, weight_decay
        ends = [s.length for s in (lr, weight_decay) if s.length is not None]
        self._length = min(ends, default=None)
        self._starts, self._heads = [np.zeros(2, WIDE)], [np.zeros(2)]  # these as rounded
        self._latest: tuple[int, _Block] | None = None
        if self._length is not None and not (lr.is_lazy or weight_decay.is_lazy):
            _, _, fault = self._read(0, self._length)
            if fault is not None:
                raise fault

    def states(self, k: Array) -> tuple[Array, Array]:
        """After k whole steps, any shape."""
        log_a, gained, _, _ = self._gather(k, past=0)
        return log_a, gained

    def log_effective_lr(self, k: Array) -> Array:
        """Logarithms of η_k / (a_k a_{k+1}) at the steps k."""
        log_a, _, lr, after = self._gather(k, past=1)
        with np.errstate(divide="ignore"):
            return np.log(lr) - log_a - after

    def search(self, times: Array, max_steps: int | None) -> Steps:
        """The largest k whose T_k does not exceed each of the times, shape (n,)."""
        limit = STREAM_LIMIT if max_steps is None else max_steps
        limit = limit if self._length is None else min(limit, self._length)
        found = np.zeros(times.shape, dtype=np.int64)
        left, i = np.argsort(times, kind="stable"), 0
        while left.size:
            wanted = times[left]
            known = bisect_right(self._heads, wanted[0], key=lambda x: float(intrinsic_time(*x)))
            i = max(i, min(known - 1, limit // _BLOCK))
            size = min(_BLOCK, limit - i * _BLOCK)
            usable, table, fault = self._block(i, size, strict=False)
            size = min(size, usable)
            reach = np.maximum.accumulate(intrinsic_time(*table[:2, : size + 1]))
            # Where the steps end, the last time is an answer only where it is hit exactly.
            if size < _BLOCK and wanted[-1] > reach[-1]:
                steps, time, end = i * _BLOCK + size, f"T = {wanted[-1]:.6g}", f"{reach[-1]:.6g}"
                raise self._not_reached(time, end, steps, fault if steps < limit else None)
            n = wanted.size if size < _BLOCK else int(np.searchsorted(wanted, reach[-1]))
            found[left[:n]] = i * _BLOCK + np.searchsorted(reach, wanted[:n], side="right") - 1
            left, i = left[n:], i + 1
        return found

    def _not_reached(
        self, time: str, reached: str, steps: int, fault: TimeScaleError | None
    ) -> TimeScaleError:
        if fault is not None:
            return fault
        if steps == self._length:
            return TimeScaleError(
                "The schedule ends before this intrinsic time.",
                received=f"{time}, and a schedule of {steps} steps",
                expected=f"T at most {reached}, where the schedule ends",
                remedy="make the schedule longer, or pass a callable of the step",
            )
        return TimeScaleError(
            f"The schedule does not reach this intrinsic time within {steps} steps.",
            received=time,
            expected=f"T at most {reached}, which it has after {steps} steps",
            remedy="ask for a smaller T or raise max_steps; with a learning rate that decays "
            "and no weight decay T may be bounded",
        )

    def _gather(self, k: Array, past: int) -> Array:
        """Log a, gained and lr at the steps k and log a at k + past, shape (4, ...)."""
        steps = k.astype(np.int64)
        wanted = int(steps.max(initial=0))
        if self._length is not None and steps.size and wanted + past > self._length:
            shorter = self._lr if self._lr.length == self._length else self._weight_decay
            raise TimeScaleError(
                f"The schedule {shorter.name} ends before step {wanted}.",
                received=f"step {wanted}, and a schedule of length {self._length}",
                expected=f"a step of at most {self._length - past}",
                remedy="make the schedule longer, or pass a callable of the step",
            )
        if wanted > STREAM_LIMIT:
            raise TimeScaleError(
                "Too many steps of a schedule to sum.",
                received=f"step {wanted}",
                expected=f"at most {STREAM_LIMIT}",
                remedy="a constant learning rate and weight decay have closed forms: pass numbers",
            )
        result = np.empty((4, *steps.shape))
        index = np.maximum(steps + past - 1, 0) // _BLOCK
        for i in np.unique(index).tolist():
            chosen = index == i
            local = steps[chosen] - i * _BLOCK
            _, table, _ = self._block(i, int(local.max()) + past)
            result[:, chosen] = *table[:, local], table[0, local + past]
        return result

    def _read(self, start: int, stop: int) -> tuple[Array, Array, TimeScaleError | None]:
        """Learning rates and weight decays of the steps, up to the first that cannot be used."""
        lr, fault = self._lr.read(start, stop)
        weight_decay, other = self._weight_decay.read(start, stop)
        fault = other if weight_decay.size < lr.size else fault
        size = min(lr.size, weight_decay.size)
        excess = lr[:size] * weight_decay[:size] >= 1
        if excess.any():
            size = int(np.argmax(excess))
            where = f" at step {start + size}"
            fault = decay_too_large(float(lr[size]), float(weight_decay[size]), where)
        return lr[:size], weight_decay[:size], fault

    def _block(self, i: int, size: int, *, strict: bool = True) -> _Block:
        """Block i with at least its first ``size`` steps; if not strict, as many as there are."""
        while len(self._starts) <= i:
            self._block(len(self._starts) - 1, _BLOCK)
        if self._latest is None or self._latest[0] != i or self._latest[1][0] < size:
            self._latest = i, self._sum(i, size)
        usable, _, fault = block = self._latest[1]
        if strict and usable < size and fault is not None:
            raise fault
        return block

    def _sum(self, i: int, size: int) -> _Block:
        rates, decays, fault = self._read(i * _BLOCK, i * _BLOCK + size)
        size = rates.size
        rows = max(1, -(-size // _ROW))
        lr, decay = np.zeros((2, rows, _ROW), WIDE)
        lr.flat[:size], decay.flat[:size] = rates, decays
        decay *= lr
        square = (1 - decay) ** 2
        start = np.zeros((2, rows + 1), WIDE)
        with np.errstate(under="ignore"):
            # Both after each step from the start of its row, ...
            rounded = decay.astype(float)
            log_a = np.log1p(-rounded) - (decay - rounded) / (1 - decay)
            log_a = log_a.cumsum(axis=1)
            gained, factor = 2 * lr**2 * square, square**2
            for j in range(1, _ROW):
                gained[:, j] += factor[:, j] * gained[:, j - 1]
            # ... after each row from the start of the block, and from step 0.
            start[0, 1:] = log_a[:, -1].cumsum()
            for j, kept in enumerate(np.exp(4 * log_a[:, -1])):
                start[1, j + 1] = kept * start[1, j] + gained[j, -1]
            start[1] += np.exp(4 * start[0]) * self._starts[i][1]
            start[0] += self._starts[i][0]
            gained += np.exp(4 * log_a.astype(float)) * start[1, :-1, None]
            log_a += start[0, :-1, None]
        table = np.zeros((3, lr.size + 1))
        table[:2, 0] = self._heads[i]
        table[0, 1:], table[1, 1:], table[2, :-1] = log_a.flat, gained.flat, lr.flat
        # Learning rate 0 changes nothing, not even by rounding.
        moved = np.where(table[2, :-1] > 0, np.arange(1, lr.size + 1), 0)
        table[:2, 1:] = table[:2, np.maximum.accumulate(moved)]
        if size == _BLOCK and len(self._starts) == i + 1:
            self._starts.append(start[:, -1].copy())
            self._heads.append(table[:2, -1].copy())
        return size, table, fault


def decay_too_large(lr: float, weight_decay: float, where: str = "") -> TimeScaleError:
    """The error for ηλ >= 1, with which a step of (1) would reverse the weights."""
    return TimeScaleError(
        f"lr * weight_decay{where} is not below 1.",
        received=f"lr = {lr!r}, weight_decay = {weight_decay!r}, product {lr * weight_decay:.6g}",
        expected="lr * weight_decay < 1: a step multiplies the weights by 1 minus it",
        remedy="lower one of them; weight decay here is decoupled, as lr * weight_decay a step",
    )
