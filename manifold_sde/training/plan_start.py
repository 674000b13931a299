"""What a plan is told of a run that a clock has watched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from manifold_sde.arguments import check_choice, check_positive, kind_of
from manifold_sde.errors import DTypeError, MixingClockError
from manifold_sde.training.clock import MixingClock
from manifold_sde.training.expected import LINEAR
from manifold_sde.training.rules import options_of
from manifold_sde.training.training_settings import FIXED, GRADIENT


def plan_options(
    clock: MixingClock, *, batch_size: float = 1, group: str | None = None
) -> dict[str, Any]:
    """Give :func:`~manifold_sde.training.plan` the rates of a run, and where it is now.

    ``plan(found, **plan_options(clock, batch_size=16) | {"lr": 0.01})`` plans from here on.

    Args:
        clock: The clock of the run, after some steps of it.
        batch_size: Samples of a step of this run. The noise is that of one of them, so that other
            batch sizes can be planned; with 1, the batch counts as a sample.
        group: Name of the group; by default the one of ``clock.time``.

    Returns:
        Rates and optimizer as they are now; ``norm``, of the median part of the group; and
        ``noise``: for SGD the trace V of a sample at norm 1 (with the signal in it where
        ``clock.measure`` was not called), else the variance of an update.

    Raises:
        MixingClockError: If gradients of the group were not looked at yet, or a plan knows nothing
            of this optimizer.

    Source: V = E |x|^2 |g|^2 of the gradients that were looked at lately.
    """
    if not isinstance(clock, MixingClock):
        raise DTypeError(
            "there is no run to plan from",
            received=kind_of(clock),
            expected="a MixingClock",
            remedy="plan_options(clock, batch_size=16)",
        )
    size = check_positive("batch_size", batch_size, "batch_size=16")
    clocks = {name: float(np.median(v)) for name, v in clock.each(lambda t: t.clock).items()}
    if group is None:
        group = min(clocks, key=lambda name: abs(clocks[name] - clock.time))
    check_choice("group", group, tuple(clocks), f"group={group!r}")
    lane = next(one for one in clock._lanes if group in [g.name for g in one.watch.groups])
    now = options_of(clock.optimizer.param_groups[lane.index]).numbers()
    norm, noise = (
        float(np.median(clock.each(quantity)[group]))
        for quantity in (lambda t: np.sqrt(t.square), lambda t: t.long_run_noise(now))
    )
    if not math.isfinite(noise) or clock.rule not in (*GRADIENT, *FIXED):
        raise MixingClockError(
            "there is nothing to plan from",
            received=f"{clock.steps} steps of the rule {clock.rule!r}",
            expected="some steps of an optimizer that plan() knows",
            remedy="train first; for another optimizer, plan(tau, norm=..., noise=...)",
        )
    linear = clock.rule in LINEAR
    if linear:
        noise *= size * (1.0 if clock.noise is None else clock.noise.share)
    return {
        "lr": now.lr,
        "weight_decay": now.weight_decay,
        "batch_size": batch_size,
        "momentum": now.momentum if linear else 0.0,
        "dampening": now.dampening if linear else 0.0,
        "optimizer": clock.rule,
        "norm": norm,
        "noise": noise,
    }
