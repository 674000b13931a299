"""Brownian paths inside torchsde's Euler, against a loop by hand and torchsde's own source.

A linear SDE dX = A X dt + B dW with D = m = 10, whose step is little more than its noise. The loop
by hand draws torch.randn and nothing has to be reproducible in it. Our source is a function of
time, timed with a step of one cell and of a sixteenth, where every increment comes out of bridges;
torchsde's is timed with the step size told to it, and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torchsde
from torch import Tensor

from benchmarks.rows import Row, in_turns, one_thread
from manifold_sde.compile import compiler_available
from manifold_sde.solvers.brownian import BrownianPath

TITLE = "A step of torchsde's Euler for a linear SDE, D = m = 10, float64"
PEERS: tuple[str, ...] = ()
DIM, DT = 10, 1 / 64
#: Paths, steps of a run, and rounds.
SIZES, QUICK_SIZES = (4096, 64, 9), (16, 8, 2)
AGAINST_HAND_LOOP = 1.6
Run = Callable[[], Tensor]


class Linear(torch.nn.Module):
    """The SDE, in the form that torchsde takes."""

    noise_type, sde_type = "general", "ito"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, DIM, DIM, dtype=torch.float64, generator=generator) / DIM**0.5
        self.drift, self.factor = (a - 2.0 * torch.eye(DIM, dtype=torch.float64)).T, b.T

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.drift

    def g_prod(self, t: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return v @ self.factor


def by_hand(sde: Linear, x: Tensor, increment: Callable[[int], Tensor], steps: int) -> Tensor:
    """The loop that one would write down."""
    for k in range(steps):
        x = x + DT * (x @ sde.drift) + increment(k) @ sde.factor
    return x


def with_randn(sde: Linear, x: Tensor, steps: int) -> Run:
    generator = torch.Generator().manual_seed(0)

    def increment(k: int) -> Tensor:
        return math.sqrt(DT) * torch.randn(x.shape, dtype=x.dtype, generator=generator)

    return lambda: by_hand(sde, x, increment, steps)


def in_torchsde(sde: Linear, x: Tensor, steps: int, source: Callable[[], object]) -> Run:
    """Every run has a new source, which keeps nothing of the last run."""
    ts = torch.tensor([0.0, steps * DT], dtype=torch.float64)
    return lambda: torchsde.sdeint(sde, x, ts, bm=source(), method="euler", dt=DT)[-1]


def ours(paths: int, parts: int, compiled: bool) -> Callable[[], BrownianPath]:
    """Our source, with ``parts`` steps a cell."""
    return lambda: BrownianPath(0, DIM, paths, cell=parts * DT, compiled=compiled)


def theirs(paths: int, steps: int, dt: float | None) -> Callable[[], object]:
    return lambda: torchsde.BrownianInterval(
        0.0, steps * DT, size=(paths, DIM), dtype=torch.float64, dt=dt, entropy=0
    )


def check(sde: Linear, x: Tensor, steps: int, source: Callable[[], BrownianPath]) -> None:
    """Check that torchsde on our source takes the steps of the loop by hand.

    Raises:
        AssertionError: If the ends differ by more than rounding.
    """
    path = source()
    expected = by_hand(sde, x, lambda k: path(k * DT, (k + 1) * DT), steps)
    found = in_torchsde(sde, x, steps, source)()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks."""
    with one_thread(), torch.no_grad():
        return _rows(*(QUICK_SIZES if quick else SIZES), compiled=not quick)


def _rows(paths: int, steps: int, rounds: int, *, compiled: bool) -> list[Row]:
    sde, x = Linear(), torch.ones(paths, DIM, dtype=torch.float64)
    hand = with_randn(sde, x, steps)
    modes = [False, *([True] if compiled and compiler_available() else [])]
    note = f"{paths} paths, {steps} steps, one thread"
    found = []
    for mode in modes:
        word = "compiled" if mode else "eager"
        for parts in (1, 16):
            source = ours(paths, parts, mode)
            check(sde, x, min(steps, 32), source)
            timing = in_turns(in_torchsde(sde, x, steps, source), hand, rounds)
            name = f"cell of {parts} step{'s' * (parts > 1)}, {word}"
            target = AGAINST_HAND_LOOP if mode else None
            found.append(timing.row(name, "hand loop", per=steps, target=target, note=note))
    mode, word = modes[-1], "compiled" if modes[-1] else "eager"
    for peer, dt in (("its own, dt", DT), ("its own", None)):
        run = in_torchsde(sde, x, steps, ours(paths, 16, mode))
        peer_run = in_torchsde(sde, x, steps, theirs(paths, steps, dt))
        timing = in_turns(run, peer_run, max(2, rounds // 3))
        text = f"{note}; torchsde's BrownianInterval {'with' if dt else 'without'} dt"
        found.append(timing.row(f"cell of 16 steps, {word}", peer, per=steps, note=text))
    return found


def main() -> None:
    """Print the rows alone."""
    for row in rows():
        print(
            f"{row.name:<26}{row.ours:>9.0f}{row.peer:>9.0f} {row.peer_name:<12}{row.ratio:>6.2f}"
        )


if __name__ == "__main__":
    main()
