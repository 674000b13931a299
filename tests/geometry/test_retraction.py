"""The retraction comes back to minima, and to no other critical points of the same rank."""

import pytest
import torch
from torch import Tensor

from manifold_sde import Problem, SphericalNoise
from manifold_sde.geometry import elimination, matrix_free
from manifold_sde.geometry.dense import DenseSpace
from manifold_sde.geometry.matrix_free_spaces import HessianSpace
from manifold_sde.geometry.normal_space import NormalSpace
from manifold_sde.geometry.retraction import retract
from tests.networks.disputed_labels import disputed


def ridge(dim: int) -> Problem:
    """Minima where the last coordinate z of a unit vector is 0, maxima where z^2 = 1/2."""

    def loss(x: Tensor) -> Tensor:
        square = (x[-1] / x.norm()) ** 2
        return square * (1.0 - square)

    return Problem(loss, dim, SphericalNoise(1.0), rank=1)


def at_angle(dim: int, angle: float) -> Tensor:
    """The unit vector (D, 1) at an angle from the minima."""
    x = torch.zeros(dim, 1, dtype=torch.float64)
    x[0], x[-1] = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    return x


SPACES = {
    "dense": (3, lambda: DenseSpace(ridge(3), 1)),
    "dense, by LAPACK": (40, lambda: DenseSpace(ridge(40), 1)),
    "by products": (3, lambda: HessianSpace(ridge(3), 1, 1 << 20)),
}


def retracted(dim: int, space: NormalSpace, angle: float) -> tuple[Tensor, bool]:
    near = space.reference_basis(at_angle(dim, 0.0))
    y, _, arrived = retract(space, at_angle(dim, angle), near)
    return y, bool(arrived)


@pytest.mark.parametrize("name", SPACES)
def test_a_maximum_is_refused_and_a_minimum_is_not(name: str) -> None:
    dim, make = SPACES[name]
    y, arrived = retracted(dim, make(), 0.1)
    assert arrived
    assert float(y[-1].abs()) < 1e-12
    # 0.785 is the angle of the maxima.
    y, arrived = retracted(dim, make(), 0.75)
    assert not arrived
    assert bool(y.isnan().all())


def test_broken_twin_that_accepts_any_critical_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "solve_positive", torch.linalg.solve)
    y, arrived = retracted(3, DenseSpace(ridge(3), 1), 0.75)
    assert arrived
    assert float(y[-1]) == pytest.approx(0.5**0.5)


@torch.no_grad()
def test_one_frame_serves_a_short_step_and_a_point_does_not_feel_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without fresh steps: by Broyden's method four steps with one frame, or a second frame.

    The twin, steps that learn nothing from those before, needs the second frame.
    """
    problem, y = disputed()
    space = HessianSpace(problem, problem.rank or 0, 1 << 20)
    near = space.reference_basis(y[:, None])
    way = torch.sin(torch.arange(len(y), dtype=y.dtype))
    x = torch.stack([y + size * way / way.norm() for size in (3e-4, 0.02)], 1)
    frames, made = [0], HessianSpace.frame_at

    def counted(self: HessianSpace, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        frames[0] += 1
        return made(self, *arguments)

    monkeypatch.setattr(HessianSpace, "frame_at", counted)

    def ends(columns: Tensor) -> tuple[Tensor, int]:
        frames[0] = 0
        found, _, arrived = retract(space, columns, near.expand(-1, -1, columns.shape[1]), 0)
        assert bool(arrived.all())
        for end in found.T:
            assert float(problem.gradient(end).norm()) < 1e-12
        return found, frames[0]

    singly = [ends(column) for column in x.split(1, 1)]
    assert [count for _, count in singly] == [1, 2]
    together = ends(x)[0]
    torch.testing.assert_close(
        together, torch.cat([end for end, _ in singly], 1), atol=1e-13, rtol=0
    )
    monkeypatch.setattr(matrix_free, "_by_broyden", lambda move, before: move)
    assert ends(x[:, :1])[1] == 2
