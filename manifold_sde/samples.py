"""Functions of the weights that are made of samples, each of which can be evaluated alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def follow(value: Tensor, x: Tensor) -> Tensor:
    """A constant in the dtype and on the device of x; whole numbers keep their dtype."""
    return value.to(x) if value.is_floating_point() else value.to(x.device)


class SampleFunction:
    """A function of one vector x (D,) with a value for each sample of some data.

    Samples must not act on each other: the value of a sample is the same alone and among others.
    Derivatives of single samples are then taken of a single sample.

    Args:
        function: Function of x and of the data of any number n of samples, (n, ...) each, that
            returns their values (n, ...).
        *data: Tensors (Xi, ...) of the samples; they take the dtype (where floating) and the device
            of x.

    Attributes:
        function, data: As given.

    Example:
        >>> import torch
        >>> inputs = torch.eye(3, dtype=torch.float64)
        >>> f = SampleFunction(lambda x, rows: rows @ x, inputs)
        >>> x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> f(x), f.one(x, inputs[1])
        (tensor([1., 2., 3.], dtype=torch.float64), tensor(2., dtype=torch.float64))
    """

    def __init__(self, function: Callable[..., Tensor], *data: Tensor) -> None:
        self.function = function
        self.data = data
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def data_for(self, x: Tensor) -> tuple[Tensor, ...]:
        """The data in the dtype and on the device of x."""
        return tuple(follow(d, x) for d in self.data)

    def __call__(self, x: Tensor) -> Tensor:
        """The values of all samples: (D,) -> (Xi, ...)."""
        return self.function(x, *self.data_for(x))

    def one(self, x: Tensor, *sample: Tensor) -> Tensor:
        """The value of one sample, given its data without the leading dimension: -> (...)."""
        return self.function(x, *(d[None] for d in sample))[0]
