"""The exact law that applies to a problem, and how exact it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from manifold_sde.errors import ArgumentError, ManifoldSDEError
from manifold_sde.problem import Problem, require_problem
from manifold_sde.verification.exact.angle_law import AngleLaw
from manifold_sde.verification.exact.circle_coefficients import LimitMap
from manifold_sde.verification.exact.circle_diffusion import CircleDiffusion
from manifold_sde.verification.exact.facts import ClosedCurve, chart_of, minimizer_or, one_point
from manifold_sde.verification.exact.inputs import check_nodes
from manifold_sde.verification.exact.sphere_law import SphereLaw
from manifold_sde.verification.exact.traced_curve import TracedCurve


def curve_of(problem: Problem, start: Tensor | None = None) -> ClosedCurve:
    """Return Gamma_1 where it is a curve: the known circle, or the curve traced.

    Args:
        problem: A problem with dim Gamma_1 = 1.
        start: A point of the manifold (D,); by default the minimiser that the problem knows, or
            that gradient flow finds from random directions.

    Returns:
        The curve.

    Raises:
        ArgumentError, NotOnManifoldError: As :meth:`TracedCurve.of`, or if no minimiser is found.
    """
    require_problem(problem)
    if start is not None:
        one_point(problem, start, "start")
    if problem.facts is not None and problem.facts.circle is not None:
        return problem.facts.circle
    return TracedCurve.of(problem, minimizer_or(problem, start))


def law_of(
    problem: Problem, start: Tensor | None = None, *, limit_map: LimitMap | None = None
) -> AngleLaw | SphereLaw | CircleDiffusion:
    """Find the exact law that applies to a problem, the most accurate first.

    ==================================================  ======================
    Problem                                             Law
    ==================================================  ======================
    noise (18), a circle, pdet H constant               :class:`AngleLaw`
    noise (18), a great sphere, pdet H constant         :class:`SphereLaw`
    dim Gamma_1 = 1, any noise with the two properties  :class:`CircleDiffusion`
    ==================================================  ======================

    The angles of the last one are those of ``curve_of(problem, start)``.

    Args:
        problem: The problem.
        start: A point of the manifold (D,), where the diffusion starts; by default the problem's
            minimiser. A ``CircleDiffusion`` holds no start: its methods take an angle.
        limit_map: Phi for the coefficients of the last one, as in ``CircleDiffusion.of``.

    Returns:
        The law.

    Raises:
        ArgumentError: If there is none, with the reason for each.

    Example:
        >>> from manifold_sde import problems
        >>> for made in (problems.normalized_linear(), problems.great_sphere()):
        ...     print(type(law_of(made)).__name__)
        AngleLaw
        SphereLaw
    """
    require_problem(problem)
    if start is not None:
        one_point(problem, start, "start")
    reasons = []
    for kind in (AngleLaw, SphereLaw):
        try:
            return kind.of(problem, start)
        except ArgumentError as error:
            reasons.append(f"{kind.__name__}: {error.received or error.problem}")
    try:
        chart = chart_of(curve_of(problem, start))
        return CircleDiffusion.of(problem, chart, limit_map=limit_map)
    except ManifoldSDEError as error:
        reasons.append(f"CircleDiffusion: {error.problem} ({error.received})")
        raise ArgumentError(
            f"no exact law of {problem.name!r} is known",
            received="; ".join(reasons),
            expected="Gamma_1 a curve, or the noise of (18) on a great sphere",
            remedy="compare with SGD itself, or with a second solver",
        ) from error


@dataclass(frozen=True)
class Convergence:
    """Changes in the laws on a curve when the number of nodes is doubled.

    Attributes:
        nodes: The two numbers of nodes.
        coefficients: Largest change of drift, variance and trace, relative to their sizes.
        equilibrium: Largest change of a Fourier moment of pi.
        spectral_gap: Relative change of the spectral gap.
    """

    nodes: tuple[int, int]
    coefficients: float
    equilibrium: float
    spectral_gap: float

    @property
    def largest(self) -> float:
        """The largest of the three changes."""
        return max(self.coefficients, self.equilibrium, self.spectral_gap)


def convergence(
    problem: Problem,
    start: Tensor | None = None,
    *,
    nodes: int = 65,
    limit_map: LimitMap | None = None,
) -> Convergence:
    """Test the convergence of :class:`CircleDiffusion` by doubling the number of nodes.

    Collocation converges faster than any power, so the change is the error of the coarser law, up
    to a factor near 1.

    Args:
        problem: A problem with dim Gamma_1 = 1.
        start: A point of the manifold (D,); by default the problem's minimiser.
        nodes: The smaller number of nodes, odd.
        limit_map: Phi, as in ``CircleDiffusion.of``.

    Returns:
        The changes.

    Raises:
        ArgumentError, NotOnManifoldError, NoiseError, LimitMapError: As ``CircleDiffusion.of``.

    Example:
        >>> from manifold_sde import problems
        >>> convergence(problems.varying_circle()).largest < 1e-8
        True
    """
    chart, nodes = chart_of(curve_of(problem, start)), check_nodes("nodes", nodes)
    finer = 2 * nodes - 1
    coarse, fine = (
        CircleDiffusion.of(problem, chart, nodes=n, limit_map=limit_map) for n in (nodes, finer)
    )
    changes = []
    degrees = range(1, nodes // 2 + 1)
    size = float(np.abs(fine.drift).max() + fine.variance.max())
    for name in ("drift", "variance", "trace"):
        values, others = getattr(coarse, name), _resampled(getattr(fine, name), nodes)
        scale = float(fine.trace.max()) if name == "trace" else size
        changes.append(float(np.abs(values - others).max()) / scale)
    return Convergence(
        (nodes, finer),
        max(changes),
        max(abs(coarse.equilibrium.moment(k) - fine.equilibrium.moment(k)) for k in degrees),
        abs(coarse.spectral_gap / fine.spectral_gap - 1.0),
    )


def _resampled(values: np.ndarray, nodes: int) -> np.ndarray:
    """Interpolate trigonometrically at other nodes."""
    spectrum = np.fft.rfft(values) / len(values)
    waves = np.exp(2j * np.pi * np.outer(np.arange(nodes), np.arange(1, len(spectrum))) / nodes)
    resampled: np.ndarray = spectrum[0].real + 2.0 * (waves @ spectrum[1:]).real
    return resampled
