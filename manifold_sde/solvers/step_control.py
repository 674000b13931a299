r"""Sizes of steps that follow the error, each path its own.

A step of size h is compared with two of half its size on the same Brownian path. The difference,
relative to the tolerance, is

.. math::

    e = \frac{\|x_{h/2} - x_h\|}{\mathrm{atol} + \mathrm{rtol}\,\|x_{h/2}\|}.

At e <= 1 the two half steps count, otherwise the step is taken again, smaller. Steps are the dyadic
intervals of the Brownian tree: what was tried and refused is refined, so that no value of the
Brownian path that was looked at is ever skipped (skipping them would bias the paths; Foster and
Jelincic, arXiv:2311.14201; Gaines and Lyons, SIAM J. Appl. Math. 57, 1997).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.march import Grid
from manifold_sde.solvers.schemes import SCHEMES, Scheme

#: Error that a new size aims at, relative to the tolerance, as a factor of the size.
_SAFETY = 0.9
#: Most halvings after one step that was refused, and those where it was lost altogether.
_MOST_HALVINGS = 3
_LOST_HALVINGS = 2
#: Levels of steps larger and smaller than the first one, where no limits are given.
_LARGER = 5
_SMALLER = 20
#: Deepest level that the Brownian tree has for whole steps and their halves.
_DEEPEST = 39
_RTOL = 1e-3


@dataclass(frozen=True)
class Tolerance:
    """What a user says of adaptive steps, in the time of the equation asked for.

    Attributes:
        rtol: Tolerance relative to the norm.
        atol: Absolute tolerance.
        dt_min: Smallest step, or ``None`` for the first one over 2^20.
        dt_max: Largest step, or ``None`` for 32 times the first one.
    """

    rtol: float
    atol: float
    dt_min: float | None = None
    dt_max: float | None = None

    def plan(
        self, start: float, h: float, clock_unit: float, scheme: Scheme
    ) -> tuple[Grid, StepControl]:
        """The grid of the first steps, whose cell is the largest step, and the control.

        Args:
            start: Time at the start.
            h: First step, in the time of the equation that is simulated.
            clock_unit: What its time is multiplied by to give that of the equation asked for.
            scheme: The scheme.

        Raises:
            ArgumentError: If the limits leave no step.
        """
        largest = h * 2.0**_LARGER if self.dt_max is None else self.dt_max / clock_unit
        h = min(h, largest)
        level = math.floor(math.log2(largest / h) + 1e-9)
        smaller = _SMALLER
        if self.dt_min is not None:
            ratio = math.log2(h) + math.log2(clock_unit) - math.log2(self.dt_min)
            smaller = math.floor(ratio + 1e-9)
        if smaller < 0:
            raise ArgumentError(
                "the smallest step is larger than the first one",
                received=f"dt_min={self.dt_min:g}, first step {h * clock_unit:g}",
                expected="dt_min at most dt and dt_max",
                remedy="leave dt_min out",
            )
        grid = Grid(start, h, level, h * 2.0**level)
        exponent = scheme.strong_order + 0.5
        deepest = min(_DEEPEST, level + smaller)
        return grid, StepControl(self.rtol, self.atol, exponent, deepest)


def check_tolerance(
    rtol: object, atol: object, adaptive: object, dt: object, dt_min: object, dt_max: object
) -> Tolerance | None:
    """The tolerance of a run, or ``None`` for steps of one size.

    Raises:
        ArgumentError: If the arguments contradict each other, or one is not a positive number.
    """
    if adaptive not in (None, True, False):
        raise ArgumentError(
            "adaptive is neither yes nor no",
            received=repr(adaptive),
            expected="True, False, or None: adaptive where rtol or atol is given",
            remedy="adaptive=True, rtol=1e-3",
        )
    given = {"rtol": rtol, "atol": atol, "dt_min": dt_min, "dt_max": dt_max}
    named = [name for name, value in given.items() if value is not None]
    if adaptive is False or (adaptive is None and rtol is None and atol is None):
        if named:
            raise ArgumentError(
                "steps of one size have no tolerance and no limits",
                received=", ".join(f"{name}={given[name]!r}" for name in named),
                expected="adaptive=True beside them, or none of them",
                remedy="rtol=1e-3 for adaptive steps, dt=... for steps of one size",
            )
        return None
    if dt is not None and adaptive is None:
        raise ArgumentError(
            "a step and a tolerance were given",
            received=f"dt={dt!r} beside {', '.join(named)}",
            expected="dt for steps of one size, or rtol and atol for adaptive ones",
            remedy="adaptive=True makes dt the first step",
        )
    numbers = {name: _positive(name, value) for name, value in given.items()}
    low, high = numbers["dt_min"], numbers["dt_max"]
    if low is not None and high is not None and low > high:
        raise ArgumentError(
            "dt_min is larger than dt_max",
            received=f"dt_min={low:g}, dt_max={high:g}",
            expected="dt_min <= dt_max",
            remedy="leave one of them out",
        )
    relative, absolute = numbers["rtol"], numbers["atol"]
    if relative is None:
        relative = _RTOL if absolute is None else 0.0
    return Tolerance(relative, absolute or 0.0, low, high)


def _positive(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = real(value)
    if not 0.0 < number < math.inf:
        raise ArgumentError(
            f"{name} is not a positive number",
            received=repr(value),
            expected="a finite number above 0",
            remedy=f"{name}=1e-3" if "tol" in name else f"leave {name} out",
        )
    return number


def require_adaptive_scheme(method: str) -> None:
    """Check that a scheme converges with adaptive steps.

    Raises:
        ArgumentError: If it does not.
    """
    if method in ("split", *ADAPTIVE):
        return
    why = "sizes that depend on the noise bias an Ito scheme: it converges to another process"
    if method not in SCHEMES:
        why = "torchsde has one error for all the paths of a batch"
    elif SCHEMES[method].calculus == "stratonovich":
        why = "it draws numbers beside the Brownian path, so that halves of a step do not refine it"
    raise ArgumentError(
        f"{method!r} has no adaptive steps",
        received=f"method={method!r} with adaptive steps; {why}",
        expected=", ".join(repr(name) for name in ("auto", "split", *ADAPTIVE)),
        remedy='method="heun" with sde.with_calculus("stratonovich"), the same process; or dt=...',
    )


#: Schemes that may be adaptive: functions of the Brownian path alone, in Stratonovich form.
ADAPTIVE = ("heun", "midpoint")


@dataclass(frozen=True)
class StepControl:
    """Tolerance and range of the steps of adaptive runs.

    Attributes:
        rtol: Tolerance relative to the norm of the state.
        atol: Absolute tolerance, in units of the state.
        exponent: Power of the step by which the error of one step falls: the strong order of the
            scheme for noise that does not commute, and a half.
        deepest: Level of the smallest step: the steps are cell / 2^level.
    """

    rtol: float
    atol: float
    exponent: float
    deepest: int

    def error(self, fine: Tensor, coarse: Tensor, beside: Tensor) -> Tensor:
        """Errors relative to the tolerance: states (D, n) -> (n,); NaN where a path was lost.

        Args:
            fine: States after two half steps.
            coarse: States after the whole step.
            beside: Errors of the logarithm of the norm (n,), where it is kept apart.
        """
        size = self.atol + self.rtol * fine.norm(dim=0)
        apart = (fine - coarse).norm(dim=0) / size
        return torch.maximum(apart, beside / (self.atol + self.rtol))

    def next_levels(
        self, level: Tensor, error: Tensor, end: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor]:
        """Which steps count, and the level of the next.

        Args:
            level: Levels of the steps (n,).
            error: Their errors (n,).
            end: Where they end, in steps of the deepest level (n,).
            deepest: Deepest level now.

        Returns:
            Whether the step counts (n,), and levels (n,) at most ``deepest``.
        """
        accepted = error <= 1.0
        # In halvings: 0 and less where a longer step would do.
        halvings = torch.log2(error.clamp(min=1e-30)) / self.exponent - torch.log2(
            torch.full_like(error, _SAFETY)
        )
        more = halvings.ceil().clamp(1.0, _MOST_HALVINGS)
        more = torch.where(torch.isfinite(error), more, float(_LOST_HALVINGS)).to(torch.int64)
        # A longer step begins where its interval does.
        aligned = end & ((1 << (self.deepest - level + 1)) - 1) == 0
        longer = aligned & (halvings <= -1.0) & (level > 0)
        after = torch.where(accepted, level - longer.to(torch.int64), level + more)
        return accepted, after.clamp(max=deepest)
