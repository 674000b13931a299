"""Flows that do not end on the manifold are refused, by name, and the others are not lost."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manifold_sde import Geometry, Problem, SphericalNoise, problems
from manifold_sde.errors import (
    ArgumentError,
    DTypeError,
    LimitMapError,
    ManifoldSDEError,
    NonFiniteError,
    ShapeError,
    ZeroVectorError,
)

NOISE = SphericalNoise(0.3)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def quartic(x: Tensor) -> Tensor:
    return unit(x)[2] ** 4


def quadratic_and_sextic(x: Tensor) -> Tensor:
    u = unit(x)
    return u[2] ** 2 + u[3] ** 6


def flat_direction(curvature: float) -> Callable[[Tensor], Tensor]:
    return lambda x: unit(x)[2] ** 2 + curvature * unit(x)[3] ** 2


def saddle(x: Tensor) -> Tensor:
    u = unit(x)
    return u[2] ** 2 - u[3] ** 2


FAILURES = {
    "on a maximum": (
        problems.great_circle(),
        tensor(0, 0, 2),
        "saddle .smallest Hessian eigenvalue -1",
    ),
    "next to a maximum": (problems.great_circle(), tensor(1e-9, 0, 1), "saddle"),
    "on the stable side of a saddle": (Problem(saddle, 4, NOISE), tensor(1, 0.2, 0.5, 0), "saddle"),
    "degenerate": (Problem(quartic, 3, NOISE), tensor(1, 0, 0.5), "creeping"),
    "degenerate with a rank": (Problem(quartic, 3, NOISE, rank=1), tensor(1, 0, 0.5), "creeping"),
    "degenerate in one direction": (
        Problem(quadratic_and_sextic, 4, NOISE),
        tensor(1, 0, 0.5, 0.3),
        "degenerate, or stiffer than 1e.08.*eigenvalues .2, ",
    ),
    "too stiff": (Problem(flat_direction(1e-9), 4, NOISE), tensor(1, 0, 0.5, 0.3), "stiffer"),
    "rank too large": (
        Problem(lambda x: unit(x)[2] ** 2, 4, NOISE, rank=2),
        tensor(1, 0, 0.5, 0.3),
        "declared rank 2 .* eigenvalues .2, .* at rank 1",
    ),
    "rank too small": (
        Problem(flat_direction(1.0), 4, NOISE, rank=1),
        tensor(1, 0.2, 0.5, 0.3),
        "declared rank 1 .* largest gap is at rank 2",
    ),
    "not finite": (
        Problem(lambda x: torch.log(unit(x)[2] + 0.999999) ** 2, 3, NOISE),
        tensor(1e-4, 0, -1),
        "not finite",
    ),
    "a kink": (Problem(lambda x: unit(x)[2].abs(), 3, NOISE), tensor(1, 0, 0.5), "collapsed"),
    "a minimum at infinity": (
        Problem(lambda x: x[1] ** 2 - x[0], 3, NOISE),
        tensor(1, 0, 0.5),
        "lies at infinity",
    ),
}


@pytest.mark.paper("Definition 2.6")
@pytest.mark.parametrize("name", FAILURES)
def test_flow_that_does_not_end_on_the_manifold(name: str) -> None:
    problem, x, message = FAILURES[name]
    with pytest.raises(LimitMapError, match="did not reach the manifold") as caught:
        Geometry(problem).limit_map(x)
    error = caught.value
    text = " ".join(error.received.split())
    assert re.search(message, text), text
    for word in ("gradient norm", "distance estimate", "flow time"):
        assert word in text
    assert "max_steps" in error.remedy
    broken = float(problem.scale_invariance_violation()) > 1e-9
    assert ("the loss is not scale-invariant" in error.remedy) == broken
    assert error.failed.shape == ()
    assert bool(error.partial.isnan().all())


def test_a_stiff_flow_within_reach_is_not_refused() -> None:
    problem = Problem(flat_direction(1e-7), 4, NOISE, rank=2)
    y = Geometry(problem).limit_map(tensor(1, 0.2, 0.5, 0.3))
    assert float(y[2:].abs().max()) < 1e-14


def test_too_few_steps() -> None:
    geometry = Geometry(problems.great_circle(), max_steps=2)
    with pytest.raises(LimitMapError, match="not settled after 2 steps"):
        geometry.limit_map(tensor(1, 0, 0.5))


def test_the_good_points_of_a_batch_are_kept() -> None:
    geometry = Geometry(problems.great_circle())
    x = torch.stack([tensor(3, 4, 12), tensor(0, 0, 1), tensor(1, 0, 0), tensor(0, 0, -2)])
    with pytest.raises(LimitMapError, match="2 of 4 points failed; point 1") as caught:
        geometry.limit_map(x.reshape(2, 2, 3))
    error = caught.value
    assert error.failed.tolist() == [[False, True], [False, True]]
    assert error.partial.shape == (2, 2, 3)
    assert bool(error.partial[:, 1].isnan().all())
    torch.testing.assert_close(error.partial[0, 0], tensor(7.8, 10.4, 0))
    torch.testing.assert_close(error.partial[1, 0], x[2])


def test_the_error_survives_a_trip_between_processes() -> None:
    with pytest.raises(LimitMapError) as caught:
        Geometry(problems.great_circle()).limit_map(tensor(0, 0, 1))
    back = pickle.loads(pickle.dumps(caught.value))
    assert str(back) == str(caught.value)
    assert back.failed.tolist() == caught.value.failed.tolist()
    assert isinstance(copy.copy(back), ManifoldSDEError)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (["1", "0", "0"], DTypeError),
        (torch.tensor([1, 0, 0]), DTypeError),
        (torch.ones(3, dtype=torch.complex128), DTypeError),
        (tensor(1, 0), ShapeError),
        (torch.tensor(1.0), ShapeError),
        (tensor(1, torch.nan, 0), NonFiniteError),
        (tensor(1, torch.inf, 0), NonFiniteError),
        (tensor(0, 0, 0), ZeroVectorError),
    ],
)
def test_points_that_cannot_be_used(x: Tensor, error: type[Exception]) -> None:
    geometry = Geometry(problems.great_circle())
    for function in (geometry.limit_map, geometry.retract, geometry.rank, geometry.spectral_gap):
        with pytest.raises(error):
            function(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "not a route"),
        ({"method": "symbolic"}, "needs a closed form"),
        ({"rtol": 0.0}, "rtol is not an accuracy"),
        ({"rtol": 1.0}, "rtol is not an accuracy"),
        ({"max_steps": 0}, "max_steps is not"),
        ({"max_steps": 2.5}, "max_steps is not"),
        ({"rtol": "tight"}, "rtol is not an accuracy"),
        ({"compile": "yes"}, "compile is not a switch"),
    ],
)
def test_options_that_cannot_be_used(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Geometry(problems.great_circle(), **options)


def test_something_that_is_not_a_problem() -> None:
    with pytest.raises(DTypeError, match="not a Problem"):
        Geometry(lambda x: x @ x)  # type: ignore[arg-type]


def test_a_dimension_beyond_the_dense_route() -> None:
    problem = Problem(lambda x: unit(x)[0] ** 2, 1001, NOISE)
    with pytest.raises(ArgumentError, match="too large for the dense route"):
        Geometry(problem, "dense")
    assert Geometry(problem).method == "matrix_free"
