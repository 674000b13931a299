r"""Where a limit theorem is put to the test: step sizes, times and rates, before anything is drawn.

SGD differs from its limit by :math:`O(\varepsilon)`, :math:`\varepsilon = \eta/\|x\|^2`, because
it stands off the manifold: by the variance :math:`d_i^2 = \Sigma_{ii}\min(\varepsilon/2\lambda_i,
u/2)` along the eigenvector :math:`n_i` of H, up to the clock u. There a unit tangent vector v moves
Phi(x) by :math:`|v + d_i\,\partial^2\Phi[n_i, v]|` and not by 1, so that the clock of Phi(x) is off
by about

.. math::

    B(u, \varepsilon) = 3 \sum_i d_i^2\, |\partial^2\Phi[n_i, v]|^2

(3 is that of a circle, whose angle moves like one over the square of the distance to its centre).
The clock and the steps are chosen so that B is a twelfth of the departure that is to be found: what
is left of it after extrapolation is not taken for that departure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.verification.effort import Effort
from manifold_sde.verification.subject import Subject

#: Times at which the law is looked at.
MOMENTS = 4
#: How many times as large the steps of the coarse run are, at most.
COARSEST = 4
#: Largest eta / |x|^2 of the coarse run, times lambda_max(H).
_STABILITY = 0.4
#: Fewest steps, a multiple of MOMENTS COARSEST^2.
_FEWEST = 256
#: Part of the departure that the predicted error of the clock may be.
_BIAS = 1.0 / 12.0
#: 4 C t at the end of a run that is short: -log of the fourth power of what weight decay leaves.
_DECAY = 1.0
#: Part of the smallest departure that SGD's distance from its limit may be.
TOLERATED = 0.25


@dataclass(frozen=True)
class Surroundings:
    """What SGD finds beside the manifold, at points of Gamma_1.

    Attributes:
        sharpness: Largest eigenvalue of H.
        trace: Mean of V = tr Sigma.
        traces: Smallest and largest V.
        eigenvalues: Nonzero eigenvalues of H, (p, M).
        pull: Sigma_ii |d^2 Phi[n_i, v]|^2 for the tangent direction v of most noise, (p, M).
    """

    sharpness: float
    trace: float
    traces: tuple[float, float]
    eigenvalues: Tensor
    pull: Tensor

    @classmethod
    def of(cls, subject: Subject, y: Tensor) -> Surroundings:
        """At points (p, D) of Gamma_1."""
        problem = subject.problem
        rank = int(torch.as_tensor(subject.geometry.rank(y[0])))
        values, vectors = torch.linalg.eigh(problem.hessian(y))
        split = problem.dim - rank
        tangent, normal = vectors[..., :split], vectors[..., split:]
        covariance = problem.noise_covariance(y)
        along = tangent.mT @ covariance @ tangent
        v = (tangent @ torch.linalg.eigh(along)[1][..., -1:])[..., 0]
        across = torch.einsum("pdi,pde,pei->pi", normal, covariance, normal)
        n = normal.mT
        pair = 0.5 * (n[..., :, None] * v[:, None, None] + n[..., None, :] * v[:, None, :, None])
        turned = subject.geometry.second_derivative(y[:, None].expand_as(n), pair)
        trace = problem.noise_trace(y)
        return cls(
            sharpness=float(values[..., -1].max()),
            trace=float(trace.mean()),
            traces=(float(trace.min()), float(trace.max())),
            eigenvalues=values[..., split:],
            pull=across * turned.square().sum(-1),
        )

    def clock_error(self, clock: float, step: float) -> float:
        """B(u, eps)."""
        settled = step / (2.0 * self.eigenvalues)
        return float(3.0 * (self.pull * settled.clamp(max=0.5 * clock)).sum(-1).mean())

    @property
    def constant_trace(self) -> bool:
        """Whether V is the same at all points, to rounding."""
        low, high = self.traces
        return high - low <= 1e-6 * high


@dataclass(frozen=True)
class Rates:
    """A run of SGD from norm 1.

    Attributes:
        lr: Learning rate eta.
        weight_decay: Weight decay lambda.
        counts: Step counts at the moments that are compared.
    """

    lr: float
    weight_decay: float
    counts: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """C = lambda / eta."""
        return self.weight_decay / self.lr

    @property
    def times(self) -> tuple[float, ...]:
        """Times t = eta^2 k of (8)."""
        return tuple(self.lr**2 * k for k in self.counts)

    def coarser(self, factor: int) -> Rates:
        """The same times of the limit, with steps that are larger by a factor."""
        counts = tuple(k // factor**2 for k in self.counts)
        return Rates(factor * self.lr, factor * self.weight_decay, counts)


@dataclass(frozen=True)
class Regime:
    """Step sizes, times and rates.

    Attributes:
        clock: Clock u at the end, for the mean trace.
        elapsed: Times t_0 of (8) at ratio 0, the same for all runs, (MOMENTS,).
        step_size: Largest eta / |x|^2.
        coarseness: How many times as large the steps of the coarse run are.
        clock_error: Predicted relative error of the clock of Phi(x), B.
        runs: SGD at two ratios; 4 C t is twice as large at the end of the first.
    """

    clock: float
    elapsed: tuple[float, ...]
    step_size: float
    coarseness: int
    clock_error: float
    runs: tuple[Rates, Rates]

    @classmethod
    def of(cls, around: Surroundings, effort: Effort) -> Regime:
        """The largest clock that the test budget allows."""
        step = min(effort.step_size, _STABILITY / (COARSEST * around.sharpness))
        most = 0.5 * effort.steps * step**2
        allowed = _BIAS * effort.departure
        clock = most
        if around.clock_error(clock, step) > allowed:
            # In the saturated form, which bounds the error, it is linear in the clock.
            shortest = allowed / max(around.clock_error(1e-12, step) / 1e-12, 1e-300)
            clock = min(most, max(shortest, 1e-3 * most))
            while around.clock_error(1.2 * clock, step) <= allowed and 1.2 * clock <= most:
                clock *= 1.2
        elapsed = math.expm1(2.0 * around.trace * clock) / (2.0 * around.trace)
        # A step leaves 1 - eta lambda and not e^{-eta lambda} of the norm: of log norm that takes
        # (4Ct)^2 / 32k, and the extrapolation has 4 times as much, half of what is tolerated of it.
        grown = around.trace * elapsed
        tolerated = 0.5 * TOLERATED * effort.departure * 0.5 * grown / (1.0 + 2.0 * grown)
        # At 4 C t = 2 V u the norm ends where it began.
        decay = max(_DECAY, 2.0 * around.trace * clock)
        decay = min(decay, math.sqrt(8.0 * effort.steps * tolerated))
        first, second = (
            _rates(elapsed, d, around.trace, step, math.ceil(d**2 / (8.0 * tolerated)))
            for d in (decay, 0.5 * decay)
        )
        ratio = first.ratio
        t0 = tuple(math.expm1(4.0 * ratio * t) / (4.0 * ratio) for t in first.times)
        return cls(
            clock=clock,
            elapsed=t0,
            step_size=step,
            coarseness=COARSEST,
            clock_error=around.clock_error(clock, step),
            runs=(first, second),
        )


def _rates(elapsed: float, decay: float, trace: float, step: float, fewest: int) -> Rates:
    """Rates at which t_0 = (e^{4Ct} - 1) / 4C is reached with 4 C t = decay, in steps below eps."""
    time = elapsed * decay / math.expm1(decay)
    # eta / |x|^2 is largest at one of the two ends.
    square = math.exp(-0.5 * decay) * math.sqrt(1.0 + 2.0 * trace * elapsed)
    lr = step * min(1.0, square)
    unit = MOMENTS * COARSEST**2
    count = unit * math.ceil(max(_FEWEST, fewest, time / lr**2) / unit)
    lr = math.sqrt(time / count)
    counts = tuple(count * (j + 1) // MOMENTS for j in range(MOMENTS))
    return Rates(lr, decay / (4.0 * time) * lr, counts)
