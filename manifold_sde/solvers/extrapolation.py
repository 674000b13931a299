r"""Expectations from two step sizes, with an estimate of the error of either.

With the weak order p and E_h the expectation that a scheme has at the step h,

.. math::

    E_h = E + c\,h^p + \dots, \qquad
    E \approx \frac{2^p E_{h/2} - E_h}{2^p - 1}

(Talay and Tubaro, Stochastic Analysis and Applications 8, 1990). Both steps run on the same
Brownian paths, so that the difference has a small variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.chunk import CHUNK
from manifold_sde.solvers.coupling import coupled, coupled_values, moments_at
from manifold_sde.solvers.lost_paths import check_average
from manifold_sde.solvers.moments import Moments, Observable
from manifold_sde.solvers.torchsde_schemes import scheme_named


@dataclass(frozen=True)
class Extrapolation:
    """An expectation from two step sizes.

    Attributes:
        mean: The extrapolated expectation (K, ...).
        standard_error: Its standard error (K, ...), from the paths of both steps together.
        bias: What the smaller step alone would be off by, estimated, (K, ...). It bounds the
            error that is left where the steps are small enough for the expansion.
        bias_error: Standard error of that estimate (K, ...).
        fine, coarse: The expectations at the smaller and at the larger step (K, ...).
        dt: The larger step.
        order: The weak order p.
        paths: Number of paths, at each step.
        lost: Number of paths lost at either step.
    """

    mean: Tensor
    standard_error: Tensor
    bias: Tensor
    bias_error: Tensor
    fine: Tensor
    coarse: Tensor
    dt: float
    order: int
    paths: int
    lost: int


def extrapolate(
    sde: StochasticEquation,
    y0: Tensor,
    ts: Sequence[float] | Tensor,
    function: Observable,
    *,
    n_paths: int,
    dt: float,
    method: str = "auto",
    seed: int = 0,
    compile: bool | str = "auto",
    chunk_size: int = CHUNK,
) -> Extrapolation:
    """An expectation by Talay and Tubaro's extrapolation, with an estimate of its error.

    Args:
        sde: The equation.
        y0: Start (D,) on the manifold, or one for each path.
        ts: Save times, increasing; the first is the start.
        function: Function of states (n, D) with a value for each, (n, ...).
        n_paths: Number of paths, each run at both steps.
        dt: The larger step; the other is half of it.
        method: Any scheme of ``solve`` with steps of one size; "auto" is "split".
        seed: Seed of the Brownian paths.
        compile: As in ``solve``.
        chunk_size: Number of paths that are stepped together.

    Returns:
        The expectation at these times.

    Warns:
        LostPathsWarning: If fewer paths were lost, and are left out.

    Raises:
        ArgumentError, ShapeError: If an argument is out of range.
        NotOnManifoldError, RankError, NoiseError: As in ``solve``.
        LostPathsError: If more than one path in a hundred was lost; its ``partial`` is the result
            over the others.

    Example:
        >>> from manifold_sde import DirectionDiffusion, problems
        >>> from manifold_sde.solvers import extrapolate
        >>> problem = problems.great_circle()
        >>> sde = DirectionDiffusion(problem)
        >>> found = extrapolate(
        ...     sde, problem.minimizer, [0, 1], lambda y: y[:, 0], n_paths=8, dt=0.5
        ... )
        >>> found.order, tuple(found.mean.shape)
        (2, (2,))
    """
    simulation = coupled(
        sde,
        y0,
        ts,
        n_paths=n_paths,
        dt=dt,
        method=method,
        seed=seed,
        compile=compile,
        chunk_size=chunk_size,
    )
    order = scheme_named(simulation.scheme).weak_order
    weight = 1.0 / (2.0**order - 1.0)
    parts: dict[str, Moments] = {}
    lost = 0
    for (coarse, fine), valid in coupled_values(simulation, function, (0, 1)):
        lost += int((~valid[-1]).sum())
        values = {
            "mean": fine + weight * (fine - coarse),
            "bias": weight * (fine - coarse),
            "fine": fine,
            "coarse": coarse,
        }
        for name, value in values.items():
            new = moments_at(value, valid)
            parts[name] = parts[name].merge(new) if name in parts else new
    results = {name: moments.result() for name, moments in parts.items()}
    found = Extrapolation(
        mean=results["mean"][0],
        standard_error=results["mean"][1],
        bias=results["bias"][0],
        bias_error=results["bias"][1],
        fine=results["fine"][0],
        coarse=results["coarse"][0],
        dt=dt,
        order=order,
        paths=simulation.n_paths,
        lost=lost,
    )
    check_average(
        lost,
        simulation.n_paths,
        when=" at one step or the other",
        partial=found,
        survivors="the error's attribute partial",
    )
    return found
