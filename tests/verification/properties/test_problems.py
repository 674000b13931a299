"""All properties hold on all problems of the toolkit, and on what users give in other ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, LabelNoise, Problem, SamplingNoise, SphericalNoise, problems
from manifold_sde.verification import strategies
from manifold_sde.verification.properties import CHECKS, drift
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.suite import verify
from tests.verification.properties.twins import SMALL

#: What takes longest, and adds least to the others.
SLOW = {
    "custom_noise",
    "great_circle",
    "great_sphere_of_dimension_38",
    "label_noise",
    "network",
    "orthogonal",
    "scalar_loss",
    "tilted",
    "varying_circle",
    "without_replacement",
}


def scalar_loss(x: Tensor) -> Tensor:
    """Without samples, with a minimum that is not 0, of codimension 2 in R^5."""
    u = x / x.norm()
    return torch.cosh(u[4] - 0.2 * u[0] ** 2) + 0.5 * (u[3] - 0.3) ** 2


MADE: dict[str, Callable[[], Problem]] = {
    "normalized_linear": problems.normalized_linear,
    "orthogonal": lambda: problems.normalized_linear(design="orthogonal"),
    "without_replacement": lambda: problems.mixed_noise_circle(
        noise=SamplingNoise(2, replacement=False)
    ),
    "great_circle": problems.great_circle,
    "great_sphere_of_dimension_38": lambda: problems.great_sphere(40),
    "varying_circle": problems.varying_circle,
    "label_noise_circle": problems.label_noise_circle,
    "mixed_noise_circle": problems.mixed_noise_circle,
    "interpolation": lambda: problems.normalized_linear(
        4, 2, design="orthogonal", noise=SamplingNoise()
    ),
    "label_noise": lambda: strategies.ResidualModel(5, 2, 0, 0.5, LabelNoise(0.3, 2)),
    "scalar_loss": lambda: Problem(scalar_loss, 5, SphericalNoise(0.3)),
    "custom_noise": lambda: Problem(
        scalar_loss, 5, CustomNoise(strategies.TangentColumns(dim=5, columns=3))
    ),
    "tilted": lambda: strategies.TiltedModel(5, 2, 1, 0.5),
    "network": lambda: strategies.NormalizedNetwork(2, 3, 2, 1),
    "symbolic": lambda: strategies.SymbolicModel((0, 1, -1, 2), 0.25, 1.0),
}


@pytest.mark.paper("Definition 2.2", "Lemma 2.4", "Lemma 2.5", "Lemma 2.7", "Lemma 2.8")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough if n in SLOW else ()) for n in MADE]
)
def test_all_properties_hold(name: str) -> None:
    start = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.1], dtype=torch.float64)
    x_init = start if name in ("scalar_loss", "custom_noise") else None
    report = verify(MADE[name](), effort=SMALL, checks=CHECKS, x_init=x_init)
    assert report.verdict == "holds", str(report)
    # The equations have nothing to say where the noise vanishes on the manifold.
    without = 2 if name == "interpolation" else 0
    assert len(report) == len(CHECKS) - without


def test_interpolation_is_told_from_noise() -> None:
    assert not drift.has_diffusion(Subject.of(MADE["interpolation"]()))
    assert drift.has_diffusion(Subject.of(MADE["label_noise_circle"]()))
    radial = CustomNoise(lambda x: x[:, None] / (x @ x))
    assert not drift.has_diffusion(Subject.of(problems.great_circle(noise=radial)))


def test_results_have_pictures_and_numbers() -> None:
    report = verify(problems.great_circle(), effort=SMALL, checks=CHECKS[:2])
    for result in report:
        assert result.statistic <= result.limit < 1e-11
        (picture,) = result.pictures
        assert picture.logy
        assert all(len(series.x) == len(series.y) > 5 for series in picture.series)
