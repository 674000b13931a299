"""The normalised linear model of section 6.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_between, check_choice, integer
from manifold_sde.errors import ArgumentError
from manifold_sde.noise import Noise, SphericalNoise
from manifold_sde.paper import implements
from manifold_sde.problem import LeastSquaresProblem
from manifold_sde.problems.facts import Circle, ConstantLogDeterminant, Facts

_DESIGNS = ("gaussian", "orthogonal")
#: Largest dimension of a dense model.
_LARGEST = 1 << 20

#: A typical draw of the Gaussian design at D = 10 and N = 8: Gamma_1 has radius 0.399 and H the
#: condition number 147, near their medians over all seeds, 0.40 and 150.
DEFAULT_SEED = 1130


@dataclass(frozen=True)
class _KernelDirection:
    """Phi: the norm of x and the direction of its component in the kernel of the inputs."""

    center: Tensor
    kernel: Tensor
    radius: float

    def __call__(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x)
        free = (x @ kernel.mT) @ kernel
        free = free / free.norm(dim=-1, keepdim=True)
        return x.norm(dim=-1, keepdim=True) * (self.center.to(x) + self.radius * free)


class NormalizedLinear(LeastSquaresProblem):
    """Section 6.1: residuals <x / |x| - x*, z_i>; made by :func:`normalized_linear`.

    Attributes:
        inputs: The inputs z_i as rows, (N, D).
        targets: The labels <x*, z_i>, (N,).
        design: "gaussian" or "orthogonal".
    """

    def __init__(
        self, inputs: Tensor, minimizer: Tensor, noise: Noise, design: str, name: str
    ) -> None:
        self.inputs = inputs
        self.targets = inputs @ minimizer
        self.design = design
        n_samples, dim = inputs.shape
        super().__init__(self._residuals, dim, noise, rank=n_samples, name=name)
        self.facts = self._facts(minimizer)

    def _residuals(self, x: Tensor) -> Tensor:
        inputs, targets = self.inputs.to(x), self.targets.to(x)
        return inputs @ (x / x.norm()) - targets

    def _facts(self, minimizer: Tensor) -> Facts:
        # The rows of V^T beyond the rank span the kernel of the inputs.
        right = torch.linalg.svd(self.inputs, full_matrices=True)[2]
        n_samples, dim = self.inputs.shape
        kernel = right[n_samples:]
        inside = kernel.T @ (kernel @ minimizer)
        center = minimizer - inside
        radius = float(inside.norm())
        first = inside / radius
        others = kernel - (kernel @ first)[:, None] * first
        circle = None
        if dim - n_samples == 2:
            second = others[others.norm(dim=1).argmax()]
            circle = Circle(center, torch.stack([first, second / second.norm()]), radius)

        # At y on Gamma_1 the Jacobian is J = Z - t y^T with Z y = t, so J J^T = Z Z^T - t t^T: the
        # nonzero eigenvalues of H = J^T J / N are the same everywhere. J has twice their digits.
        singular = torch.linalg.svdvals(self.inputs - torch.outer(self.targets, minimizer))
        log_determinant = 2.0 * float(singular.log().sum()) - n_samples * math.log(n_samples)
        sphere = "a circle" if circle else f"a sphere of dimension {dim - n_samples - 1}"
        condition = float(singular[0] / singular[-1]) ** 2
        return Facts(
            minimizer=minimizer,
            rank=n_samples,
            manifold_dim=dim - n_samples - 1,
            statement=f"Gamma_1 is {sphere} of radius {radius:.3g}; Phi keeps the direction of "
            "the component outside the inputs' span; the eigenvalues of H are the same all over "
            "Gamma_1, so that pi is uniform for the noise (18); H has the condition number "
            f"{condition:.3g} on its range",
            circle=circle,
            limit_map=_KernelDirection(center, kernel, radius),
            log_pseudo_determinant=ConstantLogDeterminant(log_determinant, n_samples),
        )


@implements("Equation (18)")
def normalized_linear(
    dim: int = 10,
    n_samples: int = 8,
    noise_scale: float = 0.3,
    seed: int = DEFAULT_SEED,
    *,
    design: str = "gaussian",
    radius: float | None = None,
    noise: Noise | None = None,
) -> NormalizedLinear:
    """The normalised linear model F_z(x) = <x / |x|, z>, fitted by least squares.

    The ``minimizer`` of the problem is x*, of norm 1.

    Args:
        dim: Dimension D.
        n_samples: Number N of inputs, at most D - 2; D - 2 makes Gamma_1 a circle.
        noise_scale: Scale of the noise (18).
        seed: Seed of inputs and minimiser. The default is a typical draw of the paper's design:
            radius 0.399 and condition number of H 147, where the medians over all seeds are 0.40
            and 150 (seed 0 has 0.10 and 8300, and is far from the limit at any practical rate).
        design: "gaussian", inputs N(0, I) as in the paper, or "orthogonal", orthogonal inputs of
            norm sqrt(N): the well-conditioned design, near its limit at practical learning rates.
        radius: Radius of Gamma_1; by default that of a uniformly random minimiser for the
            Gaussian design, where radius^2 is Beta((D-N)/2, N/2), and 0.8 for the orthogonal one.
        noise: Replaces the noise (18).

    Raises:
        ArgumentError: If the sizes, the design or the radius are out of range.

    Example:
        >>> from manifold_sde import problems
        >>> problem = problems.normalized_linear()
        >>> problem.dim, problem.rank, problem.facts.manifold_dim
        (10, 8, 1)

    Source: section 6.1.
    """
    size, count = integer(dim), integer(n_samples)
    if size is None or size > _LARGEST or count is None or not 1 <= count <= size - 2:
        raise ArgumentError(
            "the sizes do not leave a connected manifold of minimisers",
            received=f"dim={dim!r}, n_samples={n_samples!r}",
            expected=f"integers with 1 <= n_samples <= dim - 2, and dim <= {_LARGEST}",
            remedy="section 6.1 has dim=10, n_samples=8",
        )
    rng.seed_key(seed)
    design = check_choice("design", design, _DESIGNS, '"gaussian" is the paper\'s')
    if radius is None and design == "orthogonal":
        radius = 0.8
    if radius is not None:
        remedy = "leave it out for a random minimiser"
        radius = check_between(radius, 1e-6, 1.0, "the radius of Gamma_1", remedy)
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((count, size))
    if design == "orthogonal":
        inputs = math.sqrt(count) * np.linalg.qr(inputs.T)[0].T
    minimizer = generator.standard_normal(size)
    if radius is not None:
        span = np.linalg.qr(inputs.T)[0]
        outer = span @ (span.T @ minimizer)
        inner = minimizer - outer
        outer *= math.sqrt(1.0 - radius**2) / np.linalg.norm(outer)
        inner *= radius / np.linalg.norm(inner)
        minimizer = outer + inner
    minimizer /= np.linalg.norm(minimizer)
    return NormalizedLinear(
        torch.from_numpy(inputs),
        torch.from_numpy(minimizer),
        noise or SphericalNoise(noise_scale),
        design,
        f"normalized linear, {design} inputs",
    )
