"""The limit map as torch sees it: forward mode, reverse mode and vmap in any nesting.

Values and derivatives are computed on plain tensors, below every transform of ``torch.func``. A
Jacobian shares one flow between its columns: only the tangents are batched.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from manifold_sde.errors import DifferentiationError


class DifferentiableMap(Protocol):
    """A map of flat batches (n, D) -> (n, D) with its two linear images, (n, D), (n, D, k)."""

    def value(self, x: Tensor) -> Tensor:
        """The map."""

    def push(self, x: Tensor, tangents: Tensor) -> Tensor:
        """Its derivative times tangents."""

    def pull(self, x: Tensor, cotangents: Tensor) -> Tensor:
        """Its transposed derivative times cotangents."""


def apply(mapping: DifferentiableMap, x: Tensor) -> Tensor:
    """The map at a flat batch, differentiable once: (n, D) -> (n, D)."""
    return _Value.apply(x, mapping)


def _merge(tensor: Tensor, dim: int | None, size: int, into: int) -> Tensor:
    """Flatten a batch dimension, or one that is missing, into the dimension after ``into``."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, into).flatten(into, into + 1)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mapping: DifferentiableMap) -> Tensor:
        return mapping.value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.mapping = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _Image.apply(x, cotangent[..., None], ctx.mapping, "pull")[..., 0], None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Image.apply(x, tangent[..., None], ctx.mapping, "push")[..., 0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, mapping: DifferentiableMap) -> Any:
        size = info.batch_size
        flat = _Value.apply(_merge(x, in_dims[0], size, 0), mapping)
        return flat.reshape(size, -1, flat.shape[-1]), 0


class _Image(torch.autograd.Function):
    """A linear image, push or pull, of vectors (n, D, k); linear in them, and not beyond."""

    @staticmethod
    def forward(x: Tensor, vectors: Tensor, mapping: DifferentiableMap, which: str) -> Tensor:
        return mapping.push(x, vectors) if which == "push" else mapping.pull(x, vectors)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise _second_derivative_error()

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        raise _second_derivative_error()

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        vectors: Tensor,
        mapping: DifferentiableMap,
        which: str,
    ) -> Any:
        size = info.batch_size
        if in_dims[0] is None:
            # One flow for all vectors.
            merged = _merge(vectors, in_dims[1], size, 2)
            images = _Image.apply(x, merged, mapping, which)
            return images.unflatten(2, (-1, size)), 3
        flat_x = _merge(x, in_dims[0], size, 0)
        flat_vectors = _merge(vectors, in_dims[1], size, 0)
        images = _Image.apply(flat_x, flat_vectors, mapping, which)
        return images.unflatten(0, (size, -1)), 0


def _second_derivative_error() -> DifferentiationError:
    return DifferentiationError(
        "the limit map and log pdet H are differentiable once",
        received="a derivative of its derivative",
        expected="one of torch.func.jvp, vjp, jacfwd, jacrev or one backward",
        remedy="on the manifold, geometry.second_derivative(y, Sigma) is exact; off it, take "
        "differences of first derivatives",
    )
