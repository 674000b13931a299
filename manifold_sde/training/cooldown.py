"""How long the decay of the learning rate at the end of a run is to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from manifold_sde.training.training_settings import TrainingSettings

#: How far a cooldown moves the clock, as a part of what the largest rate would, and the product of
#: rate and length at which the noise has come down to a share of its size.
COOLDOWNS = {
    "linear": (1.0 / 3.0, lambda share: 0.25 * math.pi / share**2),
    "cosine": (3.0 / 8.0, lambda share: (1.60 / share) ** 1.5),
}


@dataclass(frozen=True)
class Cooldown:
    """How long the decay of the learning rate at the end is to be.

    Attributes:
        shape: "linear" or "cosine", to 0.
        shortest: Steps after which the fast directions have come down; ``None`` where the
            curvature and the noise are not known.
        longest: Steps by which the slow clock has moved by as much as is allowed.
        residual: Share of their noise that is left to the fast directions.
        drift: Part of a relaxation time by which the clock moves.
    """

    shape: str
    shortest: float | None
    longest: float
    residual: float
    drift: float

    def __str__(self) -> str:
        most = (
            f"at most {count_of(self.longest)} steps, so that the clock moves by {self.drift:g} of "
            "a relaxation time"
        )
        if self.shortest is None:
            return f"{self.shape} cooldown: {most}; curvature= and noise= give the least"
        least = (
            f"at least {count_of(self.shortest)} steps, so that {self.residual:g} of the fast "
            "noise is left"
        )
        fits = "" if self.shortest <= self.longest else ". Both cannot be had: lower the rate first"
        return f"{self.shape} cooldown: {least}; {most}{fits}"


def cooldown_of(
    settings: TrainingSettings,
    tau: float,
    shape: str,
    residual: float,
    drift: float,
    curvature: float | None,
    noise: float | None,
) -> Cooldown:
    """Compute the window of a cooldown that starts from the balance of the norm.

    Args:
        settings: What is trained with.
        tau: Relaxation time in the angular clock.
        shape: One of ``COOLDOWNS``.
        residual: Share of their noise that is left to the fast directions.
        drift: Part of a relaxation time by which the clock may move.
        curvature: Smallest eigenvalue of the Hessian at norm 1 of the fast directions.
        noise: Trace of a single sample's gradient covariance at norm 1.
    """
    moved, needed = COOLDOWNS[shape]
    longest = drift * tau / (moved * 2.0 * settings.shrinkage)
    shortest = None
    if curvature is not None and noise is not None and settings.power == 4:
        # eta / |x|^2 at the balance.
        small = math.sqrt(2.0 * settings.shrinkage / settings.noise_of(noise))
        shortest = needed(residual) / (small * curvature)
    return Cooldown(shape, shortest, longest, residual, drift)


def count_of(value: float) -> str:
    """A number of steps in words."""
    return f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
