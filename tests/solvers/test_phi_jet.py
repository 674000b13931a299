"""The Phi-jet shares no drift with the other schemes, and has their law."""

from __future__ import annotations

import numpy as np
import pytest

from manifold_sde import DirectionDiffusion, problems
from manifold_sde.geometry import drift
from manifold_sde.solvers import solve
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.verification.exact.spectral import fourier_nodes
from tests.solvers.operators import direction, harmonics, one_step

#: The functions that compute a drift.
DRIFTS = ("tangent_force", "_ito_drift")


class Touched(Exception):
    """The code of a drift was run."""


@pytest.mark.parametrize("name", ["mixed_noise_circle", "varying_circle"])
def test_it_runs_without_any_drift(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Touched

    for function in DRIFTS:
        monkeypatch.setattr(drift, function, refuse)
    problem = getattr(problems, name)()
    arguments = {"n_paths": 3, "dt": 0.25, "compile": False}
    found = solve(
        DirectionDiffusion(problem), problem.minimizer, [0.0, 0.5], method="phi_jet", **arguments
    )
    assert found.stats["lost_paths"] == 0
    for method in ("euler", "heun", "midpoint", "weak2"):
        sde = DirectionDiffusion(problem, SCHEMES[method].calculus)
        with pytest.raises(Touched):
            solve(sde, problem.minimizer, [0.0, 0.5], method=method, **arguments)


def test_it_agrees_in_law_with_the_scheme_of_order_two() -> None:
    """By quadrature, extrapolated from two steps: all starts and three harmonics at u = 8."""
    values = harmonics(fourier_nodes(33))

    def ends(method: str, h: float) -> np.ndarray:
        scheme = SCHEMES[method]
        matrix = one_step("mixed", scheme, direction("mixed", scheme.calculus), h)
        return np.linalg.matrix_power(matrix, round(8.0 / h)) @ values

    coarse, fine = (ends("phi_jet", h) for h in (0.125, 0.0625))
    other = ends("weak2", 0.125)
    assert np.abs(2.0 * fine - coarse - other).max() < 5e-4
    assert np.abs(fine - other).max() > 2e-3  # what the extrapolation takes away
