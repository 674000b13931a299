r"""What is added up along a path beside its state.

For the direction diffusion these are the growth :math:`a = 2\int V\,du` and
:math:`\log E`, :math:`E(u) = \int_0^u e^{a}\,du'`. They answer for every ratio: if the norm starts
from :math:`q_0 = \|Y(0)\|^4`, the path of (8) at ratio 0 is at clock u at time
:math:`t_0 = q_0 E(u)`, with :math:`\|Y_0\|^4 = q_0 e^{a}`; and at ratio C at the time t with
:math:`(e^{4Ct} - 1)/4C = t_0`, with :math:`\|Y_C\|^4 = q_0 e^{a - 4Ct}` (the linear equation
dp/du = -2 V p + 4c, and Theorem 3.2 path by path). For the other equations it is the clock u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Book(ABC):
    """Sums along paths, kept as (k, n), paths last."""

    @abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """The sums at the start: (D, n) -> (k, n)."""

    @abstractmethod
    def rate(self, x: Tensor, trace: Tensor) -> Tensor:
        """What is integrated, at a state (D, n) with V (n,) at its direction: (n,)."""

    @abstractmethod
    def advance(self, sums: Tensor, h: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The sums after a step of size h with these rates at its ends."""

    def norm_error(self, sums: Tensor, other: Tensor) -> Tensor:
        """By how much the logarithm of the norm differs where it is kept here: (k, n) -> (n,)."""
        return torch.zeros_like(sums[0])


class ClockBook(Book):
    """The intrinsic clock of the SDEs in time t, by the trapezoidal rule.

    Args:
        speed: What dt / |x|^4 is multiplied by: 1, and lr^2 where the time counts steps.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def start(self, x: Tensor) -> Tensor:
        """U = 0."""
        return x.new_zeros(1, x.shape[1])

    def rate(self, x: Tensor, trace: Tensor) -> Tensor:
        """1 / |x|^4, times the speed."""
        return self.speed / x.square().sum(0).square()

    def advance(self, sums: Tensor, h: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """One trapezium more."""
        return sums + h * (0.5 * (before + after))


class GrowthBook(Book):
    """Growth a and log E of the direction diffusion: (2, n)."""

    def start(self, x: Tensor) -> Tensor:
        """A = 0, E = 0."""
        zeros = x.new_zeros(x.shape[1])
        return torch.stack([zeros, zeros - torch.inf])

    def rate(self, x: Tensor, trace: Tensor) -> Tensor:
        """2 V."""
        return 2.0 * trace

    def advance(self, sums: Tensor, h: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """A and E for a rate that is linear in the step: A exactly, E as :func:`bend` says."""
        growth, log_elapsed = sums
        step = h * (0.5 * (before + after))
        gained = growth + torch.log(h * relative_expm1(step) * bend(h, before, after))
        return torch.stack([growth + step, torch.logaddexp(log_elapsed, gained)])

    def norm_error(self, sums: Tensor, other: Tensor) -> Tensor:
        """A quarter of the difference of the growths."""
        return 0.25 * (sums[0] - other[0]).abs()


def bend(h: Tensor, before: Tensor, after: Tensor) -> Tensor:
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
