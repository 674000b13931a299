"""Derivatives of the generated torch code of symbolic problems against hand-written torch.

The derivatives of two losses on a batch: the great circle of R^3, and the normalised linear model
of section 6.1. The hand-written formulas are worked out on paper, with u = x / |x|, and need as few
passes as the author found. Each pair is timed in turns, eager and compiled for points in the last
dimension: in C, as the solvers have them, and by torch's compiler.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import sympy
import torch
from torch import Tensor

from benchmarks.rows import Row, Timing, in_turns, one_thread
from manifold_sde.compile import compile_batched, compile_points, compiler_available
from manifold_sde.symbolic import SymbolicLoss

TITLE = "Derivatives of code generated from SymPy, against hand-written torch, float64"
PEERS: tuple[str, ...] = ()
BATCH = 4096
DIM, SAMPLES = 10, 8
Function = Callable[[Tensor], Tensor]


def circle() -> tuple[SymbolicLoss, dict[str, Function]]:
    """L = (x_3 / |x|)^2 / 2 in R^3, and its derivatives by hand."""
    x = sympy.symbols("x1:4", real=True)
    loss = x[2] ** 2 / sum(s**2 for s in x) / 2
    pole, identity = torch.eye(3, dtype=torch.float64)[2], torch.eye(3, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        u = x / norm
        c = u[..., 2:]
        return (c / norm) * (pole - c * u)

    def hessian(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        u = x / norm
        c = u[..., 2:]
        w = (pole - 2 * c * u) / norm
        return w.unsqueeze(-1) * w.unsqueeze(-2) - (c / norm).square().unsqueeze(-1) * identity

    return SymbolicLoss([loss], x, True), {"gradient": gradient, "hessian": hessian}


def linear_model() -> tuple[SymbolicLoss, dict[str, Function]]:
    """L = |Z x / |x| - y|^2 / (2 Xi), and its derivatives by hand."""
    source = random.Random(0)
    rows = [[source.gauss(0, 1) for _ in range(DIM)] for _ in range(SAMPLES)]
    targets = [source.gauss(0, 1) for _ in range(SAMPLES)]
    x = sympy.symbols(f"x1:{DIM + 1}", real=True)
    norm = sympy.sqrt(sum(s**2 for s in x))
    losses = [
        (sum(z * s for z, s in zip(row, x, strict=True)) / norm - y) ** 2 / 2
        for row, y in zip(rows, targets, strict=True)
    ]
    inputs, labels = (torch.tensor(v, dtype=torch.float64) for v in (rows, targets))
    square = inputs.T @ inputs / SAMPLES
    moment = labels @ inputs / SAMPLES
    identity = torch.eye(DIM, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        u = x / norm
        slope = u @ square - moment
        return (slope - (slope * u).sum(-1, keepdim=True) * u) / norm

    def hessian(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        u = x / norm
        image = u @ square
        slope = image - moment
        along = (slope * u).sum(-1, keepdim=True)
        w = (1.5 * along + 0.5 * (image * u).sum(-1, keepdim=True)) * u - image - slope
        turned = w.unsqueeze(-1) * u.unsqueeze(-2)
        whole = square - along.unsqueeze(-1) * identity + turned + turned.mT
        return whole / norm.square().unsqueeze(-1)

    return SymbolicLoss(losses, x, False), {"gradient": gradient, "hessian": hessian}


def compare(ours: Function, peer: Function, x: Tensor, rounds: int) -> Timing:
    """Time two functions in turns.

    Raises:
        AssertionError: If they do not compute the same.
    """
    expected = peer(x)
    torch.testing.assert_close(
        ours(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
    )
    return in_turns(lambda: ours(x), lambda: peer(x), rounds)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few points, nothing compiled: it shows that everything runs.
    """
    batch, rounds = (8, 2) if quick else (BATCH, 200)
    with one_thread():
        return [
            row
            for name, make in (("circle", circle), ("linear", linear_model))
            for row in _rows(name, *make(), batch, rounds, compiled=not quick)
        ]


def _rows(
    name: str,
    loss: SymbolicLoss,
    by_hand: dict[str, Function],
    batch: int,
    rounds: int,
    compiled: bool,
) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, loss.dim, dtype=torch.float64, generator=generator)
    note = f"batch {batch}, D = {loss.dim}"
    found = []
    for what, peer in by_hand.items():
        ours = getattr(loss, what)
        timings = {"eager": compare(ours, peer, x, rounds)}
        if compiled and compiler_available():
            last = x.T.contiguous()
            for mode, compiler in (("in C", compile_points), ("by torch", compile_batched)):
                pair = [compiler(function, (last,)) for function in (ours, peer)]
                if all(kernel is not None for kernel in pair):
                    timings[mode] = compare(*pair, last, rounds)
        for mode, timing in timings.items():
            found.append(timing.row(f"{what}, {name}, {mode}", "torch", note=note))
    return found
