"""The settings of ``manifold-sde audit``."""

from __future__ import annotations

from dataclasses import dataclass

from manifold_sde.experiments.experiment import ExperimentSettings, option


@dataclass(frozen=True)
class Settings(ExperimentSettings):
    """What a log or a folder of checkpoints is audited by.

    Args:
        source: The log, or the folder.
        optimizer: sgd, sgdw, adam, adamw, signsgd or lion.
        lr: Learning rate: a number, or the column that holds it.
        weight_decay: Weight decay: a number, or its column.
        norms: Columns of norms, or tensors.
        step: Column of the step.
        momentum: Momentum of SGD.
        dampening: Its dampening.
        nesterov: Nesterov's form of SGD.
        beta1: First beta of Adam.
        beta2: Its second.
    """

    source: str
    optimizer: str = option("adamw", "NAME")
    lr: str = option("lr", "ETA|COLUMN")
    weight_decay: str = option("0", "LAMBDA|COLUMN")
    norms: str | None = option(None, "NAME,NAME,...", shown="found")
    step: str = option("step", "COLUMN")
    momentum: float = option(0.0, "BETA")
    dampening: float = option(0.0, "D")
    nesterov: bool = option(False, flag="--nesterov/--no-nesterov")
    beta1: float = option(0.9, "BETA")
    beta2: float = option(0.999, "BETA")
