"""The rank of the Hessian on the manifold of minimisers, by the gap in its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.errors import RankError
from manifold_sde.geometry.gradient_flow import precision

#: Smallest ratio across the gap at which a rank is believed.
MIN_GAP = {torch.float64: 1e4, torch.float32: 1e2}
#: The gap has to beat every other ratio of neighbouring eigenvalues by this factor.
GAP_LEAD = 10.0


def gap_ratios(eigenvalues: Tensor) -> Tensor:
    """Ratios of neighbouring eigenvalues, by size: the k-th is that across rank k + 1.

    Args:
        eigenvalues: (..., D), in any order.

    Returns:
        Tensor (..., D - 1): |lambda_k| / |lambda_{k+1}| of the sizes in descending order, with
        everything below rounding level raised to it.
    """
    sizes = eigenvalues.abs().sort(dim=-1, descending=True).values
    dim = eigenvalues.shape[-1]
    floor = torch.finfo(eigenvalues.dtype).eps * dim * sizes[..., :1]
    tiny = torch.finfo(eigenvalues.dtype).tiny
    sizes = torch.maximum(sizes, floor).clamp(min=tiny)
    return sizes[..., :-1] / sizes[..., 1:]


def find_rank(eigenvalues: Tensor, declared: int | None, where: str = "y") -> Tensor:
    """Rank of each Hessian of a batch by its spectral gap, checked against a declared rank.

    Args:
        eigenvalues: (..., D), ascending.
        declared: Rank that the user gave, or ``None``.
        where: What the points are, for messages.

    Returns:
        Tensor (...), int64.

    Raises:
        RankError: If a Hessian is zero, the gap is ambiguous, an eigenvalue is clearly negative,
            or the declared rank is not confirmed. ``failed`` says where (...).
    """
    flat = eigenvalues.reshape(-1, eigenvalues.shape[-1])
    dim = flat.shape[-1]
    if len(flat) == 0:
        return torch.zeros(eigenvalues.shape[:-1], dtype=torch.int64, device=flat.device)
    ratios = gap_ratios(flat)
    largest, position = ratios.max(dim=-1)
    ranks = position + 1
    zero = flat.abs().max(dim=-1).values == 0
    if bool(zero.any()):
        raise RankError(
            f"the Hessian is zero at {where}",
            received=f"no eigenvalue that is not 0 ({int(zero.sum())} of {len(flat)} points)",
            expected="a Hessian of constant rank M, 1 or more, on the manifold of minimisers "
            "(Assumption 2.1)",
            remedy="a loss that is not constant, nor flat to second order at its minimisers",
            failed=zero.reshape(eigenvalues.shape[:-1]),
        )
    min_gap = MIN_GAP.get(flat.dtype, 1e2)
    negative = flat[:, 0] < -flat[:, -1].abs() / min_gap

    if declared is not None:
        own = ratios[:, declared - 1]
        bad = (own < min_gap) | (ranks != declared)
        if bool(bad.any()):
            index = int(torch.nonzero(bad)[0])
            raise RankError(
                f"the declared rank {declared} of the Hessian is not confirmed at {where}",
                received=f"eigenvalues {describe(flat[index])}, whose largest gap is at rank "
                f"{int(ranks[index])} ({int(bad.sum())} of {len(flat)} points differ)",
                expected=f"a drop by at least {min_gap:.0e} after the {declared} largest",
                remedy="correct rank=..., or leave it out; if it changes along Gamma, "
                "Assumption 2.1 fails there",
                failed=(bad | negative).reshape(eigenvalues.shape[:-1]),
            )
    else:
        others = ratios.scatter(-1, position[:, None], 0.0).max(dim=-1).values
        bad = (largest < min_gap) | (largest < GAP_LEAD * others)
        if bool(bad.any()):
            index = int(torch.nonzero(bad)[0])
            raise RankError(
                f"the rank of the Hessian is ambiguous at {where}",
                received=f"eigenvalues {describe(flat[index])}, largest gap "
                f"{largest[index]:.3g} at rank {int(ranks[index])} "
                f"({int(bad.sum())} of {len(flat)} points)",
                expected=f"one drop by at least {min_gap:.0e}, clearly larger than any other",
                remedy="make sure that the point lies on Gamma (geometry.retract or limit_map); "
                "give rank=M if you know it; work in float64",
                failed=(bad | negative).reshape(eigenvalues.shape[:-1]),
            )

    if bool(negative.any()):
        index = int(torch.nonzero(negative)[0])
        raise RankError(
            f"the Hessian has a negative eigenvalue at {where}",
            received=f"eigenvalues {describe(flat[index])}",
            expected="none below zero at a local minimiser",
            remedy="this is a saddle or a maximum: start gradient flow from another point",
            failed=negative.reshape(eigenvalues.shape[:-1]),
        )
    assert int(ranks.max()) < dim
    return ranks.reshape(eigenvalues.shape[:-1])


def normal_directions(values: Tensor, force: Tensor, rank: int | Tensor | None) -> Tensor:
    """Which eigenvectors of H near the manifold are normal to it.

    At a distance d the eigenvalues of the kernel have become of order d, so that only those well
    above d count. The smaller ones join in as d falls.

    Args:
        values: Eigenvalues (n, D), ascending.
        force: Gradient in the eigenbasis (n, D).
        rank: Rank M, if it is known, of all or of each, (n, 1).

    Returns:
        Boolean tensor (n, D).
    """
    dim = values.shape[-1]
    if rank is not None:
        return (torch.arange(dim, device=values.device) >= dim - rank).expand_as(values)
    top = values.abs().amax(dim=-1, keepdim=True)
    slow = precision(values.dtype).slow
    normal = values > 0.1 * top
    for _ in range(2):
        steps = torch.where(normal, force / torch.where(normal, values, 1.0), 0.0)
        distance = steps.norm(dim=-1, keepdim=True)
        normal = values > (3.0 * distance).clamp(min=slow) * top
    return normal


def common_rank(ranks: Tensor) -> int:
    """The one rank of a batch.

    Raises:
        RankError: If the rank differs between the points of the batch.
    """
    if ranks.numel() == 0:
        return 0
    low, high = int(ranks.min()), int(ranks.max())
    if low != high:
        raise RankError(
            "the rank of the Hessian differs between the points",
            received=f"ranks from {low} to {high}",
            expected="one rank M on all of Gamma (Assumption 2.1)",
            remedy="look at geometry.rank(y): the points may belong to different manifolds",
        )
    return low


def describe(values: Tensor, most: int = 6) -> str:
    """The largest and smallest eigenvalues, in descending order of size."""
    ordered = values[values.abs().argsort(descending=True)].tolist()
    if len(ordered) <= 2 * most:
        return "[" + ", ".join(f"{v:.3g}" for v in ordered) + "]"
    head = ", ".join(f"{v:.3g}" for v in ordered[:most])
    tail = ", ".join(f"{v:.3g}" for v in ordered[-most:])
    return f"[{head}, ..., {tail}]"
