"""The diffusions where the geometry is matrix-free, against the dense route and exact laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from manifold_sde import (
    DirectionDiffusion,
    FixedRatioDiffusion,
    Geometry,
    LeastSquaresProblem,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    errors,
    problems,
)
from manifold_sde.networks import NormalizedMLP
from manifold_sde.problems import NormalizedLinear
from manifold_sde.solvers import DirectionSolution, run_sgd, solve
from manifold_sde.verification.exact import AngleLaw
from manifold_sde.verification.statistics import watson_test

#: False-alarm rate of a statistical test.
ALARM = 1e-4


def free(problem: Problem, **options: int) -> DirectionDiffusion:
    return DirectionDiffusion(problem, geometry=Geometry(problem, "matrix_free", **options))


def orthogonal(scale: float = 0.3) -> NormalizedLinear:
    return problems.normalized_linear(4, 2, design="orthogonal", noise=SphericalNoise(scale))


def simulated(problem: NormalizedLinear, scale: float) -> DirectionSolution:
    """400 paths of the problem whose noise has another scale."""
    other = orthogonal(scale)
    clock = 1.0 / float(problem.noise_trace(problem.minimizer))
    found = solve(free(other), problem.minimizer, [0.0, clock], n_paths=400, dt=clock / 32, seed=4)
    assert isinstance(found, DirectionSolution)
    return found


@pytest.mark.parametrize(("scale", "right"), [(0.3, True), (0.45, False)])
def test_law_of_the_direction_against_the_wrapped_normal(scale: float, right: bool) -> None:
    """Watson's test at 1e-4; the twin has noise of 1.5 times the size."""
    problem = orthogonal()
    found = simulated(problem, scale)
    law = AngleLaw.of(problem).at_clock(float(found.ts[-1]))
    assert problem.facts.circle is not None
    angles = problem.facts.circle.angle(found.directions[-1]).numpy()
    start = float(problem.facts.circle.angle(problem.minimizer))
    angles = (angles - start + math.pi) % (2 * math.pi) - math.pi
    assert (watson_test(angles, law.cdf).p_value > ALARM) is right


def test_the_same_paths_as_the_dense_walk() -> None:
    """On the same Brownian path two routes give the same steps."""
    problem = problems.mixed_noise_circle()
    times = [0.0, 0.5, 1.0]
    arguments = {"n_paths": 3, "dt": 1 / 32, "seed": 2, "method": "walk", "compile": False}
    dense = solve(DirectionDiffusion(problem), problem.minimizer, times, **arguments)
    found = solve(free(problem), problem.minimizer, times, **arguments)
    # The two retractions agree to second order only.
    torch.testing.assert_close(found.ys, dense.ys, rtol=0.0, atol=2e-3)
    torch.testing.assert_close(found.clock, dense.clock)
    assert float(problem.gradient(found.ys).norm(dim=-1).max()) < 1e-12


def test_one_simulation_answers_for_the_others() -> None:
    """Ratios, norms and steps of SGD from a run by products; (8) and (13) by "split" itself."""
    problem = orthogonal()
    run = simulated(problem, 0.3)
    weights = run.at(ratio=0.5, times=[0.02], norm=0.8)
    torch.testing.assert_close(
        weights.norms[-1] ** 4,
        torch.full_like(weights.norms[-1], float(exact_norm4(problem, 0.8, 0.02))),
    )
    steps = run.at_steps(lr=1e-2, weight_decay=0.05, steps=[100], norm=0.5)
    assert 0.0 < steps.stats["stability"] < 2.0
    dense = DirectionDiffusion(problem)
    one = solve(dense, problem.minimizer, [0.0, 1.0], n_paths=4, compile=False)
    assert isinstance(one, DirectionSolution)
    want = one.at_steps(lr=1e-2, weight_decay=0.05, steps=[100], norm=0.5).stats
    for name in ("stability", "off_manifold", "step_size"):
        assert steps.stats[name] == pytest.approx(want[name], rel=1e-6)
    sde = LimitingDiffusion(problem, geometry=Geometry(problem, "matrix_free"))
    limit = solve(sde, 0.8 * problem.minimizer, [0.0, 0.02], n_paths=4, dt=1e-3)
    torch.testing.assert_close(
        limit.norms[-1] ** 4,
        torch.full((4,), float(exact_norm4(problem, 0.8, 0.02)), dtype=torch.float64),
    )


def exact_norm4(problem: Problem, norm: float, time: float) -> Tensor:
    """|Y|^4 = V + (|Y(0)|^4 - V) e^{-2T}, where V is constant."""
    v = problem.noise_trace(problem.minimizer)
    return v + (norm**4 - v) * math.exp(-2.0 * time)


def digits_like() -> tuple[LeastSquaresProblem, Tensor]:
    """A normalised network of 48 weights with six samples of two outputs, all fitted."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    module = NormalizedMLP((4, 12, 2), seed=1).double()
    targets = module(inputs).detach()
    problem = Problem.from_module(module, nn.MSELoss(), inputs, targets, SphericalNoise(47.0**-0.5))
    assert isinstance(problem, LeastSquaresProblem)
    x = problem.vector(module)
    return problem, x / x.norm()


def test_a_network_stays_fitted_and_observables_see_it() -> None:
    problem, y = digits_like()
    sde = free(problem)
    found = solve(
        sde,
        y,
        [0.0, 0.05, 0.1],
        n_paths=3,
        dt=1 / 64,
        observables={
            "loss": problem.loss,
            "first layer": lambda z: problem.part(z, "hidden.0.weight").norm(dim=-1),
            "outputs": problem.outputs,
        },
    )
    assert float(found.observed["loss"][0].max()) < 1e-26
    torch.testing.assert_close(found.observed["first layer"][0], torch.ones(3, dtype=y.dtype))
    fitted = problem.outputs(y).detach()
    torch.testing.assert_close(found.observed["outputs"][0][-1], fitted, rtol=0, atol=1e-11)


def test_checkpoints_resume_to_the_bit(tmp_path: object) -> None:
    problem, y = digits_like()
    arguments = {"n_paths": 2, "dt": 1 / 64, "seed": 1}
    whole = solve(free(problem), y, [0.0, 0.1], **arguments)
    once = solve(free(problem), y, [0.0, 0.1], checkpoint=f"{tmp_path}/run", **arguments)
    again = solve(free(problem), y, [0.0, 0.1], checkpoint=f"{tmp_path}/run", **arguments)
    assert torch.equal(whole.ys, once.ys)
    assert torch.equal(once.ys, again.ys)


def test_torchsde_finds_what_it_needs() -> None:
    problem, y = digits_like()
    sde = free(problem).with_calculus("stratonovich")
    v = torch.randn(2, 48, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    states = torch.stack([y, y])
    drift, noise = sde.f_and_g_prod(torch.zeros(()), states, v)
    torch.testing.assert_close(drift, sde.f(torch.zeros(()), states))
    torch.testing.assert_close(noise, sde.g_prod(torch.zeros(()), states, v))
    dense = DirectionDiffusion(problem, "stratonovich")
    torch.testing.assert_close(drift, dense.f(torch.zeros(()), states), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(noise, dense.g_prod(torch.zeros(()), states, v))
    with pytest.raises(errors.ArgumentError, match="g_prod"):
        sde.g(torch.zeros(()), states)


def test_sgd_moves_the_direction_as_the_diffusion_does() -> None:
    """Mean cosine with the start after the same clock, within 5 standard errors; twin: u too long.

    The step of SGD is 1e-3 at norm 1, and its bias of that order.
    """
    problem, y = digits_like()
    eps, steps, n = 2e-2, 500, 200
    run = run_sgd(problem, y, lr=eps, weight_decay=0.0, steps=[0, steps], n_paths=n, seed=1)
    limit = Geometry(problem, "dense").limit_map(run.ys[-1])
    sgd = limit @ y / limit.norm(dim=1)
    clock = float(run.clock[-1].mean())
    cosines = []
    for factor in (1.0, 2.0):
        found = solve(free(problem), y, [0.0, factor * clock], n_paths=n, dt=clock / 32, seed=2)
        cosines.append(found.directions[-1] @ y)
    error = math.hypot(float(sgd.std()), float(cosines[0].std())) / math.sqrt(n)
    assert abs(float(sgd.mean() - cosines[0].mean())) < 5.0 * error
    assert abs(float(sgd.mean() - cosines[1].mean())) > 5.0 * error


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda p: DirectionDiffusion(p, geometry=Geometry(orthogonal())),
            errors.ArgumentError,
            "geometry is not that of the problem",
        ),
        (
            lambda p: free(p).space,
            errors.ArgumentError,
            "require_on_manifold",
        ),
        (
            lambda p: solve(FixedRatioDiffusion(p, 1.0), p.minimizer, [0.0, 0.1], method="walk"),
            errors.ArgumentError,
            "split",
        ),
        (
            lambda p: free(p).require_on_manifold(p.minimizer + 0.1),
            errors.NotOnManifoldError,
            "limit_map",
        ),
    ],
)
def test_errors(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make(orthogonal())


def test_the_ito_drift_of_a_large_network_is_refused() -> None:
    rows = torch.eye(2, 1200, dtype=torch.float64)
    problem = LeastSquaresProblem(lambda x: rows.to(x) @ (x / x.norm()), 1200, SphericalNoise(0.1))
    y = torch.eye(1200, dtype=torch.float64)[2]
    sde = DirectionDiffusion(problem)
    assert sde.geometry.method == "matrix_free"
    with pytest.raises(errors.ArgumentError, match="walk"):
        sde.f(torch.zeros(()), y[None])
    assert float(sde.with_calculus("stratonovich").f(torch.zeros(()), y[None]).abs().max()) < 1e-12
