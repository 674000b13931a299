"""A loss of ONE vector with its derivatives: what tracing, noise and geometry see.

A :class:`~manifold_sde.problem.Problem` is what users hold: it takes any batch and checks its
input. A ``Loss`` is the same mathematics without either, composable with ``torch.func``, so
that a step of SGD or of a diffusion can be written for one path and compiled for thousands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, Self

import torch
from torch import Tensor

from manifold_sde import derivatives, reverse_mode
from manifold_sde.reverse_mode import vjp

#: Numbers of the gradients of samples that are held at once where their sums alone are wanted.
_GRADIENT_NUMBERS = 1 << 21


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
    if derivatives.is_followed(value):
        return torch.cat([value, *map(values, others)])
    result = value.new_empty(others[-1].stop, *value.shape[1:])
    result[first] = value
    for which in others:
        result[which] = values(which)
    return result


class PerSampleFunction:
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
        >>> f = PerSampleFunction(lambda x, rows: rows @ x, inputs)
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

    def of(self, function: Callable[..., Tensor]) -> PerSampleFunction:
        """Another function of the same data."""
        other = copy.copy(self)
        other.function = function
        return other

    def data_for(self, x: Tensor, which: slice = slice(None)) -> tuple[Tensor, ...]:
        """The data of some samples in the dtype and on the device of x."""
        return tuple(follow(d[which], x) for d in self.data)

    def drawn(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        """The same of the samples of these numbers, (B,)."""
        return tuple(follow(d[numbers.to(d.device)], x) for d in self.data)

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


class Loss:
    """Loss of one vector x (D,), by automatic differentiation.

    Args:
        function: Function of one vector (D,) that returns () or the sample losses (Xi,).
        dim: Ambient dimension D.
        n_samples: Number Xi of sample losses, or ``None`` for a scalar loss.
    """

    #: Whether every function here accepts leading batch dimensions as it stands.
    batches = False
    #: Of a symbolic loss: the closed form of Phi, and proofs of what the theory asks for.
    closed_form: Any = None
    scale_invariance: Any = None
    analyticity: Any = None
    #: The largest |x| |grad L_xi(x)| at fixed directions, once it was measured.
    gradient_size: float | None = None
    #: Bytes of what all samples pass through on the way to one gradient, where it was measured.
    gradient_bytes: int = 0
    #: How a gradient is taken: so that it can be batched and differentiated, or not.
    _gradient: Callable[..., Tensor] = staticmethod(reverse_mode.gradient)
    #: Whether second and third derivatives by reverse mode alone were seen to be right; they hold
    #: twice as much of a pass.
    reverses = False
    #: Whether forward mode may be used: not where reverse mode alone was looked at.
    forwards = True
    #: Whether squares of the samples' gradients from what layers receive were seen to be right;
    #: ``None`` where nobody looked yet.
    by_layers: bool | None = None

    def __init__(
        self, function: Callable[[Tensor], Tensor], dim: int, n_samples: int | None
    ) -> None:
        self.function = function
        self.dim = dim
        self.n_samples = n_samples
        #: What single samples compute, where they do not act on each other.
        self.per_sample = function if isinstance(function, PerSampleFunction) else None

    def at_one_point(self) -> Self:
        """The same loss for gradients at one point, by torch's own backward pass.

        They cannot be batched or differentiated, and samples are evaluated as the user wrote them,
        without replacements that higher derivatives need.
        """
        other = copy.copy(self)
        other._gradient = derivatives.backward_gradient
        if self.per_sample is not None:
            inner = getattr(self.per_sample.function, "as_written", self.per_sample.function)
            other.per_sample = self.per_sample.of(inner)
        return other

    @property
    def at_once(self) -> int | None:
        """Number of points whose samples are evaluated at once; ``None`` for no limit."""
        if self.per_sample is None or self.per_sample.per_pass is None:
            return None
        return max(1, self.per_sample.per_pass // len(self.per_sample.data[0]))

    def held(self, copies: int = 1) -> int:
        """Bytes of the largest pass of a derivative that holds so many copies of what it makes."""
        if self.per_sample is None:
            return copies * self.gradient_bytes
        first, count = self.per_sample.passes(copies)[0], len(self.per_sample.data[0])
        return copies * self.gradient_bytes * (first.stop - first.start) // max(1, count)

    def loss(self, x: Tensor) -> Tensor:
        """L(x), the mean over the samples: (D,) -> ()."""
        return _sum(part(x) for part in self._parts())

    def sample_losses(self, x: Tensor) -> Tensor:
        """The sample losses L_xi(x): (D,) -> (Xi,)."""
        return self.function(x)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of L: (D,) -> (D,)."""
        return self._derivative(self._gradient, x)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """The Hessian of L times v: (D,), (D,) -> (D,)."""
        if self.reverses:
            return self._derivative(reverse_mode.hessian_product, x, v, copies=4)
        return self._derivative(derivatives.hessian_product, x, v, copies=2)

    def hessian_products(self, x: Tensor, rows: Tensor, few: int) -> Tensor:
        """The Hessian of L times rows (k, D), so many at a time: what they share is made once."""
        if not self.reverses:
            return torch.vmap(lambda v: self.hessian_product(x, v), chunk_size=few)(rows)
        parts = self._parts(copies=4)
        return _sum(derivatives.hessian_rows(part, x, rows, few) for part in parts)

    def hessian(self, x: Tensor) -> Tensor:
        """The Hessian of L: (D,) -> (D, D)."""
        return self._derivative(reverse_mode.hessian, x, copies=self.dim)

    def third_derivative(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Second directional derivative of the gradient, along a and b: (D,) each -> (D,)."""
        if self.reverses:
            third = reverse_mode.third_derivative
            return self._derivative(third, x, a, b, copies=derivatives.THIRD_COPIES)
        return self._derivative(derivatives.third_derivative, x, a, b, copies=4)

    def _derivative(
        self, derivative: Callable[..., Tensor], *arguments: Tensor, copies: int = 1
    ) -> Tensor:
        """A derivative of L, pass by pass, where a pass holds so many copies of what it makes."""
        first, *others = self._parts(copies)
        total = derivative(first, *arguments)
        for part in others:
            total = total + derivative(part, *arguments)
        return total

    def _parts(self, copies: int = 1) -> list[Callable[[Tensor], Tensor]]:
        """Functions of x whose sum is L, each of the samples of one pass."""
        samples = self.per_sample
        passes = [] if samples is None else samples.passes(copies)
        if len(passes) < 2:
            return [self.function if self.n_samples is None else self._mean]

        def part(which: slice, x: Tensor) -> Tensor:
            assert samples is not None
            return self._losses_of(x, *samples.data_for(x, which)).sum() / (self.n_samples or 1)

        return [partial(part, which) for which in passes]

    def _mean(self, x: Tensor) -> Tensor:
        return self.function(x).mean()

    def weighted_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of weights_xi times the gradient of L_xi, one reverse mode: (D,), (Xi,) -> (D,)."""
        return self._pull(self.sample_losses, self._losses_of, x, weights)

    def _pull(
        self,
        function: Callable[[Tensor], Tensor],
        of_samples: Callable[..., Tensor],
        x: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Transposed derivative of a function of x times weights, (n_samples k,): -> (D,).

        Where there are several passes, the same function of x and of the data of samples is taken.
        """
        samples = self.per_sample
        passes = [] if samples is None else samples.passes()
        if samples is None or len(passes) < 2:
            return vjp(function, x)[1](weights)
        rows = weights.reshape(len(samples.data[0]), -1)

        def pull(which: slice) -> Tensor:
            data = samples.data_for(x, which)
            return vjp(lambda z: of_samples(z, *data).reshape(-1), x)[1](rows[which].reshape(-1))

        return _sum(pull(which) for which in passes)

    def drawn_gradient(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Mean gradient of the samples of these numbers, with repetitions: (D,), (B,) -> (D,).

        Where samples do not act on each other, those drawn alone are evaluated.
        """
        if self.per_sample is not None and len(drawn) < (self.n_samples or 1):
            data = self.per_sample.drawn(x, drawn)
            return self._gradient(lambda z: self._losses_of(z, *data).mean(), x)
        samples = torch.arange(self.n_samples or 1, device=drawn.device)
        counts = (drawn[:, None] == samples).to(x.dtype).sum(0)
        return self.weighted_gradient(x, counts / len(drawn))

    def sample_derivatives(self, x: Tensor, v: Tensor) -> Tensor:
        """Directional derivatives <grad L_xi(x), v>: (D,), (D,) -> (Xi,)."""
        if self.per_sample is None:
            return self.along(self.sample_losses, x, v)
        return self._along_passes(self._losses_of, x, v)

    def along(self, function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
        """Derivative along v of a function that is made of this loss: (D,), (D,) -> (...)."""
        return (derivatives if self.forwards else reverse_mode).product(function, x, v)

    def _along_passes(
        self, function: Callable[..., Tensor], x: Tensor, v: Tensor, first: int = 0
    ) -> Tensor:
        """The same of a function of x and of the data of samples, from one on: -> (n, ...)."""
        samples = self.per_sample
        assert samples is not None
        step = samples.passes(1 if self.forwards else 4)[0].stop

        def of(which: slice) -> Tensor:
            data = samples.data_for(x, slice(first + which.start, first + which.stop))
            return self.along(lambda z: function(z, *data), x, v)

        return joined(of, slices(len(samples.data[0]) - first, step))

    def sample_gradients(self, x: Tensor) -> Tensor:
        """Gradients of all sample losses: (D,) -> (Xi, D).

        Where samples do not act on each other, they take Xi passes over one sample; else Xi passes
        over all.
        """
        if self.per_sample is not None:
            whole = self.per_sample.passes()
            return joined(lambda which: self.map_samples(reverse_mode.gradient, x, which), whole)
        return self.gradients_of(x, slice(0, self.n_samples or 1))

    def gradients_of(self, x: Tensor, which: slice) -> Tensor:
        """Gradients of the losses of some samples, in one vectorised pass: (D,) -> (b, D)."""
        if self.per_sample is not None:
            return self.map_samples(reverse_mode.gradient, x, which)
        rows = derivatives.unit_rows(self.n_samples or 1, which.start, which.stop, x)
        return torch.vmap(lambda w: self.weighted_gradient(x, w))(rows)

    def map_samples(
        self, function: Callable[..., Tensor], x: Tensor, which: slice, *vectors: Tensor
    ) -> Tensor:
        """A function of the loss of ONE sample, of x and of a vector of its own, for some samples.

        Samples must not act on each other.

        Args:
            function: Function of a scalar function of x, of x (D,), and of vectors (D,).
            x: Point (D,).
            which: The samples, b of them.
            *vectors: A vector for each of them, (b, D).

        Returns:
            Tensor (b, ...).
        """
        samples = self.per_sample
        assert samples is not None

        def of_one(own: tuple[Tensor, ...], sample: tuple[Tensor, ...]) -> Tensor:
            data = [d[None] for d in sample]
            return function(lambda z: self._losses_of(z, *data)[0], x, *own)

        return torch.vmap(of_one)(vectors, samples.data_for(x, which))

    def blocks_of_samples(self) -> list[slice]:
        """Samples whose gradients are computed at once, of which no more are held."""
        assert self.n_samples is not None
        size = max(1, _GRADIENT_NUMBERS // self.dim)
        if self.per_sample is not None and self.per_sample.per_pass is not None:
            size = min(size, self.per_sample.per_pass)
        return slices(self.n_samples, size)

    def _losses_of(self, x: Tensor, *data: Tensor) -> Tensor:
        """Losses of any samples, given their data: (D,) -> (n,)."""
        assert self.per_sample is not None
        return self.per_sample.function(x, *data)


class LeastSquaresLoss(Loss):
    """Loss half the mean over samples of squared residuals: its samples are |r_xi|^2 / 2.

    Args:
        residual_function: Function of one vector (D,) that returns the residuals (Xi,), or
            (Xi, K) for K outputs a sample.
        dim: Ambient dimension D.
        n_samples: Number Xi of samples.
        n_outputs: Number K of residuals of a sample.
    """

    n_samples: int

    def __init__(
        self,
        residual_function: Callable[[Tensor], Tensor],
        dim: int,
        n_samples: int,
        n_outputs: int = 1,
    ) -> None:
        super().__init__(self._half_squares, dim, n_samples)
        self.residual_function = residual_function
        self.n_outputs = n_outputs
        self.n_residuals = n_samples * n_outputs
        self.per_sample = (
            residual_function if isinstance(residual_function, PerSampleFunction) else None
        )

    def residuals(self, x: Tensor) -> Tensor:
        """All residuals, a sample's side by side: (D,) -> (Xi K,)."""
        return self.residual_function(x).reshape(-1)

    def of_samples(self, values: Tensor) -> Tensor:
        """What belongs to the residuals (Xi K, ...), by sample and output: (Xi, K, ...)."""
        return values.reshape(self.n_samples, self.n_outputs, *values.shape[1:])

    def _half_squares(self, x: Tensor) -> Tensor:
        return 0.5 * self.of_samples(self.residuals(x) ** 2).sum(1)

    def _losses_of(self, x: Tensor, *data: Tensor) -> Tensor:
        assert self.per_sample is not None
        residuals = self.per_sample.function(x, *data)
        return 0.5 * residuals.reshape(len(residuals), -1).square().sum(1)

    def labelled_gradient(self, x: Tensor, drawn: Tensor, labels: Tensor) -> Tensor:
        """Mean gradient of the samples of these numbers, with labels added to their residuals.

        Those drawn alone are evaluated: samples must not act on each other.

        Args:
            x: Point (D,).
            drawn: Numbers of samples (B,).
            labels: What is added (B, K).

        Returns:
            Tensor (D,).
        """
        samples = self.per_sample
        assert samples is not None
        data = samples.drawn(x, drawn)

        def mean(z: Tensor) -> Tensor:
            residuals = samples.function(z, *data).reshape(labels.shape) + labels
            return 0.5 * residuals.square().sum(1).mean()

        return self._gradient(mean, x)

    def residual_product(self, x: Tensor, v: Tensor, first: int = 0) -> Tensor:
        """Jacobian of the residuals times v: (D,), (D,) -> (Xi K,), or of samples from one on."""
        if self.per_sample is None:
            return self.along(self.residuals, x, v)[first * self.n_outputs :]
        return self._along_passes(self.per_sample.function, x, v, first).reshape(-1)

    def residual_transposed_product(self, x: Tensor, w: Tensor) -> Tensor:
        """Transposed Jacobian of the residuals times w: (D,), (Xi K,) -> (D,)."""
        of_samples = self.residuals if self.per_sample is None else self.per_sample.function
        return self._pull(self.residuals, of_samples, x, w)

    def rows(self, x: Tensor, first: int, last: int) -> Tensor:
        """Rows of the Jacobian that belong to some samples: (D,) -> ((last - first) K, D)."""
        samples, k = self.per_sample, self.n_outputs
        if samples is None:
            units = derivatives.unit_rows(self.n_residuals, first * k, last * k, x)
            return torch.vmap(vjp(self.residuals, x)[1])(units)

        def of_one(*sample: Tensor) -> Tensor:
            slope = vjp(lambda z: samples.one(z, *sample).reshape(-1), x)[1]
            return torch.vmap(slope)(torch.eye(k, dtype=x.dtype, device=x.device))

        data = samples.data_for(x, slice(first, last))
        return torch.vmap(of_one)(*data).reshape(-1, self.dim)

    def bend(self, x: Tensor, first: int, last: int, vectors: Tensor) -> Tensor:
        """Sum over the residuals of some samples of their Hessians times a vector each.

        Args:
            x: Point (D,).
            first: The first of the samples.
            last: The one after the last.
            vectors: A vector for each of their residuals, ((last - first) K, D).

        Returns:
            Tensor (D,).
        """
        samples, k = self.per_sample, self.n_outputs

        def slopes(function: Callable[[Tensor], Tensor], z: Tensor, own: Tensor) -> Tensor:
            return torch.vmap(lambda v: self.along(function, z, v))(own)

        def of_one(z: Tensor, own: Tensor, *sample: Tensor) -> Tensor:
            assert samples is not None
            return slopes(lambda y: samples.one(y, *sample).flatten(), z, own).diagonal().sum()

        def total(z: Tensor) -> Tensor:
            if samples is None:
                found = slopes(self.residuals, z, vectors)
                return found[:, first * k : last * k].diagonal().sum()
            data = samples.data_for(z, slice(first, last))
            grouped = vectors.reshape(-1, k, self.dim)
            return torch.vmap(lambda own, *sample: of_one(z, own, *sample))(grouped, *data).sum()

        # Reverse over forward mode: the sum over the residuals is taken on the way back.
        return reverse_mode.gradient(total, x)

    def jacobian(self, x: Tensor) -> Tensor:
        """Jacobian of the residuals, one mode for each of the fewer side: (D,) -> (Xi K, D)."""
        if self.per_sample is not None and self.n_outputs < self.dim:
            return self.rows(x, 0, self.n_samples)
        identity = torch.eye(min(self.n_residuals, self.dim), dtype=x.dtype, device=x.device)
        if self.n_residuals <= self.dim:
            return torch.vmap(lambda w: self.residual_transposed_product(x, w))(identity)
        return torch.vmap(lambda v: self.residual_product(x, v))(identity).T


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, of which one term is made at a time."""
    return reduce(torch.add, terms)
