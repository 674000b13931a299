"""What is kept of the runs behind Figures 1 and 3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifold_sde.experiments.experiment import Array, SavedData
from manifold_sde.experiments.training.settings import Settings
from manifold_sde.solvers.archive import read_archive


@dataclass(frozen=True)
class TrainingRun(SavedData):
    """All that Figures 1 and 3 are drawn from; R runs.

    Traces are those at norm 1: |x|^2 times what is measured at x.

    Attributes:
        settings: What was trained.
        steps_per_epoch: Number of steps of an epoch.
        train_accuracy, test_accuracy, train_loss: Before a decay, at the epochs
            ``settings.records`` (R, records).
        trace: Trace of the covariance of the gradient of a batch at these epochs (R, records).
        mean_square: |x|^2 times the square of the full gradient there (R, records).
        norm: |x| at the start of each epoch and at the end (R, epochs + 1).
        square: Mean of |x|^2 |g|^2 over the steps of each epoch, g the gradient of the step's batch
            (R, epochs).
        branch_train, branch_test: Accuracies after a decay at the epochs ``settings.decay_times``,
            at the epochs ``settings.branch_records`` after it (R, times, branch records).
        branch_norm: |x| at the end of each branch (R, times).
    """

    KIND = "training of figures 1 and 3"

    settings: Settings
    steps_per_epoch: int
    train_accuracy: Array
    test_accuracy: Array
    train_loss: Array
    norm: Array
    square: Array
    trace: Array
    mean_square: Array
    branch_train: Array
    branch_test: Array
    branch_norm: Array

    def header(self) -> dict[str, Any]:
        """What is not an array, and the key of the settings."""
        return {**super().header(), "key": self.settings.key()}

    @classmethod
    def saved(cls, path: Path, settings: Settings) -> TrainingRun | None:
        """The runs in a file, if they are those of these settings and versions."""
        if not path.is_file():
            return None
        header, _ = read_archive(path, cls.KIND)
        if header.get("key") != settings.key():
            return None
        run = cls.load(path)
        return run if run.settings.seeds == settings.seeds else None
