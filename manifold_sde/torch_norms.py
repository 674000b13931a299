"""Losses in elementary operations, where torch's own higher derivatives are wrong.

In torch 2.13 the third derivatives that pass through ``layer_norm``, ``batch_norm`` or
``instance_norm`` are wrong, without an error and in every order of forward and reverse mode:
their derivative formulas take the saved mean and deviation for constants. So are those of some
linear algebra (:mod:`manifold_sde.torch_algebra`), and some layers have none
(:mod:`manifold_sde.torch_layers`). While a loss runs, these functions are replaced
by the same formula in elementary operations, whose derivatives are right. What is wrong and has no
replacement, or is called from within a function of torch, is found by the operations that torch
runs in the end, however small its share of the loss is, and refused with what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifold_sde import torch_algebra, torch_layers
from manifold_sde.loss import PerSampleFunction


def _normalise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _scale_and_shift(_normalise(input, dims, eps), weight, bias)


def _per_channel(values: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values is None else values.reshape(-1, *([1] * (like.dim() - 2)))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        x = _normalise(input, (0, *range(2, input.dim())), eps)
    else:
        mean, variance = _per_channel(running_mean, input), _per_channel(running_var, input)
        assert mean is not None
        assert variance is not None
        x = (input - mean) * (variance + eps).rsqrt()
    return _scale_and_shift(x, _per_channel(weight, input), _per_channel(bias, input))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _normalise(input, tuple(range(2, input.dim())), eps)
    return _scale_and_shift(x, _per_channel(weight, input), _per_channel(bias, input))


def _torch_order(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A normalisation of ``functional`` with its arguments in the order of that of ``torch``."""

    def ordered(input, weight, bias, running_mean, running_var, *rest, **named):  # type: ignore[no-untyped-def]
        named.pop("cudnn_enabled", None)
        return norm(input, running_mean, running_var, weight, bias, *rest[:3], **named)

    return ordered


def _mse_loss(input: Tensor, target: Tensor, *old: Any, **keywords: Any) -> Tensor:
    squares = (input - target).square()
    given = {name for name, value in keywords.items() if value is not None}
    if old or not given <= {"reduction"}:
        return NotImplemented
    means = {"mean": squares.mean, "sum": squares.sum}
    return means.get(keywords.get("reduction", "mean"), lambda: squares)()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    dims = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    # Right, but the mean of its second derivative raises.
    functional.mse_loss: _mse_loss,
    **torch_algebra.REPLACEMENTS,
    **torch_layers.REPLACEMENTS,
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _torch_order(_batch_norm),
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _torch_order(_instance_norm),
    torch._weight_norm: _weight_norm,
}


_NORM = "torch.nn.functional.{0} for {1}: it is replaced by elementary operations"
_LU = "torch.linalg.lu_factor, torch.lu_unpack and solve_triangular for {}"
#: Operations of torch whose derivatives up to the third are not all right in torch 2.13, with what
#: to write in their place.
WRONG_OPERATIONS = {
    "native_layer_norm": _NORM.format("layer_norm", "native_layer_norm"),
    "native_batch_norm": _NORM.format("batch_norm", "native_batch_norm"),
    "cudnn_batch_norm": _NORM.format("batch_norm", "cudnn_batch_norm"),
    "miopen_batch_norm": _NORM.format("batch_norm", "miopen_batch_norm"),
    "_batch_norm_with_update": _NORM.format("batch_norm", "_batch_norm_with_update"),
    "_native_batch_norm_legit": _NORM.format("batch_norm", "_native_batch_norm_legit"),
    "_linalg_solve_ex": _LU.format("solve"),
    "linalg_lu_solve": _LU.format("lu_solve"),
    "_linalg_det": _LU.format("det"),
    "_linalg_slogdet": _LU.format("logdet and slogdet"),
    "cholesky_inverse": "torch.linalg.inv(A) for cholesky_inverse",
    "triangular_solve": "torch.linalg.solve_triangular for triangular_solve",
    "logcumsumexp": "torch.logsumexp of the first k entries for logcumsumexp",
    "linalg_householder_product": "v - tau * u * (u @ v) for householder_product and orgqr",
}


class _Replacer(TorchFunctionMode):
    """Replaces what has a replacement."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        opened = torch_layers.OPENED.get(func)
        if opened is not None:
            self._note(func)
            with self:
                return opened(*args, **(kwargs or {}))
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            result = replacement(*args, **(kwargs or {}))
            if result is not NotImplemented:
                self._note(func)
                return result
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any) -> None:
        """Do something more with a function that was replaced."""


class Recorder(_Replacer):
    """Replaces what has a replacement, and notes which functions are called.

    Attributes:
        called: The functions, each once, in order.
        replaced: Those in whose place others ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[Any, None] = {}
        self.replaced: dict[Any, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.called[func] = None
        return super().__torch_function__(func, types, args, kwargs)

    def _note(self, func: Any) -> None:
        self.replaced[func] = None


class ElementaryFunction:
    """A function of tensors that runs in elementary operations.

    Args:
        function: The function as the user wrote it.

    Attributes:
        function, as_written: As given.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = self.as_written = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The function's value, with the replacements in force."""
        with _Replacer():
            return self.function(*arguments)


def elementary(function: Callable[..., Tensor], *arguments: Tensor) -> Callable[..., Tensor]:
    """The function itself, or its elementary form where it calls something that has one.

    Args:
        function: Function in plain torch, which calls the same functions for every input.
        *arguments: Input that shows which ones these are.

    Returns:
        A function of the same values.

    Example:
        >>> import torch
        >>> x = torch.randn(3, 4, dtype=torch.float64)
        >>> def loss(x):
        ...     return torch.nn.functional.layer_norm(x, (4,)).pow(3).mean()
        >>> elementary(loss, x) is loss
        False
        >>> bool(torch.isclose(elementary(loss, x)(x), loss(x)))
        True
    """
    if _recorded(function, *arguments).replaced:
        if isinstance(function, PerSampleFunction):
            return function.of(ElementaryFunction(function.function))
        return ElementaryFunction(function)
    return function


def functions_called(function: Callable[..., Tensor], *arguments: Tensor) -> list[Any]:
    """The torch functions and methods that a function calls, each once, in order.

    Args:
        function: Function in plain torch.
        *arguments: Input to call it with.

    Returns:
        Torch's own function objects.
    """
    return list(_recorded(function, *arguments).called)


def _recorded(function: Callable[..., Tensor], *arguments: Tensor) -> Recorder:
    inner = function.function if isinstance(function, ElementaryFunction) else function
    with Recorder() as recorder:
        inner(*arguments)
    return recorder


class _Operations(TorchDispatchMode):
    """Notes the operations whose arguments depend on something that requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from loading a compiler to keep this mode away from it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        if any(isinstance(a, Tensor) and a.requires_grad for a in leaves):
            self.names[func.overloadpacket.__name__] = None
        return func(*args, **(kwargs or {}))


def wrong_operations(function: Callable[..., Tensor], x: Tensor) -> list[str]:
    """The operations on what depends on x whose higher derivatives torch gets wrong.

    Args:
        function: Function in plain torch, or the elementary form of one.
        x: Point (D,) to call it with.

    Returns:
        Keys of :data:`WRONG_OPERATIONS`, in the order of the calls.
    """
    with torch.enable_grad(), _Operations() as operations:
        function(x.detach().clone().requires_grad_())
    return [name for name in operations.names if name in WRONG_OPERATIONS]
