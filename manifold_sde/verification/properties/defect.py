"""How far a property is from holding, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError, PropertyError
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Picture, Result, Series, Verdict, found
from manifold_sde.verification.subject import Subject

#: Relative tolerance above which a comparison says nothing.
COARSEST = 1e-2
#: Rounding errors of a computation, in units of rounding times the root of the dimension: what a
#: chain of some hundred operations can add up to where none of them is worse conditioned than
#: the sizes that the defect is measured against.
ROUNDINGS = 1000.0
#: Points in a picture.
_MOST_POINTS = 300


@dataclass(frozen=True)
class Defect:
    """How far a property is from holding at the worst of some points.

    Attributes:
        value: The defect, relative to the size of what is compared.
        tolerance: What rounding and truncation can make of it where the property holds.
        detail: The property, and the numbers, in a sentence.
        undecided: Points at which the tolerance is so large that nothing can be said.
        values, tolerances: At each point.

    Example:
        >>> defect = Defect(1e-3, 1e-12, "L(2 x) = L(x)")
        >>> defect.verdict
        'fails'
        >>> defect.require()
        Traceback (most recent call last):
            ...
        manifold_sde.errors.PropertyError: a property does not hold: L(2 x) = L(x)
          received: a relative defect of 0.001
          expected: at most 1e-12, which rounding and truncation can cause
          hint:     look at the loss, the noise or the code that is compared
    """

    value: float
    tolerance: float
    detail: str
    undecided: int = 0
    values: tuple[float, ...] = field(default=(), repr=False)
    tolerances: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, values: Tensor, tolerances: Tensor | float, detail: str) -> Defect:
        """The defect at the worst of some points, by value over tolerance.

        Args:
            values: Relative defects at the points (n,); NaN counts as infinite.
            tolerances: Tolerances there (n,), or one for all.
            detail: The property.
        """
        flat = values.detach().reshape(-1).double().cpu()
        flat = torch.where(torch.isnan(flat), math.inf, flat)
        bounds = torch.as_tensor(tolerances).detach().double().cpu().reshape(-1).expand_as(flat)
        bounds = torch.where(torch.isnan(bounds), math.inf, bounds).clamp(min=1e-300)
        usable = bounds <= COARSEST
        ratios = torch.where(usable, flat / bounds, -1.0)
        worst = int(ratios.argmax()) if bool(usable.any()) else int(bounds.argmin())
        return cls(
            float(flat[worst]),
            float(bounds[worst]),
            detail,
            int((~usable).sum()),
            tuple(flat.tolist()),
            tuple(bounds.tolist()),
        )

    @property
    def verdict(self) -> Verdict:
        """One of "holds" and "fails"; "undecided" where the tolerance is too large everywhere."""
        if self.tolerance > COARSEST:
            return "undecided"
        return "holds" if self.value <= self.tolerance else "fails"

    def __str__(self) -> str:
        skipped = f"; {self.undecided} points too ill-conditioned to tell" if self.undecided else ""
        return f"{self.detail}: off by {self.value:.2g} (tolerance {self.tolerance:.2g}{skipped})"

    def require(self, *, decided: bool = True) -> None:
        """Raise if the property does not hold.

        Args:
            decided: Whether it is also an error if it cannot be decided.

        Raises:
            PropertyError: An AssertionError, with the numbers.
        """
        verdict = self.verdict
        if verdict == "holds" or (verdict == "undecided" and not decided):
            return
        if verdict == "undecided":
            raise PropertyError(
                f"a property cannot be decided: {self.detail}",
                received=f"a tolerance of {self.tolerance:.3g}",
                expected=f"at most {COARSEST:g}, below which the comparison says something",
                remedy="a better conditioned problem, or require(decided=False)",
            )
        raise PropertyError(
            f"a property does not hold: {self.detail}",
            received=f"a relative defect of {self.value:.3g}",
            expected=f"at most {self.tolerance:.3g}, which rounding and truncation can cause",
            remedy="look at the loss, the noise or the code that is compared",
        )


def rounding(x: Tensor) -> float:
    """Relative rounding error of a computation with points x (..., D)."""
    return ROUNDINGS * math.sqrt(x.shape[-1]) * torch.finfo(x.dtype).eps


def spread_norms(subject: Subject, n: int) -> Tensor:
    """Norms from 1e-6 to 1e6 for n points, the extremes among them: (n,)."""
    spread = subject.norms(n)[:, 0]
    extremes = spread.new_tensor([1e6, 1e-6])[:n]
    return torch.cat([extremes, spread[len(extremes) :]])


def flat_points(x: Tensor, dim: int) -> Tensor:
    """Points (..., D) as (n, D), checked.

    Raises:
        DTypeError, ShapeError, NonFiniteError, ZeroVectorError: If they cannot be used.
    """
    return check_point(x, dim, values=True).reshape(-1, dim)


def with_factors(x: Tensor, alpha: Tensor | float, dim: int) -> tuple[Tensor, Tensor]:
    """Points (n, D) and their factors (n, 1), checked.

    Raises:
        ArgumentError: If a factor is no positive number, or they do not fit the points.
    """
    x = check_point(x, dim, values=True)
    try:
        factors = torch.as_tensor(alpha, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
        if not bool(((factors > 0) & torch.isfinite(factors)).all()):
            raise ValueError
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ArgumentError(
            "alpha is not a factor of points",
            received=repr(alpha),
            expected=f"positive finite numbers that broadcast against {tuple(x.shape[:-1])}",
            remedy="alpha=2.0",
        ) from None
    return x.reshape(-1, dim), factors.reshape(-1, 1)


def property_check(
    name: str,
    statements: tuple[str, ...],
    measure: Callable[[Subject, Effort], Sequence[Defect]],
    meaning: str,
) -> Check:
    """A check that measures defects of a property at points of its own choice.

    Args:
        name: Its name.
        statements: The statements of the paper that it is about.
        measure: The defects of a system under test; none where the property does not apply to it.
        meaning: What it means for the user if the property fails.
    """

    def run(subject: Subject, effort: Effort) -> Result | None:
        defects = list(measure(subject, effort))
        if not defects:
            return None
        decided = [defect for defect in defects if defect.verdict != "undecided"]
        worst = max(decided or defects, key=lambda d: d.value / d.tolerance)
        verdict: Verdict = worst.verdict if decided else "undecided"
        said = {
            "holds": "",
            "fails": meaning,
            "undecided": "The problem is too ill-conditioned for this comparison.",
        }
        failed = [defect for defect in decided if defect.verdict == "fails"]
        return found(
            verdict,
            "; ".join(str(defect) for defect in (failed or defects)) + ".",
            worst.value,
            worst.tolerance,
            said[verdict],
            pictures=_pictures(name, defects),
        )

    return Check(name, "property", statements, run)


def _pictures(name: str, defects: Sequence[Defect]) -> tuple[Picture, ...]:
    """The defects at the points, in ascending order, with their tolerances."""
    series: list[Series] = []
    for defect in defects:
        pairs = sorted(
            (value, bound)
            for value, bound in zip(defect.values, defect.tolerances, strict=True)
            if math.isfinite(value) and math.isfinite(bound)
        )
        pairs = pairs[:: max(1, -(-len(pairs) // _MOST_POINTS))]
        if not pairs:
            continue
        places = [(i + 1) / len(pairs) for i in range(len(pairs))]
        smallest = torch.finfo(torch.float64).eps / 100
        values = [max(value, smallest) for value, _ in pairs]
        series.append(Series(defect.detail, places, values, "points"))
        bounds = [bound for _, bound in pairs]
        series.append(Series("tolerance", places, bounds, "dashed"))
    if not series:
        return ()
    return (Picture(name, "share of the points", "relative defect", tuple(series), logy=True),)
