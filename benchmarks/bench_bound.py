"""Compiled kernels against the arithmetic that they do.

The floating-point operations of every kernel that a run calls are counted in its traced program,
where each is one operation whatever it is, and weighed with the points that it is called on. The
bound is their number over the rate at which this machine multiplies matrices, measured in the same
run: what a program that did nothing else, at the best rate there is, would need. Random numbers,
eigendecompositions and what stands between kernels are in the time and not in the bound.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.bench_second_derivative import setting as points
from benchmarks.diffusion_programs import Ours
from benchmarks.rows import Row, in_turns, one_thread
from benchmarks.weak_errors import Setting
from manifold_sde import Geometry, problems
from manifold_sde.compile import CKernel, c_compiler, c_library, compiler
from manifold_sde.compile.scalar_program import ScalarProgram

TITLE = "Compiled kernels on section 6.1, D = 10, float64, against their arithmetic"
PEERS = ()
PATHS, STEPS, ROUNDS = 4096, 16, 5
#: Side of the matrices that are multiplied, which fit into the cache, and how often.
SIDE, PRODUCTS = 384, 20


def operations(program: ScalarProgram) -> int:
    """Number of floating-point operations that one point takes."""
    needed = program.order([a for out in program.outputs for a in out])
    return sum(program.operations[a][0] not in ("const", "input", "given") for a in needed)


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the operations of the kernels that are compiled and called inside."""
    known: dict[str, int] = {}
    total = 0
    compile_traced, call = c_library.compile_traced, CKernel.__call__

    def compiled(traced: Any, dtype: torch.dtype) -> CKernel:
        kernel = compile_traced(traced, dtype)
        known[str(kernel.said["name"])] = operations(traced.program)
        return kernel

    def called(self: CKernel, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        nonlocal total
        # Eigendecompositions are loops, of no traced program.
        total += known.get(str(self.said["name"]), 0) * arguments[0].shape[-1]
        return call(self, *arguments)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(c_library, "cache_folder", return_value=Path(folder)),
        mock.patch.object(compiler, "compile_traced", compiled),
        mock.patch.object(CKernel, "__call__", called),
    ):
        yield lambda: total


def multiply(matrix: Tensor) -> None:
    """As many operations as :func:`work` says."""
    for _ in range(PRODUCTS):
        torch.mm(matrix, matrix)


def work() -> float:
    """Operations of the products of matrices."""
    return 2.0 * PRODUCTS * SIDE**3


def row(
    name: str, run: Callable[[], object], items: int, total: Callable[[], int], rounds: int
) -> Row:
    """A run, per path and step or per point, against the bound for the same.

    Args:
        name: What is computed.
        run: The run, whose kernels it compiles when it is first called.
        items: How many points or steps of paths it has.
        total: Number of operations so far.
        rounds: Rounds of timing.
    """
    run()
    before = total()
    run()
    flops = total() - before
    matrix = torch.randn(SIDE, SIDE, dtype=torch.float64)
    timing = in_turns(run, partial(multiply, matrix), rounds)
    rate = work() / timing.peer
    note = f"{flops / items:.0f} operations each, at {1e-9 * rate:.1f} a nanosecond"
    return timing.with_peer_times(flops / work()).row(name, "bound", per=items, note=note)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few paths and steps.
    """
    if c_compiler() is None:
        return []
    paths, steps, rounds = (8, 2, 1) if quick else (PATHS, STEPS, ROUNDS)
    here = Setting("section 6.1", problems.normalized_linear(), 3)
    problem, y, sigma = points(paths)

    def stepped(method: str, plain: bool) -> Callable[[], object]:
        form = here.plain() if plain else None
        clock = method == "weak2"
        ours = Ours(
            here, method, 64, paths, clock=clock, compiled=True, problem=form, timed_steps=steps
        )
        return partial(ours.run, 0)

    found = []
    with one_thread(), counted() as total:
        for method in ("euler",) if quick else ("euler", "weak2"):
            for plain in (False,) if quick else (False, True):
                name = f"step of {method}" + ", plain" * plain
                found.append(row(name, stepped(method, plain), steps * paths, total, rounds))
        if not quick:
            geometry = Geometry(problem, method="dense", compile=True)
            second = partial(geometry.second_derivative, y, sigma)
            found.append(row("∂²Φ[Σ]", second, paths, total, rounds))
    return found
