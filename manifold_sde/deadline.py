"""Work that has a deadline: its loops ask on the way whether it is still worth going on.

Nothing is interrupted from outside. The loops of the toolkit (kernels on batches, progress bars)
call :func:`consult`, which does nothing unless a :class:`Deadline` is in force, and otherwise ends
the work by an exception once its time is over, or as soon as it is seen that it will not do. What
is computed does not depend on it.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar, Token
from functools import cached_property
from types import TracebackType
from typing import Any, TypeVar

from manifold_sde.errors import ManifoldSDEError

T = TypeVar("T")


class OutOfTimeError(BaseException):
    """Work was given up; no ``Exception``, so that nothing that handles errors swallows it.

    Attributes:
        seconds: Time that it would take, about; or time that it took without an end in sight.
        estimated: Whether it is the former.
    """

    def __init__(self, seconds: float, estimated: bool) -> None:
        self.seconds = seconds
        self.estimated = estimated
        super().__init__(str(self))

    def __str__(self) -> str:
        how = "would take about" if self.estimated else "takes more than"
        return f"{how} {self.seconds:.{0 if self.seconds >= 10 else 1}f} s"


class Deadline:
    """A number of seconds for the work of a ``with`` block, in place of those of one around it.

    They are of processor time of this thread: they do not run while other programs do.

    Args:
        seconds: How many; infinitely many are none.
        clock: The clock.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.thread_time) -> None:
        self.seconds = seconds
        self._clock = clock
        self._begin = clock()
        self._token: Token[Deadline | None] | None = None

    def __enter__(self) -> Deadline:
        self._begin = self._clock()
        self._token = _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)

    @property
    def elapsed(self) -> float:
        """Seconds since the block began."""
        return self._clock() - self._begin

    def require(self, more: float = 0.0, estimated: bool = False) -> None:
        """Give up if so many more seconds are not left.

        Args:
            more: How many.
            estimated: Whether this is what it takes, and not the least that it takes.

        Raises:
            OutOfTimeError: If they are not.
        """
        needed = self.elapsed + more
        if needed > self.seconds:
            raise OutOfTimeError(needed, estimated)


_current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)
_expected: ContextVar[float | None] = ContextVar("expected", default=None)


def current() -> Deadline | None:
    """The deadline that is in force, if there is one."""
    return _current.get()


def expected() -> float | None:
    """How many steps :func:`expecting` says that a loop takes."""
    return _expected.get()


def consult() -> None:
    """Give up what is under way if its time is over.

    Raises:
        OutOfTimeError: If it is.
    """
    deadline = _current.get()
    if deadline is not None:
        deadline.require()


@contextlib.contextmanager
def expecting(steps: float) -> Iterator[None]:
    """Say how many steps a loop in this block takes, about, which does not know it itself."""
    token = _expected.set(steps)
    try:
        yield
    finally:
        _expected.reset(token)


class Attempts:
    """Shared values that could not be made, and are not tried again where that is known."""

    def __init__(self) -> None:
        self._errors: dict[Hashable, ManifoldSDEError] = {}
        self._seconds: dict[Hashable, tuple[float, bool]] = {}

    @contextlib.contextmanager
    def making(self, key: Hashable) -> Iterator[None]:
        """Make something in this block.

        Raises:
            ManifoldSDEError: What was raised the last time that it was made.
            OutOfTimeError: If the time that it takes, as it was seen before, is not left.
        """
        if key in self._errors:
            raise copy.copy(self._errors[key])
        deadline = _current.get()
        begin = 0.0
        if deadline is not None:
            deadline.require(*self._seconds.get(key, (0.0, False)))
            begin = deadline.elapsed
        try:
            yield
        except ManifoldSDEError as error:
            # The frames of its traceback would keep what was under way in memory.
            self._errors[key] = copy.copy(error)
            raise
        except OutOfTimeError as error:
            self._seconds[key] = error.seconds - begin, error.estimated
            raise


class shared_property(cached_property[T]):
    """A cached property with the memory of :class:`Attempts`."""

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Any:
        """The value, made where it is not there."""
        if instance is None:
            return self
        attempts: Attempts = instance.__dict__.setdefault("_attempts", Attempts())
        with attempts.making(self.attrname):
            return super().__get__(instance, owner)
