"""Means and standard errors that are put together from parts, without the values themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, DTypeError, ShapeError

#: A function of states (n, D) with a value for each, (n, ...).
Observable = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """Number, mean, and sum of squared deviations of values, at K times.

    Attributes:
        count: Number of values (K,), double precision.
        mean: Their mean (K, ...); 0 where there are none.
        squares: Sum of their squared deviations from it (K, ...).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor, valid: Tensor) -> Moments:
        """Moments of one time, K = 1.

        Args:
            values: (n, ...).
            valid: Which of them count, (n,).
        """
        kept = values[valid].to(torch.float64)
        count = torch.tensor([len(kept)], dtype=torch.float64, device=values.device)
        mean = kept.sum(0) / max(1, len(kept))
        return cls(count, mean[None], (kept - mean).square().sum(0)[None])

    @classmethod
    def stack(cls, parts: list[Moments]) -> Moments:
        """Moments of consecutive times."""
        return cls(*(torch.cat([getattr(m, k) for m in parts]) for k in cls.names()))

    @staticmethod
    def names() -> tuple[str, str, str]:
        """The attributes, in order."""
        return ("count", "mean", "squares")

    def merge(self, other: Moments) -> Moments:
        """Moments of the values of both.

        References:
            Chan, Golub and LeVeque, Algorithms for computing the sample variance, The American
            Statistician 37 (1983).
        """
        count = self.count + other.count
        shape = (-1, *(1,) * (self.mean.dim() - 1))
        share = (other.count / count.clamp(min=1.0)).reshape(shape)
        apart = other.mean - self.mean
        between = apart.square() * (self.count.reshape(shape) * share)
        return Moments(count, self.mean + apart * share, self.squares + other.squares + between)

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of one value (K, ...); NaN where there are fewer than two."""
        count = self.count.reshape(-1, *(1,) * (self.mean.dim() - 1))
        enough = count >= 2.0
        return torch.where(enough, self.squares / (count - 1.0).clamp(min=1.0), torch.nan)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and its standard error, (K, ...) each; NaN where there are too few values."""
        count = self.count.reshape(-1, *(1,) * (self.mean.dim() - 1))
        mean = torch.where(count > 0, self.mean, torch.nan)
        return mean, (self.variance / count.clamp(min=1.0)).sqrt()


def moments_of(
    name: str, function: Observable, states: Tensor, *, antithetic: bool = False
) -> Moments:
    """Moments of a function of the paths that are not lost.

    Args:
        name: What the function is called in messages.
        function: The function.
        states: States (K, n, D), NaN where a path is lost.
        antithetic: Whether paths 2i and 2i + 1 form a pair, whose mean counts as one value; a
            pair that lost a path does not count.
    """
    parts = []
    for x in states:
        values, valid = evaluate(name, function, x)
        if antithetic:
            values = values.reshape(-1, 2, *values.shape[1:]).mean(1)
            valid = valid.reshape(-1, 2).all(1)
        parts.append(Moments.of(values, valid))
    return Moments.stack(parts)


def evaluate(name: str, function: Observable, states: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n, ...) of a function of states (n, D), and which of the paths are not lost (n,).

    The function has the states for itself: it may change them in place.

    Raises:
        ArgumentError: If it is not a function, or raises an error.
        ShapeError: If it does not return one value, or one tensor, for each state.
        DTypeError: If the values are complex numbers.
    """
    if not callable(function):
        raise ArgumentError(
            f"{name} is not a function",
            received=type(function).__name__,
            expected="a function of states (n, D) that returns (n, ...)",
            remedy="lambda y: y[:, 0]",
        )
    valid = torch.isfinite(states).all(-1)
    whole = bool(valid.all()) or not bool(valid.any())
    rows = states.clone() if whole else states[valid]
    try:
        found = function(rows)
    except Exception as error:
        raise ArgumentError(
            f"{name} raises an error",
            received=f"{type(error).__name__}: {error}",
            expected=f"a value for each of {len(rows)} states, of shape {tuple(rows.shape)}",
            remedy="try it on a few states, function(solution.ys[0]); it is given all at once",
        ) from error
    if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != len(rows):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(
            f"{name} does not return one value for each state",
            received=f"{got} for states of shape {tuple(rows.shape)}",
            expected=f"a tensor ({len(rows)},), or ({len(rows)}, ...)",
            remedy="lambda y: y[:, 0]; the function is given all states at once",
        )
    if found.is_complex():
        raise DTypeError(
            f"{name} returns complex numbers",
            received=f"dtype {found.dtype}",
            expected="real numbers",
            remedy="torch.view_as_real(...) gives real and imaginary parts",
        )
    if not found.is_floating_point():
        found = found.to(states.dtype)
    if whole:
        return found, valid
    values = found.new_full((len(states), *found.shape[1:]), torch.nan)
    values[valid] = found
    return values, valid
