"""Norms and clock are the same where every sample comes once an epoch; exploration is not."""

import math

import pytest
import torch
from torch import Tensor, nn

from manifold_sde.training import MixingClock, ScaleGroup, audit

PATHS, DIM, SAMPLES, EPOCHS, LR = 300, 6, 32, 12, 0.05


class Circle(nn.Module):
    """Paths on L = |(x_3, ..., x_D)|^2 / (2 |x|^2), whose minimisers of norm 1 are a circle.

    The noise of sample i is z_i / |x|, made tangential; the z_i sum to 0 and have trace 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        start = torch.zeros(PATHS, DIM, dtype=torch.float64)
        start[:, 0] = 1.0
        self.weight = nn.Parameter(start)
        z = torch.randn(SAMPLES, DIM, generator=self.generator, dtype=torch.float64)
        z = z - z.mean(0)
        self.z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / SAMPLES)).T / DIM**0.5
        self.group = ScaleGroup("paths", ("weight",), 0, 1, None, PATHS, PATHS * DIM, 0.0)

    def gradient(self, noise: Tensor) -> Tensor:
        x = self.weight.detach()
        norm = x.norm(dim=1, keepdim=True)
        y = x / norm
        normal = y.clone()
        normal[:, :2] = 0.0
        whole = normal + noise
        return (whole - y * (y * whole).sum(1, keepdim=True)) / norm


def run(sampling: str, fresh: float = 0.0) -> tuple[MixingClock, Tensor]:
    """The clock, and the angles along the circle after all epochs."""
    paths = Circle()
    optimizer = torch.optim.SGD([paths.weight], lr=LR, weight_decay=0.02)
    clock = MixingClock(paths, optimizer, [paths.group], sampling=sampling)
    for _ in range(EPOCHS):
        if sampling == "iid":
            order = torch.randint(SAMPLES, (PATHS, SAMPLES), generator=paths.generator)
        else:
            order = torch.rand(PATHS, SAMPLES, generator=paths.generator).argsort(1)
        for k in range(SAMPLES):
            noise = math.sqrt(1.0 - fresh) * paths.z[order[:, k]]
            own = torch.randn(PATHS, DIM, generator=paths.generator, dtype=torch.float64)
            noise = noise + math.sqrt(fresh / DIM) * own
            paths.weight.grad = paths.gradient(noise)
            optimizer.step()
    x = paths.weight.detach()
    return clock, torch.atan2(x[:, 1], x[:, 0])


def explored(clock: MixingClock, angles: Tensor) -> tuple[float, float]:
    """Variance of the angle over s^2 u, with its standard error; s^2 is 1/D."""
    u = clock.values()["paths/u"] / DIM
    return float(angles.var()) / u, float(angles.var()) / u * math.sqrt(2.0 / PATHS)


def test_independent_batches_explore_by_the_clock() -> None:
    clock, angles = run("iid")
    ratio, error = explored(clock, angles)
    assert abs(ratio - 1.0) < 4.0 * error
    assert clock.effective == clock.time


@pytest.mark.parametrize("fresh", [0.0, 0.3])
def test_of_reshuffled_data_only_fresh_noise_explores(fresh: float) -> None:
    clock, angles = run("reshuffled", fresh)
    ratio, error = explored(clock, angles)
    assert abs(ratio - fresh) < 4.0 * error + 0.02
    # Broken twin: the clock of independent batches.
    assert abs(ratio - 1.0) > 10.0 * max(error, 0.01)
    independent, _ = run("iid")
    ours, theirs = (audit(z)["paths"] for z in (clock, independent))
    # Nothing else shows it: norms, rotations of single steps and the clock are as before.
    assert ours.norm == pytest.approx(theirs.norm, rel=0.02)
    assert ours.rotation == pytest.approx(theirs.rotation, rel=0.05)
    assert clock.time == pytest.approx(independent.time, rel=0.05)
    assert ours.verdict == theirs.verdict == "as predicted"
    assert clock.effective == 0.0
