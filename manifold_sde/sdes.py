"""The stochastic differential equations of the theory, as objects that torchsde can integrate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.columns import column_norms
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.errors import ArgumentError, NotOnManifoldError
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.drift import (
    direction_drift,
    direction_drift_and_noise,
    tangent_noise,
)
from manifold_sde.paper import implements
from manifold_sde.problem import Problem


@implements("Equation (3)", "Equation (19)")
class WeightDecaySDE(StochasticEquation):
    r"""SGD with weight decay in continuous time, in the whole space; t counts steps.

    .. math::

        dX = -\eta \nabla L(X)\, dt - \eta\lambda X\, dt + \eta\, \sigma(X)\, dW

    In Stratonovich form the drift has -1/2 eta^2 sum_j d sigma_j[sigma_j] besides.

    Args:
        problem: The problem.
        lr: Learning rate eta.
        weight_decay: Weight decay lambda of (1).
        calculus: "ito" or "stratonovich".

    Example:
        >>> from manifold_sde import WeightDecaySDE, problems
        >>> WeightDecaySDE(problems.great_circle(), lr=0.01, weight_decay=0.05).sde_type
        'ito'

    Source: equation (3); (19) is the same equation at the rates of (9).
    """

    time_unit = "steps of SGD"

    def __init__(
        self, problem: Problem, lr: float, weight_decay: float, calculus: str = "ito"
    ) -> None:
        super().__init__(problem, calculus)
        self.lr = _number("lr", lr, positive=True)
        self.weight_decay = _number("weight_decay", weight_decay)

    def __repr__(self) -> str:
        return (
            f"WeightDecaySDE({self.problem!r}, lr={self.lr:g}, "
            f"weight_decay={self.weight_decay:g}, calculus={self.calculus!r})"
        )

    def with_calculus(self, calculus: str) -> WeightDecaySDE:
        """The same process in the other form."""
        return WeightDecaySDE(self.problem, self.lr, self.weight_decay, calculus)

    def drift_at(self, x: Tensor) -> Tensor:
        """Drift at ONE point: (D,) -> (D,)."""
        loss = self.problem.pointwise
        drift = -self.lr * (loss.gradient(x) + self.weight_decay * x)
        if self.calculus == "ito":
            return drift
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        correction = self.problem.noise.correction(loss, x, identity)
        return drift - 0.5 * self.lr**2 * correction

    def reference_basis(self, x: Tensor) -> Tensor:
        """None: (D, 0, n)."""
        return x.new_zeros(x.shape[0], 0, x.shape[1])

    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        """Drift: (D, n) -> (D, n)."""
        name = f"weight_decay_{self.calculus}_{self.lr}_{self.weight_decay}"
        result: Tensor = self.kernels.run_last(name, self.drift_at, x)
        return result

    def noise(self, x: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """The product eta sigma w: (D, n), (m, n) -> (D, n)."""
        return self.lr * self.ambient_noise(x, w)

    def factor(self, x: Tensor, basis: Tensor) -> Tensor:
        """The matrix eta sigma: (D, n) -> (D, m, n)."""
        return self.lr * self.kernels.noise_factor(x)

    def retract(self, x: Tensor, basis: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The state itself."""
        return x, basis


@implements("Equation (8)")
class FixedRatioDiffusion(ManifoldEquation):
    r"""The limit of SGD at a fixed ratio C of weight decay to learning rate; t = eta^2 k.

    .. math::

        dY = -C\,Y\,dt + \tfrac12 \partial^2\Phi(Y)[\Sigma(Y)]\,dt + \partial\Phi(Y)\sigma(Y)\,dW

    Args:
        problem: The problem.
        ratio: C = lambda / eta, not negative.
        calculus: "ito", as printed, or "stratonovich", whose drift is tangent to the manifold.
        geometry: The geometry of the problem; by default ``Geometry(problem)``.
        groups: Groups of weights by which the loss can be scaled separately, as for
            :class:`~manifold_sde.GroupDirectionDiffusion`; in up to 512 dimensions they are found.

    Raises:
        ScaleInvarianceError, NoiseError: If the loss or the noise does not have the properties
            that the equation needs.

    Source: equation (8), Theorem 3.2.
    """

    time_unit = "t = eta^2 k"

    def __init__(
        self,
        problem: Problem,
        ratio: float,
        calculus: str = "ito",
        *,
        geometry: Geometry | None = None,
        groups: Any = None,
    ) -> None:
        super().__init__(problem, calculus, geometry=geometry)
        self.ratio = _number("ratio", ratio)
        self.groups = groups

    def __repr__(self) -> str:
        return (
            f"FixedRatioDiffusion({self.problem!r}, ratio={self.ratio:g}, "
            f"calculus={self.calculus!r})"
        )

    def with_calculus(self, calculus: str) -> FixedRatioDiffusion:
        """The same process in the other form."""
        return FixedRatioDiffusion(
            self.problem, self.ratio, calculus, geometry=self.geometry, groups=self.groups
        )

    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        """Drift: (D, n), (D, d, n) -> (D, n)."""
        r = column_norms(x)
        y = x / r
        return self._scaled(direction_drift(self.space, y, basis, self.calculus), y, r)

    def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and P sigma w: (D, n) each."""
        r = column_norms(x)
        y = x / r
        drift, noise = direction_drift_and_noise(self.space, y, basis, w, self.calculus)
        return self._scaled(drift, y, r), noise / r

    def _scaled(self, drift: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """The drift at r y, from that of the direction diffusion at y."""
        return (drift + 0.5 * self.noise_trace(y) * y) / r**3 - self.ratio * r * y


@implements("Equation (13)", "Theorem 4.1")
class LimitingDiffusion(FixedRatioDiffusion):
    r"""The limiting diffusion of SGD with weight decay, in the time T of (12): (8) at C = 1/2.

    .. math::

        dY = -\tfrac12 Y\,dT + \tfrac12 \partial^2\Phi(Y)[\Sigma(Y)]\,dT
             + \partial\Phi(Y)\sigma(Y)\,dW

    Args:
        problem: The problem.
        calculus: "ito", as printed, or "stratonovich".
        geometry: The geometry of the problem; by default ``Geometry(problem)``.
        groups: As for :class:`FixedRatioDiffusion`.

    Raises:
        ScaleInvarianceError, NoiseError: As for :class:`FixedRatioDiffusion`.

    Source: equation (13), Theorems 4.1 and 4.4.
    """

    time_unit = "T of (12)"

    def __init__(
        self,
        problem: Problem,
        calculus: str = "ito",
        *,
        geometry: Geometry | None = None,
        groups: Any = None,
    ) -> None:
        super().__init__(problem, 0.5, calculus, geometry=geometry, groups=groups)

    def __repr__(self) -> str:
        return f"LimitingDiffusion({self.problem!r}, calculus={self.calculus!r})"

    def with_calculus(self, calculus: str) -> LimitingDiffusion:
        """The same process in the other form."""
        return LimitingDiffusion(self.problem, calculus, geometry=self.geometry, groups=self.groups)


class DirectionDiffusion(ManifoldEquation):
    r"""The direction of all these diffusions, in the intrinsic clock u, on the unit vectors.

    .. math::

        d\bar Y = \tfrac12\bigl(\partial^2\Phi(\bar Y)[\Sigma(\bar Y)] - V(\bar Y)\bar Y\bigr)du
                  + P\sigma(\bar Y)\,dW_u, \qquad u = \int \|Y\|^{-4}\,dt

    It knows no learning rate, no weight decay and no norm: one simulation of it answers for (8) at
    every ratio and for (13).

    Args:
        problem: The problem.
        calculus: "ito" or "stratonovich".
        geometry: The geometry of the problem; by default ``Geometry(problem)``.

    Raises:
        ScaleInvarianceError, NoiseError: As for :class:`FixedRatioDiffusion`.

    Source: the directions of (8) and (13) by Ito's formula and the time change u.
    """

    time_unit = "intrinsic clock u"

    def __repr__(self) -> str:
        return f"DirectionDiffusion({self.problem!r}, calculus={self.calculus!r})"

    def with_calculus(self, calculus: str) -> DirectionDiffusion:
        """The same process in the other form."""
        return DirectionDiffusion(self.problem, calculus, geometry=self.geometry)

    def require_on_manifold(self, y: Tensor) -> None:
        """As for the others; the states also have norm 1.

        Raises:
            NotOnManifoldError: If a state is not on the manifold, or not of norm 1.
        """
        super().require_on_manifold(y)
        off = float((y.norm(dim=-1) - 1.0).abs().max())
        if off > 1e-6:
            raise NotOnManifoldError(
                "the direction diffusion starts from a vector that has not norm 1",
                received=f"a norm off by {off:.3g}",
                expected="unit vectors",
                remedy="y0 / y0.norm(dim=-1, keepdim=True); the norm is an argument of .at",
            )

    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        """Drift at the direction: (D, n), (D, d, n) -> (D, n)."""
        return direction_drift(self.space, x / column_norms(x), basis, self.calculus)

    def noise(self, x: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """P sigma w at the direction: (D, n), (D, d, n), (m, n) -> (D, n)."""
        return tangent_noise(self.space, x / column_norms(x), basis, w)

    def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and P sigma w, at the direction: (D, n) each."""
        return direction_drift_and_noise(self.space, x / column_norms(x), basis, w, self.calculus)

    def factor(self, x: Tensor, basis: Tensor) -> Tensor:
        """P sigma at the direction: (D, n), (D, d, n) -> (D, m, n)."""
        return super().factor(x / column_norms(x), basis)

    def retract(self, x: Tensor, basis: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The retraction of the direction."""
        return super().retract(x / column_norms(x), basis, fresh_steps)


def _number(name: str, value: object, *, positive: bool = False) -> float:
    """A finite number that is not negative.

    Raises:
        ArgumentError: If it is none.
    """
    number = real(value)
    if not (number > 0.0 if positive else number >= 0.0) or number == float("inf"):
        raise ArgumentError(
            f"{name} cannot be used",
            received=repr(value),
            expected=f"a finite {'positive number' if positive else 'number, 0 or more'}",
            remedy="a schedule belongs to solution.at_steps or run_sgd"
            if name != "ratio"
            else "C = weight_decay / lr",
        )
    return number
