"""A noise given by its factor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from manifold_sde.errors import NoiseError
from manifold_sde.noise.base import Noise
from manifold_sde.pointwise import Pointwise


class CustomNoise(Noise):
    r"""Gaussian noise sigma(x) w, w ~ N(0, I_m), with a factor of the user's.

    The theory asks two things of sigma: degree -1, sigma(a x) = sigma(x) / a, without which there
    is no intrinsic clock; and sigma(x)^T x = 0, without which the norm equation holds only in
    mean. Both are measured by ``Problem.noise_violations`` and asked for where they are needed.

    Args:
        factor: Function of one vector (D,) that returns sigma(x), (D, m), in plain torch.
    """

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        if not callable(factor):
            raise NoiseError(
                "the factor of a custom noise is not a function",
                received=type(factor).__name__,
                expected="a function of one vector (D,) that returns sigma(x), (D, m)",
                remedy="CustomNoise(lambda x: ...)",
            )
        self.function = factor
        self._components: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"CustomNoise({getattr(self.function, '__name__', 'factor')})"

    def bind(self, loss: Pointwise) -> None:
        """Measure the shape of sigma at one point."""
        point = torch.linspace(0.5, 1.5, loss.dim, dtype=torch.float64)
        try:
            value = self.function(point)
        except Exception as error:
            raise NoiseError(
                "the factor of the custom noise raised at a test point",
                received=f"{type(error).__name__}: {error}",
                expected=f"a function of one float64 vector of shape ({loss.dim},)",
                remedy="write it for ONE vector, in plain torch, with the dtype of its input",
            ) from error
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != loss.dim:
            raise NoiseError(
                "the factor of the custom noise has the wrong shape",
                received=str(shape),
                expected=f"({loss.dim}, m): one row a coordinate, one column a Brownian motion",
                remedy="return sigma(x) of one vector, with the coordinates first",
            )
        if value.dtype != point.dtype or not bool(torch.isfinite(value).all()):
            raise NoiseError(
                "the factor of the custom noise is not usable at a test point",
                received=f"dtype {value.dtype}, finite: {bool(torch.isfinite(value).all())}",
                expected="finite values in the dtype of x",
                remedy="build constants with x.new_tensor(...) or dtype=x.dtype",
            )
        self._components[loss.dim] = int(value.shape[1])

    def n_components(self, loss: Pointwise) -> int:
        """m, the number of columns measured when the problem was made."""
        return self._components[loss.dim]

    def draw_counts(self, loss: Pointwise) -> tuple[int, int]:
        """M normals a step."""
        return self.n_components(loss), 0

    def factor(self, loss: Pointwise, x: Tensor) -> Tensor:
        """sigma(x) as the user gives it."""
        return self.function(x)

    def product(self, loss: Pointwise, x: Tensor, w: Tensor) -> Tensor:
        """sigma(x) w."""
        return self.function(x) @ w

    def transposed_product(self, loss: Pointwise, x: Tensor, v: Tensor) -> Tensor:
        """sigma(x)^T v."""
        return self.function(x).T @ v

    def correction(self, loss: Pointwise, x: Tensor, projection: Tensor) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j, one forward mode a column."""
        directions = (projection @ self.function(x)).T

        def column(direction: Tensor, index: Tensor) -> Tensor:
            derivative = jvp(self.function, (x,), (direction,))[1]
            return derivative.index_select(1, index.reshape(1))[:, 0]

        indices = torch.arange(directions.shape[0], device=x.device)
        return torch.vmap(column)(directions, indices).sum(0)

    def stochastic_gradient(
        self, loss: Pointwise, x: Tensor, normals: Tensor, uniforms: Tensor
    ) -> Tensor:
        """The gradient plus sigma(x) times the normals of the step."""
        return loss.gradient(x) + self.product(loss, x, normals)
