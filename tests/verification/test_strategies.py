"""The strategies: what they draw, how it shrinks, and that what is printed runs."""

from __future__ import annotations

import contextlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    Geometry,
    LabelNoise,
    Problem,
    SamplingNoise,
    SphericalNoise,
    TimeScale,
    problems,
)
from manifold_sde.errors import ArgumentError, PropertyError
from manifold_sde.verification import properties, strategies
from manifold_sde.verification.strategies.printing import tensor_code
from tests.verification.properties.twins import as_class

#: What a user has imported before an example is pasted.
PASTED = """
from manifold_sde import *
from manifold_sde.verification import strategies
import torch
"""
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
Drawn = tuple[Problem, Tensor]


def executed(code: str, **names: object) -> object:
    """What an expression makes in the namespace of a user."""
    namespace: dict[str, object] = dict(names)
    exec(PASTED, namespace)
    return eval(code, namespace)


def some(strategy: st.SearchStrategy, condition: Callable[..., bool] = lambda value: True) -> Any:
    """A value of a strategy that fulfils a condition, as it is found: not shrunk."""
    chosen = settings(max_examples=500, phases=[Phase.generate], database=None)
    return find(strategy, condition, settings=chosen)


# Problems.

MODELS = [
    strategies.ResidualModel(),
    strategies.ResidualModel(6, 4, 7, 0.25, LabelNoise(0.3, 2)),
    strategies.TiltedModel(4, 2, 1, 0.5, 0.25, SamplingNoise(3, replacement=False)),
    strategies.NormalizedNetwork(2, 3, 2, 3),
    strategies.SymbolicModel((0, 1, 2), 0.5, 1.0),
    strategies.ResidualModel(noise=CustomNoise(strategies.TangentColumns(3, 2, 0.1, 5))),
]


@pytest.mark.parametrize("problem", MODELS, ids=lambda problem: type(problem).__name__)
def test_a_problem_prints_as_the_code_that_makes_it(problem: Problem) -> None:
    again = executed(repr(problem))
    assert isinstance(again, Problem)
    assert repr(again) == repr(problem)
    assert type(again) is type(problem)
    x = torch.randn(4, problem.dim, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(again.loss(x), problem.loss(x))
    assert torch.equal(again.noise_factor(x), problem.noise_factor(x))
    other = problem.with_noise(SphericalNoise(0.7))
    assert "SphericalNoise(scale=0.7)" in repr(other)


@pytest.mark.parametrize("problem", MODELS, ids=lambda problem: type(problem).__name__)
def test_a_problem_survives_a_pickle_and_knows_a_minimiser(problem: Problem) -> None:
    again = pickle.loads(pickle.dumps(problem))
    y = again.minimizer
    assert float(y.norm()) == pytest.approx(1.0, abs=1e-12)
    assert float(problem.gradient(y).norm()) < 1e-12
    geometry = Geometry(problem)
    assert int(geometry.rank(y)) == problem.facts.rank
    assert problem.facts.manifold_dim >= 1


@settings(max_examples=20, suppress_health_check=SLOW)
@given(strategies.problems(max_dim=5))
def test_problems_are_well_conditioned_and_fit_their_noise(problem: Problem) -> None:
    assert problem.dim <= 5
    values = torch.linalg.eigvalsh(problem.hessian(problem.minimizer))
    rank = problem.facts.rank
    assert 1 <= rank <= problem.dim - 2
    assert float(values[-1] / values[-rank]) < 500
    assert max(problem.noise_violations().values()) < 1e-12
    assert float(problem.scale_invariance_violation()) < 1e-12
    assert isinstance(executed(repr(problem)), Problem)


@pytest.mark.parametrize("family", ["residuals", "tilted", "network", "symbolic"])
def test_a_family_and_a_noise_can_be_chosen(family: str) -> None:
    noise = SphericalNoise(0.7)
    found = some(strategies.problems([family], noise=noise))
    assert found.noise is noise
    kinds = {"residuals": "ResidualModel", "tilted": "TiltedModel"}
    kinds |= {"network": "NormalizedNetwork", "symbolic": "SymbolicModel"}
    assert type(found).__name__ == kinds[family]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (SphericalNoise, problems.great_circle()),
        (CustomNoise, problems.great_circle()),
        (LabelNoise, problems.great_circle()),
        (SamplingNoise, problems.mixed_noise_circle()),
    ],
)
def test_noises_of_all_kinds_fit(kind: type, problem: Problem) -> None:
    noise = some(strategies.noises(problem), lambda noise: isinstance(noise, kind))
    assert isinstance(problem.with_noise(noise), Problem)
    assert repr(executed(repr(noise))) == repr(noise)


# Points and numbers.


@settings(max_examples=6, suppress_health_check=SLOW)
@given(st.data())
def test_points_are_where_they_are_said_to_be(data: st.DataObject) -> None:
    problem = data.draw(st.sampled_from(MODELS))
    geometry = Geometry(problem)
    cone = data.draw(strategies.cone_points(problem.dim))
    assert 1e-7 < float(cone.norm()) < 1e7
    x = data.draw(strategies.attraction_points(problem))
    y = data.draw(strategies.manifold_points(problem))
    for point in (x, y):
        assert 0.9e-6 < float(point.norm()) < 2.1e6
    assert torch.isfinite(geometry.limit_map(x)).all()
    size = float(y.norm())
    assert float(problem.gradient(y / size).norm()) < 1e-10


@pytest.mark.parametrize(("low", "high"), [(9e-7, 1e-4), (1e4, 3e6)])
def test_points_have_norms_over_twelve_decades(low: float, high: float) -> None:
    problem = problems.great_circle()
    for strategy in (
        strategies.cone_points(3),
        strategies.attraction_points(problem),
        strategies.manifold_points(problem),
    ):
        found = some(strategy, lambda x: low < float(x.norm()) < high)
        assert found.shape == (3,)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_covariances_have_any_rank(rank: int) -> None:
    for covariance in (
        some(strategies.covariances(3, min_rank=rank, max_rank=rank)),
        some(strategies.covariances(3), lambda s: int(torch.linalg.matrix_rank(s)) == rank),
    ):
        assert torch.equal(covariance, covariance.mT)
        assert int(torch.linalg.matrix_rank(covariance)) == rank
        assert float(torch.linalg.eigvalsh(covariance)[0]) > -1e-9


@settings(max_examples=100)
@given(strategies.factors(4, min_rank=2, max_rank=3))
def test_factors_have_full_rank(factor: Tensor) -> None:
    assert factor.shape[1] in (2, 3)
    assert int(torch.linalg.matrix_rank(factor)) == factor.shape[1]


@settings(max_examples=200)
@given(strategies.rates(), strategies.rates(within_theorem=True), strategies.times())
def test_rates_are_in_the_range_of_the_theorems(
    rates: tuple[float, float], inside: tuple[float, float], time: float
) -> None:
    for lr, decay in (rates, inside):
        assert lr > 0
        assert 0 < decay <= 1
        assert lr * decay < 1
        assert lr < 20 * decay
        TimeScale(lr, decay)
    assert TimeScale(*inside).within_theorem
    assert 0 <= time <= 5


@pytest.mark.paper("Remark 4.2")
def test_rates_reach_what_remark_4_2_adds() -> None:
    lr, decay = some(strategies.rates(), lambda rates: rates[0] > 2 * rates[1])
    assert 2 * decay < lr < 20 * decay
    small = some(strategies.rates(), lambda rates: rates[0] * rates[1] < 1e-6)
    assert small[0] > 0


def test_numbers_of_one_digit_are_exact() -> None:
    assert find(strategies.scales(), lambda alpha: alpha == 1e6) == 1e6
    assert find(strategies.scales(), lambda alpha: alpha < 5e-6) in (1e-6, 2e-6, 3e-6)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: strategies.problems(["networks"]),
        lambda: strategies.problems([]),
        lambda: strategies.problems(max_dim=2),
        lambda: strategies.problems_with_points("somewhere"),
        lambda: strategies.covariances(3, min_rank=4),
        lambda: strategies.factors(3, min_rank=2, max_rank=1),
    ],
)
def test_what_cannot_be_drawn_is_refused(strategy: Callable[[], st.SearchStrategy]) -> None:
    with pytest.raises(ArgumentError):
        some(strategy())


# Shrinking and printing.


def test_a_problem_with_a_point_shrinks_to_the_simplest() -> None:
    few = settings(max_examples=8, database=None)
    problem, x = find(strategies.problems_with_points("cone"), lambda drawn: True, settings=few)
    assert repr(problem) == repr(strategies.ResidualModel())
    assert tensor_code(x) == "torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)"
    residuals = strategies.problems(["residuals"])
    larger = find(residuals, lambda problem: problem.dim >= 5, settings=few)
    assert repr(larger) == repr(strategies.ResidualModel(dim=5))


class Growing(Problem):
    """A loss that grows with the norm, slowly, in 4 dimensions and more."""

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x) + self._growth(x)

    def sample_losses(self, x: Tensor) -> Tensor:
        return super().sample_losses(x) + self._growth(x)[..., None]

    def _growth(self, x: Tensor) -> Tensor:
        return 1e-3 * x.norm(dim=-1).log1p() * (self.dim >= 4)


def falsified(test: Callable[..., None]) -> tuple[PropertyError, str]:
    """The error of a test of Hypothesis', and the call that it prints."""
    with pytest.raises(PropertyError) as caught:
        test()
    notes = "\n".join(caught.value.__notes__)
    call = re.search(r"(?:Falsifying example|Failing test case): (.*?\n\))", notes, re.DOTALL)
    assert call, notes
    return caught.value, call[1]


def test_a_falsifying_example_runs_and_fails_again() -> None:
    """Of a loss that is not scale-invariant in some dimensions: what is printed is pasted."""

    def invariant(problem: Problem, x: Tensor) -> None:
        properties.scale_invariance(as_class(problem, Growing), x, 2.0).require()

    @settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None)
    @given(strategies.problems_with_points("cone", ["residuals", "tilted"]))
    def fails(drawn: Drawn) -> None:
        invariant(*drawn)

    error, call = falsified(fails)
    assert "strategies.ResidualModel(dim=4, rank=1, seed=0, curvature=0.0" in call
    again = executed(call, fails=lambda drawn: drawn)
    problem, x = again
    assert tensor_code(x) == "torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)"
    with pytest.raises(PropertyError) as repeated:
        invariant(problem, x)
    assert str(repeated.value) == str(error)


def test_every_kind_of_value_prints_as_code() -> None:
    seen = []

    phases = [Phase.generate]  # as it is drawn, not as it would shrink

    @settings(max_examples=1, phases=phases, suppress_health_check=list(HealthCheck), database=None)
    @given(
        problem=strategies.problems(),
        noise=strategies.noises(MODELS[2]),
        x=strategies.cone_points(3),
        alpha=strategies.scales(),
        covariance=strategies.covariances(3),
        rates=strategies.rates(),
        T=strategies.times(),
    )
    def fails(**drawn: object) -> None:
        seen.append(drawn)
        raise PropertyError("always")

    _, call = falsified(fails)
    again = executed(call, fails=lambda **drawn: drawn)
    last = seen[-1]
    for name in ("alpha", "rates", "T"):
        assert again[name] == last[name]
    for name in ("x", "covariance"):
        assert torch.equal(again[name], last[name])
    for name in ("problem", "noise"):
        assert repr(again[name]) == repr(last[name])


def test_tensors_print_with_all_their_digits() -> None:
    x = torch.rand(2, 3, dtype=torch.float64) * 1e-7
    assert torch.equal(executed(tensor_code(x)), x)
    single = x.float()
    again = executed(tensor_code(single))
    assert again.dtype == torch.float32
    assert torch.equal(again, single)
    assert hypothesis.vendor.pretty.pretty(x) == tensor_code(x)


# Without Hypothesis.


def test_without_hypothesis_the_rest_works_and_the_error_says_how_to_install_it() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
import manifold_sde.verification
from manifold_sde.verification import properties
from manifold_sde.errors import MissingDependencyError
assert not any(name.startswith("manifold_sde.verification.strategies") for name in sys.modules)
try:
    from manifold_sde.verification import strategies
except MissingDependencyError as error:
    assert "pip install 'manifold_sde[verification]'" in error.remedy
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with contextlib.suppress(ImportError):
        import manifold_sde.verification.strategies as again

        assert again is strategies
