"""Progress bars, and what a run costs, said on a terminal or in a notebook before most of it.

A bar that was not asked for is shown where a person looks on, and only if the run takes longer than
a second. Once the first steps are measured a line above it says how long the run takes.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from typing import Any, Protocol, TypeVar

from manifold_sde import deadline

with warnings.catch_warnings():
    # tqdm warns where a notebook has no widgets; it then draws its bar as text.
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: Seconds for which a loop is watched before a deadline ends it.
_WATCHED = 0.25
#: Seconds after which a bar is shown that was not asked for, and the shortest run of which the
#: cost is said.
_DELAY = 1.0
#: Steps, relative to those before, after which the time is written down again.
_SPACING = 1.02


class Pace:
    """How long what is left of a loop takes, by the steps that were taken last.

    The first update is no measure, as with it goes what is made once (compiling, tracing); nor are
    those of the first half of the steps, once there are others.
    """

    def __init__(self) -> None:
        self._done: list[float] = []
        self._times: list[float] = []
        self._now = (0.0, 0.0)

    def note(self, now: float, work: float) -> None:
        """Note that so much more work is done by now."""
        done = self._now[0] + work if self._done else 0.0
        self._now = done, now
        if not self._done or done >= _SPACING * self._done[-1]:
            self._done.append(done)
            self._times.append(now)

    @property
    def watched(self) -> float:
        """Seconds that have been looked at."""
        return self._now[1] - self._times[0] if self._times else 0.0

    def seconds(self, left: float) -> float | None:
        """Seconds that so much work takes; ``None`` where it cannot be told yet."""
        done, now = self._now
        if done <= 0.0:
            return None
        begin = max(0, bisect_right(self._done, 0.5 * done) - 1)
        taken = now - self._times[begin]
        return max(0.0, left) * taken / (done - self._done[begin])


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_shown: ContextVar[Progress | None] = ContextVar("shown", default=None)
_beside: ContextVar[Callable[[float], str] | None] = ContextVar("beside", default=None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block whose loops show no bar unless they are told to: it shows one of its own."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextlib.contextmanager
def with_alternative(said: Callable[[float], str]) -> Iterator[None]:
    """A block whose bars, when they say what a run costs, say what else could be done.

    Args:
        said: Function of the seconds of the run, to which it may add some of its own; "" where
            there is nothing better.
    """
    token = _beside.set(said)
    try:
        yield
    finally:
        _beside.reset(token)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """A block that compiles, for which the bar that is shown says so."""
    bar = _shown.get()
    if bar is None:
        yield
        return
    with bar.compiling():
        yield


def duration(seconds: float) -> str:
    """A time in words.

    Example:
        >>> duration(0.2), duration(119.6), duration(3600.0), duration(1e5)
        ('0.2 s', '120 s', '60 minutes', '28 hours')
    """
    if seconds < 1.0:
        return f"{seconds:.1f} s"
    if seconds < 120.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} minutes" if seconds < 7200.0 else f"{seconds / 3600.0:.0f} hours"


def _in_notebook() -> bool:
    return "ipykernel.zmqshell" in sys.modules


class Progress(tqdm):
    """A progress bar, shown or not, that asks the deadline whether what is left will fit.

    Args:
        progress: Whether it is shown, or its label; ``None`` shows it on a terminal and in a
            notebook, where it takes longer than a second.
        label: Its label, where none is given.
        begun: Whether the loop begins now; otherwise :meth:`begin` says when, and with what total.
        about: What the steps are taken of, such as "1,000 paths".
        even: Whether all steps are alike, so that those taken tell of those that are left.
        **options: Options of tqdm.

    Where what is left is known, or :func:`~manifold_sde.deadline.expecting` says it, the time of it
    follows from that of the steps taken.
    """

    def __init__(
        self,
        progress: bool | str | None,
        label: str,
        *,
        begun: bool = True,
        about: str = "",
        even: bool = True,
        **options: Any,
    ) -> None:
        itself = progress is None and not _quiet.get()
        self._label = progress if isinstance(progress, str) else label
        self._about = about
        self._asked, self._even = bool(progress), even
        self._pace, self._own_pace = Pace(), Pace()
        self._begun = time.perf_counter()
        self._done: float = 0
        self._work_left = 0.0
        self._left: float | None = None
        self._compiled, self._said = False, False
        self._prepared, self._aside = 0.0, 0.0
        self._token: Token[Progress | None] | None = None
        hidden = (False if _in_notebook() else None) if itself else not progress
        super().__init__(
            desc=self._label,
            disable=hidden,
            delay=0.0 if self._asked and begun else _DELAY,
            **options,
        )

    def __enter__(self) -> Progress:
        if not self.disable:
            self._token = _shown.set(self)
        found: Progress = super().__enter__()
        return found

    def __exit__(self, *error: Any) -> None:
        if self._token is not None:
            _shown.reset(self._token)
        super().__exit__(*error)

    def begin(self, total: float | None, about: str) -> None:
        """Say that the loop begins, how many steps it takes (if that is known) and of what."""
        self.total, self._about = total, about
        if self._asked and not self.disable:
            self._show()

    def _show(self) -> None:
        """Show the bar now."""
        self.refresh()
        self.delay = 0.0

    def skip(self, n: float) -> None:
        """Count n steps that were taken before, and tell nothing of the time."""
        self._done += n
        super().update(n)

    def update(
        self,
        n: float | None = 1,
        left: Callable[[], tuple[float, float]] | None = None,
        work: float | None = None,
    ) -> bool | None:
        """Count n more steps.

        Args:
            n: How many.
            left: Gives how many steps are left, and how much work they are; by default what the
                total leaves, one by one.
            work: How much work the n steps were.

        Raises:
            OutOfTimeError: If the time is over, or what is left does not fit.
        """
        n = n or 0
        self._done += n
        limit = deadline.current()
        if limit is not None:
            elapsed = limit.elapsed
            self._own_pace.note(elapsed, n if work is None else work)
            rest = self._for_deadline(left) if self._own_pace.watched >= _WATCHED else 0.0
            limit.require(rest, rest > 0.0)
        if self.disable:
            return None
        if not self._prepared:
            self._prepared = time.perf_counter() - self._begun
        self._pace.note(time.perf_counter() - self._aside, n if work is None else work)
        if left is not None:
            steps, self._work_left = left()
            self.total = self._done + math.ceil(steps - 1e-6)
        elif self.total is not None:
            self._work_left = max(self.total - self._done, 0.0)
        known = self._even and (left is not None or self.total is not None)
        self._left = self._pace.seconds(self._work_left) if known else None
        shown: bool | None = super().update(n)
        self._tell()
        return shown

    def _for_deadline(self, left: Callable[[], tuple[float, float]] | None) -> float:
        """Seconds that the rest takes; 0 where it cannot be told yet."""
        total = deadline.expected() if self.total is None or left is not None else self.total
        if total is not None:
            return self._own_pace.seconds(max(total - self._done, 0.0)) or 0.0
        return 0.0 if left is None else self._own_pace.seconds(left()[1]) or 0.0

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar shows; its rate is that at which the rest is expected to go."""
        found: dict[str, Any] = super().format_dict
        if self._left and self.total:
            found["rate"] = (self.total - self.n) / self._left or None
        return found

    # What is said of it.

    def _tell(self) -> None:
        """Say, once, what the run costs, if it is long enough."""
        if self._said or self._left is None:
            return
        self._said = True
        if time.perf_counter() - self._begun + self._left < _DELAY:
            return
        steps = f"{self.total:,.0f} {self.unit}s" + (f" of {self._about}" if self._about else "")
        text = f"{self._label}: {steps}, about {duration(self._left)}"
        if self._compiled:
            text += f"; compiling and the like took {duration(self._prepared)}"
        beside = _beside.get()
        if beside is not None:
            begin = time.perf_counter()
            text = "\n".join(filter(None, (text, beside(self._left))))
            self._aside += time.perf_counter() - begin
        self.write(text, file=self.fp)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A block that compiles, of unknown length: the bar says so at once."""
        before, self._compiled = self.desc, True
        self.set_description_str(f"{self._label}: compiling", refresh=False)
        self._show()
        try:
            yield
        finally:
            self.set_description_str(before, refresh=False)


class _Countable(Protocol[T_co]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...


def counted(items: _Countable[T], shown: bool, label: str) -> Iterator[T]:
    """Items whose number is known, with a bar that goes when they are done."""
    with Progress(shown and label, label, total=len(items), leave=False) as bar:
        for item in items:
            yield item
            bar.update()
