"""Assumption 2.1: four derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import loss_checks
from manifold_sde.errors import DifferentiationError, NonFiniteError
from manifold_sde.problem import Problem
from manifold_sde.verification.assumptions.survey import Survey, assumption, show_point
from manifold_sde.verification.result import Result, found
from manifold_sde.verification.sampling import unit

#: Nodes of a line, its length at unit norm, and how often the interval of its largest increment is
#: divided into how many parts.
_NODES, _LENGTH, _ROUNDS, _PARTS = 33, 1.0, 4, 6
#: Part of the first increment that is left after them where there is a jump.
_JUMP = 0.05
#: Increment, relative to the largest value along the line, that counts as rounding.
_ROUNDING = 1e-6
#: Points at which derivatives are compared with differences.
_COMPARED = 6
#: Numbers of the points that derivatives are taken at together.
_AT_ONCE = 2**16


def line_derivatives(problem: Problem, x: Tensor, v: Tensor) -> Tensor:
    """Derivatives of order 1 to 4 of the loss along directions: (n, D), (n, D) -> (n, 4)."""
    loss = problem.pointwise

    def at(z: Tensor, a: Tensor) -> Tensor:
        def third(y: Tensor) -> Tensor:
            return (loss.third_derivative(y, a, a) * a).sum()

        first, second = ((d * a).sum() for d in (loss.gradient(z), loss.hessian_product(z, a)))
        return torch.stack([first, second, third(z), loss.along(third, z, a)])

    return vmap(at, chunk_size=max(1, _AT_ONCE // x.shape[1]))(x, v)


def find_jumps(problem: Problem, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Jumps of the derivatives of order 1 to 4 along lines through points.

    On each line and for each order the interval of the largest increment is divided again and
    again. The increment of a continuous function goes to zero with it, that over a jump does not.

    Args:
        problem: The problem.
        x: Middle points of the lines (n, D).
        v: Unit directions (n, D).

    Returns:
        What is left of the increment, relative to the largest value along the line, 0 where it
        has gone to zero: (n, 4), and the places (n, 4, D).
    """
    nodes = torch.linspace(-0.5 * _LENGTH, 0.5 * _LENGTH, _NODES, dtype=x.dtype)
    places = x[:, None] + nodes[:, None] * v[:, None]
    values = line_derivatives(
        problem, places.flatten(0, 1), v[:, None].expand_as(places).flatten(0, 1)
    ).reshape(len(x), _NODES, 4)
    scale = values.abs().amax(1)
    increments = values.diff(dim=1).abs()
    first, index = increments.max(dim=1)
    low = nodes[index]  # (n, 4): an interval for each order
    width = float(nodes[1] - nodes[0])
    order = torch.arange(4)
    left = values.gather(1, index[:, None])[:, 0]
    right = values.gather(1, index[:, None] + 1)[:, 0]
    ends = torch.stack([left, right], dim=-1)
    inside = torch.arange(1, _PARTS, dtype=x.dtype)
    for _ in range(_ROUNDS):
        width /= _PARTS
        middles = x[:, None, None] + (low[..., None] + inside * width)[..., None] * v[:, None, None]
        along = v[:, None, None].expand_as(middles)
        inner = line_derivatives(problem, middles.flatten(0, 2), along.flatten(0, 2))
        inner = inner.reshape(len(x), 4, _PARTS - 1, 4)[:, order, :, order].transpose(0, 1)
        row = torch.cat([ends[..., :1], inner, ends[..., 1:]], dim=-1)
        part = row.diff(dim=-1).abs().argmax(-1, keepdim=True)
        ends = row.gather(-1, torch.cat([part, part + 1], dim=-1))
        low = low + part[..., 0] * width
    last = ends.diff(dim=-1)[..., 0].abs()
    jumped = (last > _JUMP * first) & (last > _ROUNDING * scale) & (scale > 0)
    jumped |= ~torch.isfinite(last)
    size = torch.where(jumped, (last / scale.clamp(min=1e-300)).nan_to_num(nan=1.0), 0.0)
    return size, x[:, None] + low[..., None] * v[:, None]


def check_smoothness(survey: Survey) -> Result:
    """Derivatives of order 1 to 4 exist and are finite, as far as it can be seen."""
    problem, points = survey.subject.problem, _points(survey)
    try:
        worst, order, where = _against_differences(problem, points[:_COMPARED])
    except (DifferentiationError, NonFiniteError) as error:
        return _fails(f"{error.problem}: {error.received}", error.remedy)
    directions = unit(survey.subject.normals(62, *points.shape))
    jumps, places = find_jumps(problem, points, directions)
    if bool((jumps > 0).any()):
        first = int((jumps > 0).any(0).nonzero()[0])
        line = int(jumps[:, first].argmax())
        return _fails(
            f"the derivative of order {first + 1} jumps by {float(jumps[line, first]):.2g} of "
            f"its size at {show_point(places[line, first])}, on "
            f"{int((jumps[:, first] > 0).sum())} of {len(points)} lines near the minimisers",
            "Replace what has a kink (ReLU, absolute values, maxima, max-pooling) by "
            "something smooth, such as softplus or tanh, or take what follows as a statement "
            "between the kinks.",
            float(jumps[line, first]),
        )
    if worst > loss_checks.TOLERANCE:
        return _fails(
            f"the {order} by automatic differentiation is off the quotient of differences by "
            f"{worst:.2g} at {show_point(where)}",
            "A derivative is cut (detach, no_grad), or torch has it wrong.",
            worst,
        )
    return found(
        "holds",
        f"four derivatives are finite and without a jump on {len(points)} lines through "
        f"points near the minimisers, and agree with differences to {worst:.1g}",
        worst,
        loss_checks.TOLERANCE,
    )


def _points(survey: Survey) -> Tensor:
    """Points of the manifold as far as there are any, and random directions."""
    n = max(survey.effort.points // 2, survey.lines)
    reached = survey.arrived[: n // 2]
    return torch.cat([reached, survey.starts[: n - len(reached)]])


def _against_differences(problem: Problem, points: Tensor) -> tuple[float, str, Tensor]:
    """The largest error of a derivative that is one for sure, its name, and the place."""
    worst, name, where = 0.0, "gradient", points[0]
    for x in points:
        for order, (error, reliable) in loss_checks.derivative_errors(problem.pointwise, x).items():
            if error > worst and (reliable or error <= loss_checks.TOLERANCE):
                worst, name, where = error, order, x
    return worst, name, where


def _fails(detail: str, meaning: str, size: float = float("nan")) -> Result:
    return found("fails", detail, size, loss_checks.TOLERANCE, meaning)


CHECKS = (assumption("four derivatives", ("Assumption 2.1",), check_smoothness),)
