"""The drift by random columns of the noise: without bias, with the error that is reported."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from manifold_sde import DirectionDiffusion, Geometry, Problem, SphericalNoise, errors, problems
from manifold_sde.geometry import sketched_drift
from manifold_sde.geometry.matrix_free import MatrixFreeSpace
from manifold_sde.geometry.matrix_free_spaces import HessianSpace, JacobianSpace
from manifold_sde.geometry.normal_space import without_radial_part
from manifold_sde.noise import LabelNoise, SamplingNoise
from manifold_sde.solvers import Solution, solve
from tests.geometry.drift_reference import Reference
from tests.geometry.test_matrix_free import start_of, taught
from tests.largest_tensor import Largest
from tests.networks.disputed_labels import disputed

#: False-alarm rate of a statistical test; columns that it draws.
ALARM, COLUMNS = 1e-4, 4000


@functools.cache
def sampling() -> tuple[MatrixFreeSpace, Tensor]:
    """Samples of a network that disagree: the route, and a point (D,)."""
    problem, y = disputed()
    assert problem.rank is not None
    return HessianSpace(problem, problem.rank, 1 << 26), y


def labels() -> tuple[MatrixFreeSpace, Tensor]:
    problem = taught(samples=True).with_noise(LabelNoise(0.4))
    y = Geometry(problem, "dense").limit_map(start_of(15))
    return JacobianSpace(problem, problem.pointwise.n_residuals, 1 << 26), y / y.norm()


def frame_of(space: MatrixFreeSpace, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    column = y[:, None]
    return column, space.frame(column, space.reference_basis(column))


def normals(space: MatrixFreeSpace, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = sketched_drift.numbers(space, columns)
    return torch.randn(count, 1, dtype=torch.float64, generator=generator)


@torch.no_grad()
def p_value(space: MatrixFreeSpace, y: Tensor, columns: int = COLUMNS) -> float:
    """Of the mean of the tangent drift by one column, against whole tensors: Hotelling's test.

    It looks at three functionals: along the drift that is right, and two fixed ones.
    """
    right = Reference(space.problem, y, space.rank).drift("tangent")
    frame = frame_of(space, y)[1]
    own = tuple(part[..., 0] for part in frame)
    drifts = sketched_drift.drifts_at(space, y, own, normals(space, columns, 5)[:, 0])[0]
    ways = torch.stack([right, y.roll(1), torch.sin(3.0 * y)], 1)
    apart = (drifts - right) @ (ways / ways.norm(dim=0))
    mean, covariance = apart.mean(0), torch.cov(apart.T)
    k = len(mean)
    square = columns * float(mean @ torch.linalg.solve(covariance, mean))
    return float(stats.f.sf(square * (columns - k) / (k * (columns - 1)), k, columns - k))


@pytest.mark.parametrize("make", [sampling, labels])
def test_the_mean_is_the_drift(make: Callable[[], tuple[MatrixFreeSpace, Tensor]]) -> None:
    assert p_value(*make()) > ALARM


class Fewer(SamplingNoise):
    """The twin: nine tenths of the samples, and no factor 10/9 for it."""

    def product(self, loss: object, x: Tensor, w: Tensor) -> Tensor:
        kept = torch.arange(len(w)) % 10 != 9
        return super().product(loss, x, torch.where(kept, w, 0.0))  # type: ignore[arg-type]


def whole_normal(values: Tensor) -> Tensor:
    """The twin: the normal part in full, where half of it belongs to the drift."""
    return 2.0**0.5 * RIGHT_ROOT(values)


def no_lyapunov(values: Tensor) -> Tensor:
    """The twin: the Lyapunov equation as if the columns had no mixed part."""
    return torch.eye(len(values), dtype=values.dtype) * 0.5**0.5


RIGHT_ROOT = sketched_drift._root


@pytest.mark.parametrize("root", [whole_normal, no_lyapunov, None])
def test_broken_twins_are_told(
    root: Callable[[Tensor], Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, y = sampling()
    if root is None:
        twin = HessianSpace(space.problem, space.rank, 1 << 26)
        twin.noise = Fewer()
        assert p_value(twin, y) < ALARM
        return
    monkeypatch.setattr(sketched_drift, "_root", root)
    assert p_value(space, y) < ALARM


@torch.no_grad()
def test_the_variance_that_is_reported_is_that_of_the_drift() -> None:
    """Over 300 drifts of 4 columns, and the variances that 300 others report."""
    space, y = sampling()
    column, frame = frame_of(space, y)
    right = Reference(space.problem, y, space.rank).drift("tangent")
    many, basis = column.expand(-1, 300), space.reference_basis(column).expand(-1, -1, 300)
    frames = tuple(part.expand(*part.shape[:-1], 300) for part in frame)
    drawn = [normals(space, 300 * 4, seed).reshape(300, -1).T for seed in (1, 2)]
    force = sketched_drift.estimated_force(space, many, frames, drawn[0])
    drifts = without_radial_part(space.project(many, frames, force), many)
    ours = (drifts - right[:, None]).square().sum(0)
    reported = torch.stack(sketched_drift.error_of_drift(space, many, basis, drawn[1]), 1)
    error = float((ours.var() / 300 + reported[:, 0].var() / 16 / 300).sqrt())
    apart = float(ours.mean() - reported[:, 0].mean() / 4)
    assert abs(apart) < 4.0 * error < 0.5 * float(ours.mean())
    assert abs(float(ours.mean() - reported[:, 0].mean())) > 4.0 * error  # the twin: of one column
    wanted = torch.stack([right @ right, along(space.problem, y, space.rank)])
    errors_of_mean = reported[:, 1:].std(0) / 300**0.5
    assert bool(((reported[:, 1:].mean(0) - wanted).abs() < 4.0 * errors_of_mean).all())


def along(problem: Problem, y: Tensor, rank: int) -> Tensor:
    """Tr P Sigma P by whole matrices."""
    return (Reference(problem, y, rank).P @ problem.noise_factor(y)).square().sum()


# In solve.


def run(columns: int | None, **options: object) -> Solution:
    problem, y = disputed()
    sde = DirectionDiffusion(problem, geometry=Geometry(problem, "matrix_free", **of(columns)))
    trace = float(problem.noise_trace(y))
    given = {"n_paths": 3, "dt": 2.0**-9 / trace, "method": "walk", "seed": 7} | options
    times = given.pop("times", [0.0, 2 * 2.0**-9 / trace])
    return solve(sde, y, times, **given)  # type: ignore[arg-type]


def of(columns: int | None) -> dict[str, int]:
    return {} if columns is None else {"drift_columns": columns}


def test_a_path_depends_on_seed_path_and_time_alone(tmp_path: object) -> None:
    whole = run(2)
    torch.testing.assert_close(run(2, n_paths=1).ys[:, 0], whole.ys[:, 0], rtol=1e-10, atol=1e-12)
    times = [0.0, *(k * float(whole.ts[-1]) / 2 for k in (1, 2))]
    kept = run(2, times=times, checkpoint=f"{tmp_path}/run")
    torch.testing.assert_close(kept.ys[-1], whole.ys[-1], rtol=1e-10, atol=1e-12)
    assert torch.equal(run(2, times=times, checkpoint=f"{tmp_path}/run").ys, kept.ys)
    assert float((run(3, n_paths=1).ys[-1] - whole.ys[-1, :1]).norm()) > 1e-6
    with pytest.raises(errors.CheckpointError):
        run(3, times=times, checkpoint=f"{tmp_path}/run")


def test_the_solution_says_what_the_error_is() -> None:
    exact, few, many = run(None), run(2), run(32)
    assert "drift_error" not in exact.stats
    assert "drift_columns" not in exact.config
    assert few.config["drift_columns"] == 2
    share = few.stats["drift_variance"] / many.stats["drift_variance"]
    assert 8.0 < share < 32.0  # 16, by estimates from 8 and from 32 columns
    assert 0.0 < many.stats["drift_error"] < few.stats["drift_error"] < 1.0
    # On the same Brownian path the exact walk is as near as is said.
    moved = float((exact.ys[-1] - exact.ys[0]).norm())
    apart = [float((one.ys[-1] - exact.ys[-1]).norm()) / moved for one in (few, many)]
    expected = [one.stats["drift_variance"] ** 0.5 for one in (few, many)]
    for found, said in zip(apart, expected, strict=True):
        assert 0.3 * said < found < 3.0 * said
    means = run(2, observables={"first": lambda x: x[:, 0]})
    assert means.stats["drift_variance"] > 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Geometry(disputed()[0], "dense", drift_columns=2), "matrix_free"),
        (lambda: Geometry(disputed()[0], "matrix_free", drift_columns=0), "drift_columns"),
        (
            lambda: Geometry(
                problems.normalized_linear(noise=SphericalNoise(0.1)),
                "matrix_free",
                drift_columns=2,
            ),
            "SphericalNoise",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(errors.ArgumentError, match=message):
        make()


@torch.no_grad()
def test_no_matrix_of_all_samples_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a step is of a block of samples; the twin is sigma itself."""
    problem, y = disputed(inputs=20, width=24, n_samples=302)
    monkeypatch.setattr("manifold_sde.loss._GRADIENT_NUMBERS", 30 * problem.dim)

    space = HessianSpace(problem, problem.rank or 0, 100 * problem.dim)
    column, frame = frame_of(space, y)
    with Largest() as seen:
        space.kernels.noise_trace(column)
        space.contract(column, frame, mixed=1.0, normal=0.5)
        space.noise_correction(column, frame)
    assert seen.most < 0.25 * problem.dim * 302
    with Largest() as seen:
        problem.noise_factor(y)
    assert seen.most >= problem.dim * 302
