"""What a function of the user's has to do before it is taken for a loss.

It is evaluated at fixed test points when a problem is made: what it returns, that it is a fixed
function, that ``torch.func`` can batch it and differentiate it three times, and that the
derivatives are those of the function. The last is measured against differences, because a
derivative can be cut without an error (``detach``, ``.item()``, ``no_grad``), and because torch
itself differentiates some of its functions wrongly.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import reverse_mode, rng
from manifold_sde.arguments import check_integer
from manifold_sde.derivatives import has_custom_derivative
from manifold_sde.errors import (
    ArgumentError,
    DifferentiationError,
    DTypeError,
    ManifoldSDEError,
    NonFiniteError,
    ShapeError,
)
from manifold_sde.loss import LeastSquaresLoss, Loss
from manifold_sde.loss_trials import require_alike, require_fixed, require_uncut
from manifold_sde.remedies import (
    DIFFERENTIABLE,
    KEEP_DERIVATIVES,
    differentiating,
    first_line,
    ordinal,
)
from manifold_sde.torch_norms import (
    WRONG_OPERATIONS,
    ElementaryFunction,
    elementary,
    functions_called,
    wrong_operations,
)

#: Names of the derivatives, in the order of differentiation.
ORDERS = ("gradient", "hessian", "third")
#: Relative difference between a derivative and the quotients of differences that is an error: a
#: thousand times what rounding makes of them, so that a term of a thousandth of the loss shows.
TOLERANCE = 1e-7
#: A derivative below this part of the lower one, at unit distance, counts as zero.
_ZERO = 1e-8
#: Steps of the difference quotients, relative to the norm of the point: kinks lie between the
#: nodes of the large ones, rounding spoils the small ones.
STEPS = (1e-3, 1e-4, 1e-5)
#: Nodes and weights of central differences of fourth order.
_NODES = (-2.0, -1.0, 1.0, 2.0)
_WEIGHTS = (1 / 12, -2 / 3, 2 / 3, -1 / 12)
#: Points at which derivatives are compared, half of them beyond so many coordinates, and how far
#: from a point at which they are wrong that is looked at again.
_POINTS = 4
_LARGE = 4096
_NEAR = 0.01
#: Relative difference of derivatives by other modes that is rounding, four times what was seen of
#: 134 operations; more says that terms cancel, as in ``sinc``.
_SAME = 1e-14
#: Numbers of x that are evaluated at once.
_NUMBERS = 1 << 16


def check_dim(dim: object) -> int:
    """Check the dimension of a space with directions, of vectors that fit into memory."""
    remedy = "dim is the dimension of the vector x: a direction needs two coordinates"
    return check_integer("dim", dim, 2, (1 << 40) - 1, remedy)


def fixed_directions(dim: int, count: int = 16) -> Tensor:
    """Fixed random directions (count, D), from the counter-based generator."""
    paths = torch.arange(count)
    points = rng.normals((0x5EED, 0), 0, paths, torch.tensor(0), dim, torch.float64)
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
            remedy="check the data for NaN, and logarithms, divisions and square roots",
        )
    return value


def checked_loss(function: Callable[[Tensor], Tensor] | Loss, dim: int) -> Loss:
    """The loss that a user's function of one vector (D,) stands for, () or (Xi,).

    Raises:
        ShapeError, DTypeError, NonFiniteError, DifferentiationError: If it cannot be used.
    """
    if isinstance(function, Loss):
        return _of_dim(function, dim)
    dim = check_dim(dim)
    expected = "() for a scalar loss, or (Xi,) for Xi sample losses, at least one"
    remedy = "for SymPy expressions use Problem.from_sympy"
    plain, value = _evaluated(function, dim, "loss", (0, 1), expected, remedy)
    loss = Loss(plain, dim, value.shape[0] if value.dim() else None)
    require_derivatives(loss, plain, "loss")
    return loss


def checked_residuals(
    function: Callable[[Tensor], Tensor] | LeastSquaresLoss, dim: int
) -> LeastSquaresLoss:
    """The loss whose residuals (Xi,) or (Xi, K) a user's function of one vector (D,) returns.

    Raises:
        ShapeError, DTypeError, NonFiniteError, DifferentiationError: If it cannot be used.
    """
    if isinstance(function, LeastSquaresLoss):
        return _of_dim(function, dim)
    dim, what = check_dim(dim), "residual function"
    expected = "(Xi,), a residual a sample, or (Xi, K), K of them; at least one"
    remedy = "LeastSquaresProblem(lambda x: Z @ (x / x.norm()) - targets, dim, noise)"
    plain, value = _evaluated(function, dim, what, (1, 2), expected, remedy)
    loss = LeastSquaresLoss(plain, dim, len(value), value[0].numel())
    require_derivatives(loss, plain, what)
    return loss


def _evaluated(
    function: Callable[[Tensor], Tensor],
    dim: int,
    what: str,
    ranks: tuple[int, ...],
    expected: str,
    remedy: str,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A user's function in operations that torch differentiates, and its value at a test point."""
    if not callable(function):
        raise DTypeError(
            f"the {what} is not a function",
            received=type(function).__name__,
            expected="a function of one vector (D,) in plain torch",
            remedy=remedy,
        )
    value = try_function(ElementaryFunction(function), dim, what)
    if value.dim() not in ranks or value.numel() == 0:
        raise ShapeError(
            f"the value of the {what} has the wrong shape",
            received=f"{tuple(value.shape)} for x of shape ({dim},)",
            expected=expected,
            remedy="write the function for ONE vector, batches are made by the toolkit; check the "
            "data that it was made with",
        )
    return elementary(function, fixed_directions(dim, 1)[0]), value


_AnyLoss = TypeVar("_AnyLoss", bound=Loss)


def _of_dim(loss: _AnyLoss, dim: int) -> _AnyLoss:
    if loss.dim == dim:
        return loss
    raise ArgumentError(
        "dim is not the dimension of the loss",
        received=f"dim={dim} for a loss of vectors ({loss.dim},)",
        expected=f"dim={loss.dim}",
        remedy="dim=loss.dim",
    )


def derivative_errors(loss: Loss, x: Tensor) -> dict[str, tuple[float, bool]]:
    """Derivatives by automatic differentiation, in a batch, against quotients of differences.

    Each order is compared with central differences of the order before, along one direction.

    Args:
        loss: The loss.
        x: Point (D,).

    Returns:
        For "gradient", "hessian" and "third" the relative difference, and whether the quotients
        agree so well with each other that the difference is the derivative's error.

    Raises:
        DifferentiationError: If torch cannot batch or differentiate the loss.
        NonFiniteError: If a derivative is not finite.
        ShapeError: If x is not one point.
    """
    if x.dim() != 1:
        raise ShapeError(
            "derivatives are compared at one point",
            received=str(tuple(x.shape)),
            expected=f"({loss.dim},)",
            remedy="call it for each point",
        )
    return _derivative_errors(loss, x[None], *fixed_directions(loss.dim, 3)[1:].to(x))[0]


def _derivative_errors(
    loss: Loss, x: Tensor, a: Tensor, b: Tensor, kept: list[Tensor] | None = None
) -> list[dict[str, tuple[float, bool]]]:
    """The same at points (n, D), along directions a and b (D,); the derivatives may be kept."""
    sizes = x.norm(dim=1)
    # Of a storage of their own, as in use: writing into a tensor then fails here, too.
    directions = torch.stack([a, b])
    results: list[dict[str, tuple[float, bool]]] = [{} for _ in x]
    for order, name in enumerate(ORDERS, start=1):
        with differentiating(order):
            exact = _derivative(loss, order, x, directions)
            if kept is not None:
                kept.append(exact)
            found, below = _derivative_quotients(loss, order, x, a, b)
        if not bool(torch.isfinite(exact).all()):
            raise NonFiniteError(
                f"the {ordinal(order)} derivative of the loss is not finite at a test point",
                received=f"{exact.flatten()[:4].tolist()}",
                expected="finite derivatives at every x other than 0",
                remedy="check square roots, norms and quotients that vanish at some x; "
                "torch.where does not hide a branch whose derivative is infinite",
            )
        for i, result in enumerate(results):
            size = float(below[i].norm()) / float(sizes[i])
            result[name] = compare(exact[i], [q[i] for q in found], size)
    return results


def compare(exact: Tensor, quotients: list[Tensor], size: float) -> tuple[float, bool]:
    """A derivative against difference quotients at several steps.

    Args:
        exact: The derivative.
        quotients: The quotients, in the order of their steps.
        size: Size of the differentiated function, over the distance on which it is smooth.

    Returns:
        Relative difference at the best step, and whether quotients agree so well with each
        other that it is the derivative's error: not so at a kink or in single precision.
    """
    off = min(float((exact - q).norm()) for q in quotients)
    scale = max(*(float(v.norm()) for v in (exact, *quotients)), _ZERO * size, 1e-300)
    apart = min(float((p - q).norm()) for p, q in itertools.pairwise(quotients))
    return off / scale, apart < 0.1 * off


def quotients(
    function: Callable[[Tensor], Tensor], points: Tensor, direction: Tensor
) -> list[Tensor]:
    """Central differences of fourth order at several steps.

    Args:
        function: Function of one vector (D,).
        points: Points (n, D); steps are relative to their norms.
        direction: Direction (D,).

    Returns:
        A tensor (n, ...) for each of the steps.
    """
    sizes = points.norm(dim=1)
    shifts = torch.tensor([k * h for h in STEPS for k in _NODES], dtype=torch.float64).to(points)
    nodes = points + (shifts[:, None] * sizes)[..., None] * direction
    values = _mapped(function, nodes.flatten(0, 1))
    values = values.reshape(len(STEPS), len(_NODES), len(points), -1)
    weights = torch.tensor(_WEIGHTS, dtype=torch.float64).to(values)
    slopes = torch.tensordot(weights, values, ([0], [1])) / sizes[:, None]
    return [v / h for v, h in zip(slopes, STEPS, strict=True)]


def _mapped(function: Callable[..., Tensor], points: Tensor) -> Tensor:
    """A function of one vector on points (n, D), as many at once as fit into little memory."""
    return vmap(function, chunk_size=max(1, _NUMBERS // points.shape[1]))(points)


def _derivative(loss: Loss, order: int, x: Tensor, directions: Tensor) -> Tensor:
    """Derivative of an order, as it is computed in a batch of points and of directions."""
    a, b = directions
    if order == 1:
        return (_mapped(loss.gradient, x) @ a)[:, None]

    def along(z: Tensor, v: Tensor) -> Tensor:
        return loss.hessian_product(z, v) if order == 2 else loss.third_derivative(z, v, b)

    return _mapped(lambda z: vmap(lambda v: along(z, v))(directions), x)[:, 0]


def _derivative_quotients(
    loss: Loss, order: int, x: Tensor, a: Tensor, b: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Central differences of the derivative one order lower, and that derivative itself."""

    def below(z: Tensor) -> Tensor:
        if order == 1:
            return loss.loss(z)
        return loss.gradient(z) if order == 2 else loss.hessian_product(z, a)

    return quotients(below, x, b if order == 3 else a), _mapped(below, x)


def require_derivatives(
    loss: Loss, function: Callable[[Tensor], Tensor], what: str, *, alone: bool | None = None
) -> None:
    """Refuse a function that is random, cannot be differentiated, or is differentiated wrongly.

    Args:
        loss: The loss; it is told which modes were seen to be right.
        function: The user's function that it is made of.
        what: What the function is, for messages.
        alone: What :func:`reverses_alone` says of it, where that is known.

    Raises:
        DifferentiationError: With what to write instead.
        NonFiniteError: If a derivative is not finite.
    """
    points = fixed_directions(loss.dim, 2 + (_POINTS if loss.dim <= _LARGE else _POINTS // 2))
    first = function(points[0].clone())
    require_fixed(function, points[0], first, what)
    if reverses_alone(loss, function) if alone is None else alone:
        loss.reverses, loss.forwards = True, False
    else:
        _require_right(loss, function, points, what)
    require_alike(loss, function, points[:2], what, second=loss.dim <= _LARGE)
    require_uncut(function, points[0], what)
    require_fixed(function, points[0], first, what)


def _require_right(
    loss: Loss, function: Callable[[Tensor], Tensor], points: Tensor, what: str
) -> None:
    """Refuse a function whose derivatives by forward mode are not those of what it computes."""
    exact: list[Tensor] = []
    wrong = _first_wrong(loss, points, exact)
    if wrong is not None:
        name, error = wrong
        order = ORDERS.index(name) + 1
        raise DifferentiationError(
            f"the {ordinal(order)} derivative of the {what} is not the derivative of what it "
            "computes",
            received=f"a relative difference of {error:.2g} between automatic differentiation and "
            f"differences, in {name!r}",
            expected=f"at most {TOLERANCE:g}: {DIFFERENTIABLE}, without cutting a derivative",
            remedy=what_is_wrong(order, function, points[0]),
        )
    with differentiating(1):
        operations = wrong_operations(function, points[0])
    if operations:
        raise DifferentiationError(
            f"torch differentiates an operation of the {what} wrongly",
            received=f"calls of {', '.join(operations)}, whose third derivatives are not right",
            expected=DIFFERENTIABLE,
            remedy=_write_instead(operations),
        )
    if loss.per_sample is not None or loss.dim <= _LARGE:
        loss.reverses = _reverses(loss, points, exact)


def reverses_alone(loss: Loss, function: Callable[[Tensor], Tensor]) -> bool:
    """Whether reverse mode alone is right, and all that a loss is asked for.

    Functions that return the losses of samples, and those whose derivatives are the user's, are
    asked for forward mode, too, which is not looked at here: it loads a compiler of torch's.
    """
    apart = loss.per_sample is not None or isinstance(loss, LeastSquaresLoss)
    if loss.dim > _LARGE or not (loss.n_samples is None or apart):
        return False
    points, exact = fixed_directions(loss.dim, 2 + _POINTS), list[Tensor]()
    other = copy.copy(loss)
    other.reverses = True
    try:
        return (
            not has_custom_derivative(function, points[0])
            and not wrong_operations(function, points[0])
            and _first_wrong(other, points, exact) is None
            and _agree(_by_transposes(loss, points), exact)
        )
    except (ManifoldSDEError, RuntimeError):  # the other check says what is wrong
        return False


def _reverses(loss: Loss, points: Tensor, exact: list[Tensor]) -> bool:
    """Whether reverse mode alone gives the second and third of the derivatives by forward mode."""
    other = copy.copy(loss)
    other.reverses = True
    try:
        return _agree([_derivative(other, k, points[:-2], points[-2:]) for k in (2, 3)], exact)
    except RuntimeError:
        return False


def _by_transposes(loss: Loss, points: Tensor) -> list[Tensor]:
    """Second and third derivatives by transposes of transposes, in the order of forward mode."""
    x, a, b = points[:-2], *points[-2:]

    def second(z: Tensor) -> Tensor:
        return reverse_mode.product(loss.gradient, z, a)

    return [_mapped(f, x) for f in (second, lambda z: reverse_mode.product(second, z, b))]


def _agree(found: list[Tensor], exact: list[Tensor]) -> bool:
    """Whether the second and third of the derivatives of :func:`_first_wrong` came out again."""
    pairs = zip(found, exact[1:], strict=True)
    return all(float((one - two).norm()) <= _SAME * float(two.norm()) for one, two in pairs)


def _first_wrong(loss: Loss, points: Tensor, kept: list[Tensor]) -> tuple[str, float] | None:
    """The first derivative that is not that of the function, and its relative difference.

    Args:
        loss: The loss.
        points: Unit vectors (n, D), of which the last two are directions of derivatives.
        kept: Gets the derivatives of the three orders.
    """
    *x, a, b = points
    wrong = _wrong_derivatives(loss, torch.stack(x), a, b, kept)
    for i in [i for i, names in enumerate(wrong) if names]:
        # Next to a kink, as in relu, quotients can agree with each other by chance.
        near = x[i] + _NEAR * torch.stack([a, -a])
        again = _wrong_derivatives(loss, near, a, b)
        for name, error in wrong[i].items():
            if all(name in there for there in again):
                return name, error
    return None


def _wrong_derivatives(
    loss: Loss, x: Tensor, a: Tensor, b: Tensor, kept: list[Tensor] | None = None
) -> list[dict[str, float]]:
    """Relative differences of the derivatives that are not those of the function, at points."""
    return [
        {name: off for name, (off, reliable) in at.items() if off > TOLERANCE and reliable}
        for at in _derivative_errors(loss, x, a, b, kept)
    ]


def what_is_wrong(order: int, function: Callable[[Tensor], Tensor], point: Tensor) -> str:
    """What to write instead of a function whose derivative of an order is wrong at a point."""
    known = wrong_operations(function, point)
    if known and order > 1:
        return _write_instead(known)
    if order == 1:
        return KEEP_DERIVATIVES
    called = functions_called(function, point.clone())
    names = [getattr(f, "__name__", "").removeprefix("linalg_") for f in called]
    shown = ", ".join(dict.fromkeys(n for n in names if n and not n.startswith("__")))
    return (
        "backward and jvp of a custom autograd.Function have to be differentiable themselves; "
        f"otherwise write the functions of torch that are called in elementary ones: {shown}"
    )


def _write_instead(operations: list[str]) -> str:
    return "write " + ", ".join(WRONG_OPERATIONS[name] for name in operations)
