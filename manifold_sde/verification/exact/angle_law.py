"""The law of section 6.1 where the minimisers of unit norm form a circle."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import check_number
from manifold_sde.problem import Problem, require_problem
from manifold_sde.time_scale import TimeScale
from manifold_sde.verification.exact.facts import (
    KnownNorm,
    known,
    one_point,
    require_constant_determinant,
    spherical_scale,
)
from manifold_sde.verification.exact.inputs import check_time, keep
from manifold_sde.verification.exact.wrapped_normal import WrappedNormal


@dataclass(frozen=True)
class AngleLaw(KnownNorm):
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
        numbers = {field.name: real(getattr(self, field.name)) for field in fields(self)}
        finite = all(map(math.isfinite, numbers.values()))
        positive = all(value > 0 for name, value in numbers.items() if name != "start")
        if not (finite and positive and numbers["radius"] <= 1 + 1e-12):
            raise ArgumentError(
                "these numbers do not describe a diffusion on a circle",
                received=repr(self),
                expected="positive finite numbers, and a radius of at most 1",
                remedy="AngleLaw.of(problem) reads them off a problem",
            )
        keep(self, **numbers)

    @classmethod
    def of(cls, problem: Problem, x0: Tensor | None = None) -> AngleLaw:
        """Read the law off a problem that knows its circle.

        Args:
            problem: A problem with ``facts.circle`` and the noise of (18), whose pdet H is
                constant on the circle.
            x0: Start (D,) of SGD; by default the problem's minimiser. The diffusion starts at
                Phi(x0), which has to be known in closed form where x0 is off the circle.

        Returns:
            The law.

        Raises:
            ArgumentError: If the law of this problem is another one, or not known.
        """
        circle = known(require_problem(problem), "circle")
        scale = spherical_scale(problem)
        around = torch.linspace(0, 2 * math.pi, 65, dtype=torch.float64)
        require_constant_determinant(problem, circle.point(around))
        x = problem.minimizer if x0 is None else one_point(problem, x0, "x0")
        phi = None if problem.facts is None else problem.facts.limit_map
        if phi is not None:
            x = phi(x)
        elif not torch.allclose(x / x.norm(), circle.point(circle.angle(x)).to(x), atol=1e-6):
            raise ArgumentError(
                f"the limit of gradient flow is not known of {problem.name!r}",
                received="x0 is off the circle, and Phi is not known",
                expected="x0 on the circle, or problem.facts.limit_map",
                remedy="x0=problem.minimizer, or Geometry(problem).limit_map(x)",
            )
        return cls(
            start=float(circle.angle(x)),
            radius=circle.radius,
            noise_scale=scale,
            noise_trace=scale**2 * (problem.dim - 1),
            initial_norm=float(x.norm()),
        )

    def at(self, T: float) -> WrappedNormal:
        """Compute the law of the angle at the time T of (13)."""
        return self.at_clock(self.clock(T))

    def at_steps(self, lr: Any, weight_decay: Any, steps: int) -> WrappedNormal:
        """Compute the law of the angle in the limit of SGD after some steps.

        Args:
            lr: Learning rate, a number or a schedule, as in ``TimeScale``.
            weight_decay: Weight decay, likewise.
            steps: Number of steps.

        Returns:
            The law at the intrinsic clock of the steps.

        Raises:
            TimeScaleError: If an argument is out of range.
        """
        scale = TimeScale(lr, weight_decay)
        k = check_number("steps", steps, "steps=1000: the law is that of one number")
        return self.at_clock(float(scale.clock(k, self.noise_trace, self.initial_norm)))

    def at_clock(self, u: float) -> WrappedNormal:
        """Compute the law of the angle at the intrinsic clock u >= 0."""
        variance = (self.noise_scale / self.radius) ** 2 * check_time("u", u)
        return WrappedNormal(self.start, variance)
