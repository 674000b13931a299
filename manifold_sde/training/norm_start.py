"""The norm of the weights at the start of a planned run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from manifold_sde.arguments import check_positive
from manifold_sde.errors import ArgumentError
from manifold_sde.training.training_settings import TrainingSettings, check_settings


@dataclass(frozen=True)
class NormAtStart:
    """The norm at the start: its own, that of other settings' balance, or the balance."""

    norm: float | None
    noise: float | None
    before: TrainingSettings | None

    def ratio(self, settings: TrainingSettings) -> float:
        """The power p of the norm at the start over that at its balance."""
        if self.norm is not None:
            assert self.noise is not None
            noise = settings.noise_of(self.noise)
            power = self.norm**settings.power
            return power / settings.balance(noise) if settings.shrinkage else math.inf
        before = self.before or settings
        return before.balance(before.noise_of(1.0)) / settings.balance(settings.noise_of(1.0))

    def _given(self, settings: TrainingSettings) -> tuple[float, float | None]:
        """What :meth:`TrainingSettings.clock` is told of the start."""
        if settings.shrinkage:
            return self.ratio(settings), None
        assert self.norm is not None
        assert self.noise is not None
        step = settings.noise_of(self.noise) * settings.step**2
        return 1.0, step / self.norm**settings.power

    def clock(self, settings: TrainingSettings, steps: float) -> float:
        """The clock after some steps."""
        return settings.clock(steps, *self._given(settings))

    def steps(self, settings: TrainingSettings, clock: float) -> float:
        """Steps until the clock."""
        return math.inf if math.isinf(clock) else settings.steps(clock, *self._given(settings))


def norm_at_start(
    settings: TrainingSettings,
    before: TrainingSettings | None,
    norm: float | None,
    noise: float | None,
) -> NormAtStart:
    """Check what is said of the norm at the start.

    Raises:
        ArgumentError: If it is said twice, or too little.
    """
    if noise is not None:
        noise = check_positive("noise", noise, "noise=V, as plan_options(clock) has it")
    if norm is not None:
        norm = check_positive("norm", norm, "norm=weight.norm().item()")
    if before is not None:
        check_settings("before", before).require_decay()
    if before is not None and norm is not None:
        raise ArgumentError(
            "the norm at the start is given twice",
            received="before and norm",
            expected="the settings at whose balance it is, or the norm itself",
            remedy="leave one of them out",
        )
    if norm is not None and noise is None:
        raise ArgumentError(
            "the balance of the norm is not known",
            received=f"norm={norm:g}, and no noise",
            expected="the trace of the gradient's covariance at norm 1",
            remedy="plan(tau, **plan_options(clock, batch_size=...)) has both; or "
            "before=TrainingSettings(...)",
        )
    if before is not None and before.power != settings.power:
        raise ArgumentError(
            "the norms of the two optimizers do not compare",
            received=f"{before.optimizer} before, and {settings.optimizer} now",
            expected="optimizers of one kind, or the norm at the start",
            remedy="norm=weight.norm().item(), noise=...",
        )
    if norm is None:
        settings.require_decay()
    return NormAtStart(norm, noise, before)
