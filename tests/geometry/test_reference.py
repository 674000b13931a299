"""The reference itself: its derivatives by hand against differences, and its two sides agree."""

import numpy as np
import pytest
import torch

from tests.geometry.reference import Case, RandomLoss

KINDS = [Case(kind=kind, seed=3) for kind in ("square", "linex", "cauchy", "weighted")]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_force_and_hessian_are_derivatives_of_the_loss(case: Case) -> None:
    loss = RandomLoss(case)
    x = 1.7 * loss.starts(1)[0]
    problem = loss.problem()
    np.testing.assert_allclose(loss.force(x.numpy()), -problem.gradient(x), atol=1e-14)
    np.testing.assert_allclose(loss.hessian(x.numpy()), problem.hessian(x), atol=1e-13)
    h, basis = 1e-5, np.eye(case.dim)
    columns = [(loss.force(x.numpy() - h * e) - loss.force(x.numpy() + h * e)) for e in basis]
    np.testing.assert_allclose(np.transpose(columns) / (2 * h), loss.hessian(x.numpy()), atol=1e-8)


def test_nearest_point_is_the_nearest() -> None:
    loss = RandomLoss(Case(dim=5, rank=2))
    x = loss.starts(1, 0.1)[0].numpy()
    nearest = loss.nearest(x)
    np.testing.assert_allclose(loss.residuals(nearest), 0.0, atol=1e-14)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = loss.limit_map(nearest + 0.05 * rng.standard_normal(5), rtol=1e-10)
        assert np.linalg.norm(other - x) >= np.linalg.norm(nearest - x) - 1e-9


def test_torch_loss_keeps_the_dtype() -> None:
    loss = RandomLoss(Case())
    assert loss.torch_loss(torch.ones(6)).dtype == torch.float32
