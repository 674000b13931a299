"""Derivatives by reverse mode, as ``torch.func`` takes them, without the compiler that it loads.

``torch.func.grad`` and ``vjp`` load ``torch._dynamo`` at their first call, to make sure that no
backward pass of theirs is compiled: a second of processor time, in a process that compiles nothing.
As long as it is not loaded none is compiled, and the same steps are taken here without it. They are
not public: where torch has others, or the compiler is loaded, ``torch.func`` is called.

All functions take a function of ONE vector, or another tensor, and compose with ``torch.func``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

try:
    from torch._functorch.eager_transforms import (
        _create_differentiable,
        _undo_create_differentiable,
        _wrap_all_tensors,
        doesnt_support_saved_tensors_hooks,
        grad_increment_nesting,
    )
    from torch.autograd.graph import _engine_run_backward
except ImportError:  # a torch that has other names for them
    _KNOWN = False
else:
    _KNOWN = True


def grad(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of a scalar function of one tensor, as ``torch.func.grad``."""

    def gradient(x: Tensor) -> Tensor:
        if _alone():
            found: Tensor = doesnt_support_saved_tensors_hooks(_gradient)(function, x)
            return found
        return torch.func.grad(function)(x)

    return gradient


def vjp(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The value of a function of one tensor, and products with its transposed derivative.

    As ``torch.func.vjp``, of one tensor: what it returns for weights of the shape of the value is a
    tensor of the shape of x.
    """
    if not _alone():
        pair: Any = torch.func.vjp(function, x)
        return pair[0], lambda weights: pair[1](weights)[0]
    result: tuple[Tensor, Callable[[Tensor], Tensor]]
    result = doesnt_support_saved_tensors_hooks(_vjp)(function, x)
    return result


def _alone() -> bool:
    """Whether nothing can compile a backward pass, and the steps of torch are known."""
    loaded = "torch._dynamo" in sys.modules
    return _KNOWN and not loaded and not torch.is_inference_mode_enabled()


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with grad_increment_nesting() as level, torch.enable_grad():
        point = _wrap_all_tensors(x, level)
        _create_differentiable(point, level)
        value = function(point)
        if not value.requires_grad:
            return torch.zeros_like(x)
        found: Any = torch.autograd.grad(value, point, create_graph=True, allow_unused=True)[0]
        if found is None:
            return torch.zeros_like(x)
        result: Tensor = _undo_create_differentiable(found, level)
        return result


def _vjp(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    with grad_increment_nesting() as level, torch.enable_grad():
        point = _wrap_all_tensors(x, level)
        _create_differentiable(point, level)
        value = function(point)
        result = _undo_create_differentiable(value, level)

    def pull(weights: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(x)
        # What torch.autograd.grad comes to, which loads SymPy to compare two shapes.
        further = torch.is_grad_enabled()
        found: tuple[Any, ...] = _engine_run_backward(
            (value,), (weights,), True, further, (point,), True, accumulate_grad=False
        )
        return torch.zeros_like(x) if found[0] is None else found[0]

    return result, pull


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of a scalar function at one point: (D,) -> (D,)."""
    return grad(function)(x)


def product(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Derivative along v at one point: the transposed product, transposed: (D,), (D,) -> (...)."""
    value, pull = vjp(function, x)
    return vjp(pull, torch.zeros_like(value))[1](v)


def hessian_product(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Hessian-vector product at one point: (D,), (D,) -> (D,)."""
    return grad(lambda z: grad(function)(z) @ v)(x)


def hessian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Hessian at one point, one reverse mode a column: (D,) -> (D, D), symmetrised."""
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # What does not depend on v is computed once.
    columns = vmap(lambda v: hessian_product(function, x, v))(basis)
    return 0.5 * (columns + columns.T)


def third_derivative(
    function: Callable[[Tensor], Tensor], x: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """Second directional derivative of the gradient at one point: (D,) each -> (D,)."""
    return grad(lambda z: hessian_product(function, z, a) @ b)(x)
