"""The properties hold on whatever problems, noises, points and rates Hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from manifold_sde import Problem
from manifold_sde.verification import properties, strategies
from manifold_sde.verification.properties.drift import has_diffusion
from manifold_sde.verification.subject import Subject

Drawn = tuple[Problem, Tensor]

SLOW = [HealthCheck.too_slow]


@pytest.mark.paper("Definition 2.2", "Lemma 2.4", "Lemma 2.5")
@settings(max_examples=15, suppress_health_check=SLOW)
@given(strategies.problems_with_points("cone"), strategies.scales())
def test_losses_and_noise(drawn: Drawn, alpha: float) -> None:
    problem, x = drawn
    properties.scale_invariance(problem, x, alpha).require()
    for order in (1, 2, 3):
        properties.derivative_degree(problem, x, alpha, order).require()
    properties.euler(problem, x).require()
    properties.noise_degree(problem, x, alpha).require()
    properties.noise_is_tangent(problem, x).require()


@pytest.mark.paper("Definition 2.6", "Lemma 2.7")
@settings(max_examples=4, suppress_health_check=SLOW)
@given(strategies.problems_with_points("attraction"), strategies.scales())
def test_limit_map(drawn: Drawn, alpha: float) -> None:
    problem, x = drawn
    properties.limit_map_degree(problem, x, alpha).require()
    properties.limit_map_idempotent(problem, x).require()
    properties.limit_map_norm(problem, x).require()
    properties.limit_map_flow(problem, x).require()


@pytest.mark.paper("Lemma 2.8", "Equation (5)")
@settings(max_examples=5, suppress_health_check=SLOW)
@given(st.data(), strategies.scales())
def test_derivatives_of_the_limit_map(data: st.DataObject, alpha: float) -> None:
    problem, y = data.draw(strategies.problems_with_points("manifold"))
    properties.projector(problem, y).require()
    properties.tangent_projection(problem, y).require()
    factor = data.draw(strategies.factors(problem.dim, min_rank=1))
    properties.second_derivative(problem, y, factor).require()
    properties.second_derivative_degree(problem, y, alpha, factor).require()
    properties.normal_trace(problem, y).require()


@pytest.mark.paper("Equation (8)", "Equation (13)")
@settings(max_examples=6, suppress_health_check=[*SLOW, HealthCheck.filter_too_much])
@given(strategies.problems_with_points("manifold"), st.sampled_from([None, 0.0, 2.0]))
def test_drift(drawn: Drawn, ratio: float | None) -> None:
    problem, y = drawn
    assume(has_diffusion(Subject.of(problem)))
    properties.norm_identity(problem, y, ratio).require()
    properties.stratonovich_tangency(problem, y, ratio).require()
    properties.calculus_correction(problem, y).require()


@pytest.mark.paper("Equation (9)", "Remark 3.3", "Remark 4.2")
@settings(max_examples=4, suppress_health_check=SLOW)
@given(strategies.problems_with_points("attraction"), st.sampled_from([None, 0.1, 30.0]))
def test_runs(drawn: Drawn, C: float | None) -> None:
    problem, x = drawn
    lr = properties.stable_rate(problem, x)
    properties.reparametrisation(problem, x, lr, 2e-3 / lr, C).require()
    properties.decay_as_rate(problem, x, lr, 2e-3 / lr).require()
    properties.decay_equation_scaling(problem, x, lr, 2e-3 / lr, C or 5.0).require()
