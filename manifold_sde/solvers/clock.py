r"""The running integrals along a path, and the norm and the time that are read off them.

For the direction diffusion these are the growth :math:`a = 2\int V\,du` and
:math:`\log E`, :math:`E(u) = \int_0^u e^{a}\,du'`. They answer for every ratio: if the norm starts
from :math:`q_0 = \|Y(0)\|^4`, the path of (8) at ratio 0 is at clock u at time
:math:`t_0 = q_0 E(u)`, with :math:`\|Y_0\|^4 = q_0 e^{a}`; and at ratio C at the time t with
:math:`(e^{4Ct} - 1)/4C = t_0`, with :math:`\|Y_C\|^4 = q_0 e^{a - 4Ct}` (the linear equation
dp/du = -2 V p + 4c, and Theorem 3.2 path by path). For the other equations it is the clock u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.sdes import DirectionDiffusion, WeightDecaySDE

#: Iterations that find where E has a value: each gains a factor of (h rate)^2 or so.
_ITERATIONS = 12


class RunningIntegrals(ABC):
    """Integrals along paths, kept as (k, n), paths last."""

    @abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """Values at the start: (D, n) -> (k, n)."""

    @abstractmethod
    def rate(self, x: Tensor, trace: Tensor) -> Tensor:
        """Integrand at a state (D, n) with V (n,) at its direction: (n,)."""

    @abstractmethod
    def advance(self, sums: Tensor, h: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Values after a step of size h with these rates at its ends."""

    def norm_error(self, sums: Tensor, other: Tensor) -> Tensor:
        """Difference of the logarithm of the norm where it is kept here: (k, n) -> (n,)."""
        return torch.zeros_like(sums[0])


class ClockIntegral(RunningIntegrals):
    """The intrinsic clock of the SDEs in time t, by the trapezoidal rule.

    Args:
        speed: Factor of dt / |x|^4: 1, and lr^2 where the time counts steps.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def start(self, x: Tensor) -> Tensor:
        """The clock u is 0: (D, n) -> (1, n)."""
        return x.new_zeros(1, x.shape[1])

    def rate(self, x: Tensor, trace: Tensor) -> Tensor:
        """1 / |x|^4, times the speed."""
        return self.speed / x.square().sum(0).square()

    def advance(self, sums: Tensor, h: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Add one trapezium."""
        return sums + h * (0.5 * (before + after))


class GrowthIntegrals(RunningIntegrals):
    """Growth a and log E of the direction diffusion: (2, n)."""

    def start(self, x: Tensor) -> Tensor:
        """The growth a and E are 0: (D, n) -> (2, n)."""
        zeros = x.new_zeros(x.shape[1])
        return torch.stack([zeros, zeros - torch.inf])

    def rate(self, x: Tensor, trace: Tensor) -> Tensor:
        """2 V."""
        return 2.0 * trace

    def advance(self, sums: Tensor, h: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Integrate a rate that is linear in the step: a exactly, E with the correction."""
        growth, log_elapsed = sums
        step = h * (0.5 * (before + after))
        gain = h * relative_expm1(step) * trapezoid_correction(h, before, after)
        gained = growth + torch.log(gain)
        return torch.stack([growth + step, torch.logaddexp(log_elapsed, gained)])

    def norm_error(self, sums: Tensor, other: Tensor) -> Tensor:
        """A quarter of the difference of the growths."""
        return 0.25 * (sums[0] - other[0]).abs()


def integrals_of(equation: StochasticEquation) -> RunningIntegrals:
    """The running integrals of an equation."""
    if isinstance(equation, DirectionDiffusion):
        return GrowthIntegrals()
    return ClockIntegral(equation.lr**2 if isinstance(equation, WeightDecaySDE) else 1.0)


def trapezoid_correction(h: Tensor, before: Tensor, after: Tensor) -> Tensor:
    r"""What E gains in a step whose rate is linear, over what it gains at the mean rate.

    A rate that rises by d makes the growth hang below its chord by d s (1 - s/h) / 2. With z = h d
    this makes :math:`\int_0^h e^a ds` smaller by the factor 1 - z/12 + z^2/240, up to z^3 and z
    times (h rate)^2.
    """
    z = h * (after - before)
    return 1.0 - z / 12.0 * (1.0 - z / 20.0)


def relative_expm1(z: Tensor) -> Tensor:
    """(e^z - 1) / z, which is 1 at 0."""
    safe = torch.where(z == 0, torch.ones_like(z), z)
    return torch.where(z == 0, torch.ones_like(z), torch.expm1(safe) / safe)


# Reading off.


@dataclass(frozen=True)
class ReadOff:
    """Moments of an equation with a norm, in the direction and its running integrals.

    Attributes:
        norm: Norms at the start (n,).
        log_time: log t_0 of the moments, for the covariance that is simulated, (K,).
        log_shrinkage: Log of the factor of the norm at ratio 0, (K,).
    """

    norm: Tensor
    log_time: Tensor
    log_shrinkage: Tensor

    @classmethod
    def at_ratio(cls, norm: Tensor, elapsed: Tensor, ratio: float) -> ReadOff:
        """Moments of (8) at a ratio, at times (K,) since its start."""
        return cls(norm, log_time_at_zero_ratio(elapsed, ratio), -ratio * elapsed)

    def to(self, like: Tensor) -> ReadOff:
        """The same in the dtype and on the device of a tensor."""
        return ReadOff(self.norm.to(like), self.log_time.to(like), self.log_shrinkage.to(like))

    @property
    def log_elapsed(self) -> Tensor:
        """Values of log E at which the direction is saved, (K, n)."""
        return self.log_time[:, None] - 4.0 * self.norm.log()

    def norms(self, growth: Tensor) -> Tensor:
        """Norms at the moments, from the growth there: (K, n) -> (K, n)."""
        return self.norm * torch.exp(0.25 * growth + self.log_shrinkage[:, None])


def log_time_at_zero_ratio(time: Tensor, ratio: float) -> Tensor:
    """Log of t_0 = (e^{4 C t} - 1) / 4C, the time of (8) at ratio 0 that ratio C has at t."""
    z = 4.0 * ratio * time
    # log(t (e^z - 1) / z), without overflow.
    safe = torch.where(z > 0, z, torch.ones_like(z))
    log_factor = torch.where(z > 0, safe + torch.log(-torch.expm1(-safe) / safe), 0.0 * z)
    return torch.log(time) + log_factor


def clock_at(log_elapsed: Tensor, trace: Tensor) -> Tensor:
    r"""Clock u at which E reaches a value, where V is constant: log(1 + 2 V E) / 2V.

    For another V the clock lies between its values at the extremes of V along the path: E grows
    the faster the larger V is.

    Args:
        log_elapsed: log E, any shape.
        trace: V, not negative, broadcast against it.

    Returns:
        u, the broadcast shape, without overflow.

    Source: E(u) = (e^{2Vu} - 1) / 2V.
    """
    rate = 2.0 * trace
    safe = torch.where(rate > 0, rate, torch.ones_like(rate))
    log_product = log_elapsed + safe.log()
    clock = torch.logaddexp(torch.zeros_like(log_product), log_product) / safe
    return torch.where(rate > 0, clock, log_elapsed.exp())


def clock_left(sums: Tensor, rate: Tensor, log_elapsed: Tensor) -> Tensor:
    """Clock until log E reaches values (n,), at the present rates: (n,); 0 where it has."""
    missing = _still_missing(sums, log_elapsed).clamp(min=0)
    return torch.log1p(rate * missing) / rate


def clock_within(
    sums: Tensor, rates: tuple[Tensor, Tensor], step: Tensor, log_elapsed: Tensor
) -> tuple[Tensor, Tensor]:
    """Parts of steps at whose ends E has given values, and the rates there: (n,) each.

    The rate counts as linear in the step, as in the integrals, so that the moments of a path are
    increasing in what is asked for, whatever its noise does in between.

    Args:
        sums: Growth and log E at the beginning of the steps (2, n).
        rates: Rates there, and at the ends of the steps, (n,) each.
        step: Lengths of the steps (n,).
        log_elapsed: Values of log E to be reached within them, (n,).
    """
    missing = _still_missing(sums, log_elapsed)
    rate, slope = rates[0], (rates[1] - rates[0]) / step
    h = missing / _relative_growth(missing, rate)
    for _ in range(_ITERATIONS):
        after = rate + slope * h.minimum(step)
        needed = missing / trapezoid_correction(h, rate, after)
        h = needed / _relative_growth(needed, 0.5 * (rate + after))
    h = h.minimum(step)
    return h, rate + slope * h


def log_missing(last: Tensor, growth: Tensor, wanted: Tensor) -> Tensor:
    """Log of what E lacks to reach values, over its rate of growth now, where it lacks some."""
    return wanted - growth + torch.log1p(-torch.exp(last - wanted))


def _still_missing(sums: Tensor, log_elapsed: Tensor) -> Tensor:
    """What E lacks to reach values, over its rate of growth now: (2, n), (n,) -> (n,)."""
    growth, elapsed = sums
    return torch.exp(log_elapsed - growth) - torch.exp(elapsed - growth)


def _relative_growth(missing: Tensor, rate: Tensor) -> Tensor:
    """How much faster E grows than at its start: missing / (log(1 + rate missing) / rate)."""
    z = rate * missing
    safe = torch.where(z > 0, z, torch.ones_like(z))
    return torch.where(z > 0, safe / torch.log1p(safe), torch.ones_like(z))


def equilibrium_weights(growth: Tensor, log_elapsed: Tensor) -> Tensor:
    """The fourth power of the norm in equilibrium, in units of 4 C times itself: e^a / E."""
    weights = torch.exp(growth - log_elapsed)
    return torch.where(torch.isfinite(weights), weights, 0.0)
