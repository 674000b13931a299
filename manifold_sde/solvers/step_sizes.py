r"""How small the steps of SGD are on the sphere, without running it.

A step of SGD moves the direction like a step of size :math:`\varepsilon = \eta / \|x\|^2` at norm
1 (exactly, :math:`\eta_k / ((1 - \eta_k\lambda_k) \|x_k\|^2)`; its square is the step of the
intrinsic clock). The diffusion is the limit of small :math:`\varepsilon`, and the laws of the two
differ by :math:`O(\varepsilon)`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from manifold_sde.equations import ManifoldEquation
from manifold_sde.errors import StepSizeWarning
from manifold_sde.group_sdes import balanced
from manifold_sde.time_scale import TimeScale

#: Points of the manifold at which the Hessian is looked at: fewer where it is large.
_POINTS = 64
_NUMBERS = 1 << 22
_AT_ONCE = 1 << 18
#: Largest stable step, times the largest eigenvalue of H.
STABLE = 2.0
#: Largest distance of SGD from the manifold over its norm.
FAR = 0.5


@dataclass(frozen=True)
class Terrain:
    r"""What decides how small a step has to be, at points of Gamma_1.

    Attributes:
        trace: Mean of V = tr Sigma.
        sharpness: Largest eigenvalue of H.
        normal: The nonzero eigenvalues lambda_i of H, and Sigma_ii of their vectors, (p, M) each.
    """

    trace: float
    sharpness: float
    normal: tuple[Tensor, Tensor] = field(compare=False, repr=False)

    @property
    def spread(self) -> float:
        r"""Largest :math:`\sum_i \Sigma_{ii} / (2 \lambda_i)` of the points.

        It is the variance across Gamma that SGD settles to, divided by its step.
        """
        values, across = self.normal
        return float((across / (2.0 * values)).sum(-1).max())

    def spread_after(self, elapsed: float) -> float:
        """The same while it grows, after steps of this sum."""
        values, across = self.normal
        grown = -torch.expm1(-2.0 * values * elapsed)
        return float((grown * across / (2.0 * values)).sum(-1).max())

    @classmethod
    def of(cls, equation: ManifoldEquation, directions: Tensor, factor: float = 1.0) -> Terrain:
        """At some of these points of Gamma_1.

        Args:
            equation: The equation, which knows the problem and the rank of H.
            directions: Unit vectors (p, D) on Gamma, at least one. Of several groups of weights it
                is their norms in balance that count.
            factor: What the covariance of the problem's noise is multiplied by.
        """
        problem, directions = equation.problem, balanced(equation, directions)
        points = max(1, min(_POINTS, _NUMBERS // problem.dim**2))
        few = directions[:: -(-len(directions) // points)]
        values, across = equation.geometry.route.normal_variances(few, equation.rank)
        trace = problem.noise_trace(few)
        return cls(
            trace=factor * float(trace.mean()),
            sharpness=float(values[:, -1].max()),
            normal=(values, factor * across),
        )


@dataclass(frozen=True)
class StepSizes:
    r"""The steps of a run of SGD, dimensionless, for the norm that the mean trace V gives.

    Attributes:
        largest: Largest step eps up to the last count.
        last: Step at the last count.
        count: Number of steps.
        equilibrium: Step that two constant rates lead to, sqrt(2 eta lambda / V); else ``None``.
        terrain: What the steps are to be measured by.
    """

    largest: float
    last: float
    count: int
    equilibrium: float | None
    terrain: Terrain

    @classmethod
    def of(cls, scale: TimeScale, steps: int, norm: float, terrain: Terrain) -> StepSizes:
        """The steps of a run.

        Args:
            scale: Learning rate and weight decay.
            steps: Number of steps.
            norm: Norm of the weights at step 0.
            terrain: What is known of the manifold.
        """
        last = max(0, steps - 1)
        largest = -math.inf
        if scale.is_constant:  # the norm is monotone, and so is the step
            largest = float(_log_steps(scale, np.array([0, last]), norm, terrain.trace).max())
        else:
            for first in range(0, last + 1, _AT_ONCE):
                counts = np.arange(first, min(first + _AT_ONCE, last + 1))
                found = _log_steps(scale, counts, norm, terrain.trace)
                largest = max(largest, float(found.max()))
        equilibrium = None
        if isinstance(scale.lr, float) and isinstance(scale.weight_decay, float):
            product = scale.lr * scale.weight_decay
            equilibrium = math.sqrt(2.0 * product / terrain.trace) if product > 0 else None
        return cls(
            largest=math.exp(largest),
            last=float(np.exp(_log_steps(scale, np.array([last]), norm, terrain.trace))[0]),
            count=steps,
            equilibrium=equilibrium,
            terrain=terrain,
        )

    @property
    def stability(self) -> float:
        """Largest step times the largest eigenvalue of H; from 2 on SGD leaves the manifold."""
        return self.largest * self.terrain.sharpness

    @property
    def off_manifold(self) -> float:
        """Root mean square of SGD's distance from Gamma over its norm, to leading order.

        It begins on Gamma, and goes off at the largest step.
        """
        return math.sqrt(self.largest * self.terrain.spread_after(self.count * self.largest))

    def stats(self) -> dict[str, float]:
        """The numbers, for ``solution.stats``."""
        found = {
            "step_size": self.largest,
            "last_step_size": self.last,
            "stability": self.stability,
            "off_manifold": self.off_manifold,
        }
        if self.equilibrium is not None:
            found["equilibrium_step_size"] = self.equilibrium
        return found

    def warn_if_unstable(self) -> None:
        """Warn where SGD would not stay near the manifold.

        Warns:
            StepSizeWarning: If the largest step is beyond 2 / lambda_max(H), or the noise spreads
                SGD across the manifold by more than half its norm.
        """
        if self.stability <= STABLE:
            self._warn_if_far()
            return
        warnings.warn(
            "SGD is unstable at these rates, and the diffusion does not describe it: "
            f"eta / |x|^2 reaches {self.largest:.3g}, and lambda_max(H) is "
            f"{self.terrain.sharpness:.3g} at norm 1; their product {self.stability:.3g} is to be "
            f"below {STABLE:g}, and small for a good prediction. Way out: a smaller learning rate "
            "or weight decay, or a larger norm at the start",
            StepSizeWarning,
            stacklevel=3,
        )

    def _warn_if_far(self) -> None:
        if self.off_manifold <= FAR:
            return
        warnings.warn(
            "SGD is not near the manifold at these rates, and the diffusion does not describe it: "
            "where the loss is flattest across the manifold, the noise keeps it "
            f"{self.off_manifold:.2g} of its norm away; this is to be below {FAR:g}, and small for "
            "a good prediction. Way out: a smaller learning rate or weight decay, or less noise; "
            "check_assumptions(problem) says whether the rank of the Hessian falls",
            StepSizeWarning,
            stacklevel=4,
        )


def _log_steps(scale: TimeScale, counts: np.ndarray, norm: float, trace: float) -> np.ndarray:
    """Log of the steps after these counts; -inf where the learning rate is 0."""
    log_rate = np.asarray(scale.log_effective_lr(counts))
    log_time = np.asarray(scale.log_accumulated(counts))
    log_norm4 = np.logaddexp(4.0 * math.log(norm), math.log(2.0 * trace) + log_time)
    result: np.ndarray = log_rate - 0.5 * log_norm4
    return result
