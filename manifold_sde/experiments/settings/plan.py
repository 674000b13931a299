"""The settings of ``manifold-sde plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifold_sde.experiments.experiment import ExperimentSettings, option


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What is planned.

    Args:
        lr: Learning rate of the planned run, the largest of its schedule.
        weight_decay: Its weight decay.
        tau: Relaxation time in the angular clock.
        tau_from: Lower end of its interval.
        tau_to: Upper end.
        relaxation: Instead: a file that Relaxation.to_json wrote.
        batch_size: Samples of a step.
        momentum: Momentum of SGD.
        dampening: Dampening of its buffer.
        schedule: Schedule: constant, cosine or linear.
        optimizer: Optimizer: sgd, sgdw, adamw, lion, signsgd, signum, normalised_sgd or muon.
        relaxations: Relaxation times until the run counts as mixed.
        budget: Steps that there are: which rates do with them.
        before_lr: Learning rate of the run at whose balance the norm starts.
        before_weight_decay: Its weight decay.
        before_batch_size: Its batch size.
        norm: Instead: norm of the weights at the start.
        noise: Trace of one sample's gradient covariance at norm 1.
        curvature: Smallest curvature at norm 1 that the cooldown is to calm.
    """

    lr: float | None = option(None, "ETA", shown=False)
    weight_decay: float | None = option(None, "LAMBDA", shown=False)
    tau: float | None = option(None, "V", shown=False)
    tau_from: float | None = option(None, "V", shown="tau")
    tau_to: float | None = option(None, "V", shown="tau")
    relaxation: Path | None = option(None, "FILE", shown=False)
    batch_size: int = option(1, "B", min=1)
    momentum: float = option(0.0, "BETA")
    dampening: float = option(0.0, "D")
    schedule: str = option("constant", "NAME")
    optimizer: str = option("sgd", "NAME")
    relaxations: float = option(5.0, "N")
    budget: float | None = option(None, "K", shown="none")
    before_lr: float | None = option(None, "ETA", shown="at its own balance")
    before_weight_decay: float | None = option(None, "LAMBDA", shown="the same")
    before_batch_size: int | None = option(None, "B", shown="the same", min=1)
    norm: float | None = option(None, "R", shown="that of the balance")
    noise: float | None = option(None, "V", shown="not needed")
    curvature: float | None = option(None, "H", shown="unknown")
