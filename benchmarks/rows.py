"""Rows of the table of benchmarks, and the timing that the benchmarks share.

Times are processor time. All computations use one thread, for which it is the wall time of an idle
machine; what else a busy machine does disturbs it less.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

#: Processor time over wall time from which on a computation has used more than one thread.
_ONE_CORE = 1.2
#: Seconds below which that is not measured.
_LONG_ENOUGH = 0.2


@dataclass(frozen=True)
class Row:
    """One comparison of this toolkit with a peer.

    Attributes:
        name: What is computed.
        ours, peer: What it costs here and there, in ``unit``.
        peer_name: Who the peer is.
        unit: Of the costs.
        ratio: Ours divided by the peer's; the median where there were several rounds.
        target: Largest ratio aimed at; ``None`` where there is no aim.
        note: What was held fixed, and how sure the ratio is.
        low, high: Smallest and largest ratio of a round; ``None`` where there was one.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    target: float | None = None
    note: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is at most the target, if there is one."""
        return None if self.target is None else self.ratio <= self.target


@dataclass(frozen=True)
class Timing:
    """Seconds of two computations timed in turns: medians, and ratios over the rounds."""

    ours: float
    peer: float
    ratio: float
    low: float
    high: float

    def with_peer_times(self, factor: float) -> Timing:
        """The same where the peer has this many times the work that was timed."""
        parts = (self.ratio, self.low, self.high)
        return Timing(self.ours, self.peer * factor, *(part / factor for part in parts))

    def row(
        self,
        name: str,
        peer_name: str,
        *,
        unit: str = "µs",
        per: float = 1.0,
        target: float | None = None,
        note: str = "",
    ) -> Row:
        """The row of the table.

        Args:
            name: What is computed.
            peer_name: Who the peer is.
            unit: "µs" or "ms".
            per: How many of it were timed at once.
            target: Largest ratio aimed at.
            note: What was held fixed.
        """
        scale = {"µs": 1e6, "ms": 1e3}[unit] / per
        costs = scale * self.ours, scale * self.peer
        return Row(name, *costs, peer_name, unit, self.ratio, target, note, self.low, self.high)


def in_turns(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> Timing:
    """Time two computations in turns; each is called once beforehand.

    A round times both, so that what else the machine does falls on both; who comes first changes
    from round to round.

    Raises:
        AssertionError: If one of them uses more than one thread.
    """
    computations = (ours, peer)
    times: tuple[list[float], list[float]] = ([], [])
    wall = [0.0, 0.0]
    for function in computations:
        function()
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            begin, start = time.perf_counter(), time.process_time()
            computations[which]()
            times[which].append(time.process_time() - start)
            wall[which] += time.perf_counter() - begin
    for name, whole, found in zip(("ours", "the peer"), wall, times, strict=True):
        if whole > _LONG_ENOUGH and sum(found) > _ONE_CORE * whole:
            cores = sum(found) / whole
            raise AssertionError(f"{name} used {cores:.2f} cores, and not one")
    ratios = [a / b for a, b in zip(*times, strict=True)]
    ours_median, peer_median, ratio = map(statistics.median, (*times, ratios))
    return Timing(ours_median, peer_median, ratio, min(ratios), max(ratios))


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a computation that is called once beforehand."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def installed(package: str) -> bool:
    """Whether a peer's package is there."""
    return importlib.util.find_spec(package) is not None
