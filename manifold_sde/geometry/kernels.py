"""Loss functions on flat batches, eager or compiled in padded chunks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.compile import compile_batched
from manifold_sde.deadline import consult
from manifold_sde.problem import Problem

#: Batch sizes of compiled kernels: compiling takes seconds, so they are few. Smaller batches are
#: filled up to the next size, larger ones are cut into chunks of the largest, which is where the
#: numbers in between still fit into the cache of a core.
_SIZES = (16, 64, 256)


class Kernels:
    """Evaluates functions of single points on batches, for one problem.

    Compiled kernels are kept with the problem, by name, size, dtype and device.

    Args:
        problem: The problem.
        compiled: Whether to compile.
    """

    def __init__(self, problem: Problem, compiled: bool) -> None:
        self.problem = problem
        self.compiled = compiled

    def run(
        self,
        name: str,
        function: Callable[..., Tensor],
        *arguments: Tensor,
        size: int | None = None,
    ) -> Tensor:
        """Evaluate a function of single points: each argument (n, ...) -> (n, ...).

        Args:
            name: Name of the kernel; it stands for the function.
            function: Function of single points, composable with ``torch.func``.
            *arguments: Tensors with one leading batch dimension.
            size: Batch size to compile for, where the number of points will vary from call to
                call; by default that of the arguments.
        """
        if len(arguments[0]) == 1 and arguments[0].dtype != torch.float64:
            # Forward mode makes some numbers of a batch of one double (torch 2.13).
            pair = (a.expand(2, *a.shape[1:]) for a in arguments)
            return self.run(name, function, *pair, size=size)[:1]
        # Points last in memory: the loops over them are the ones that vectorise.
        last = [a.movedim(0, -1) for a in arguments]
        return self.run_last(name, function, *last, size=size).movedim(-1, 0).contiguous()

    def run_last(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Tensor,
        size: int | None = None,
    ) -> Any:
        """Evaluate a function of single points: each argument (..., n) -> (..., n).

        Args:
            name: Name of the kernel; it stands for the function.
            function: Function of single points that returns a tensor or a tuple of tensors.
            *arguments: Tensors whose last dimension is that of the points.
            size: As in :meth:`run`.
        """
        consult()
        n = arguments[0].shape[-1]
        if n == 0:
            one = self.run_last(name, function, *(a.new_ones(*a.shape[:-1], 1) for a in arguments))
            return one[..., :0] if isinstance(one, Tensor) else tuple(o[..., :0] for o in one)
        if not self.compiled:
            # Forward mode cannot write to an expanded tensor.
            contiguous = (a.contiguous() for a in arguments)
            return vmap(function, in_dims=-1, out_dims=-1)(*contiguous)
        chunk = next((c for c in _SIZES if c >= (size or n)), _SIZES[-1])
        key = (name, chunk, arguments[0].dtype, arguments[0].device)
        kernels = self.problem.kernels
        pieces: list[Any] = []
        for start in range(0, n, chunk):
            piece = [a[..., start : start + chunk].detach() for a in arguments]
            missing = chunk - piece[0].shape[-1]
            if missing:
                piece = [
                    torch.cat([a, a[..., -1:].expand(*a.shape[:-1], missing)], -1) for a in piece
                ]
            piece = [a.contiguous() for a in piece]
            if key not in kernels:
                kernels[key] = _elsewhere(compile_batched, function, tuple(piece))
            pieces.append(kernels[key](*piece))
        if isinstance(pieces[0], Tensor):
            return _joined(pieces, n)
        return tuple(_joined(list(parts), n) for parts in zip(*pieces, strict=True))

    def noise_trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma at the directions of points: (D, n) -> (n,)."""
        noise, loss = self.problem.noise, self.problem.pointwise
        result: Tensor = self.run_last("trace", lambda y: noise.trace(loss, y), x / x.norm(dim=0))
        return result

    def noise_product(self, y: Tensor, w: Tensor) -> Tensor:
        """The product sigma w, not projected: (D, n), (m, n) -> (D, n)."""
        noise, loss = self.problem.noise, self.problem.pointwise
        result: Tensor = self.run_last(
            "noise_product", lambda z, v: noise.product(loss, z, v), y, w
        )
        return result

    def noise_factor(self, y: Tensor) -> Tensor:
        """The matrix sigma: (D, n) -> (D, m, n)."""
        noise, loss = self.problem.noise, self.problem.pointwise
        result: Tensor = self.run_last("noise_factor", lambda z: noise.factor(loss, z), y)
        return result

    def gradient(self, x: Tensor, size: int | None = None) -> Tensor:
        """Gradients: (n, D) -> (n, D)."""
        return self.run("gradient", self.problem.pointwise.gradient, x, size=size)

    def hessian(self, x: Tensor, size: int | None = None) -> Tensor:
        """Hessians: (n, D) -> (n, D, D)."""
        return self.run("hessian", self.problem.pointwise.hessian, x, size=size)


def _joined(pieces: list[Tensor], n: int) -> Tensor:
    """Pieces one after the other, without what filled up the last."""
    return (torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0])[..., :n]


def _elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own, and wait.

    The modes of autograd and the transforms of ``torch.func`` that are active here, such as inside
    the derivative of the limit map, belong to the thread; torch's compiler stumbles over them.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments).result()
