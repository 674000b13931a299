"""Weak orders by quadrature, without sampling, against the exact laws.

The orders are the halving exponents of the largest error over the first three harmonics (and over
all starts, where they differ). There is no Monte Carlo error in them: what they differ from whole
numbers is the next order, and the deviation allowed is stated.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.schemes import SCHEMES, StepNoise, Weak2
from manifold_sde.verification.exact import AngleLaw, SphereLaw
from manifold_sde.verification.exact.spectral import fourier_nodes
from tests.solvers.operators import (
    acting,
    decay,
    decay_error,
    direction,
    harmonics,
    law,
    moved,
    one_step,
    problem,
    slopes,
    weak_error,
)

#: The clock at which laws are compared, and the steps.
CLOCK = 8.0
STEPS = {"mixed": (0.125, 0.0625, 0.03125)}
OTHERS = (0.25, 0.125, 0.0625)
#: Largest deviation of the last slope from the order declared.
DEVIATION = 0.15
#: Largest error at the smallest step: of first order, and of second.
BOUND = {1: 1e-2, 2: 5e-5}

METHODS = sorted(SCHEMES)
CURVED = ("varying", "mixed")
ALIKE = ("linear", "circle", "sphere")


@functools.cache
def curved_errors(name: str, method: str) -> list[float]:
    scheme = SCHEMES[method]
    sde = direction(name, scheme.calculus)
    return [
        weak_error(one_step(name, scheme, sde, h), h, law(name), CLOCK)
        for h in STEPS.get(name, OTHERS)
    ]


def check(found: list[float], order: int) -> None:
    assert abs(slopes(found)[-1] - order) <= DEVIATION, (found, slopes(found))
    assert min(slopes(found)) >= order - 0.3
    assert found[-1] <= BOUND[order]


@pytest.mark.paper("Equation (13)")
@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("method", METHODS)
def test_order_where_the_direction_has_a_drift(name: str, method: str) -> None:
    """The reversible law of (18) with varying pdet H; sampling noise with mixed term and trace."""
    check(curved_errors(name, method), SCHEMES[method].weak_order)


@pytest.mark.paper("Equation (13)", "Equation (18)")
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("method", METHODS)
def test_order_of_harmonics(name: str, method: str) -> None:
    """The wrapped normal of section 6.1 and of the great circle, and E Y_l on the 2-sphere."""
    scheme, made = SCHEMES[method], problem(name)
    sde = direction(name, scheme.calculus)
    if made.facts.circle is None:
        sphere = SphereLaw.of(made)
        rates = np.array([sphere.rate(degree) for degree in (1, 2, 3)])
    else:
        moments = [AngleLaw.of(made).at_clock(1.0).moment(k) for k in (1, 2, 3)]
        rates = -np.log(np.abs(moments))
    found = [
        decay_error(decay(name, scheme, sde, h, made.minimizer), h, rates, CLOCK) for h in OTHERS
    ]
    check(found, scheme.weak_order)


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("method", ["heun", "phi_jet"])
def test_all_points_are_alike(name: str, method: str) -> None:
    """One start stands for all of them: harmonics have the same factors from another one.

    To the error of the rule, whose nodes do not turn with the start: 32 steps change by 3e-8.
    """
    scheme, made = SCHEMES[method], problem(name)
    sde = direction(name, scheme.calculus)
    if made.facts.circle is None:
        other = torch.tensor([0.6, -0.48, 0.64, 0.0], dtype=torch.float64)
    else:
        other = made.facts.circle.point(torch.tensor(2.5, dtype=torch.float64))
    here, there = (
        decay(name, scheme, sde, 0.0625, start, quadrature=8) for start in (made.minimizer, other)
    )
    np.testing.assert_allclose(there, here, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("name", [*CURVED, *ALIKE])
@pytest.mark.parametrize("method", METHODS)
def test_no_other_noise_acts(name: str, method: str) -> None:
    """What is left out of the quadrature moves nothing."""
    scheme, made = SCHEMES[method], problem(name)
    directions = acting(name, scheme)
    generator = torch.Generator().manual_seed(5)
    shape = (2, made.n_noise, 8)
    normals = torch.randn(shape, generator=generator, dtype=torch.float64)
    sde = direction(name, scheme.calculus)
    x = made.minimizer[:, None].expand(-1, 8).contiguous()

    def end(kept: Tensor) -> Tensor:
        point = moved(scheme, sde, x, 0.125, (kept @ kept.T) @ normals)
        return point / point.norm(dim=0)

    whole = end(torch.eye(made.n_noise, dtype=torch.float64))
    torch.testing.assert_close(end(directions), whole, rtol=0.0, atol=1e-12)
    assert float((end(directions[:, :1]) - whole).abs().max()) > 1e-2


class _Independent(Weak2):
    """The two flows with independent increments: weak order 1 for what does not commute."""

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step, with S^1 and S^2 of half the variance each."""
        return super().step(
            sde, x, basis, h, StepNoise(noise.dw, lambda: math.sqrt(0.5) * noise.extra())
        )


def test_wrong_covariance_of_the_two_flows_loses_the_second_order() -> None:
    sde = direction("mixed", "stratonovich")
    wrong = [
        weak_error(one_step("mixed", _Independent(), sde, h), h, law("mixed"), CLOCK)
        for h in STEPS["mixed"][:2]
    ]
    assert wrong[-1] > 2.0 * curved_errors("mixed", "weak2")[1]
    assert slopes(wrong)[-1] < 1.5


@pytest.mark.parametrize(("method", "coarse", "fine"), [("heun", 6, 12), ("weak2", 4, 5)])
def test_the_rules_of_quadrature_are_fine_enough(method: str, coarse: int, fine: int) -> None:
    """What a finer rule changes at the clock of the comparison, against the error of the step."""
    scheme, h = SCHEMES[method], 0.125
    sde = direction("mixed", scheme.calculus)
    values = harmonics(fourier_nodes(25))
    steps = round(CLOCK / h)
    ends = [
        np.linalg.matrix_power(one_step("mixed", scheme, sde, h, nodes=25, quadrature=q), steps)
        @ values
        for q in (coarse, fine)
    ]
    assert np.abs(ends[0] - ends[1]).max() < 0.05 * curved_errors("mixed", method)[0]
