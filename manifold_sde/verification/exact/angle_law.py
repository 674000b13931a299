"""The law of section 6.1 where the minimisers of unit norm form a circle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError
from manifold_sde.noise import SphericalNoise
from manifold_sde.number_arrays import check_number
from manifold_sde.problem import Problem
from manifold_sde.time_scale import TimeScale
from manifold_sde.verification.exact.wrapped_normal import WrappedNormal

#: At this learning rate and weight decay R is 1 throughout, (12) reads tau(t) = t, and so the
#: functions of steps of a TimeScale are functions of the time T of (13).
_LIMIT = TimeScale(1.0, 0.5)
#: Largest spread of log pdet H on the circle that counts as rounding.
_CONSTANT = 1e-8


@dataclass(frozen=True)
class AngleLaw:
    r"""The exact law of the limiting diffusion (13) on a circle, with the noise of (18).

    If Gamma_1 is a circle of radius r on which pdet H is constant, then with V = s^2 (D - 1)

    .. math::

        \|Y(T)\|^4 = V + (\|Y(0)\|^4 - V) e^{-2T}, \qquad
        u(T) = \frac1{2V} \ln\Bigl(1 + \frac{V (e^{2T} - 1)}{\|Y(0)\|^4}\Bigr),

    the norm is not random, the unwrapped angle at T is normal with variance s^2 u(T) / r^2 about
    its start, and the equilibrium is uniform on the circle. The direction of SGD has this law
    after tau^{-1}(T) steps in the limit of small learning rates (Theorem 4.4).

    Args:
        start: Angle at the start, in radians.
        radius: Radius r of the circle, in (0, 1].
        noise_scale: The scale s of (18).
        noise_trace: V, the trace of the noise covariance at norm 1.
        initial_norm: The norm at the start.

    Raises:
        ArgumentError: If a number is out of range.

    Example:
        >>> from manifold_sde import problems
        >>> law = AngleLaw.of(problems.normalized_linear(design="orthogonal"))
        >>> round(law.at(1.0).variance, 4), round(law.norm(1.0), 4)
        (0.158, 0.9561)

    Source: equations (10) to (13) and section 6.1.
    """

    start: float
    radius: float
    noise_scale: float
    noise_trace: float
    initial_norm: float = 1.0

    def __post_init__(self) -> None:
        positive = (self.radius, self.noise_scale, self.noise_trace, self.initial_norm)
        usable = all(math.isfinite(value) and value > 0 for value in positive)
        if not (usable and self.radius <= 1 + 1e-12 and math.isfinite(self.start)):
            raise ArgumentError(
                "these numbers do not describe a diffusion on a circle",
                received=repr(self),
                expected="positive finite numbers, and a radius of at most 1",
                remedy="AngleLaw.of(problem) reads them off a problem",
            )

    @classmethod
    def of(cls, problem: Problem, x0: Tensor | None = None) -> AngleLaw:
        """The law for a problem that knows its circle.

        Args:
            problem: A problem with ``facts.circle`` and the noise of (18), whose pdet H is
                constant on the circle.
            x0: Start (D,) of SGD; by default the problem's minimiser. The diffusion starts at
                Phi(x0), so off the circle the problem has to know Phi in closed form.

        Returns:
            The law.

        Raises:
            ArgumentError: If the law of this problem is another one, or not known.
        """
        facts = problem.facts
        if facts is None or facts.circle is None:
            _refuse(problem, "no circle of minimisers is known", "problems.great_circle()")
        if type(problem.noise) is not SphericalNoise:
            _refuse(problem, f"its noise is {problem.noise!r}", "noise=SphericalNoise(0.3)")
        if facts.log_pseudo_determinant is None:
            _refuse(problem, "log pdet H is not known along the circle", "problems.great_circle()")
        around = facts.circle.point(torch.linspace(0, 2 * math.pi, 65, dtype=torch.float64))
        values = facts.log_pseudo_determinant(around)
        spread = float(values.max() - values.min())
        if not spread <= _CONSTANT:
            _refuse(
                problem,
                f"log pdet H varies by {spread:.3g} along the circle, so the angle has a drift",
                "problems.normalized_linear(), where it is constant",
            )
        x = problem.minimizer if x0 is None else check_point(x0, problem.dim, name="x0")
        if x.dim() != 1:
            raise ArgumentError(
                "the law is that of one start",
                received=f"x0 of shape {tuple(x.shape)}",
                expected=f"({problem.dim},)",
                remedy="one AngleLaw.of(problem, x) for each start",
            )
        on_circle = facts.circle.point(facts.circle.angle(x))
        if facts.limit_map is not None:
            x = facts.limit_map(x)
        elif not torch.allclose(x / x.norm(), on_circle.to(x), atol=1e-6):
            _refuse(problem, "x0 is off the circle and Phi is not known", "x0=problem.minimizer")
        scale = problem.noise.scale
        return cls(
            start=float(facts.circle.angle(x)),
            radius=facts.circle.radius,
            noise_scale=scale,
            noise_trace=scale**2 * (problem.dim - 1),
            initial_norm=float(x.norm()),
        )

    def norm(self, T: float) -> float:
        """Norm of Y(T), the same on every path."""
        return float(_LIMIT.norm(_checked(T), self.initial_norm, self.noise_trace))

    def clock(self, T: float) -> float:
        """Intrinsic clock u(T)."""
        return float(_LIMIT.clock(_checked(T), self.noise_trace, self.initial_norm))

    def at(self, T: float) -> WrappedNormal:
        """Law of the angle at the diffusion's time T."""
        return self.at_clock(self.clock(T))

    def at_steps(self, lr: Any, weight_decay: Any, steps: int) -> WrappedNormal:
        """The limit's law of the angle after so many steps of SGD.

        Args:
            lr: Learning rate, a number or a schedule, as in ``TimeScale``.
            weight_decay: Weight decay, likewise.
            steps: Number of steps.

        Returns:
            The law at the clock that the steps have in the limit.

        Raises:
            TimeScaleError: If an argument is out of range.
        """
        scale = TimeScale(lr, weight_decay)
        return self.at_clock(float(scale.clock(steps, self.noise_trace, self.initial_norm)))

    def at_clock(self, u: float) -> WrappedNormal:
        """Law of the angle at the intrinsic clock u >= 0."""
        return WrappedNormal(self.start, (self.noise_scale / self.radius) ** 2 * u)


def _checked(T: float) -> float:
    return check_number("T", T, "the diffusion starts at T = 0")


def _refuse(problem: Problem, received: str, remedy: str) -> NoReturn:
    raise ArgumentError(
        f"the exact law of the angle is not that of {problem.name!r}",
        received=received,
        expected="minimisers of unit norm on a circle with constant pdet H, and the noise of (18)",
        remedy=remedy,
    )
