"""What derivatives at a few single points do not show of a function of the user's.

- That it has another value when it is called again.
- That it is another function in a batch: of points that lie otherwise in memory (``as_strided``),
  under ``vmap`` (``try: float(x[0])``), or of as many points as directions, where torch has batched
  an operation wrongly.
- That a value which depends on x is taken for a constant, by ``detach`` or ``no_grad``, in a branch
  that no test point is in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from manifold_sde import reverse_mode, rng
from manifold_sde.errors import DifferentiationError
from manifold_sde.loss import Loss
from manifold_sde.remedies import DIFFERENTIABLE, KEEP_DERIVATIVES, differentiating
from manifold_sde.torch_norms import functions_called

#: Relative difference that is an error.
_TOLERANCE = 1e-7
#: Units of rounding, of the largest value, by which two calls of a fixed function may differ: the
#: last digits of linear algebra depend on where its arguments lie in memory.
_ROUNDING = 4096
#: Functions of torch that make a constant of what depends on x, and the switch of ``no_grad``.
_DETACHING = (Tensor.detach, torch.detach)
_SWITCH = torch._C._set_grad_enabled
#: Points at which functions that call them are looked at, of so many numbers together; bytes that
#: derivatives may hold at once, and in all.
_POINTS, _NUMBERS = 256, 1 << 16
_AT_ONCE, _IN_ALL = 1 << 26, 1 << 30
#: What derivatives hold, over what a backward pass does.
_COPIES = 8


class _Uncut(TorchFunctionMode):
    """Leaves out what makes constants."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DETACHING:
            return args[0] if args else (kwargs or {})["input"]
        return None if func is _SWITCH else func(*args, **(kwargs or {}))


def equal_to_rounding(value: Tensor, other: Tensor) -> bool:
    """Whether two calls of one function at the same x gave the same up to rounding."""
    if value.shape != other.shape:
        return False
    size = float(value.nan_to_num().abs().max()) if value.numel() else 0.0
    off = _ROUNDING * torch.finfo(value.dtype).eps * size
    return torch.allclose(value, other, rtol=0.0, atol=off, equal_nan=True)


def require_fixed(
    function: Callable[[Tensor], Tensor], x: Tensor, before: Tensor, what: str
) -> None:
    """Refuse a function with another value at x than it had before."""
    value = function(x.clone())
    if not equal_to_rounding(value, before):
        raise DifferentiationError(
            f"the {what} is not a fixed function",
            received=f"values that differ by {float((value - before).abs().max()):.3g} at the "
            "same x",
            expected="the same value at every call",
            remedy="switch dropout off (module.eval()), draw random constants outside, and keep "
            "nothing from call to call",
        )


def require_alike(
    loss: Loss, function: Callable[[Tensor], Tensor], points: Tensor, what: str, *, second: bool
) -> None:
    """Refuse a function that is another one in a batch than at single points.

    Args:
        loss: The loss.
        function: The user's function that it is made of.
        points: Unit vectors (2, D).
        what: What the function is, for messages.
        second: Whether to look at second derivatives, too, along as many directions.

    Raises:
        DifferentiationError: With what to write instead.
    """
    trials: list[tuple[str, Callable[[Tensor], Tensor]]] = [("value", function)]
    if second:
        orders = [Loss.hessian_product] if loss.reverses else [Loss.hessian_product, _by_reverse]
        trials += [("second derivative", partial(_along, partial(f, loss), points)) for f in orders]
    for name, of_one in trials:
        with differentiating(1 if name == "value" else 2):
            alone = torch.stack([of_one(x.clone()) for x in points])
            together = vmap(of_one, in_dims=-1)(points.T.contiguous())
        off = float((alone - together).norm()) / max(float(alone.norm()), 1e-300)
        if off > _TOLERANCE:
            raise DifferentiationError(
                f"the {name} of the {what} at a point is another one among other points",
                received=f"a relative difference of {off:.2g}",
                expected=DIFFERENTIABLE,
                remedy="write the operation in elementary ones: no as_strided, which reads memory "
                "and not x; nothing that runs otherwise under torch.func, as an except around "
                "float(x[0]); nothing kept from call to call",
            )


def _by_reverse(loss: Loss, x: Tensor, v: Tensor) -> Tensor:
    return loss._derivative(reverse_mode.hessian_product, x, v)


def _along(product: Callable[[Tensor, Tensor], Tensor], directions: Tensor, x: Tensor) -> Tensor:
    result: Tensor = vmap(partial(product, x))(directions)
    return result


def require_uncut(function: Callable[[Tensor], Tensor], point: Tensor, what: str) -> None:
    """Refuse a function that takes for a constant, somewhere, a value that depends on x.

    It is differentiated as it is and without ``detach`` and ``no_grad``, at many points, half of
    them near few coordinates. A function that calls neither costs one evaluation.

    Args:
        function: The user's function.
        point: Point (D,) that shows what it calls.
        what: What the function is, for messages.

    Raises:
        DifferentiationError: If the derivatives differ.
    """
    called = functions_called(function, point.clone())
    if not any(f in _DETACHING or f is _SWITCH for f in called):
        return
    held = _COPIES * max(1, _bytes_held(function, point))
    count, dim = max(8, min(_POINTS, _NUMBERS // len(point), _IN_ALL // held)), len(point)
    few = max(1, min(_POINTS, _AT_ONCE // held))
    points = rng.normals((0xC07, 0), 0, torch.arange(count), torch.tensor(0), dim, point.dtype).T
    points = torch.cat([points[::2], points[1::2] ** 5]).contiguous()
    points = points / points.norm(dim=1, keepdim=True)
    along = points[0].clone()

    def total(z: Tensor) -> Tensor:
        value = function(z).flatten()
        return value @ torch.arange(1.0, len(value) + 1.0).to(value)

    def uncut(z: Tensor) -> Tensor:
        with _Uncut():
            return total(z)

    def both(f: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [
            vmap(partial(reverse_mode.gradient, f), chunk_size=few)(points),
            vmap(lambda z: reverse_mode.hessian_product(f, z, along), chunk_size=few)(points),
        ]
        return torch.stack(parts, 1)

    try:
        found, want = both(total), both(uncut)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return  # without them it may be no function of torch.func, and do what its author excluded
    # Where all is saturated a derivative is rounding: the largest at all points is the measure.
    size = want.norm(dim=-1).nan_to_num(0.0).amax(0).clamp(min=1e-300)
    off = float(((found - want).norm(dim=-1) / size).nan_to_num(0.0).max())
    if off > _TOLERANCE:
        raise DifferentiationError(
            f"the derivative of the {what} is not everywhere that of what it computes",
            received=f"a relative difference of {off:.2g} from its derivative without detach() and "
            "torch.no_grad(), at one of many points",
            expected=f"at most {_TOLERANCE:g}: {DIFFERENTIABLE}, without cutting a derivative",
            remedy=KEEP_DERIVATIVES,
        )


def _bytes_held(function: Callable[[Tensor], Tensor], point: Tensor) -> int:
    """Bytes that a backward pass of a function at one point holds; 0 where it cannot be seen."""
    held = 0

    def keep(value: Tensor) -> Tensor:
        nonlocal held
        held += value.numel() * value.element_size()
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with contextlib.suppress(RuntimeError), torch.enable_grad(), hooks:  # torch.func refuses them
        function(point.detach().requires_grad_())
    return held
