"""Starts and points in single precision: taken where the loss takes them, or refused at once."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, DirectionDiffusion, Geometry, Problem, SphericalNoise
from manifold_sde.arguments import check_point
from manifold_sde.errors import DTypeError, NotOnManifoldError
from manifold_sde.noise import Noise
from manifold_sde.points import point_of
from manifold_sde.solvers import finite_lr_error, predict_sgd, run_sgd, solve

NORMAL = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
START = [1.0, 0.0, 0.0]
SINGLE = torch.tensor(START)
ENTRIES: dict[str, Callable[[Problem, Any], Any]] = {
    "predict_sgd": lambda p, x: predict_sgd(p, x, 0.01, 0.05, [20], n_paths=2, compile=False).ys,
    "run_sgd": lambda p, x: run_sgd(p, x, 0.01, 0.05, [5], n_paths=2, compile=False).ys,
    "solve": lambda p, x: solve(DirectionDiffusion(p), x, [0.0, 0.1], compile=False).ys,
    "limit_map": lambda p, x: Geometry(p).limit_map(x),
    "rank": lambda p, x: Geometry(p).rank(x),
    "finite_lr_error": lambda p, x: finite_lr_error(p, x, 0.01, 0.05, 20, torch.norm),
}


def of_double(x: Tensor) -> Tensor:
    return 0.5 * (NORMAL @ (x / x.norm()))[0] ** 2


def following(x: Tensor) -> Tensor:
    return 0.5 * (NORMAL.to(x) @ (x / x.norm()))[0] ** 2


def problem(loss: Callable[[Tensor], Tensor], noise: Noise | None = None) -> Problem:
    return Problem(loss, 3, noise or SphericalNoise(0.3))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_start_that_the_loss_does_not_take(name: str) -> None:
    with pytest.raises(DTypeError, match=r"(?s)in float32.*0?\.double\(\).*Z\.to\(x\)") as caught:
        ENTRIES[name](problem(of_double), SINGLE)
    assert len(traceback.extract_tb(caught.tb)) <= 7  # at the entry


@pytest.mark.parametrize("name", ["run_sgd", "limit_map"])
def test_single_precision_where_the_loss_takes_it(name: str) -> None:
    found = ENTRIES[name](problem(following), SINGLE)
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())


def test_noise_of_double_constants() -> None:
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    noise = CustomNoise(lambda x: (turn @ x)[:, None] / x.norm() ** 2)
    with pytest.raises(DTypeError, match="in float32"):
        point_of(problem(following, noise), SINGLE)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.int32])
def test_arrays_and_lists_count_as_double(kind: Any) -> None:
    for given in (np.array(START, kind), [kind(v) for v in START]):
        assert check_point(given, 3).dtype == torch.float64
        assert ENTRIES["run_sgd"](problem(of_double), given).dtype == torch.float64


def test_the_loss_is_evaluated_once_for_a_dtype() -> None:
    seen: list[torch.dtype] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return following(x)

    p = problem(loss)
    seen.clear()
    point_of(p, torch.tensor(START, dtype=torch.float64))
    assert not seen
    point_of(p, SINGLE)
    calls = len(seen)
    assert set(seen) == {torch.float32}
    point_of(p, SINGLE)
    assert len(seen) == calls


def test_off_the_manifold_in_single_precision_hints_at_double() -> None:
    off = torch.tensor([1.0, 0.0, 0.003])
    with pytest.raises(NotOnManifoldError, match=r"x\.double\(\)"):
        DirectionDiffusion(problem(following)).require_on_manifold(off)
    with pytest.raises(NotOnManifoldError) as caught:
        DirectionDiffusion(problem(following)).require_on_manifold(off.double())
    assert "double" not in str(caught.value)


def test_half_precision_by_autocast_is_refused() -> None:
    """A matrix product was off by a per cent, the twin; double precision is left alone."""
    rows = torch.ones(3, 2)

    def loss(x: Tensor) -> Tensor:
        return ((x / x.norm()).reshape(2, 3) @ rows.to(x)).square().mean()

    problem = Problem(loss, 6, SphericalNoise(0.3))
    x = torch.linspace(0.3, 1.7, 6)
    want, double = problem.loss(x), problem.hessian(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function in (problem.loss, problem.hessian, Geometry(problem).limit_map):
            with pytest.raises(DTypeError, match="half precision"):
                function(x)
        assert abs(float(problem.pointwise.loss(x) - want)) > 1e-4
        torch.testing.assert_close(problem.hessian(x.double()), double, rtol=0, atol=0)
