"""What every scheme provides: one step for many paths, and what is known of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.sdes import (
    DirectionDiffusion,
    WeightDecaySDE,
)


class Motion(ABC):
    """What a step needs of an equation: its coefficients on batches, and where its states live."""

    sde: StochasticEquation
    kernels: Kernels

    @abstractmethod
    def anchor(self, x: Tensor) -> Tensor:
        """Tangent bases at states: (D, n) -> (D, d, n)."""

    @abstractmethod
    def drift(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Drift: (D, n), (D, d, n) -> (D, n)."""

    @abstractmethod
    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """Diffusion times w: (D, n), (D, d, n), (m, n) -> (D, n)."""

    @abstractmethod
    def increment(self, x: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Drift times h and diffusion times w: (D, n), (D, d, n), () or (n,), (m, n) -> (D, n)."""

    def tangent_increment(self, x: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """As :meth:`increment`, by the tangent part of the Ito drift: where there is a tangent."""
        raise NotImplementedError(f"{type(self).__name__} has no tangent space")

    @abstractmethod
    def land(self, x: Tensor, anchor: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The state that belongs to x, and the tangent basis there; NaN where a path is lost."""

    def noise_alone(self, x: Tensor, w: Tensor) -> Tensor:
        """Sigma w, not projected: (D, n), (m, n) -> (D, n)."""
        problem = self.sde.problem
        r = x.norm(dim=0)

        def product(y: Tensor, v: Tensor) -> Tensor:
            return problem.noise.product(problem.pointwise, y, v)

        result: Tensor = self.kernels.run_last("noise_product", product, x / r, w)
        return result / r

    def trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma at the directions: (D, n) -> (n,)."""
        return self.kernels.noise_trace(x)


class ManifoldMotion(Motion):
    """Motion on the manifold of minimisers.

    Args:
        sde: The equation, in the calculus of the scheme.
        compiled: Whether the kernels are compiled.
    """

    sde: ManifoldEquation

    def __init__(self, sde: ManifoldEquation, *, compiled: bool = False) -> None:
        self.sde = sde
        self.field = sde.field(compiled=compiled)
        self.kernels = self.field.kernels

    def anchor(self, x: Tensor) -> Tensor:
        """Tangent bases at states, of NaN where a state is: (D, n) -> (D, d, n)."""
        lost = ~torch.isfinite(x).all(dim=0)
        safe = torch.where(lost, torch.ones_like(x), x)
        return torch.where(lost, torch.nan, self.field.anchor(safe))

    def drift(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Drift: (D, n), (D, d, n) -> (D, n)."""
        return self.sde.drift(self.field, x, anchor)

    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        return self.sde.noise(self.field, x, anchor, w)

    def increment(self, x: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Drift times h and P sigma w, which share a tangent space."""
        drift, noise = self.sde.drift_and_noise(self.field, x, anchor, w)
        return h * drift + noise

    def tangent_increment(self, x: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Tangent part of the direction's Ito drift times h, and P sigma w."""
        return self.field.tangent_increment(x / x.norm(dim=0), anchor, h, w)

    def land(self, x: Tensor, anchor: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The retraction of x. The direction diffusion lives on unit vectors."""
        if isinstance(self.sde, DirectionDiffusion):
            x = x / x.norm(dim=0)
        point, basis, _ = self.field.retract(x, anchor, fresh_steps)
        return point, basis


class AmbientMotion(Motion):
    """Motion in the whole space, of the SDE (3); there are no anchors.

    Args:
        sde: The equation, in the calculus of the scheme.
        compiled: Whether the kernels are compiled.
    """

    sde: WeightDecaySDE

    def __init__(self, sde: WeightDecaySDE, *, compiled: bool = False) -> None:
        self.sde = sde
        self.kernels = Kernels(sde.problem, compiled)

    def anchor(self, x: Tensor) -> Tensor:
        """None: (D, 0, n)."""
        return x.new_zeros(x.shape[0], 0, x.shape[1])

    def drift(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Drift: (D, n) -> (D, n)."""
        name = f"weight_decay_{self.sde.calculus}_{self.sde.lr}_{self.sde.weight_decay}"
        result: Tensor = self.kernels.run_last(name, self.sde.drift_at, x)
        return result

    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """Eta sigma w: (D, n), (m, n) -> (D, n)."""
        return self.sde.lr * self.noise_alone(x, w)

    def increment(self, x: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Drift times h and eta sigma w."""
        return h * self.drift(x, anchor) + self.noise(x, anchor, w)

    def land(self, x: Tensor, anchor: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        """The state itself."""
        return x, anchor


def motion_of(sde: StochasticEquation, *, compiled: bool = False) -> Motion:
    """Motion of an equation."""
    if isinstance(sde, WeightDecaySDE):
        return AmbientMotion(sde, compiled=compiled)
    assert isinstance(sde, ManifoldEquation)
    return ManifoldMotion(sde, compiled=compiled)


@dataclass(frozen=True)
class StepNoise:
    """Random numbers of one step.

    Attributes:
        dw: Increment of the Brownian motion, (m, n).
        extra: Function that returns m standard normals a path, independent of it, (m, n).
    """

    dw: Tensor
    extra: Callable[[], Tensor]


class Scheme(ABC):
    """A one-step method on the manifold.

    Attributes:
        name: Name, as ``solve`` takes it.
        calculus: Form of the equation whose drift it uses, or ``None`` if it uses none.
        weak_order: Weak order.
        strong_order: Strong order for noise that does not commute.
        strong_order_commutative: Strong order for noise that does.
        cost: What a step costs in evaluations of the gradient, for D dimensions, of which the
            cone of minimisers has d, by the general route: a Hessian counts D, and so does a sum
            of D third derivatives. Least squares that interpolates puts its M residuals for D.
    """

    name: str
    calculus: str | None
    weak_order: int
    strong_order: float = 0.5
    strong_order_commutative: float
    cost: str

    @abstractmethod
    def step(
        self, motion: Motion, x: Tensor, anchor: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step of size h.

        Args:
            motion: The equation.
            x: States on the manifold (D, n).
            anchor: Tangent bases there (D, d, n).
            h: Step, () or (n,).
            noise: The random numbers.

        Returns:
            The new states and tangent bases; NaN where a path is lost.
        """

    def __repr__(self) -> str:
        return f"<scheme {self.name!r}, weak order {self.weak_order}>"


def half(h: Tensor) -> Tensor:
    """Half a step."""
    return torch.mul(h, 0.5)
