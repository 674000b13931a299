"""Derivatives of a loss of one vector, in the orders of automatic differentiation that work.

Losses are written by users in ordinary torch, so the orders matter: the derivative of
``x / x.norm()`` raises inside torch when the outermost derivative of a third-order one is
reverse mode over forward mode. Forward over forward over reverse works for all of them. Run
operation by operation it takes two to five times as long as reverse mode alone, because torch 2.13
goes through Python where a tensor meets a constant, and the first one loads a compiler; compiled it
is as many operations. A loss for which reverse mode was seen to do the same takes that. Some
functions of torch have wrong third derivatives in every order; :mod:`manifold_sde.torch_norms`
replaces or finds them.

All functions take a function of ONE vector and are composable with ``torch.func``; batches are
made by :func:`batched`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.errors import DTypeError, ShapeError
from manifold_sde.reverse_mode import grad, vjp

ScalarFunction = Callable[[Tensor], Tensor]
#: Copies of what a function passes through that a third derivative by reverse mode holds.
THIRD_COPIES = 8


@functools.cache
def _load_forward_mode() -> None:
    """Load what torch loads at the first forward-mode derivative.

    It warns there of its own use of ``torch.jit.script``, which stops a program in which warnings
    are errors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """``torch.func.jvp``: the value and its derivative along the tangents, by forward mode."""
    _load_forward_mode()
    return torch.func.jvp(function, primals, tangents)


def product(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Derivative along v at one point, by forward mode: (D,), (D,) -> (...)."""
    found: Tensor = jvp(function, (x,), (v,))[1]
    # Forward mode makes some numbers of single precision double: x[0] - 0.5, say.
    return found.to(x.dtype)


def backward_gradient(function: ScalarFunction, x: Tensor) -> Tensor:
    """Gradient by torch's own backward pass, which is quicker and cannot be differentiated."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        value = function(point)
    return torch.autograd.grad(value, point)[0]


def hessian_product(function: ScalarFunction, x: Tensor, v: Tensor) -> Tensor:
    """Hessian-vector product at one point, forward over reverse: (D,), (D,) -> (D,)."""
    return product(grad(function), x, v)


def hessian_rows(function: ScalarFunction, x: Tensor, rows: Tensor, few: int) -> Tensor:
    """Hessian times several vectors, reverse over reverse: (D,), (k, D) -> (k, D).

    Args:
        function: Scalar function of one vector.
        x: Point (D,).
        rows: The vectors.
        few: How many of them are taken at a time.
    """
    pull = vjp(grad(function), x)[1]
    if few == 1 or len(rows) == 1:
        return torch.stack([pull(v) for v in rows])
    found: Tensor = vmap(pull, chunk_size=few)(rows)
    return found


def third_derivative(function: ScalarFunction, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Second directional derivative of the gradient at one point.

    It is ``d^2(grad f)(x)[a, b]``, symmetric in a and b, by forward over forward over reverse;
    the script T of the mathematics is its sum over a factorisation of the matrix.

    Args:
        function: Scalar function of one vector.
        x: Point (D,).
        a: Direction (D,).
        b: Another direction (D,).

    Returns:
        Tensor (D,).
    """
    _load_forward_mode()

    def first(z: Tensor) -> Tensor:
        return torch.func.jvp(grad(function), (z,), (a,))[1]

    return torch.func.jvp(first, (x,), (b,))[1].to(x.dtype)


def is_followed(x: Tensor) -> bool:
    """Whether a tensor is in a transform of ``torch.func``, or a graph of it is recorded."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or x.requires_grad


def has_custom_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a function calls a ``torch.autograd.Function``, whose derivative is the user's."""
    with torch.enable_grad():
        value = function(x.detach().clone().requires_grad_())
    left: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        left += [before for before, _ in node.next_functions]
    return False


def batched(
    function: Callable[..., Tensor],
    *arguments: Tensor,
    event_dims: tuple[int, ...] = (1,),
    randomness: str = "error",
    at_once: int | None = None,
) -> Tensor:
    """Apply a function of single points to arguments with any leading batch.

    Args:
        function: Function of unbatched tensors that returns one unbatched tensor.
        *arguments: Tensors whose last ``event_dims[i]`` dimensions are the event; the leading
            ones are broadcast against each other.
        event_dims: Number of event dimensions of each argument.
        randomness: Passed to ``torch.func.vmap``.
        at_once: Number of points in one ``vmap``; all of them where it is ``None``.

    Returns:
        Tensor with the broadcast batch shape in front of the function's own.

    Raises:
        DTypeError: If the arguments differ in dtype or device.
        ShapeError: If their batch shapes do not broadcast.
    """
    first = arguments[0]
    for other in arguments[1:]:
        if (other.dtype, other.device) != (first.dtype, first.device):
            raise DTypeError(
                "the arguments differ in dtype or device",
                received=" and ".join(f"{a.dtype} on {a.device}" for a in (first, other)),
                expected="one dtype and one device",
                remedy="other.to(x)",
            )
    batch_shapes = [a.shape[: a.dim() - d] for a, d in zip(arguments, event_dims, strict=True)]
    try:
        batch = torch.Size(np.broadcast_shapes(*batch_shapes))  # that of torch loads SymPy
    except ValueError as error:
        raise ShapeError(
            "the leading batch dimensions do not fit together",
            received=" and ".join(str(tuple(a.shape)) for a in arguments),
            expected="batch shapes that broadcast",
            remedy="give one batch shape, or none, to all of them",
        ) from error
    if batch == ():
        return function(*arguments)
    flat = [
        a.expand(*batch, *a.shape[a.dim() - d :]).reshape(batch.numel(), *a.shape[a.dim() - d :])
        for a, d in zip(arguments, event_dims, strict=True)
    ]
    if batch.numel() == 0:
        # vmap refuses an empty batch: one point shows the shape of the result.
        flat = [torch.ones(1, *a.shape[1:], dtype=a.dtype, device=a.device) for a in flat]
        result = vmap(function, randomness=randomness)(*flat)[:0]
    else:
        size = None if at_once is None or at_once >= batch.numel() else at_once
        result = vmap(function, randomness=randomness, chunk_size=size)(*flat)
    return result.reshape(*batch, *result.shape[1:])


def unit_rows(count: int, first: int, last: int, like: Tensor) -> Tensor:
    """Unit vectors of some coordinates, as rows, in the dtype and on the device of a tensor.

    Args:
        count: Number of coordinates.
        first: The first of them.
        last: The one after the last.
        like: The tensor.

    Returns:
        Tensor (last - first, count).
    """
    rows = like.new_zeros(last - first, count)
    rows.diagonal(first).fill_(1.0)
    return rows
