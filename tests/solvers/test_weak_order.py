"""Weak orders on closed curves by quadrature, against the spectral law; and broken schemes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion
from manifold_sde.solvers.schemes import SCHEMES, Motion, Noise, Scheme, Weak2, motion_of
from manifold_sde.verification.exact import CircleDiffusion
from tests.solvers.operators import one_step, problem, slopes, weak_error

#: Steps, and the clock at which the laws are compared.
STEPS = {"varying": (1.0, 0.5, 0.25), "mixed": (0.125, 0.0625, 0.03125)}
CLOCK = {"varying": 8.0, "mixed": 8.0}
#: Error at the smallest step.
BOUND = {"euler": 2e-2, "heun": 2e-2, "midpoint": 2e-2, "weak2": 1e-3}


def errors(name: str, scheme: Scheme, calculus: str | None) -> list[float]:
    made = problem(name)
    law = CircleDiffusion.of(made) if name == "mixed" else CircleDiffusion.reversible(made)
    sde = DirectionDiffusion(made, calculus or "ito")
    sde.require_on_manifold(made.minimizer)
    motion = motion_of(sde)
    found = []
    for h in STEPS[name]:
        matrix = one_step(name, scheme, motion, h, nodes=33, quadrature=6)
        found.append(weak_error(matrix, h, law, CLOCK[name]))
    return found


@pytest.mark.parametrize("name", ["varying", "mixed"])
@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "weak2"])
def test_order(name: str, method: str) -> None:
    scheme = SCHEMES[method]
    found = errors(name, scheme, scheme.calculus)
    least = 1.7 if scheme.weak_order == 2 else 0.7
    assert min(slopes(found)) >= least, (found, slopes(found))
    assert found[-1] <= BOUND[method]


@pytest.mark.parametrize(("method", "wrong"), [("heun", "ito"), ("euler", "stratonovich")])
def test_the_drift_of_the_other_calculus_misses_the_law(method: str, wrong: str) -> None:
    """The retraction removes the normal part; the tangent parts differ on this circle."""
    right = errors("mixed", SCHEMES[method], SCHEMES[method].calculus)
    twin = errors("mixed", SCHEMES[method], wrong)
    assert twin[-1] > 5.0 * right[-1]
    assert slopes(twin)[-1] < 0.5


class _NoDrift(Weak2):
    name = "weak2_without_drift"

    @staticmethod
    def _drift_flow(motion: Motion, x: Tensor, anchor: Tensor, h: Tensor) -> Tensor:
        return x


class _OneFlow(Weak2):
    """The noise by one flow of the Brownian increment: weak order 1 for what does not commute."""

    name = "weak2_independent"

    def step(
        self, motion: Motion, x: Tensor, anchor: Tensor, h: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """One step, with S^1 and S^2 independent of half the variance each."""
        across = math.sqrt(1.0) * h.sqrt() * noise.extra()
        x = self._drift_flow(motion, x, anchor, 0.5 * h)
        for w in (0.5 * (noise.dw + across), 0.5 * (noise.dw - across)):
            x = self._noise_flow(motion, x, anchor, w)
        x = self._drift_flow(motion, x, anchor, 0.5 * h)
        return motion.land(x, anchor, fresh_steps=1)


@pytest.mark.parametrize("name", ["varying", "mixed"])
def test_without_the_drift_of_phi_the_error_does_not_fall(name: str) -> None:
    found = errors(name, _NoDrift(), "stratonovich")
    assert found[-1] > 2e-2
    assert slopes(found)[-1] < 0.2


def test_wrong_covariance_of_the_two_flows_loses_the_second_order() -> None:
    wrong = errors("mixed", _OneFlow(), "stratonovich")
    right = errors("mixed", SCHEMES["weak2"], "stratonovich")
    assert wrong[-1] > 2.0 * right[-1]
    assert slopes(wrong)[-1] < 1.5


def test_the_rule_of_quadrature_is_fine_enough() -> None:
    made = problem("mixed")
    sde = DirectionDiffusion(made, "stratonovich")
    sde.require_on_manifold(made.minimizer)
    coarse, fine = (
        one_step("mixed", SCHEMES["heun"], motion_of(sde), 0.03125, nodes=25, quadrature=q)
        for q in (6, 12)
    )
    assert float(torch.from_numpy(coarse - fine).abs().max()) < 1e-3
