"""Runs that would not end: their steps are counted beforehand, and refused or said."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sized

from torch import Tensor

from manifold_sde.arguments import check_count
from manifold_sde.errors import ArgumentError, LongRunWarning
from manifold_sde.progress import duration

#: Steps of a path beyond which a run is refused, by default.
MAX_STEPS = 10_000_000
#: The same for SGD itself, whose steps are cheaper.
MAX_SGD_STEPS = 1_000_000_000
#: Adaptive steps of a path above which a run is said to be long.
_MANY_STEPS = 20_000
#: Bytes of a number in a list.
_ENTRY = 40
#: Steps after which they are first counted ahead; then after twice as many, and so on.
_FIRST_LOOK = 32


def check_max_steps(max_steps: object, default: int = MAX_STEPS) -> int:
    """The largest number of steps of a path.

    Raises:
        ArgumentError: If it is none.
    """
    return check_count("max_steps", max_steps, "steps", f"leave it out: {default}")


def refuse_many_steps(steps: float, most: int, remedy: str) -> None:
    """Refuse a run that takes more steps than are allowed.

    Args:
        steps: Steps that a path would take.
        most: Steps that it may take.
        remedy: What takes fewer.

    Raises:
        ArgumentError: If there are more.
    """
    if steps > most:
        finite = math.isfinite(steps)
        wait = f"; or max_steps={_rounded_up(steps)}, if you can wait for it" if finite else ""
        raise ArgumentError(
            "the run would take too many steps",
            received=f"about {steps:.3g} steps of each path" if finite else "steps without end",
            expected=f"at most max_steps={most}",
            remedy=remedy + wait,
        )


def check_length(name: str, values: object) -> None:
    """Refuse a sequence that is too long to be written down.

    Raises:
        ArgumentError: If it is.
    """
    if isinstance(values, Sized) and not isinstance(values, Tensor):
        require_memory(len(values), _ENTRY, f"fewer {name}")


def require_memory(numbers: float, size: int, remedy: str) -> None:
    """Refuse a result that the memory of the machine cannot hold.

    Args:
        numbers: How many numbers are kept.
        size: Bytes of each.
        remedy: What keeps fewer.

    Raises:
        ArgumentError: If it does not fit.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if numbers * size > memory:
        raise ArgumentError(
            "what is to be kept does not fit into the memory",
            received=f"{numbers:.3g} numbers, {numbers * size / 2**30:.3g} GiB",
            expected=f"less than the memory of this machine, {memory / 2**30:.3g} GiB",
            remedy=remedy,
        )


class Watch:
    """Counts the steps of a run ahead, now and then, by how far the last ones have led.

    Args:
        most: Steps that a path may take.
        rtol: Tolerance of adaptive steps, or ``None`` for steps of one size.
        position: Steps that were taken before.
    """

    def __init__(self, most: int, rtol: float | None, position: int) -> None:
        self.most = most
        self.rtol = rtol
        self._next = position + _FIRST_LOOK
        self._last: tuple[int, float, float] | None = None
        self._said = rtol is None

    def look(self, position: int, time_left: Callable[[], float]) -> None:
        """Refuse or tell, where it is time to look.

        Args:
            position: Steps taken by now.
            time_left: The time that is left to a path in the middle of the others.

        Raises:
            ArgumentError: If there are more steps than are allowed.

        Warns:
            LongRunWarning: Once, if there are very many adaptive steps.
        """
        if position < min(self._next, self.most + 1):
            return
        self._next = 2 * position
        now = position, time_left(), time.process_time()
        before, self._last = self._last, now
        steps, taken, came = float(position), 0, 0.0
        if before is not None:
            taken, came = position - before[0], before[1] - now[1]
        if came > 0.0:
            steps += now[1] / came * taken
        fewer = "a larger dt, or an earlier last time"
        if self.rtol is not None:
            fewer = (
                f"a larger tolerance than {self.rtol:g}, say rtol=1e-3: it is that of the error "
                "of ONE step on its Brownian path, which falls no faster than the step, so that a "
                "tenth of it takes ten times the steps; or steps of one size (dt=...), whose error "
                "in law is far smaller"
            )
        refuse_many_steps(steps, self.most, fewer)
        if self._said or before is None or steps < _MANY_STEPS:
            return
        self._said = True
        seconds = (now[2] - before[2]) / taken * steps
        warnings.warn(
            f"the run takes about {steps:.2g} steps of each path, and {duration(seconds)} of the "
            f"processor for this chunk of paths. Way out: {fewer}",
            LongRunWarning,
            stacklevel=2,
        )


def _rounded_up(steps: float) -> str:
    """The number with two digits and a tenth to spare, as it can be written in a call."""
    power = 10.0 ** (math.floor(math.log10(steps)) - 1)
    return f"int({math.ceil(1.1 * steps / power) * power:.2g})"
