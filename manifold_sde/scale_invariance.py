"""Scale invariance of a loss, and the two properties of a noise, as measured numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import rng
from manifold_sde.arguments import check_point
from manifold_sde.errors import DifferentiationError, ScaleInvarianceError, ShapeError
from manifold_sde.loss import Loss
from manifold_sde.loss_checks import fixed_directions, what_is_wrong

#: Largest violation of scale invariance that counts as rounding, by dtype of the point.
INVARIANCE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_NORMALISE = (
    "normalise what these coordinates feed (no bias, no affine parameters, no eps in the "
    "normalisation, a frozen last layer), or take them out of x"
)
#: Largest dimension in which the coordinates that break scale invariance are solved for.
SOLVED_DIM = 512
#: Numbers in the gradients of all samples, at all points, that are held at once.
_AT_ONCE = 2**24
#: Numbers in those of which only sums are wanted.
_SUMMED = 2**21
#: Relative Euler defect below which a scaling counts as a symmetry, above rounding.
_SYMMETRY = {torch.float64: 1e-11, torch.float32: 1e-5}
#: Entries of sigma above which its products with a few vectors are looked at instead.
_MOST_NUMBERS = 1 << 20
_PROBES = 8
#: Relative step along a ray.
_ALONG = 1e-3
#: Part of 1/D above which two coordinates belong to the same group of scalings.
_TOGETHER = 0.1


def euler_products(loss: Loss, points: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of Euler's theorem, and the size that their sum is measured against.

    Args:
        loss: The loss.
        points: Points (n, D).

    Returns:
        x_i d_i L_xi(x), (n, Xi or 1, D), and |x| |grad L_xi(x)|, (n, Xi or 1).
    """

    def products(z: Tensor) -> tuple[Tensor, Tensor]:
        single = loss.n_samples is None
        gradients = loss.gradient(z)[None] if single else loss.sample_gradients(z)
        return gradients * z, z.norm() * gradients.norm(dim=-1)

    terms, size = vmap(products)(points)
    return terms, size


def euler_defects(loss: Loss, points: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of Euler's theorem, and the size that they are measured against.

    Where the gradients of all samples do not fit into memory together, the sums come from forward
    modes along the points, and the size is the root mean square over the samples in place of the
    largest, from two random sums of gradients a point.

    Args:
        loss: The loss.
        points: Points (n, D).

    Returns:
        <x, grad L_xi(x)>, (n, Xi or 1), and the largest |x| |grad L_xi(x)|, ().
    """
    n_samples = loss.n_samples
    numbers = loss.dim * (n_samples or 1)
    if len(points) * numbers <= _AT_ONCE:
        found, largest = [], []
        for some in points.split(max(1, _SUMMED // numbers)):
            terms, size = euler_products(loss, some)
            found.append(terms.sum(-1))
            largest.append(size.max())
        return torch.cat(found), torch.stack(largest).max()
    if n_samples is None:
        gradients = torch.stack([loss.gradient(z) for z in points])
        sizes = points.norm(dim=1) * gradients.norm(dim=1)
        return (gradients * points).sum(1, keepdim=True), sizes.max()
    sums = torch.stack([loss.sample_derivatives(z, z) for z in points])
    paths = torch.arange(2, device=points.device)
    zero = torch.zeros((), dtype=torch.int64, device=points.device)
    normals = rng.normals((0x5EED, 2), 0, paths, zero, n_samples, points.dtype).T
    squares = [
        torch.stack([loss.weighted_gradient(z, w).square().sum() for w in normals]).mean()
        for z in points
    ]
    sizes = points.norm(dim=1) * (torch.stack(squares) / n_samples).sqrt()
    return sums, sizes.max()


def points_to_measure(x: Tensor | None, dim: int) -> Tensor:
    """The points (n, D) to measure at: those given, or fixed random directions.

    Raises:
        ShapeError, DTypeError, NonFiniteError, ZeroVectorError: If there are none, or not usable.
    """
    points = fixed_directions(dim) if x is None else check_point(x, dim, values=True)
    if points.numel() == 0:
        raise ShapeError(
            "there is no point to measure at",
            received=str(tuple(points.shape)),
            expected=f"at least one point, (..., {dim})",
            remedy="leave x out for fixed random directions",
        )
    return points.reshape(-1, dim)


def relative_defects(loss: Loss, points: Tensor) -> Tensor:
    """Euler's sums at points (n, D), relative to the largest |x| |grad L_xi(x)|: (n, Xi or 1).

    The largest is that over the points and fixed directions: at minimisers alone there would be
    nothing but rounding to compare with.
    """
    sums, size = euler_defects(loss, points)
    if loss.gradient_size is None:
        loss.gradient_size = float(euler_defects(loss, fixed_directions(loss.dim))[1])
    largest = size.clamp(min=loss.gradient_size)
    return sums / torch.where(largest > 0, largest, 1.0)


def require_constant_along_rays(
    loss: Loss,
    points: Tensor,
    tolerance: float | None,
    name: str,
    offending: Callable[[Tensor], tuple[tuple[int, ...], str, str]],
) -> None:
    """Refuse a loss that is not constant along the rays through points.

    Args:
        loss: The loss.
        points: Points (n, D).
        tolerance: Largest violation allowed; ``None`` for rounding level of the dtype.
        name: What the loss is called in messages.
        offending: The coordinates at fault, what they are in words, and the way out, from the
            points.

    Raises:
        ScaleInvarianceError: With the violation measured and the coordinates that cause it.
        DifferentiationError: If it is the gradient that is wrong, and not the loss.
    """
    defects = relative_defects(loss, points)
    violation = float(defects.abs().max())
    if tolerance is None:
        tolerance = INVARIANCE_TOLERANCE.get(points.dtype, 1e-2)
    if violation <= tolerance:
        return
    worst = points[int(defects.abs().amax(1).argmax())]
    require_true_derivatives(loss, worst, repr(name))
    coordinates, description, remedy = offending(points)
    raise ScaleInvarianceError(
        f"the loss of {name!r} is not scale-invariant (Definition 2.2)",
        violation=violation,
        coordinates=coordinates,
        received=f"|<x, grad L>| / (|x| |grad L|) = {violation:.3g}, caused by " + description,
        expected=f"at most {tolerance:.1g}: each sample loss is constant along rays",
        remedy=remedy,
    )


def require_true_derivatives(loss: Loss, x: Tensor, name: str) -> None:
    """Refuse a loss that changes otherwise along the ray through x than its derivatives say.

    Args:
        loss: The loss.
        x: Point (D,) where Euler's theorem is violated.
        name: What the loss is called in the message.

    Raises:
        DifferentiationError: If it is the gradient that is wrong, and not the scale invariance.
    """
    sums = euler_defects(loss, x[None])[0][0]
    worst = int(sums.abs().argmax())
    ray = (1.0 + _ALONG) * x, (1.0 - _ALONG) * x
    values = torch.stack([loss.function(z).reshape(-1)[worst] for z in ray])
    change = float(values[0] - values[1]) / (2.0 * _ALONG)
    rounding = torch.finfo(x.dtype).eps * float(values.abs().max()) / _ALONG
    if abs(change - float(sums[worst])) > 0.1 * abs(float(sums[worst])) + 10.0 * rounding:
        raise DifferentiationError(
            f"the first derivative of the loss of {name} is not the derivative of what it computes",
            received=f"<x, grad L> = {float(sums[worst]):.3g}, where L changes by {change:.3g}",
            expected="the change of the loss along the ray through x",
            remedy=what_is_wrong(1, loss.function, x),
        )


def offending_coordinates(loss: Loss, points: Tensor) -> tuple[tuple[int, ...], str, str]:
    """Coordinates whose scaling breaks the scale invariance of a loss, in words, and the way out.

    Scaling x_i by exp(c_i t) leaves the loss alone if and only if sum_i c_i x_i d_i L(x) = 0 at
    every x: a linear equation for c at each x. The loss is scale-invariant if c = (1, ..., 1)
    solves them all. Otherwise the projection of that vector on the solutions is 1 at the
    coordinates of invariant groups and differs from it at the others, which are returned.

    Args:
        loss: The loss.
        points: Points (n, D) at which the violation was seen.

    Returns:
        Indices, ascending, what they are called, and what to do.
    """
    if loss.dim > SOLVED_DIM:
        at_fault = _dependent_coordinates(loss, points)
    else:
        at_fault = outside_symmetries(*_scalings(loss, points), _SYMMETRY[points.dtype])
    coordinates = tuple(int(i) for i in torch.nonzero(at_fault)[:, 0])
    return coordinates, describe_coordinates(coordinates, loss.dim), _NORMALISE


def outside_symmetries(values: Tensor, basis: Tensor, level: float) -> Tensor:
    """Where the scaling of all by one factor is farthest from the symmetries of a loss.

    Args:
        values: How much scalings change the loss (k,); up to the level, they are symmetries, and
            the rest is weighted out smoothly.
        basis: The scalings, orthonormal rows (k, P).
        level: Size that counts as 0.

    Returns:
        Mask (P,).
    """
    weights = level**2 / (values**2 + level**2)
    off = (1.0 - basis.T @ (weights * basis.sum(1))).abs()
    return off > 0.1 * off.max()


def _scalings(loss: Loss, points: Tensor) -> tuple[Tensor, Tensor]:
    """Scalings c of the coordinates, (D, D) as rows, by how much they change the loss (D,)."""
    dim = loss.dim
    rows_each = loss.n_samples or 1
    count = -(-2 * dim // rows_each) + 4
    paths = torch.arange(count, device=points.device)
    zero = torch.zeros((), dtype=torch.int64, device=points.device)
    noise = rng.normals((0x5EED, 1), 0, paths, zero, dim, points.dtype).T
    chosen = points[torch.arange(count, device=points.device) % len(points)]
    scale = chosen.norm(dim=1, keepdim=True) / math.sqrt(dim)
    terms, size = euler_products(loss, chosen * (1.0 + 0.3 * noise) + 0.3 * scale * noise)
    largest = size.max()
    rows = (terms / torch.where(largest > 0, largest, torch.ones_like(largest))).reshape(-1, dim)
    _, values, basis = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
    return values, basis


def scaling_groups(loss: Loss, points: Tensor) -> tuple[tuple[int, ...], ...]:
    """The groups of coordinates under whose separate scaling a loss does not change.

    A scale-invariant loss has one group, all coordinates, unless it is invariant under scaling
    parts of them, as a network is whose filters each feed a normalisation. The scalings that leave
    it alone are a linear space; where it is spanned by groups, it is read off which coordinates
    go together. A coordinate of which the loss does not depend is a group of its own.

    Args:
        loss: A scale-invariant loss, of at most 512 coordinates.
        points: Points (n, D) near which it is looked at.

    Returns:
        The groups, each with its coordinates ascending.
    """
    values, basis = _scalings(loss, points)
    symmetries = basis[values <= 10.0 * _SYMMETRY[points.dtype]]
    together = (symmetries.T @ symmetries).abs() > _TOGETHER / loss.dim
    groups: list[tuple[int, ...]] = []
    left = set(range(loss.dim))
    while left:
        group, new = set[int](), {min(left)}
        while new:
            group |= new
            near = together[sorted(new)].any(0).nonzero()[:, 0].tolist()
            new = set(near) - group
        groups.append(tuple(sorted(group)))
        left -= group
    return tuple(groups)


def _dependent_coordinates(loss: Loss, points: Tensor) -> Tensor:
    """Mask (D,) of those on which <x, grad L(x)> depends most, by |x_i d_i <x, grad L>|."""

    def dependence(z: Tensor) -> Tensor:
        return (z * (loss.gradient(z) + loss.hessian_product(z, z))).abs()

    size = vmap(dependence)(points).max(0).values
    return size > 0.1 * size.max()


def describe_coordinates(coordinates: tuple[int, ...], dim: int) -> str:
    """Coordinates in words, with runs of them as ranges.

    Example:
        >>> describe_coordinates((0, 1, 2, 7), 9)
        'coordinates 0-2, 7'
        >>> describe_coordinates((0, 1, 2), 3)
        'all 3 coordinates'
    """
    if len(coordinates) == dim:
        return f"all {dim} coordinates"
    runs: list[list[int]] = []
    for i in coordinates:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    shown = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    more = "" if len(shown) <= 8 else f", ... ({len(coordinates)} of {dim})"
    noun = "coordinate" if len(coordinates) == 1 else "coordinates"
    return f"{noun} {', '.join(shown[:8])}{more}"


def noise_violations(
    factor: Callable[[Tensor], Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
    n_noise: int,
    points: Tensor,
) -> dict[str, float]:
    """How far sigma is from degree -1 and from sigma^T x = 0, relative to its size.

    Args:
        factor: sigma at points: (n, D) -> (n, D, m).
        product: sigma at points times vectors: (n, D), (n, m) -> (n, D).
        n_noise: Number m of columns of sigma.
        points: Points (n, D).

    Returns:
        The largest relative violation of each, by the names "degree" and "radial".
    """

    def columns(x: Tensor) -> Tensor:
        """sigma(x), or its products with a few fixed vectors where it is large: (n, D, k)."""
        if x.shape[1] * n_noise <= _MOST_NUMBERS:
            return factor(x)
        probes = fixed_directions(n_noise, _PROBES).to(x)
        return torch.stack([product(x, probe.expand(len(x), -1)) for probe in probes], dim=-1)

    fixed = fixed_directions(points.shape[1]).to(points)
    here, norms = columns(points), points.norm(dim=1)

    def scaled_size(z: Tensor, sigma: Tensor) -> Tensor:
        return z.norm(dim=1) * sigma.flatten(1).norm(dim=1)

    # |x| |sigma(x)| has degree 0: where sigma vanishes at the points, it is compared with its size
    # elsewhere.
    reference = scaled_size(fixed, columns(fixed)).max()
    size = scaled_size(points, here).clamp(min=float(1e-3 * reference))
    size = torch.where(size > 0, size, 1.0)
    changes = [(a * columns(a * points) - here).flatten(1).norm(dim=1) for a in (0.5, 2.0)]
    radial = torch.einsum("bdm,bd->bm", here, points).norm(dim=1)
    return {
        "degree": max(float((change * norms / size).max()) for change in changes),
        "radial": float((radial / size).max()),
    }
