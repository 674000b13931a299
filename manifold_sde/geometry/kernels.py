"""Loss functions on flat batches, eager or compiled in padded chunks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.columns import column_norms
from manifold_sde.compile import (
    CKernel,
    Identity,
    Unsupported,
    compile_batched,
    compile_points,
    eigen_kernel,
)
from manifold_sde.deadline import consult
from manifold_sde.derivatives import has_custom_derivative
from manifold_sde.ghost_products import singly
from manifold_sde.problem import Problem

#: Batch sizes of compiled kernels: compiling takes seconds, so they are few. Smaller batches are
#: filled up to the next size, larger ones are cut into chunks of the largest, which is where the
#: numbers in between still fit into the cache of a core.
_SIZES = (16, 64, 256)
#: Dimension above which a batch of one is none.
_LARGE = 1000
#: Points at which a kernel for any number is compared with what it was made of.
_FEW = 3


class Kernels:
    """Evaluates functions of single points on batches, for one problem.

    Compiled kernels are kept with the problem, by name, size, dtype and device.

    Args:
        problem: The problem.
        compiled: Whether to compile: "c" for what the C compiler can do in seconds.
    """

    def __init__(self, problem: Problem, compiled: bool | str) -> None:
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
        last = tuple(a.movedim(0, -1) for a in arguments)
        kernel = (
            self._c_kernel(name, function, last) if self.compiled and len(arguments[0]) else None
        )
        if kernel is not None:
            consult()
            return kernel.points_first(*(a.detach() for a in last))
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
        kernel = self._c_kernel(name, function, arguments) if self.compiled else None
        if kernel is not None:
            return kernel(*(a.detach().contiguous() for a in arguments))
        if self.compiled is not True:
            if self.compiled:
                self._note(name)
            if n == 1 and self.problem.dim > _LARGE and arguments[0].dtype == torch.float64:
                return at_one_point(function, *arguments)
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
                reasons: list[str] = []
                kernels[key] = _elsewhere(compile_batched, function, tuple(piece), reasons)
                if reasons:
                    self._note(name, reasons[0])
            pieces.append(kernels[key](*piece))
        if isinstance(pieces[0], Tensor):
            return _joined(pieces, n)
        return tuple(_joined(list(parts), n) for parts in zip(*pieces, strict=True))

    def whole(self, name: str, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """Evaluate a function of several kernels as one, where that is compiled.

        Args:
            name: Name of the kernel; it stands for the function.
            function: Function of kernels and of tensors with the points last, or of ONE point
                without them, that is the same for either.
            *arguments: Tensors whose last dimension is that of the points, at least one.

        Returns:
            What :meth:`run_last` returns, or ``None`` where it is not compiled.
        """
        if not self.compiled or not arguments[0].shape[-1]:
            return None
        consult()
        one = partial(function, OnePoint(self.problem))
        kernel = self._c_kernel(name, one, arguments)
        return None if kernel is None else kernel(*(a.detach().contiguous() for a in arguments))

    def eigh(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors: (D, D, n) -> (D, n), (D, D, n).

        NaN where a matrix is not finite.
        """
        on_cpu = matrices.device.type == "cpu"
        kernel = eigen_kernel(len(matrices), matrices.dtype) if self.compiled and on_cpu else None
        if kernel is not None:
            values, vectors = kernel(matrices.detach().contiguous())
            return values, vectors
        batch = matrices.movedim(-1, 0)
        lost = ~torch.isfinite(batch).flatten(1).all(1)
        # LAPACK refuses what is not finite.
        values, vectors = torch.linalg.eigh(batch.masked_fill(lost[:, None, None], 0.0))
        values = values.masked_fill(lost[:, None], torch.nan)
        vectors = vectors.masked_fill(lost[:, None, None], torch.nan)
        return values.T, vectors.movedim(0, -1)

    def no_part_of_one(self, what: str) -> None:
        """Say that what follows cannot be part of a kernel of several."""

    def _c_kernel(
        self, name: str, function: Callable[..., Any], arguments: tuple[Tensor, ...]
    ) -> CKernel | None:
        kernels = self.problem.kernels
        # A kernel reads memory: all that it is called with is what it was compiled for.
        kinds = tuple((a.shape[:-1], a.dtype, a.device) for a in arguments)
        key = (name, *kinds)
        if key not in kernels:
            few = tuple(a[..., :_FEW].detach().contiguous() for a in arguments)
            identity = self._identity(arguments[0])
            identity = None if identity is None else identity.of_kernel(name)
            reasons: list[str] = []
            kernels[key] = _elsewhere(compile_points, function, few, identity, reasons)
            if reasons:
                kernels["reason", name] = reasons[0]
        found: CKernel | None = kernels[key]
        return found

    def _note(self, name: str, reason: str | None = None) -> None:
        """Write down that a kernel runs uncompiled in this mode, and why."""
        noted = self.problem.kernels.setdefault(("uncompiled", self.compiled), {})
        noted[name] = reason or self.problem.kernels.get(("reason", name), "no C code")

    def _identity(self, like: Tensor) -> Identity | None:
        """What the kernels of the problem are made of."""
        problem, kernels = self.problem, self.problem.kernels
        key = ("identity", like.dtype, like.device)
        if key not in kernels:
            noise, loss = problem.noise, problem.pointwise
            x = torch.ones(problem.dim, dtype=like.dtype, device=like.device)
            w = x.new_ones(noise.n_components(loss))
            functions = [
                (loss.function, (x,)),
                (loss.gradient, (x,)),
                (lambda z, v: noise.product(loss, z, v), (x, w)),
            ]
            # The user's second derivatives are in none of them.
            hidden = has_custom_derivative(loss.function, x)
            kernels[key] = None if hidden else _elsewhere(Identity.of, functions)
        found: Identity | None = kernels[key]
        return found

    def noise_trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma at the directions of points: (D, n) -> (n,)."""
        noise, loss, y = self.problem.noise, self.problem.pointwise, x / column_norms(x)
        if singly(loss, y) and not self.compiled:
            return torch.stack([noise.trace(loss, z) for z in y.T.contiguous()])
        result: Tensor = self.run_last("trace", lambda z: noise.trace(loss, z), y)
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


def uncompiled(problem: Problem, mode: bool | str) -> frozenset[str]:
    """Why kernels of a problem ran uncompiled although they were to be compiled, if any did."""
    return frozenset(problem.kernels.get(("uncompiled", mode), {}).values())


class OnePoint(Kernels):
    """Kernels that are called on the tensors of ONE point, as they stand.

    Args:
        problem: The problem.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, False)

    def run_last(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Tensor,
        size: int | None = None,
    ) -> Any:
        """Call the function."""
        return function(*arguments)

    def no_part_of_one(self, what: str) -> None:
        """Refuse to be compiled, before anything is traced in vain."""
        raise Unsupported(what)


def at_one_point(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """A function of one point where there is one: products of matrices take half the time then.

    In a batch of one they would be products of batches.
    """
    found = function(*(a[..., 0].contiguous() for a in arguments))
    if isinstance(found, Tensor):
        return found[..., None]
    return tuple(part[..., None] for part in found)


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
