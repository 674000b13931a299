"""Diffusions on a circle that several tests share."""

import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, problems
from manifold_sde.verification.exact import CircleDiffusion


@pytest.fixture(scope="session")
def mixed() -> CircleDiffusion:
    return CircleDiffusion.of(problems.mixed_noise_circle())


@pytest.fixture(scope="session")
def varying() -> CircleDiffusion:
    return CircleDiffusion.of(problems.varying_circle())


@pytest.fixture(scope="session")
def unmixed() -> CircleDiffusion:
    """The noise split into its parts along and across the circle, which makes NΣP = 0."""
    original = problems.mixed_noise_circle()

    def split(x: Tensor) -> Tensor:
        factor = original.noise.factor(original.pointwise, x)
        along = torch.stack([-x[1], x[0], torch.zeros_like(x[0])]) / x[:2].norm()
        part = along[:, None] * (along @ factor)
        return torch.cat([part, factor - part], 1)

    return CircleDiffusion.of(problems.mixed_noise_circle(noise=CustomNoise(split)))
