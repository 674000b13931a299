"""Properties of SGD that hold path by path, on the same samples: (9) and weight decay as a rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_sde import loss_checks
from manifold_sde.arguments import check_positive
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.problem import Problem
from manifold_sde.sdes import WeightDecaySDE
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties.defect import (
    Defect,
    flat_points,
    property_check,
    rounding,
)
from manifold_sde.verification.spectra import largest_curvature
from manifold_sde.verification.subject import Subject

#: Steps at which runs are compared.
_STEPS = (1, 10, 40, 100)
#: Displacement of a step, relative to the norm: small enough that rounding is not amplified.
_STEP_SIZE = 0.1
#: eta lambda of the runs that are compared: the norm falls by at most a fifth over the steps, so
#: that steps which start small stay small.
_DECAYS = (2e-3, 1e-4)


def stable_rate(problem: Problem | Subject, x: Tensor) -> float:
    """A learning rate with which SGD from x is stable, and rounding errors do not grow.

    Args:
        problem: The problem.
        x: Starts (..., D).

    Returns:
        0.1 |x|^2 over the larger of the size of H (its largest eigenvalue, where it does not fit
        into memory) and the noise's size, at unit norm.
    """
    owner = Subject.of(problem).problem
    points = flat_points(x, owner.dim)
    square = float(points.square().sum(1).min())
    unit = points / points.norm(dim=1, keepdim=True)
    if owner.dim <= DENSE_LIMIT:
        curvature = torch.linalg.matrix_norm(owner.hessian(unit), ord="fro").max()
    else:
        curvature = torch.stack([largest_curvature(owner, z) for z in unit]).max()
    noise = owner.noise_trace(unit).max().sqrt()
    return _STEP_SIZE * square / max(float(curvature), float(noise), 1e-12)


def reparametrisation(
    problem: Problem | Subject,
    x: Tensor,
    lr: float,
    weight_decay: float,
    C: float | None = None,
    *,
    seed: int = 0,
) -> Defect:
    """Runs of SGD at (eta, lambda, x) and at (9)'s rates have the same directions, path by path.

    (9) takes (sqrt(eta lambda), sqrt(eta lambda), (lambda / eta)^(1/4) x); Remark 4.2, of which it
    is the case C = eta / lambda, takes (C^(-1/2) eta, C^(1/2) lambda, C^(-1/4) x).

    Args:
        problem: The problem.
        x: Starts (..., D), a path for each; steps should be small (:func:`stable_rate`), so that
            rounding is not amplified.
        lr: Learning rate eta.
        weight_decay: Weight decay lambda, positive for (9).
        C: The factor of Remark 4.2, or ``None`` for (9).
        seed: Seed of the samples.

    Returns:
        The largest difference of directions, and of norms after scaling, over 100 steps.

    Source: equation (9), Remark 4.2.
    """
    subject = Subject.of(problem)
    starts = flat_points(x, subject.problem.dim)
    lr, weight_decay, C = _checked(lr, weight_decay, C)
    ratio = lr / weight_decay if C is None else C
    rates = (lr / math.sqrt(ratio), weight_decay * math.sqrt(ratio))
    factor = ratio**-0.25
    one = subject.run_sgd(subject.problem, starts, lr, weight_decay, _STEPS, seed=seed).ys
    other = subject.run_sgd(subject.problem, factor * starts, *rates, _STEPS, seed=seed).ys
    shown = "(9)" if C is None else f"C = {C:g} of Remark 4.2"
    return Defect.of(
        _gap(one, other / factor),
        _tolerance(starts),
        f"the same directions at the rates of {shown}",
    )


def decay_as_rate(
    problem: Problem | Subject, x: Tensor, lr: float, weight_decay: float, *, seed: int = 0
) -> Defect:
    """SGD with weight decay is a_k times SGD without it at the rates eta_k / (a_k a_{k+1}).

    a_k is the product of the 1 - eta_j lambda_j. The rates are a schedule here: eta falls to a
    half, lambda is switched off for a while. The products are formed here, and those of the time
    scale compared with them.

    Args:
        problem: The problem.
        x: Starts (..., D), a path for each, as in :func:`reparametrisation`.
        lr: Learning rate at the start.
        weight_decay: Weight decay at the start.
        seed: Seed of the samples.

    Returns:
        The largest difference of the runs, and of the rates.

    Source: Theorem 3.2 and Remark 3.3, path by path.
    """
    subject = Subject.of(problem)
    starts = flat_points(x, subject.problem.dim)
    lr, weight_decay, _ = _checked(lr, weight_decay, None)
    count = _STEPS[-1]
    k = torch.arange(count, dtype=torch.float64)
    rates = lr * (1.0 - 0.5 * k / count)
    decays = torch.where((k > 0.3 * count) & (k < 0.5 * count), 0.0, weight_decay)
    left = torch.cat([torch.ones(1).double(), torch.cumprod(1.0 - rates * decays, 0)])
    effective = rates / (left[:-1] * left[1:])
    scale = subject.time_scale(rates.tolist(), decays.tolist())
    claimed = torch.as_tensor(scale.effective_lr(range(count)))
    with_decay = subject.run_sgd(
        subject.problem, starts, rates.tolist(), decays.tolist(), _STEPS, seed=seed
    ).ys
    without = subject.run_sgd(
        subject.problem, starts, effective.tolist(), 0.0, _STEPS, seed=seed
    ).ys
    a = left[list(_STEPS)].to(starts)[:, None, None]
    rate_gap = (claimed / effective - 1.0).abs().max().to(starts)
    values = torch.cat([_gap(with_decay, a * without), rate_gap[None]])
    return Defect.of(values, _tolerance(starts), "weight decay as a growing learning rate")


def decay_equation_scaling(
    problem: Problem | Subject, x: Tensor, lr: float, weight_decay: float, C: float
) -> Defect:
    """Remark 4.2 for the SDE (3): its coefficients at the two rates differ by C^(-1/4).

    Args:
        problem: The problem.
        x: Points (..., D), not 0.
        lr: Learning rate eta.
        weight_decay: Weight decay lambda.
        C: The factor of Remark 4.2.

    Returns:
        The larger of the relative differences of drift and of diffusion.

    Source: Remark 4.2.
    """
    owner = Subject.of(problem).problem
    lr, weight_decay, _ = _checked(lr, weight_decay, None)
    points, C = flat_points(x, owner.dim), check_positive("C", C, "C=2.0")
    time, factor = torch.zeros((), dtype=points.dtype), C**-0.25
    one = WeightDecaySDE(owner, lr, weight_decay)
    other = WeightDecaySDE(owner, lr / math.sqrt(C), weight_decay * math.sqrt(C))
    values = []
    w = loss_checks.fixed_directions(owner.n_noise, 1).to(points).expand(len(points), -1)

    def coefficients(sde: WeightDecaySDE, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = owner.dim <= DENSE_LIMIT
        return sde.f(time, x), (sde.g(time, x).flatten(1) if whole else sde.g_prod(time, x, w))

    for here, there in zip(
        coefficients(one, points), coefficients(other, factor * points), strict=True
    ):
        size = here.norm(dim=1).max().clamp(min=1e-300)
        values.append((there / factor - here).norm(dim=1) / size)
    return Defect.of(
        torch.maximum(*values), rounding(points), f"(3) at C = {C:g} of Remark 4.2 is (3) scaled"
    )


def _checked(lr: float, weight_decay: float, C: float | None) -> tuple[float, float, float | None]:
    """The rates, and the factor of Remark 4.2 or ``None`` for (9): positive numbers."""
    return (
        check_positive("lr", lr, "lr=0.01"),
        check_positive("weight_decay", weight_decay, "weight_decay=0.05"),
        None if C is None else check_positive("C", C, "C=2.0, or None for (9)"),
    )


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """Largest relative difference over the steps, of paths (K, n, D)."""
    gap = ((one - other).norm(dim=2) / other.norm(dim=2)).amax(0)
    return torch.where(torch.isnan(gap), torch.inf, gap)


def _tolerance(starts: Tensor) -> float:
    """Rounding of each step adds up; steps this small do not amplify it."""
    return _STEPS[-1] * rounding(starts)


def _starts(subject: Subject, effort: Effort) -> tuple[Tensor, float]:
    near = subject.attraction_points(min(4, effort.points))
    x = near if len(near) else subject.start[None]
    return x, stable_rate(subject, x)


def _check_rescaling(subject: Subject, effort: Effort) -> list[Defect]:
    x, lr = _starts(subject, effort)
    seed = subject.seed
    slow, fast = (decay / lr for decay in _DECAYS[::-1])
    return [
        reparametrisation(subject, x, lr, fast, seed=seed),
        reparametrisation(subject, x, lr, slow, C=3.0, seed=seed),
        decay_equation_scaling(subject, x, lr, fast, C=3.0),
    ]


def _check_decay(subject: Subject, effort: Effort) -> list[Defect]:
    x, lr = _starts(subject, effort)
    return [decay_as_rate(subject, x, lr, _DECAYS[0] / lr, seed=subject.seed)]


#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "SGD at the rates of (9) and of Remark 4.2",
        ("Equation (9)", "Remark 4.2"),
        _check_rescaling,
        "Learning rate and weight decay do not act through their product and the norm alone: the "
        "loss or the noise does not have the degree that scale invariance gives it.",
    ),
    property_check(
        "SGD with weight decay as SGD without it",
        ("Theorem 3.2", "Remark 3.3"),
        _check_decay,
        "Weight decay is not a change of the learning rate here: the loss or the noise is not "
        "scale-invariant, or the decay is not the decoupled one of (1).",
    ),
)
