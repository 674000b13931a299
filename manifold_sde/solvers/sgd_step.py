"""One step of SGD with weight decay for many paths at once, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import rng
from manifold_sde.compile import CKernel, compile_function, compile_points
from manifold_sde.compile.random_numbers import fill
from manifold_sde.noise.base import AT_ONCE
from manifold_sde.problem import Problem

#: Steps whose learning rates are laid out in one table; the noise of as many as fit is drawn at
#: once.
BLOCK = 1024
_STREAMS = (rng.STREAM_SGD_NORMAL, rng.STREAM_SGD_UNIFORM)
#: Paths are padded to a multiple of this, so that every path runs through the same vector code.
LANES = 16


@dataclass
class SgdState:
    """State of a group of paths, paths last.

    Attributes:
        x: Weights (D, n).
        clock: Intrinsic clock u of each path, (n,).
        paths: Path indices, on which the noise depends, (n,).
        step: Number of steps taken.
    """

    x: Tensor
    clock: Tensor
    paths: Tensor
    step: int = 0

    @classmethod
    def begin(cls, start: Tensor, first: int, lanes: int = LANES) -> SgdState:
        """State of paths from one of this index on, at their starts (n, D), padded to lanes."""
        n = len(start)
        padded = -(-n // lanes) * lanes
        x = torch.cat([start, start[-1:].expand(padded - n, -1)]).T.contiguous()
        paths = torch.arange(first, first + padded, device=x.device)
        return cls(x, x.new_zeros(padded), paths)


def go_alone(problem: Problem, n_paths: int) -> bool:
    """Whether paths on a network are quicker one after the other than together, as measured."""
    return problem.network is not None and n_paths <= max(3, problem.dim // 1000)


def update(
    problem: Problem,
    x: Tensor,
    clock: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    normals: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Equation (1) with its noise given, and the clock's step.

    .. math::

        x_{k+1} = (1 - \eta_k\lambda_k) x_k - \eta_k g_k, \qquad
        \Delta u = \eta_k^2 / ((1 - \eta_k\lambda_k)^2 \|x_k\|^4)

    Args:
        problem: The problem, whose noise makes the stochastic gradient g.
        x: Weights (D, n).
        clock: Clock (n,).
        lr: Learning rate of the step, ().
        weight_decay: Weight decay of the step, ().
        normals: Normals that the step consumes, (a, n).
        uniforms: Uniforms that the step consumes, (b, n).

    Returns:
        Weights and clock after the step.
    """

    def stochastic_gradient(z: Tensor, n: Tensor, u: Tensor) -> Tensor:
        return problem.noise.stochastic_gradient(problem.pointwise, z, n, u)

    gradient = vmap(stochastic_gradient, in_dims=-1, out_dims=-1)(x, normals, uniforms)
    return _moved(x, clock, lr, weight_decay, gradient)


def update_alone(
    problem: Problem,
    x: Tensor,
    clock: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    normals: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same path by path, each by torch's own backward pass; x is changed in place."""
    loss, squares = problem.pointwise.at_one_point(), torch.empty_like(clock)
    rate, shrink = float(lr), 1.0 - float(lr * weight_decay)
    for i, point in enumerate(x.T):
        gradient = problem.noise.stochastic_gradient(loss, point, normals[:, i], uniforms[:, i])
        squares[i] = point.dot(point)
        point.mul_(shrink).sub_(gradient, alpha=rate)
    return x, clock + (rate / (shrink * squares)) ** 2


def _moved(
    x: Tensor, clock: Tensor, lr: Tensor, weight_decay: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with the stochastic gradient given, of many paths or of ONE."""
    shrink = 1.0 - lr * weight_decay
    square = (x * x).sum(0)
    return shrink * x - lr * gradient, clock + (lr / (shrink * square)) ** 2


def c_step(problem: Problem, state: SgdState) -> tuple[CKernel, Tensor] | None:
    """The step as C code for any number of paths, kept with the problem.

    Returns:
        Kernel of (x, clock, normals, uniforms), and the tensor (2,) that it holds of the learning
        rate and the weight decay; ``None`` where it cannot be had.
    """
    key = ("sgd", state.x.dtype, state.x.device)
    if key not in problem.kernels:
        # Rates at which the gradient shows, where the step is compared with the eager one.
        rates = state.x.new_full((2,), 0.5)
        noise, loss = problem.noise, problem.pointwise

        def step(
            x: Tensor, clock: Tensor, normals: Tensor, uniforms: Tensor
        ) -> tuple[Tensor, Tensor]:
            gradient = noise.stochastic_gradient(loss, x, normals, uniforms)
            return _moved(x, clock, rates[0], rates[1], gradient)

        few = [state.x[:, :3], state.clock[:3]]
        few += [state.x.new_full((count, 3), 0.3) for count in noise.draw_counts(loss)]
        reasons: list[str] = []
        kernel = compile_points(step, tuple(a.contiguous() for a in few), reasons=reasons)
        problem.kernels["reason", "sgd"] = reasons
        problem.kernels[key] = None if kernel is None else (kernel, rates)
    found: tuple[CKernel, Tensor] | None = problem.kernels[key]
    return found


def compiled_step(problem: Problem, state: SgdState) -> Callable[..., tuple[Tensor, ...]]:
    """A compiled step that draws its own noise, for states of this shape.

    It is kept with the problem, and serves every seed, learning rate and number of steps.

    Returns:
        Function of (x, clock, index, start, lrs, decays, key0, key1, paths) that returns
        (x, clock, index + 1), where lrs and decays are tables of the steps from start on.
    """
    dtype = state.x.dtype

    def step(
        x: Tensor,
        clock: Tensor,
        index: Tensor,
        start: Tensor,
        lrs: Tensor,
        decays: Tensor,
        key0: Tensor,
        key1: Tensor,
        paths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        entry = (index - start).reshape(1)
        lr, decay = lrs.index_select(0, entry)[0], decays.index_select(0, entry)[0]
        normals, uniforms = problem.noise.numbers(
            problem.pointwise, (key0, key1), paths, index, dtype
        )
        x, clock = update(problem, x, clock, lr, decay, normals, uniforms)
        return x, clock, index + 1

    key = ("sgd", tuple(state.x.shape), dtype, state.x.device)
    if key not in problem.kernels:
        scalar = torch.zeros((), dtype=torch.int64, device=state.x.device)
        # Rates at which the gradient shows, where the compiled step is compared with the eager one.
        table = torch.full((BLOCK,), 0.5, dtype=dtype, device=state.x.device)
        arguments = (
            state.x,
            state.clock,
            scalar,
            scalar,
            table,
            table,
            scalar,
            scalar,
            state.paths,
        )
        problem.kernels[key] = compile_function(step, arguments)
    return problem.kernels[key]


def _c_steps(
    problem: Problem,
    step: tuple[CKernel, Tensor],
    state: SgdState,
    first: int,
    tables: tuple[Tensor, Tensor],
    key: tuple[int, int],
) -> Iterator[int]:
    """Take the steps of the tables, as :func:`advance` does, by C code."""
    kernel, rates = step
    own = rates.clone()  # another run of the same problem may be under way in another thread
    kernel, table = kernel.holding(rates, own), torch.stack(tables, 1)
    counts = problem.noise.draw_counts(problem.pointwise)
    n = state.x.shape[1]
    at_once = max(1, AT_ONCE // max(1, sum(counts) * n))
    for begin in range(0, len(table), at_once):
        some = table[begin : begin + at_once]
        steps = torch.arange(first + begin, first + begin + len(some))[:, None]
        normals, uniforms = (
            fill(
                state.x.new_empty(len(some), count, n),
                normal=stream == rng.STREAM_SGD_NORMAL,
                key=key,
                stream=stream,
                paths=state.paths,
                steps=steps,
                components_first=False,
            )
            for count, stream in zip(counts, _STREAMS, strict=True)
        )
        for j in range(len(some)):
            own.copy_(some[j])
            state.x, state.clock = kernel(state.x, state.clock, normals[j], uniforms[j])
        yield len(some)


def advance(
    problem: Problem,
    state: SgdState,
    first: int,
    tables: tuple[Tensor, Tensor],
    seed: int,
    *,
    compiled: bool | str,
    alone: bool = False,
) -> Iterator[int]:
    """Take the steps first, first + 1, ... whose rates the tables hold, changing the state.

    Args:
        problem: The problem.
        state: The state; replaced in place.
        first: Number of the first step.
        tables: Learning rates and weight decays of the steps, (m,) each, m at most ``BLOCK``.
        seed: Seed of the noise.
        compiled: Whether the step is compiled: "c" for what the C compiler can do in seconds.
        alone: Whether paths are taken one after the other, by :func:`update_alone`.

    Yields:
        Numbers of steps just taken, which add up to m.
    """
    key = rng.seed_key(seed)
    lrs, decays = tables
    m = len(lrs)
    device = state.x.device
    quick = c_step(problem, state) if compiled else None
    if quick is not None:
        yield from _c_steps(problem, quick, state, first, tables, key)
        return
    if compiled is True:
        step = compiled_step(problem, state)
        pad = BLOCK - m
        lrs, decays = (torch.nn.functional.pad(t, (0, pad)) for t in (lrs, decays))
        index = torch.tensor(first, device=device)
        start = torch.tensor(first, device=device)
        key0, key1 = (torch.tensor(k, device=device) for k in key)
        x, clock, paths = state.x, state.clock, state.paths
        for _ in range(m):
            x, clock, index = step(x, clock, index, start, lrs, decays, key0, key1, paths)
        state.x, state.clock = x, clock
        yield m
        return
    step_of_all = update_alone if alone else update
    if alone:
        state.x = state.x.T.clone(memory_format=torch.contiguous_format).T
    steps = torch.arange(first, first + m, device=device)
    numbers = problem.noise.step_numbers(problem.pointwise, key, state.paths, steps, state.x.dtype)
    for lr, decay, drawn in zip(lrs, decays, numbers, strict=True):
        state.x, state.clock = step_of_all(problem, state.x, state.clock, lr, decay, *drawn)
        yield 1
