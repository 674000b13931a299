"""Losses in elementary operations, where torch's own higher derivatives are wrong.

In torch 2.13 the third derivatives that pass through ``layer_norm``, ``batch_norm`` or
``instance_norm`` are wrong, without an error and in every order of forward and reverse mode:
their derivative formulas take the saved mean and deviation for constants. While a loss runs, these
functions are replaced by the same formula in elementary operations, whose derivatives are right.
Functions that are wrong and have no replacement are refused, with what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from manifold_sde.samples import SampleFunction


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


def _functional_batch_norm(
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


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _functional_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _functional_instance_norm(
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
        return _functional_batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    x = _normalise(input, tuple(range(2, input.dim())), eps)
    return _scale_and_shift(x, _per_channel(weight, input), _per_channel(bias, input))


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _functional_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    dims = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.batch_norm: _functional_batch_norm,
    torch.batch_norm: _batch_norm,
    functional.instance_norm: _functional_instance_norm,
    torch.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}


class _Recorder(TorchFunctionMode):
    """Replaces what has a replacement, and notes which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[Any, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.called[func] = None
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


class _Replacer(TorchFunctionMode):
    """Replaces what has a replacement."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


class ElementaryFunction:
    """A function of tensors that runs in elementary operations.

    Args:
        function: The function as the user wrote it.

    Attributes:
        function: As given.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
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
    if any(f in _REPLACEMENTS for f in functions_called(function, *arguments)):
        if isinstance(function, SampleFunction):
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
    inner = function.function if isinstance(function, ElementaryFunction) else function
    with _Recorder() as recorder:
        inner(*arguments)
    return list(recorder.called)
