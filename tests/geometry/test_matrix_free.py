"""The matrix-free route against its dense twin, and against itself where no twin fits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    Geometry,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    errors,
    problems,
)
from manifold_sde.deadline import Deadline, OutOfTimeError
from manifold_sde.geometry import matrix_free, matrix_free_route
from manifold_sde.geometry.matrix_free_route import MatrixFreeRoute
from manifold_sde.geometry.matrix_free_spaces import HessianSpace, JacobianSpace
from manifold_sde.loss import PerSampleFunction
from manifold_sde.networks import NormalizedMLP
from manifold_sde.networks.data import digits
from manifold_sde.networks.passes import _Alive
from manifold_sde.verification.strategies.models import (
    NormalizedNetwork,
    ResidualModel,
    TiltedModel,
)
from tests.networks.disputed_labels import disputed

#: What the two routes may differ by.
AGREE = 1e-6
GENERATOR = torch.Generator().manual_seed(11)

INPUTS = torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR)
HEADS = torch.randn(2, 5, dtype=torch.float64, generator=GENERATOR)


def two_layers(x: Tensor, inputs: Tensor) -> Tensor:
    """Outputs (n, 2) of a network with a normalised layer of width 5, and a frozen last one."""
    hidden = inputs @ x.reshape(5, 3).T
    hidden = hidden - hidden.mean(1, keepdim=True)
    hidden = hidden * hidden.square().mean(1, keepdim=True).rsqrt()
    return torch.tanh(hidden) @ HEADS.to(x).T


def start_of(dim: int) -> Tensor:
    x = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x / x.norm()


def taught(samples: bool) -> LeastSquaresProblem:
    """Four samples of two outputs; targets are those of a point, which is then a minimiser."""
    targets = two_layers(start_of(15), INPUTS)

    def residuals(x: Tensor, inputs: Tensor, wanted: Tensor) -> Tensor:
        return two_layers(x, inputs) - wanted

    function: Callable[..., Tensor] = PerSampleFunction(residuals, INPUTS, targets)
    whole = function if samples else lambda x: residuals(x, INPUTS.to(x), targets.to(x))
    return LeastSquaresProblem(whole, 15, SphericalNoise(0.3), name="taught")


def minimizer(problem: Problem) -> Tensor:
    return start_of(15) if problem.facts is None else problem.minimizer


CASES: dict[str, Callable[[], Problem]] = {
    "section 6.1": lambda: problems.normalized_linear(),
    "great circle": lambda: problems.great_circle(),
    "residuals": lambda: ResidualModel(20, 6, seed=3, curvature=0.5),
    "larger": lambda: ResidualModel(120, 8, seed=4, curvature=0.5),
    "largest": lambda: ResidualModel(500, 12, seed=4, curvature=0.5),
    "network": lambda: NormalizedNetwork(3, 4, 2, seed=1),
    "outputs": lambda: taught(samples=False),
    "samples": lambda: taught(samples=True),
    "not interpolating": lambda: TiltedModel(12, 4, seed=2),
    "mixed noise": lambda: problems.mixed_noise_circle(),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.thorough if name == "largest" else ())
        for name in sorted(CASES)
    ]
)
def case(request: pytest.FixtureRequest) -> tuple[Problem, Tensor]:
    """A problem, and points of its manifold that the dense route has found."""
    return on_the_manifold(request.param)


@functools.cache
def on_the_manifold(name: str) -> tuple[Problem, Tensor]:
    problem = CASES[name]()
    noise = torch.randn(
        3, problem.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    x = minimizer(problem) + 0.1 * noise / problem.dim**0.5
    return problem, Geometry(problem, "dense").limit_map(x)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=AGREE, atol=AGREE * float(want.abs().max()))


def test_the_same_as_the_dense_route(case: tuple[Problem, Tensor]) -> None:
    """Everything that Geometry has, at points of the manifold of any norm."""
    problem, y = case
    y = y * torch.tensor([[0.5], [1.0], [3.0]], dtype=y.dtype)
    dense, free = Geometry(problem, "dense"), Geometry(problem, "matrix_free")
    v = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(6))
    factor = torch.stack([v, v.roll(1, 0), v.flip(1)], dim=-1)
    close(free.tangent_projection(y, v), dense.tangent_projection(y, v))
    close(free.log_pseudo_determinant(y), dense.log_pseudo_determinant(y))
    assert torch.equal(free.rank(y), dense.rank(y))
    assert bool((free.spectral_gap(y) > 1e4).all())
    close(free.second_derivative(y, factor=factor), dense.second_derivative(y, factor=factor))
    sigma = factor @ factor.mT
    close(free.second_derivative(y, sigma), dense.second_derivative(y, sigma))
    if problem.dim < 100:
        close(free.second_derivative(y), dense.second_derivative(y))
    close(free.projector(y[0])(v), dense.projector(y[0])(v))
    close(free.projector(y[0])(v[1]), dense.tangent_projection(y[0], v[1]))
    assert all(float(r.max()) < AGREE for r in free.residuals(y).values())


def test_the_limit_map_is_that_of_gradient_flow(case: tuple[Problem, Tensor]) -> None:
    """Also far from the manifold, where the frame is no more than a preconditioner."""
    problem, y = case
    if problem.rank is None and not isinstance(problem, LeastSquaresProblem):
        pytest.skip("the rank off the manifold is to be declared")
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    x = 2.0 * (y + 0.2 * noise / problem.dim**0.5)
    free, dense = Geometry(problem, "matrix_free"), Geometry(problem, "dense")
    limit = free.limit_map(x)
    close(limit, dense.limit_map(x))
    torch.testing.assert_close(limit.norm(dim=1), x.norm(dim=1))
    if isinstance(problem, (ResidualModel, NormalizedNetwork)) or problem.name == "taught":
        # The twin: Newton's method in place of the flow.
        assert float((limit - free.retract(x)).abs().max()) > 1e2 * AGREE


def test_retraction(case: tuple[Problem, Tensor]) -> None:
    """It ends on the manifold, agrees with Phi to first order, and leaves its points alone."""
    problem, y = case
    free = Geometry(problem, "matrix_free")
    if problem.rank is None and not isinstance(problem, LeastSquaresProblem):
        pytest.skip("the rank off the manifold is to be declared")
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(8))
    apart = []
    for size in (1e-2, 1e-3):
        x = y + size * noise / problem.dim**0.5
        z = free.retract(x)
        assert float(problem.gradient(z).norm(dim=1).max()) < 1e-11
        apart.append(float((z - free.limit_map(x)).norm()))
    assert apart[1] < 0.03 * apart[0] + 1e-12
    torch.testing.assert_close(free.retract(y), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory", [1, 2000, 1 << 20])
def test_the_memory_changes_nothing_but_rounding(memory: int) -> None:
    """Blocks of one vector, of a few, and of all."""
    problem = taught(samples=True)
    y = start_of(15)[None]
    whole, small = Geometry(problem, "matrix_free"), Geometry(problem, "matrix_free", memory=memory)
    factor = torch.randn(1, 15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for name in ("log_pseudo_determinant", "second_derivative"):
        arguments = {"factor": factor} if name == "second_derivative" else {}
        one, other = (getattr(g, name)(y, **arguments) for g in (whole, small))
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@functools.cache
def digits_network(samples: int) -> tuple[LeastSquaresProblem, Tensor]:
    """A network of 1024 weights on digits, of ten residuals each, and a minimiser."""
    data, module = digits(samples), NormalizedMLP((64, 16, 10), seed=1).double()
    with torch.no_grad():
        targets = module(data.inputs)
    loss = torch.nn.MSELoss()
    problem = Problem.from_module(module, loss, data.inputs, targets, SphericalNoise(1 / 32))
    assert isinstance(problem, LeastSquaresProblem)
    y = problem.vector(module)
    return problem, y / y.norm()


def test_a_block_has_room_for_what_the_samples_pass_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes alive in third derivatives along 200 vectors, of a fraction of what all take."""
    problem, y = digits_network(100)
    memory, v = 2**22, torch.randn(200, len(y), dtype=torch.float64, generator=GENERATOR)
    space = JacobianSpace(problem, 200, memory)

    def alive() -> int:
        with _Alive() as counted:
            space.script_t_at(y, v, v)
        return counted.most

    assert 0.1 * memory < alive() < 1.1 * memory
    # The broken twin counts the vectors alone.
    monkeypatch.setattr(problem.pointwise, "gradient_bytes", 0)
    assert alive() > 2.0 * memory


def test_few_pairs_are_enough_for_the_noise_across(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third derivatives of a column are along a few dozen vectors, and not all 200."""
    problem, y = digits_network(20)
    geometry = Geometry(problem)
    column = torch.randn(len(y), 1, dtype=torch.float64, generator=GENERATOR)
    numbers = []
    pairs_of = matrix_free._pairs_of

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        pairs = pairs_of(matrix)
        numbers.append(len(pairs[0]))
        return pairs

    def every(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(len(matrix), dtype=matrix.dtype), matrix

    def fewer(matrix: Tensor) -> tuple[Tensor, Tensor]:
        left, right = pairs_of(matrix)
        large = right.norm(dim=1) > 1e-4 * right.norm(dim=1).max()
        return left[large], right[large]

    found = []
    for form in (every, counted, fewer):
        monkeypatch.setattr(matrix_free, "_pairs_of", form)
        found.append(geometry.second_derivative(y, factor=column))
    assert numbers[0] < 60
    off = [float((one - found[0]).norm() / found[0].norm()) for one in found[1:]]
    assert off[0] < 1e-11
    assert off[1] > 1e-7
    assert bool(pairs_of(torch.full((3, 3), torch.nan, dtype=torch.float64))[1].isnan().any())


def test_nothing_is_as_large_as_the_square_of_the_dimension() -> None:
    """At D = 2000 a square matrix would have 4 million entries; the largest tensor has fewer."""
    dim, largest = 2000, 0
    rows = torch.randn(4, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0.0
    problem = LeastSquaresProblem(
        lambda x: rows.to(x) @ (x / x.norm()), dim, SphericalNoise(0.3), rank=4
    )
    y = torch.zeros(dim, dtype=torch.float64)
    y[0] = 1.0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    geometry = Geometry(problem, memory=1 << 20)
    sde = DirectionDiffusion(problem, "stratonovich", geometry=geometry)
    sde.require_on_manifold(y)
    with Watch():
        geometry.tangent_projection(y, y.flip(0))
        geometry.retract(y + 1e-3 * y.flip(0))
        sde.f_and_g_prod(torch.zeros(()), y[None], y.flip(0)[None])
    assert dim < largest < 100 * dim


@pytest.mark.parametrize("watched", [True, False])
def test_flows_that_take_too_long_are_given_up(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first few of them: each takes a second here. The twin asks no deadline."""
    problem, passed = problems.normalized_linear(), [0.0]
    route = Geometry(problem, "matrix_free").route
    flow = MatrixFreeRoute.one_limit

    def slow(*arguments: Any) -> Any:
        passed[0] += 1.0
        return flow(*arguments)

    monkeypatch.setattr(MatrixFreeRoute, "one_limit", slow)
    if not watched:
        monkeypatch.setattr(matrix_free_route, "Progress", lambda *_, **__: mock.MagicMock())
    x = problem.minimizer.expand(40, -1)
    with Deadline(20.0, lambda: passed[0]):
        if watched:
            with pytest.raises(OutOfTimeError, match="would take about 40 s"):
                route.limit_map(x)
        else:
            route.limit_map(x)
    assert passed[0] < 10.0 if watched else passed[0] == 40.0


@pytest.mark.parametrize("kind", [JacobianSpace, HessianSpace])
def test_a_wrong_rank_is_not_a_small_error(kind: type[JacobianSpace] | type[HessianSpace]) -> None:
    """The twin: a frame with one eigenvector too few."""
    problem = problems.normalized_linear()
    y = problem.minimizer
    wrong = kind(problem, 7, 1 << 20)
    frame = wrong.frame_at(y, wrong.start_at(y))
    v = torch.ones_like(y)
    right = Geometry(problem, "dense").tangent_projection(y, v)
    assert float((wrong.project_at(y, frame, v) - right).norm()) > 1e-2


def test_errors_name_what_to_do() -> None:
    problem = problems.normalized_linear()
    free = Geometry(problem, "matrix_free")
    off = problem.minimizer + 0.3 * torch.ones(10, dtype=torch.float64)
    with pytest.raises(errors.NotOnManifoldError, match="limit_map"):
        free.tangent_projection(off, off)
    with pytest.raises(errors.NotOnManifoldError, match="1 of 1"):
        free.projector(off)
    with pytest.raises(errors.ShapeError, match="one point"):
        free.projector(off[None])
    with pytest.raises(errors.ArgumentError, match="matrix_free"):
        Geometry(problem, "dense").residuals(problem.minimizer)
    with pytest.raises(errors.ArgumentError, match="number of bytes"):
        Geometry(problem, memory=0)
    wrong = LeastSquaresProblem(problem.residuals, 10, SphericalNoise(0.3), rank=5)
    with pytest.raises(errors.RankError, match="not confirmed"):
        Geometry(wrong, "matrix_free").rank(problem.minimizer.detach())


def test_a_rank_that_was_not_declared_is_found_on_arrival() -> None:
    unknown = Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3))
    x = torch.tensor([3.0, 4.0, 2.0], dtype=torch.float64)
    geometry = Geometry(unknown, "matrix_free")
    y = geometry.limit_map(x)
    want = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64) * x.norm()
    torch.testing.assert_close(y, want, rtol=0, atol=1e-9)
    assert int(geometry.rank(y)) == 1
    torch.testing.assert_close(geometry.retract(y + 1e-6 * x.roll(1)), y, rtol=0, atol=1e-5)
    unclear = Problem(
        lambda x: 0.5 * (x[2] ** 2 + 1e-6 * x[1] ** 2 + 1e-11 * x[3] ** 2) / (x @ x),
        4,
        SphericalNoise(0.3),
    )
    near = torch.tensor([1.0, 0.0, 1e-9, 0.0], dtype=torch.float64)
    with pytest.raises(errors.LimitMapError, match="ambiguous") as caught:
        Geometry(unclear, "matrix_free").limit_map(near)
    assert "rank=M" in caught.value.remedy


def test_a_flow_that_does_not_arrive() -> None:
    """A loss without minimisers on the way: the others of the batch are kept."""
    problem = problems.normalized_linear()
    free = Geometry(problem, "matrix_free", max_steps=2)
    y = problem.minimizer
    x = torch.stack([y, y + 0.3 * torch.ones_like(y)])
    with pytest.raises(errors.LimitMapError, match="not settled after 2 steps") as caught:
        free.limit_map(x)
    assert caught.value.failed.tolist() == [False, True]
    torch.testing.assert_close(caught.value.partial[0], y, rtol=1e-10, atol=1e-10)
    assert bool(caught.value.partial[1].isnan().all())


def test_sampling_noise_that_vanishes_is_told() -> None:
    problem = taught(samples=True).with_noise(SamplingNoise())
    sde = DirectionDiffusion(problem, geometry=Geometry(problem, "matrix_free"))
    with pytest.raises(errors.NoiseError, match="interpolation"):
        sde.require_on_manifold(start_of(15))


def test_float32() -> None:
    problem = taught(samples=True)
    free = Geometry(problem, "matrix_free")
    y = start_of(15).float()
    v = torch.ones(15)
    want = Geometry(problem, "dense").tangent_projection(start_of(15), v.double())
    got = free.tangent_projection(y, v)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_vectors_that_go_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with H by reverse mode alone, and sums of third derivatives, in any blocks."""
    problem, y = disputed()
    space = HessianSpace(problem, problem.rank or 0, 1 << 20)
    columns = torch.sin(torch.arange(5.0 * len(y), dtype=y.dtype)).reshape(len(y), 5)
    assert space.loss.reverses
    assert space.few >= 5
    whole = space.products(y, columns), space.script_t_at(y, columns.T, columns.T)
    torch.testing.assert_close(whole[0], problem.hessian(y) @ columns, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr("manifold_sde.geometry.matrix_free._CACHED", 1)
    assert space.few == 1
    singly = space.products(y, columns), space.script_t_at(y, columns.T, columns.T)
    torch.testing.assert_close(singly, whole, rtol=1e-12, atol=1e-12)
    space.loss.reverses = False
    forward = space.products(y, columns)
    torch.testing.assert_close(forward, whole[0], rtol=1e-10, atol=1e-12)
