"""A noise given by its factor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import loss_checks, remedies
from manifold_sde.derivatives import jvp
from manifold_sde.errors import NoiseError
from manifold_sde.loss import Loss
from manifold_sde.loss_trials import require_uncut
from manifold_sde.noise.base import Noise


class CustomNoise(Noise):
    """Gaussian noise sigma(x) w, w ~ N(0, I_m), with a factor that the user gives.

    The theory needs two properties of sigma: degree -1, sigma(a x) = sigma(x) / a, without which
    there is no intrinsic clock; and sigma(x)^T x = 0, without which the norm equation holds only in
    mean. ``Problem.noise_violations`` measures both, and what needs them requires them.

    Args:
        factor: Function of one vector (D,) that returns sigma(x), (D, m), in plain torch.

    Raises:
        NoiseError: If the factor cannot be used; what depends on D, when the problem is made.

    Example:
        >>> import torch
        >>> from manifold_sde import CustomNoise, problems
        >>> def rotation(x):
        ...     turned = torch.stack([-x[1], x[0], torch.zeros_like(x[0])])
        ...     return turned[:, None] / (x @ x)
        >>> problem = problems.great_circle(noise=CustomNoise(rotation))
        >>> problem.noise_trace(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
        tensor(0.2500, dtype=torch.float64)
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

    def validate(self, loss: Loss) -> None:
        """Measure the shape of sigma at one point."""
        point = torch.linspace(0.5, 1.5, loss.dim, dtype=torch.float64)
        try:
            value = self.function(point)
        except Exception as error:
            raise NoiseError(
                "the factor of the custom noise raised at a test point",
                received=remedies.first_line(error),
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
        if value.shape[1] == 0:
            raise NoiseError(
                "the factor of the custom noise has no column",
                received=str(shape),
                expected=f"({loss.dim}, m) with m at least 1",
                remedy="for no noise follow gradient flow: Geometry(problem).limit_map(x)",
            )
        if value.dtype != point.dtype or not bool(torch.isfinite(value).all()):
            raise NoiseError(
                "the factor of the custom noise is not usable at a test point",
                received=f"dtype {value.dtype}, finite: {bool(torch.isfinite(value).all())}",
                expected="finite values in the dtype of x",
                remedy="build constants with x.new_tensor(...) or dtype=x.dtype",
            )
        if value.requires_grad:
            raise NoiseError(
                "the factor of the custom noise records gradients of something that is not x",
                received="a value that requires grad, at an x that does not",
                expected="constants in which nothing is trained",
                remedy="module.requires_grad_(False) and constant.detach() where they are made",
            )
        self._try_transforms(point)
        self._components[loss.dim] = int(value.shape[1])

    def _try_transforms(self, point: Tensor) -> None:
        """A factor is batched and differentiated once, and has to be a fixed function."""
        steps = torch.linspace(-1.0, 1.0, point.shape[0], dtype=point.dtype)
        points = torch.stack([point, point + 0.1 * steps])

        def derivative(z: Tensor) -> Tensor:
            return jvp(self.function, (z,), (steps,))[1]

        try:
            values, derivatives = vmap(self.function)(points), vmap(derivative)(points)
        except (RuntimeError, NotImplementedError) as error:
            raise NoiseError(
                "the factor of the custom noise cannot be batched or differentiated",
                received=remedies.first_line(error),
                expected="a factor that torch.func can batch and differentiate",
                remedy=remedies.remedy(str(error)),
            ) from error
        if not torch.allclose(values[0], self.function(point), rtol=1e-6, atol=0.0):
            raise NoiseError(
                "the factor of the custom noise is not a fixed function",
                received="different values at the same x",
                expected="sigma(x): the randomness comes from the normals that it is applied to",
                remedy="draw random constants once, outside",
            )
        found = loss_checks.quotients(self.function, point[None], steps)
        quotients = [q.reshape(values.shape[1:]) for q in found]
        size = float(values[0].norm())
        off, reliable = loss_checks.compare(derivatives[0], quotients, size)
        if off > loss_checks.TOLERANCE and reliable:
            raise NoiseError(
                "the derivative of the custom noise's factor is not that of what it computes",
                received=f"a relative difference of {off:.2g} from difference quotients",
                expected=f"at most {loss_checks.TOLERANCE:g}",
                remedy="no detach(), .data or torch.no_grad() on what depends on x",
            )
        require_uncut(self.function, point, "factor of the custom noise")

    def n_components(self, loss: Loss) -> int:
        """Return m, the number of columns measured when the problem was made."""
        return self._components[loss.dim]

    def factor(self, loss: Loss, x: Tensor) -> Tensor:
        """Return sigma(x) as the user gives it."""
        return self.function(x)

    def product(self, loss: Loss, x: Tensor, w: Tensor) -> Tensor:
        """Return sigma(x) w."""
        return self.function(x) @ w

    def transposed_product(self, loss: Loss, x: Tensor, v: Tensor) -> Tensor:
        """Return sigma(x)^T v."""
        return self.function(x).T @ v

    def correction(self, loss: Loss, x: Tensor, projection: Tensor) -> Tensor:
        """Return the sum over j of d sigma_j [P sigma_j], by one forward pass a column."""
        directions = (projection @ self.function(x)).T

        def column(direction: Tensor, index: Tensor) -> Tensor:
            derivative = jvp(self.function, (x,), (direction,))[1]
            return derivative.index_select(1, index.reshape(1))[:, 0]

        indices = torch.arange(directions.shape[0], device=x.device)
        return vmap(column)(directions, indices).sum(0)
