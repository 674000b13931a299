"""Points at which a problem is evaluated: of its dimension, and of a dtype that its loss takes."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.arguments import Points, check_point
from manifold_sde.errors import DifferentiationError, DTypeError
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.problem import Problem


def point_of(problem: Problem, x: Points, *, name: str = "x", values: bool = False) -> Tensor:
    """Check points (..., D) of a problem, and return them as a tensor.

    A loss was evaluated in double precision on the CPU when its problem was made. In another dtype
    or on another device it is evaluated here once, with the noise, at a fixed direction.

    Args:
        problem: The problem.
        x: The points, as :func:`~manifold_sde.arguments.check_point` takes them.
        name: Name used in messages.
        values: Whether values are needed: a meta tensor has a shape alone.

    Raises:
        DTypeError: If the loss or the noise cannot be evaluated in their dtype, on their device.
        ShapeError, NonFiniteError, ZeroVectorError: As ``check_point``.
    """
    x = check_point(x, problem.dim, name=name, values=values)
    if (x.dtype == torch.float64 and x.device.type == "cpu") or x.is_meta:
        return x
    key = ("taken", x.dtype, x.device)
    if problem.network is None and key not in problem.kernels:
        probe = fixed_directions(problem.dim, 1)[0].to(x.device, x.dtype)
        try:
            problem.loss(probe)
            problem.noise_trace(probe)
        except DifferentiationError as error:
            kind = str(x.dtype).removeprefix("torch.")
            place = "" if x.device.type == "cpu" else f" on {x.device}"
            back = "x.double().cpu()" if place else "x.double()"
            raise DTypeError(
                f"the loss or the noise of {problem.name!r} cannot be evaluated in {kind}{place}",
                received=f"{name} in {kind}{place}; {error.received}",
                expected="float64 on the CPU, or a loss and a noise that follow the dtype and "
                "device of x",
                remedy=f"{name}{back[1:]}, or constants as Z.to(x) in place of Z in the loss",
            ) from error
        problem.kernels[key] = True
    return x
