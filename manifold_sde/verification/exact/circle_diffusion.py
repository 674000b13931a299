"""The laws of the direction and the norm where the minimisers of unit norm form a closed curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import ArrayLike

from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import LARGEST_FLOAT, SMALLEST, as_float64, check_number
from manifold_sde.problem import Problem
from manifold_sde.time_scale import TimeScale
from manifold_sde.verification.exact.circle_coefficients import (
    Curve,
    LimitMap,
    circle_coefficients,
    reversible_coefficients,
)
from manifold_sde.verification.exact.inputs import check_nodes, check_time, keep
from manifold_sde.verification.exact.periodic_law import CircleNormLaw, PeriodicLaw
from manifold_sde.verification.exact.spectral import (
    Array,
    chebyshev,
    chebyshev_size,
    fourier_cardinals,
    fourier_derivative,
    fourier_nodes,
    fourier_tail,
    invariant_row,
    propagate,
    slowest_eigenvalues,
)

#: Relative variation of the trace that counts as rounding.
_CONSTANT = 1e-9
#: Largest Fourier tail of the coefficients: six digits of the laws.
_RESOLVED = 1e-6


@dataclass(frozen=True, eq=False)
class CircleDiffusion:
    r"""The direction of (8) and (13) where dim Gamma_1 = 1, for noise with the two properties.

    Let theta in [0, 2 pi) be a coordinate of the closed curve Gamma_1. In the intrinsic clock
    u = int ||Y||^-4 dt it is an autonomous diffusion with the generator

    .. math::

        \mathcal G f = b(\theta) f' + \tfrac12 v(\theta) f'' ;

    in arc length b is half the tangential part of the second derivative of Phi contracted with
    Sigma, and v is the tangential variance. In the time t of (8), or T of (13), the pair of theta
    and q = ||Y||^4 has the generator

    .. math::

        q^{-1} \mathcal G + (-4 c q + 2 V(\theta))\, \partial_q, \qquad c = C \text{ or } \tfrac12,

    with V the trace of Sigma at norm 1. The laws are found by collocation, Fourier in theta and
    Chebyshev in the norm, to ten digits where the coefficients are that well resolved.

    For all c and initial norms the second generator is solved as one: with
    t_0 = (e^{4ct} - 1) / (4c) and the mean V_m of the extremes of V,

    .. math::

        q = e^{-4ct} (q_0 + 2 V_m t_0)\, z, \qquad
        r = \frac{1}{2 V_m} \ln\Bigl(1 + \frac{2 V_m t_0}{q_0}\Bigr),

    where (theta, z) has in the time r the generator of c = V_m / 2, starts at z = 1 and never
    leaves the interval between the extremes of V / V_m.

    Args:
        drift: Values b (n,) at the angles 2 pi j / n, n odd, per unit of u.
        variance: Values v (n,), per unit of u.
        trace: Values V (n,).

    Raises:
        ArgumentError: If the values are not the coefficients of such a diffusion, or do not
            resolve them.

    Example:
        >>> import numpy as np
        >>> from manifold_sde import problems
        >>> law = CircleDiffusion.reversible(problems.varying_circle())
        >>> round(law.expectation(np.cos, clock=2.0), 6), round(law.equilibrium.moment(1).real, 6)
        (0.911421, -0.267949)

    Source: equations (8) and (13); the coefficients from (5).
    """

    drift: Array
    variance: Array
    trace: Array

    def __post_init__(self) -> None:
        names = ("drift", "variance", "trace")
        values = [as_float64(name, getattr(self, name)) for name in names]
        drift, variance, trace = values
        fits = drift.ndim == 1 and drift.shape == variance.shape == trace.shape
        finite = all(bool(np.isfinite(v).all()) for v in values)
        if not (fits and len(drift) >= 9 and len(drift) % 2 and finite):
            _refuse(
                f"shapes {', '.join(str(v.shape) for v in values)}, finite: {finite}",
                "three arrays (n,) of finite numbers, n odd and at least 9",
            )
        if not (trace.min() > 0.0 and variance.min() >= 0.0):
            _refuse(
                f"V of at least {trace.min():.3g}, v of at least {variance.min():.3g}",
                "V positive, and v not negative",
            )
        if not variance.max() > 1e-12 * trace.max():
            _refuse("v = 0: the direction stands still or flows", "a diffusion, v > 0")
        keep(self, drift=drift, variance=variance, trace=trace)
        if not self.tail <= _RESOLVED:
            raise ArgumentError(
                "the nodes do not resolve the coefficients of the diffusion",
                received=f"Fourier coefficients of {self.tail:.2g} at degree {len(drift) // 2}",
                expected=f"at most {_RESOLVED:g}, relative to the largest value",
                remedy=f"nodes={2 * len(drift) - 1}",
            )

    @classmethod
    def of(
        cls,
        problem: Problem,
        curve: Curve | None = None,
        *,
        nodes: int = 65,
        limit_map: LimitMap | None = None,
        step: float = 0.02,
    ) -> CircleDiffusion:
        """Compute the diffusion of a problem from differences of Phi.

        Args:
            problem: A problem with dim Gamma_1 = 1 and a noise with the two properties.
            curve: Gamma_1, angles (n,) -> unit vectors (n, D), 2 pi-periodic and smooth, of any
                speed; by default the problem's ``facts.circle``.
            nodes: Odd number of Fourier nodes.
            limit_map: Phi, (k, D) -> (k, D); by default gradient flow by SciPy.
            step: Step of the differences, relative to the norm.

        Returns:
            The diffusion.

        Raises:
            ArgumentError, NotOnManifoldError, NoiseError, LimitMapError: If the problem has no
                such diffusion, or the curve is not its Gamma_1.
        """
        return cls(
            *circle_coefficients(problem, curve, nodes=nodes, limit_map=limit_map, step=step)
        )

    @classmethod
    def reversible(cls, problem: Problem, *, nodes: int = 65) -> CircleDiffusion:
        """Compute the diffusion with the noise of (18) from the known pdet H.

        In arc length the drift is -(s^2 / 4) d log pdet H, and the variance s^2. It is reversible,
        with pi proportional to pdet(H)^{-1/2}.

        Args:
            problem: A problem with ``facts.circle``, ``facts.log_pseudo_determinant`` and the
                noise of (18).
            nodes: Odd number of Fourier nodes.

        Returns:
            The diffusion.

        Raises:
            ArgumentError: If the problem does not know these, or has another noise.
        """
        return cls(*reversible_coefficients(problem, nodes=nodes))

    @property
    def angles(self) -> Array:
        """The Fourier nodes (n,)."""
        return fourier_nodes(len(self.drift))

    @cached_property
    def tail(self) -> float:
        """The last Fourier coefficients of drift, variance and trace, small where resolved."""
        size = np.abs(self.drift).max() + self.variance.max()
        drift = fourier_tail(self.drift) * float(np.abs(self.drift).max() / size)
        return max(drift, fourier_tail(self.variance), fourier_tail(self.trace))

    @cached_property
    def generator(self) -> Array:
        """The generator in the clock u, as a matrix (n, n) that acts on values at the nodes."""
        derivative = fourier_derivative(len(self.drift))
        second = derivative @ derivative
        return self.drift[:, None] * derivative + 0.5 * self.variance[:, None] * second

    # In the clock.

    def at_clock(self, u: float, start: float = 0.0) -> PeriodicLaw:
        """Compute the law of the angle at the intrinsic clock u >= 0.

        Args:
            u: The clock.
            start: The angle at u = 0.

        Returns:
            The law.

        Raises:
            TimeScaleError: If u or the start is out of range.
        """
        u = check_time("u", u)
        row = fourier_cardinals(len(self.drift), _angle(start))
        return PeriodicLaw(propagate(row, scipy.sparse.csr_array(self.generator), u))

    def expectation(self, f: Callable[[Array], Array], clock: ArrayLike, start: float = 0.0) -> Any:
        """Compute E f(angle) at clocks u.

        Args:
            f: Periodic function of an array of angles.
            clock: Clocks u, a number or (k,).
            start: The angle at u = 0.

        Returns:
            A number, or an array (k,).

        Raises:
            TimeScaleError: If a clock or the start is out of range.
            ArgumentError: If f does not return finite real numbers.
        """
        return _each("clock", clock, lambda u: self.at_clock(u, start).expectation(f))

    @cached_property
    def equilibrium_in_clock(self) -> PeriodicLaw:
        """The law that is invariant in the clock u, which is not the pi of Theorem 5.4.

        Raises:
            ArgumentError: If the variance vanishes somewhere.
        """
        self._require_ergodic()
        return PeriodicLaw(invariant_row(self.generator))

    @cached_property
    def spectral_gap(self) -> float:
        """Slowest rate at which expectations of the angle relax, per unit of the clock u."""
        self._require_ergodic()
        rates = np.sort(-scipy.linalg.eigvals(self.generator).real)
        return float(rates[1])

    @property
    def relaxation_time(self) -> float:
        """1 / spectral_gap, in units of the clock u."""
        return 1.0 / self.spectral_gap

    # In time, with the norm.

    def at(
        self,
        t: float,
        start: float = 0.0,
        *,
        ratio: float = 0.5,
        norm: float = 1.0,
        norm_nodes: int | None = None,
    ) -> CircleNormLaw:
        """Compute the joint law of the angle and ||Y|| at the time t of (8), or T of (13).

        Args:
            t: The diffusion's own time.
            start: The angle at time 0.
            ratio: The ratio C of (8), 0 or more; 1/2 is (13).
            norm: ||Y(0)||.
            norm_nodes: Odd number of Chebyshev nodes for the norm; by default as many as
                the variation of V needs.

        Returns:
            The law.

        Raises:
            TimeScaleError, ArgumentError: If an argument is out of range.
        """
        t = check_time("t", t)
        c = check_number("ratio", ratio, "(8) has C >= 0, and (13) is C = 1/2")
        if t == 0.0:
            return self._joint(-math.inf, 0.0, start, norm, norm_nodes)
        grown = 4.0 * c * t
        log_time = math.log(t) if grown < 1e-12 else grown + math.log(-math.expm1(-grown) / 4 / c)
        return self._joint(log_time, -c * t, start, norm, norm_nodes)

    def at_steps(
        self, lr: Any, weight_decay: Any, steps: int, start: float = 0.0, *, norm: float = 1.0
    ) -> CircleNormLaw:
        """Compute the joint law of the angle and the norm in the limit of SGD after some steps.

        Args:
            lr: Learning rate, a number or a schedule, as in ``TimeScale``.
            weight_decay: Weight decay, likewise.
            steps: Number of steps.
            start: The angle of Phi(x_0).
            norm: The norm of x_0.

        Returns:
            The law at the time t_0 = sum of the squared learning rates of the equivalent run
            without weight decay, its norm scaled back.

        Raises:
            TimeScaleError, ArgumentError: If an argument is out of range.
        """
        scale = TimeScale(lr, weight_decay)
        k = check_number("steps", steps, "steps=1000: the law is that of one number")
        log_time = float(scale.log_accumulated(k))
        return self._joint(log_time, float(scale.log_shrinkage(k)), start, norm, None)

    def expectation_at(
        self,
        f: Callable[[Array, Array], Array],
        times: ArrayLike,
        start: float = 0.0,
        *,
        ratio: float = 0.5,
        norm: float = 1.0,
    ) -> Any:
        """Compute E f(angle, ||Y||) at times t of (8), or T of (13).

        Args:
            f: Smooth function of two arrays that broadcast; for several functions use :meth:`at`.
            times: Times, a number or (k,).
            start: The angle at time 0.
            ratio: The ratio C of (8), 0 or more; 1/2 is (13).
            norm: ||Y(0)||.

        Returns:
            A number, or an array (k,).

        Raises:
            TimeScaleError, ArgumentError: If an argument is out of range.
        """
        at = partial(self.at, start=start, ratio=ratio, norm=norm)
        return _each("times", times, lambda t: at(t).expectation(f))

    def joint_equilibrium(
        self, ratio: float = 0.5, *, norm_nodes: int | None = None
    ) -> CircleNormLaw:
        """Compute the equilibrium in time of the angle and ||Y||, at a ratio C > 0.

        Args:
            ratio: The ratio C of (8), positive; 1/2 is (13). The law of the angle is the same for
                every ratio.
            norm_nodes: Odd number of Chebyshev nodes for the norm.

        Returns:
            The law.

        Raises:
            TimeScaleError, ArgumentError: If an argument is out of range, or the variance of the
                angle vanishes somewhere.
        """
        self._require_ergodic()
        c = check_number("ratio", ratio, "without weight decay the norm grows for ever")
        if c == 0.0:
            raise ArgumentError(
                "without weight decay the norm has no equilibrium",
                received="ratio=0",
                expected="a positive ratio",
                remedy="ratio=0.5; the equilibrium of the angle is the same for each",
            )
        z, matrix = self._scaled_generator(norm_nodes)
        weights = invariant_row(matrix.toarray()).reshape(len(self.drift), -1)
        return CircleNormLaw(weights, (self._middle / (2.0 * c) * z) ** 0.25)

    @cached_property
    def equilibrium(self) -> PeriodicLaw:
        """The law pi of Theorem 5.4, the equilibrium of the angle in time and in SGD steps.

        It weights the equilibrium in the clock by ||Y||^4.

        Raises:
            ArgumentError: If the variance vanishes somewhere.
        """
        return self.joint_equilibrium().angle

    def spectral_gap_in_time(self, ratio: float = 0.5) -> float:
        """Compute the slowest rate at which the angle and the norm relax, per unit of time.

        Args:
            ratio: The ratio C of (8), to which the rate is proportional; 1/2 is (13). Per step of
                SGD it is the rate in the time of (8), at C = lambda / eta, times eta^2.

        Returns:
            The rate, at most 4 C, which is that of the norm.

        Raises:
            TimeScaleError, ArgumentError: If the ratio is out of range, or the variance of the
                angle vanishes somewhere.
        """
        self._require_ergodic()
        c = check_number("ratio", ratio, "(8) has C >= 0, and (13) is C = 1/2")
        matrix = self._scaled_generator(None)[1]
        rates = np.sort(-slowest_eigenvalues(matrix).real)
        return 2.0 * c / self._middle * min(float(rates[1]), 2.0 * self._middle)

    @property
    def _middle(self) -> float:
        return 0.5 * float(self.trace.max() + self.trace.min())

    def _joint(
        self, log_time: float, log_shrinkage: float, start: float, norm: float, nodes: int | None
    ) -> CircleNormLaw:
        """Compute the law at t_0 without weight decay, the norm times the shrinkage."""
        norm = check_number("norm", norm, "norm=1.0, or the norm of x_0", least=SMALLEST)
        log_q = 4.0 * math.log(norm)
        log_grown = float(np.logaddexp(log_q, math.log(2.0 * self._middle) + log_time))
        # As log1p where little has grown, so that short times keep their digits.
        gained = math.log(2.0 * self._middle) + log_time - log_q
        length = (math.log1p(math.exp(gained)) if gained < 30 else log_grown - log_q) / (
            2.0 * self._middle
        )
        z, matrix = self._scaled_generator(nodes)
        row = np.zeros((len(self.drift), len(z)))
        row[:, len(z) // 2] = fourier_cardinals(len(self.drift), _angle(start))
        weights = propagate(row.ravel(), matrix, length).reshape(row.shape)
        return CircleNormLaw(weights, np.exp(0.25 * log_grown + log_shrinkage) * z**0.25)

    def _scaled_generator(self, nodes: int | None) -> tuple[Array, scipy.sparse.csr_array]:
        """Return nodes z (m,), and z^{-1} G + 2 (V - V_m z) d/dz as a matrix (n m, n m)."""
        half = float(np.ptp(self.trace)) / (2.0 * self._middle)
        if half <= _CONSTANT:
            half, nodes = 0.0, 1
        elif nodes is None:
            nodes = chebyshev_size(half)
        else:
            nodes = check_nodes("norm_nodes", nodes, least=3)
        x, derivative = chebyshev(nodes)
        z = 1.0 + half * x
        n = len(self.drift)
        turning = scipy.sparse.kron(self.generator, scipy.sparse.diags_array(1.0 / z))
        if half == 0.0:
            return z, turning.tocsr()
        speed = 2.0 * (self.trace[:, None] - self._middle * z).ravel() / half
        growing = scipy.sparse.diags_array(speed) @ scipy.sparse.kron(
            scipy.sparse.eye_array(n), derivative
        )
        return z, (turning + growing).tocsr()

    def _require_ergodic(self) -> None:
        if not self.variance.min() > 1e-12 * self.trace.max():
            raise ArgumentError(
                "the equilibrium need not be unique",
                received=f"a variance of {self.variance.min():.3g} at some angle",
                expected="a positive variance all over Gamma_1 (Assumption 5.2)",
                remedy="ask for the law at a finite time",
            )


def _each(name: str, points: ArrayLike, compute: Callable[[float], float]) -> Any:
    array = as_float64(name, points)
    values = np.array([compute(float(point)) for point in array.ravel()])
    return float(values[0]) if array.ndim == 0 else values.reshape(array.shape)


def _angle(start: float) -> float:
    hint = "radians; problem.facts.circle.angle(x) gives the angle of a point"
    return check_number("start", start, hint, least=-LARGEST_FLOAT)


def _refuse(received: str, expected: str) -> None:
    raise ArgumentError(
        "these are not the coefficients of a diffusion on a circle",
        received=received,
        expected=expected,
        remedy="CircleDiffusion.of(problem) computes them",
    )
