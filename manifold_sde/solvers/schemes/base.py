"""What every scheme provides: one step for many paths, and what is known of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.equations import StochasticEquation


@dataclass(frozen=True)
class StepNoise:
    """Random numbers of one step.

    Attributes:
        dw: Increment of the Brownian motion, (m, n).
        extra: Function that returns m standard normals a path, independent of it, (m, n), or as
            many as it is asked for.
    """

    dw: Tensor
    extra: Callable[..., Tensor]


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
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step of size h.

        Args:
            sde: The equation.
            x: States on the manifold (D, n).
            basis: Reference bases there (D, d, n).
            h: Step, () or (n,).
            noise: The random numbers.

        Returns:
            The new states and reference bases; NaN where a path is lost.
        """

    def __repr__(self) -> str:
        return f"<scheme {self.name!r}, weak order {self.weak_order}>"


def half(h: Tensor) -> Tensor:
    """Half a step."""
    return torch.mul(h, 0.5)
