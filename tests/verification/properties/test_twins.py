"""What is subtly broken is rejected, each by the check that is for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, Geometry, Problem, SamplingNoise, SphericalNoise, problems
from manifold_sde.verification.properties.defect import COARSEST
from manifold_sde.verification.subject import Subject
from tests.verification.properties import twins
from tests.verification.properties.twins import check

LOSSES = "scale invariance of the losses"
DEGREES = "degrees of the derivatives"
EULER = "Euler's theorem"
NOISE_DEGREE = "degrees of the noise"
NOISE_RADIAL = "noise orthogonal to the weights"
CONE = "the attraction set is a cone and Phi 1-homogeneous"
FIXED = "Phi fixes the manifold and keeps the norm"
FLOW = "Phi against SciPy's gradient flow"
PROJECTOR = "the derivative of Phi is the orthogonal projector"
SECOND = "the second derivative of Phi"
NORM = "the norm in the drift of (8) and (13)"
CALCULI = "Ito and Stratonovich forms of (13)"
RESCALED = "SGD at the rates of (9) and of Remark 4.2"
DECAY = "SGD with weight decay as SGD without it"


def rejects(name: str, subject: Subject) -> None:
    result = check(name, subject)
    assert result.verdict == "fails", result
    assert result.statistic > result.limit
    assert result.limit <= COARSEST
    assert result.meaning


# Losses and noise.


def with_eps(x: Tensor) -> Tensor:
    return 0.5 * x[2] ** 2 / (x @ x + 1e-3)


def with_penalty(x: Tensor) -> Tensor:
    return 0.5 * x[2] ** 2 / (x @ x) + 1e-3 * torch.tanh(x[0])


def one_sample(x: Tensor) -> Tensor:
    u = x / x.norm()
    eps = torch.tensor([0.0, 0.0, 0.0, 1e-3], dtype=x.dtype)
    tilted = torch.stack([u[0], -u[0], u[1], -u[1]])
    return 0.5 * u[2] ** 2 + 0.3 * tilted + eps * torch.sin(x[0])


LOSS_TWINS = {
    "eps": (with_eps, SphericalNoise(0.3)),
    "additive": (with_penalty, SphericalNoise(0.3)),
    "sample": (one_sample, SamplingNoise()),
}


@pytest.mark.twin(LOSSES, "a loss with an eps of 1e-3 in its norm, a term of 1e-3, or one sample")
@pytest.mark.twin(DEGREES, "the derivatives of a loss that is scale-invariant up to 1e-3")
@pytest.mark.twin(EULER, "a loss that is scale-invariant up to 1e-3")
@pytest.mark.paper("Definition 2.2", "Lemma 2.4", "Lemma 2.5")
@pytest.mark.parametrize("name", [LOSSES, DEGREES, EULER])
@pytest.mark.parametrize("loss", LOSS_TWINS)
def test_a_loss_that_is_nearly_scale_invariant_is_rejected(name: str, loss: str) -> None:
    function, noise = LOSS_TWINS[loss]
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rejects(name, Subject.of(Problem(function, 3, noise, rank=1), x_init=start))


@pytest.mark.twin(DEGREES, "a derivative whose degree is off by 0.01")
@pytest.mark.paper("Lemma 2.4")
@pytest.mark.parametrize(
    "twin", [twins.WrongGradient, twins.WrongHessian, twins.WrongThirdDerivative]
)
def test_a_derivative_of_another_degree_is_rejected(twin: type[Problem]) -> None:
    problem = twins.as_class(problems.varying_circle(), twin)
    result = check(DEGREES, Subject.of(problem))
    assert result.verdict == "fails"
    order = {"WrongGradient": "gradient", "WrongHessian": "Hessian"}.get(twin.__name__, "third")
    assert order in result.detail
    assert result.detail.count("degree") == 1


def tangent_columns(x: Tensor) -> Tensor:
    turned = torch.stack([-x[1], x[0], torch.zeros_like(x[0])])
    return turned[:, None] / (x @ x)


@pytest.mark.twin(NOISE_DEGREE, "a noise of degree 0")
@pytest.mark.twin(RESCALED, "a noise of degree 0")
@pytest.mark.paper("Equation (9)", "Remark 4.2")
@pytest.mark.parametrize("name", [NOISE_DEGREE, RESCALED])
def test_a_noise_of_degree_0_is_rejected(name: str) -> None:
    noise = CustomNoise(lambda x: 0.3 * tangent_columns(x) * x.norm())
    rejects(name, Subject.of(problems.varying_circle(noise=noise)))


@pytest.mark.twin(NOISE_RADIAL, "a noise with a radial part of a thousandth")
def test_a_noise_with_a_radial_part_is_rejected() -> None:
    noise = CustomNoise(lambda x: tangent_columns(x) + 1e-3 * x[:, None] / (x @ x))
    subject = Subject.of(problems.varying_circle(noise=noise))
    rejects(NOISE_RADIAL, subject)
    assert check(NOISE_DEGREE, subject).verdict == "holds"


# Phi and its derivatives.


@pytest.mark.twin(FLOW, "the nearest point of the manifold in the place of Phi")
@pytest.mark.twin(SECOND, "the second derivative of Phi beside the nearest point")
@pytest.mark.paper("Definition 2.6")
@pytest.mark.parametrize("name", [FLOW, SECOND])
def test_the_nearest_point_is_rejected(name: str) -> None:
    subject = twins.with_geometry("varying_circle", twins.NearestPoint)
    rejects(name, subject)
    assert check(FIXED, subject).verdict == check(PROJECTOR, subject).verdict == "holds"


@pytest.mark.twin(CONE, "a flow that stops at a gradient of fixed size")
@pytest.mark.twin(FIXED, "a limit map that shortens, or that moves the points of the manifold")
@pytest.mark.twin(FLOW, "a flow that stops a thousandth of the way before the manifold")
@pytest.mark.paper("Lemma 2.7")
@pytest.mark.parametrize(
    ("name", "twin"),
    [
        (CONE, twins.AbsoluteTolerance),
        (FIXED, twins.ShorterNearestPoint),
        (FIXED, twins.DriftingPoints),
        (FLOW, twins.StoppedEarly),
    ],
)
def test_another_limit_map_is_rejected(name: str, twin: type[Geometry]) -> None:
    rejects(name, twins.with_geometry("varying_circle", twin))


@pytest.mark.twin(PROJECTOR, "an oblique projector, a rank that is one too small")
@pytest.mark.paper("Lemma 2.8")
@pytest.mark.parametrize(
    "twin", [twins.ObliqueProjector, twins.RankTooSmall, twins.TangentTooLarge]
)
def test_another_projector_is_rejected(twin: type[Geometry]) -> None:
    rejects(PROJECTOR, twins.with_geometry("normalized_linear", twin))


@pytest.mark.twin(SECOND, "the second derivative dropped, halved, turned, or without a term")
@pytest.mark.paper("Equation (5)")
@pytest.mark.parametrize("change", twins.SECOND_DERIVATIVES)
def test_another_second_derivative_is_rejected(change: str) -> None:
    twin = twins.second_derivative_twin(twins.SECOND_DERIVATIVES[change])
    rejects(SECOND, twins.with_geometry("mixed_noise_circle", twin))


# The equations.


@pytest.mark.twin(NORM, "(13) with C off by 5 %, or with the Stratonovich drift as Ito's")
@pytest.mark.twin(CALCULI, "a Stratonovich drift that leaves the manifold, or that is off by 1e-3")
@pytest.mark.paper("Equation (13)")
@pytest.mark.parametrize(
    ("name", "twin"),
    [
        (NORM, twins.OtherRatio),
        (NORM, twins.UncorrectedCalculus),
        (CALCULI, twins.UncorrectedCalculus),
        (CALCULI, twins.NormalDrift),
        (CALCULI, twins.TangentDrift),
    ],
)
def test_another_drift_is_rejected(name: str, twin: Callable[..., Any]) -> None:
    rejects(name, twins.on("mixed_noise_circle", limiting_diffusion=twin))


# SGD.


@pytest.mark.twin(DECAY, "weight decay off by 5 %, coupled to the loss, or other effective rates")
@pytest.mark.paper("Remark 3.3")
@pytest.mark.parametrize(
    "changed",
    [
        {"run_sgd": twins.sgd_with(weight_decay=1.05)},
        {"run_sgd": twins.coupled_decay},
        {"time_scale": twins.WrongEffectiveRates},
        {"time_scale": twins.wrong_decay},
    ],
)
def test_another_weight_decay_is_rejected(changed: dict[str, Any]) -> None:
    rejects(DECAY, twins.on("mixed_noise_circle", **changed))


@pytest.mark.twin(RESCALED, "weight decay without the learning rate")
@pytest.mark.paper("Equation (9)")
def test_coupled_weight_decay_is_rejected() -> None:
    rejects(RESCALED, twins.on("mixed_noise_circle", run_sgd=twins.coupled_decay))
