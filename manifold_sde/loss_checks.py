"""What a function of the user's has to do before it is taken for a loss.

It is evaluated at fixed test points when a problem is made: what it returns, that it is a fixed
function, that ``torch.func`` can batch it and differentiate it three times, and that the
derivatives are those of the function. The last is measured against differences, because a
derivative can be cut without an error (``detach``, ``.item()``, ``no_grad``), and because torch
itself differentiates some of its functions wrongly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import philox
from manifold_sde.derivatives import integer
from manifold_sde.elementary import functions_called
from manifold_sde.errors import ArgumentError, DifferentiationError, DTypeError, NonFiniteError
from manifold_sde.pointwise import Pointwise

#: Names of the derivatives, in the order of differentiation.
ORDERS = ("gradient", "hessian", "third")
#: Relative difference between a derivative and the quotient of differences that is an error.
TOLERANCE = 1e-3
#: A derivative below this part of the lower one, at unit distance, counts as zero.
_ZERO = 1e-8
#: Steps of the difference quotients, relative to the norm of the point.
STEPS = (1e-3, 1e-4)

_ANY_BATCH = "a function that torch.func can batch and differentiate three times"
#: What to write instead, by what torch says when it fails.
_REMEDIES = (
    (
        ("memory_format",),
        "no memory_format inside the loss: x.contiguous(); the layout changes no value",
    ),
    (
        ("inplace", "in-place", "ZeroTensors"),
        "nothing written into a tensor: torch.cat, torch.stack or torch.where build a new one, "
        "and x / (x * x).sum().sqrt() is the elementary normalisation",
    ),
    (
        (".item()", "data-dependent"),
        "no .item(), float(x) or `if` on values: torch.where(condition, a, b)",
    ),
    (
        (".data", "`data`"),
        "no .data: the value itself; modules are made and converted outside the loss",
    ),
    (
        ("dynamic shape",),
        "no boolean mask as an index: torch.where(mask, a, b)",
    ),
    (
        ("random operation",),
        "a loss is a fixed function of x: switch dropout off, draw random constants outside",
    ),
    (
        ("autograd.Function", "jvp function", "once_differentiable"),
        "ordinary operations in place of the custom autograd.Function; or give it setup_context, "
        "jvp and generate_vmap_rule = True, with backward and jvp in differentiable operations",
    ),
    (
        ("forward AD", "not implemented", "not differentiable"),
        "write the operation that torch names in elementary ones: torch.where on the two branches "
        "of huber_loss, ((a[:, None] - b) ** 2).sum(-1).sqrt() for cdist, "
        "a * torch.sigmoid(b) for glu",
    ),
    (
        ("storage", "numpy"),
        "torch operations from x to the result: no numpy, no float(...)",
    ),
    (
        ("dtype", "scalar type", "device"),
        "constants of the dtype and device of x: Z.to(x) in place of Z",
    ),
)
#: What to write in place of functions whose higher derivatives torch gets wrong, by their names.
_WRONG = {
    "solve": "torch.linalg.inv(A) @ b for solve",
    "tensorsolve": "torch.linalg.inv(A) @ b for tensorsolve",
    "triangular_solve": "torch.linalg.inv(A) @ b for triangular_solve",
    "solve_triangular": "torch.linalg.inv(A) @ b for solve_triangular",
    "det": "2 * torch.linalg.cholesky(A).diagonal().log().sum() for log det(A), A > 0",
    "logdet": "2 * torch.linalg.cholesky(A).diagonal().log().sum() for logdet, A > 0",
    "slogdet": "2 * torch.linalg.cholesky(A).diagonal().log().sum() for slogdet, A > 0",
    "cumprod": "the products one by one for cumprod",
    "native_layer_norm": "torch.nn.functional.layer_norm for native_layer_norm",
    "native_batch_norm": "torch.nn.functional.batch_norm for native_batch_norm",
}


def remedy(message: str) -> str:
    """What to write instead, from what torch said when a loss failed."""
    for fragments, advice in _REMEDIES:
        if any(fragment in message for fragment in fragments):
            return advice
    return "write the loss in elementary torch operations on its argument"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def check_dim(dim: object) -> int:
    """Check an ambient dimension, and return it as an int.

    Raises:
        ArgumentError: If it is not an integer of at least 2.
    """
    value = integer(dim)
    if value is None or value < 2:
        raise ArgumentError(
            "dim is not the dimension of a space with directions",
            received=repr(dim),
            expected="an integer D of at least 2",
            remedy="pass the length of the vector x that the loss takes",
        )
    return value


def fixed_directions(dim: int, count: int = 16) -> Tensor:
    """Fixed random directions (count, D), from the counter-based generator."""
    paths = torch.arange(count)
    points = philox.normals((0x5EED, 0), 0, paths, torch.tensor(0), dim, torch.float64)
    points = points.T.contiguous()  # in-place writes fail or work by the layout
    return points / points.norm(dim=1, keepdim=True)


def try_function(function: Callable[[Tensor], Tensor], dim: int, what: str) -> Tensor:
    """Value of a user's function at one test point.

    Raises:
        ArgumentError: If it raises, or records gradients of something else.
        DTypeError: If it does not return a tensor of the dtype of its argument.
        NonFiniteError: If the value is not finite.
    """
    point = fixed_directions(dim, 1)[0]
    try:
        value = function(point.clone())
    except Exception as error:
        raise ArgumentError(
            f"the {what} raised at a test point",
            received=first_line(error),
            expected=f"a function of one float64 vector of shape ({dim},)",
            remedy="check dim, write the function for ONE vector, and give its constants the "
            "dtype and device of x: Z.to(x)",
        ) from error
    if not isinstance(value, Tensor) or value.dtype != point.dtype:
        received = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DTypeError(
            f"the {what} does not return a tensor of the dtype of its argument",
            received=received,
            expected=f"{point.dtype} for a vector of {point.dtype}",
            remedy="use torch operations from x to the result, without float(...), .float() or "
            "numpy; constants as Z.to(x), modules as module.double()",
        )
    if value.requires_grad:
        raise ArgumentError(
            f"the {what} records gradients of something that is not x",
            received="a value that requires grad, at an x that does not",
            expected="constants in which nothing is trained, so that no graph grows from step to "
            "step",
            remedy="module.requires_grad_(False) and constant.detach() where they are made",
        )
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"the {what} is not finite at a test point",
            received=f"{value.flatten()[:4].tolist()} at a random unit vector",
            expected="a finite value at every x other than 0",
            remedy="check logarithms, divisions and square roots",
        )
    return value


def derivative_errors(loss: Pointwise, x: Tensor) -> dict[str, tuple[float, bool]]:
    """Derivatives by automatic differentiation, in a batch, against quotients of differences.

    Each order is compared with central differences of the order before, along one direction.

    Args:
        loss: The loss.
        x: Point (D,).

    Returns:
        For "gradient", "hessian" and "third" the relative difference, and whether the quotients
        at two steps agree so well with each other that the difference is the derivative's error.

    Raises:
        DifferentiationError: If torch cannot batch or differentiate the loss.
        NonFiniteError: If a derivative is not finite.
    """
    size = float(x.norm())
    # With a part along x: a norm whose derivative is cut shows there.
    directions = fixed_directions(loss.dim, 3)[1:].to(x) + x / size
    directions = directions / directions.norm(dim=1, keepdim=True)
    a, b = directions
    results = {}
    for order, name in enumerate(ORDERS, start=1):
        try:
            exact = _derivative(loss, order, x, directions)
            quotients, below = _quotients(loss, order, x, a, b, [h * size for h in STEPS])
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _not_differentiable(error, order) from error
        if not bool(torch.isfinite(exact).all()):
            raise NonFiniteError(
                f"the {_ordinal(order)} derivative of the loss is not finite at a test point",
                received=f"{exact.flatten()[:4].tolist()}",
                expected="finite derivatives at every x other than 0",
                remedy="check square roots, norms and quotients that vanish at some x; "
                "torch.where does not hide a branch whose derivative is infinite",
            )
        results[name] = compare(exact, quotients, float(below.norm()) / size)
    return results


def compare(exact: Tensor, quotients: list[Tensor], size: float) -> tuple[float, bool]:
    """A derivative against difference quotients at two steps.

    Args:
        exact: The derivative.
        quotients: The quotients.
        size: Size of the differentiated function, over the distance on which it is smooth.

    Returns:
        Relative difference at the better step, and whether the quotients agree so well with each
        other that it is the derivative's error: not so at a kink or in single precision.
    """
    off = min(float((exact - q).norm()) for q in quotients)
    scale = max(*(float(v.norm()) for v in (exact, *quotients)), _ZERO * size, 1e-300)
    return off / scale, float((quotients[0] - quotients[1]).norm()) < 0.1 * off


def _derivative(loss: Pointwise, order: int, x: Tensor, directions: Tensor) -> Tensor:
    """Derivative of an order at x, as it is computed in a batch of points and of directions."""
    a, b = directions
    points = torch.stack([x, x + 0.1 * x.norm() * b])
    if order == 1:
        return vmap(loss.gradient)(points)[0] @ a

    def along(z: Tensor, v: Tensor) -> Tensor:
        return loss.hessian_product(z, v) if order == 2 else loss.third_derivative(z, v, b)

    return vmap(lambda z: vmap(lambda v: along(z, v))(directions))(points)[0, 0]


def _quotients(
    loss: Pointwise, order: int, x: Tensor, a: Tensor, b: Tensor, steps: list[float]
) -> tuple[list[Tensor], Tensor]:
    """Central differences of the derivative one order lower, and that derivative itself."""

    def below(z: Tensor) -> Tensor:
        if order == 1:
            return loss.loss(z)
        return loss.gradient(z) if order == 2 else loss.hessian_product(z, a)

    v = b if order == 3 else a
    shifts = torch.tensor([0.0, *steps, *(-h for h in steps)], dtype=x.dtype, device=x.device)
    here, *values = vmap(below)(x + shifts[:, None] * v)
    ahead, behind = values[: len(steps)], values[len(steps) :]
    return [(p - m) / (2.0 * h) for p, m, h in zip(ahead, behind, steps, strict=True)], here


def require_derivatives(loss: Pointwise, function: Callable[[Tensor], Tensor], what: str) -> None:
    """Refuse a function that is random, cannot be differentiated, or is differentiated wrongly.

    Args:
        loss: The loss.
        function: The user's function that it is made of.
        what: What the function is, for messages.

    Raises:
        DifferentiationError: With what to write instead.
        NonFiniteError: If a derivative is not finite.
    """
    point = fixed_directions(loss.dim, 1)[0]
    first, second = function(point.clone()), function(point.clone())
    if not torch.equal(first, second):
        raise DifferentiationError(
            f"the {what} is not a fixed function",
            received=f"values that differ by {float((first - second).abs().max()):.3g} at the "
            "same x",
            expected="the same value at every call",
            remedy="switch dropout off (module.eval()), and draw random constants outside",
        )
    wrong = _wrong_derivatives(loss, point)
    for other in fixed_directions(loss.dim, 5)[3:]:
        # Next to a kink, as in relu, quotients can agree with each other by chance.
        if wrong:
            there = _wrong_derivatives(loss, other)
            wrong = {name: error for name, error in wrong.items() if name in there}
    for name, error in wrong.items():
        order = ORDERS.index(name) + 1
        raise DifferentiationError(
            f"the {_ordinal(order)} derivative of the {what} is not the derivative of what it "
            "computes",
            received=f"a relative difference of {error:.2g} between automatic differentiation and "
            f"differences, in {name!r}",
            expected=f"at most {TOLERANCE:g}: {_ANY_BATCH}, without cutting a derivative",
            remedy=_what_is_wrong(order, function, point),
        )


def _wrong_derivatives(loss: Pointwise, x: Tensor) -> dict[str, float]:
    """Relative differences of the derivatives that are not those of the function, at a point."""
    errors = derivative_errors(loss, x)
    return {name: off for name, (off, reliable) in errors.items() if off > TOLERANCE and reliable}


def _what_is_wrong(order: int, function: Callable[[Tensor], Tensor], point: Tensor) -> str:
    called = functions_called(function, point.clone())
    names = [getattr(f, "__name__", "").removeprefix("linalg_") for f in called]
    known = dict.fromkeys(_WRONG[n] for n in names if n in _WRONG)
    if known and order > 1:
        return "torch differentiates some functions wrongly; write " + ", ".join(known)
    if order == 1:
        return (
            "let every value that depends on x keep its derivative: no detach(), .data, .item(), "
            "torch.no_grad(), torch.tensor(...) or straight-through estimator"
        )
    shown = ", ".join(dict.fromkeys(n for n in names if n and not n.startswith("__")))
    return (
        "backward and jvp of a custom autograd.Function have to be differentiable themselves; "
        f"otherwise write the functions of torch that are called in elementary ones: {shown}"
    )


def _not_differentiable(error: Exception, order: int) -> DifferentiationError:
    return DifferentiationError(
        f"the loss cannot be differentiated: its {_ordinal(order)} derivative fails",
        received=first_line(error),
        expected=_ANY_BATCH,
        remedy=remedy(str(error)),
    )


def _ordinal(order: int) -> str:
    return ("first", "second", "third")[order - 1]
