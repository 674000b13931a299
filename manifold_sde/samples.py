"""Functions of the weights that are made of samples, each of which can be evaluated alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def follow(value: Tensor, x: Tensor) -> Tensor:
    """A constant in the dtype and on the device of x; whole numbers keep their dtype."""
    return value.to(x) if value.is_floating_point() else value.to(x.device)


def slices(count: int, size: int | None) -> list[slice]:
    """A number of samples in slices of a size; one slice where it is ``None``."""
    size = size or max(1, count)
    return [slice(i, min(i + size, count)) for i in range(0, max(1, count), size)]


def joined(values: Callable[[slice], Tensor], passes: Sequence[slice]) -> Tensor:
    """The values of all samples, from those of passes over some of them.

    Plain tensors are written into one that is there before the second pass: results kept between
    the buffers of passes hold the allocator from using these again.
    """
    first, *others = passes
    value = values(first)
    if not others:
        return value
    if torch._C._functorch.is_functorch_wrapped_tensor(value) or value.requires_grad:
        return torch.cat([value, *map(values, others)])
    result = value.new_empty(others[-1].stop, *value.shape[1:])
    result[first] = value
    for which in others:
        result[which] = values(which)
    return result


class SampleFunction:
    """A function of one vector x (D,) with a value for each sample of some data.

    Samples must not act on each other: the value of a sample is the same alone and among others.
    Derivatives of single samples are then taken of a single sample.

    Args:
        function: Function of x and of the data of any number n of samples, (n, ...) each, that
            returns their values (n, ...).
        *data: Tensors (Xi, ...) of the samples; they take the dtype (where floating) and the device
            of x.
        per_pass: Number of samples evaluated at once; all of them where it is ``None``.

    Attributes:
        function, data, per_pass: As given.

    Example:
        >>> import torch
        >>> inputs = torch.eye(3, dtype=torch.float64)
        >>> f = SampleFunction(lambda x, rows: rows @ x, inputs)
        >>> x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> f(x), f.one(x, inputs[1])
        (tensor([1., 2., 3.], dtype=torch.float64), tensor(2., dtype=torch.float64))
    """

    def __init__(
        self, function: Callable[..., Tensor], *data: Tensor, per_pass: int | None = None
    ) -> None:
        self.function = function
        self.data = data
        self.per_pass = per_pass
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def of(self, function: Callable[..., Tensor]) -> SampleFunction:
        """Another function of the same data."""
        other = copy.copy(self)
        other.function = function
        return other

    def data_for(self, x: Tensor, which: slice = slice(None)) -> tuple[Tensor, ...]:
        """The data of some samples in the dtype and on the device of x."""
        return tuple(follow(d[which], x) for d in self.data)

    def passes(self, copies: int = 1) -> list[slice]:
        """The samples of each pass, where a pass holds so many copies of what it computes."""
        return slices(len(self.data[0]), self.per_pass and max(1, self.per_pass // copies))

    def __call__(self, x: Tensor) -> Tensor:
        """The values of all samples, pass by pass: (D,) -> (Xi, ...)."""
        passes = self.passes()
        return joined(lambda which: self.function(x, *self.data_for(x, which)), passes)

    def one(self, x: Tensor, *sample: Tensor) -> Tensor:
        """The value of one sample, given its data without the leading dimension: -> (...)."""
        return self.function(x, *(d[None] for d in sample))[0]
